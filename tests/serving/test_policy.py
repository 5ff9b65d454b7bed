"""Which version answers by default, as a table, and what holds whatever the versions are."""

from collections.abc import Callable
from dataclasses import replace
from types import MappingProxyType

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backboned.registry import Preprocessing
from backboned.registry.manifest import Epoch, EpochMetrics, Manifest
from backboned.registry.task import Task
from backboned.server.serving.policy import NAMING, Policy, VersionPolicy, candidates, shadow, why

Made = Callable[..., Manifest]
LATEST, BEST, PINNED, MANUAL, PROMOTE, CALL_BACK = VersionPolicy


def manifest(version: int, *, complete: bool = True, accuracy: float | None = None, loss: float = 1.0) -> Manifest:
    metrics = EpochMetrics() if accuracy is None else EpochMetrics(val_accuracy=accuracy, val_loss=loss)
    return Manifest(
        model="m",
        version=version,
        backbone="b",
        task=Task.SINGLE_LABEL,
        classes=("a", "b"),
        stages={},
        preprocessing=Preprocessing(),
        epochs=(Epoch(1, "epoch-0001.pt", "", 1, 0.0, metrics),),
        best_epoch=1,
        complete=complete,
    )


VERSIONS = {
    1: manifest(1, accuracy=0.9, loss=0.3),
    2: manifest(2, accuracy=0.9, loss=0.2),
    3: manifest(3, accuracy=0.7),
    4: manifest(4),
    5: manifest(5, complete=False, accuracy=0.99),
}


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        (Policy(), (4, 3, 2, 1, 5)),
        (Policy(rejected={4: "bad"}), (3, 2, 1, 5)),
        (Policy(rejected={5: "bad"}), (4, 3, 2, 1)),
        (Policy(BEST), (2, 1, 3, 4, 5)),
        (Policy(BEST, rejected={2: "bad"}), (1, 3, 4, 5)),
        (Policy(PINNED, 2), (2,)),
        (Policy(PINNED, 9), ()),
        (Policy(MANUAL, 3), (3, 2, 1)),
        (Policy(MANUAL, 3, {2: "bad"}), (3, 1)),
        (Policy(MANUAL, 9), (4, 3, 2, 1)),
    ],
)
def test_the_one_that_should_answer_comes_first(policy: Policy, expected: tuple[int, ...]) -> None:
    assert candidates(VERSIONS, policy) == expected


@pytest.mark.parametrize(
    ("policy", "serving", "expected"),
    [
        (Policy(), 4, None),
        (Policy(BEST), 2, None),
        (Policy(PINNED, 2), 2, None),
        (Policy(MANUAL, 2), 2, 4),
        (Policy(PROMOTE, 2), 2, 4),
        (Policy(PROMOTE, 2, {4: "worse"}), 2, 3),
        (Policy(PROMOTE, 4), 4, None),
        (Policy(CALL_BACK), 4, 3),
        (Policy(CALL_BACK, rejected={3: "worse"}), 4, 2),
        (Policy(CALL_BACK), 1, None),
    ],
)
def test_a_shadow_is_what_could_take_the_place(policy: Policy, serving: int, expected: int | None) -> None:
    assert shadow(VERSIONS, policy, serving) == expected


@given(
    numbers=st.sets(st.integers(1, 12)),
    complete=st.sets(st.integers(1, 12)),
    rejected=st.sets(st.integers(1, 12)),
    kind=st.sampled_from(VersionPolicy),
    named=st.integers(1, 12),
)
def test_nothing_is_chosen_twice_and_nothing_that_was_rejected(
    numbers: set[int], complete: set[int], rejected: set[int], kind: VersionPolicy, named: int
) -> None:
    versions = {v: manifest(v, complete=v in complete) for v in numbers}
    policy = Policy(kind, named if kind in NAMING else None, MappingProxyType(dict.fromkeys(rejected, "bad")))
    chosen = candidates(versions, policy)
    assert len(set(chosen)) == len(chosen) and set(chosen) <= numbers
    assert not (set(chosen) & rejected) - ({named} if kind in NAMING else set())
    if kind is PINNED:
        assert set(chosen) <= {named}
    firsts = [v for v in chosen if v in complete]
    if firsts and kind in (LATEST, BEST):
        assert chosen[0] in complete  # what trains never comes before what is done


@pytest.mark.parametrize(
    ("policy", "before", "after", "says"),
    [
        (Policy(), 1, 2, "it is the newest"),
        (Policy(), 2, 1, "version 2 can't serve"),
        (Policy(), 2, 0, "version 2 is gone"),
        (Policy(rejected={2: "too slow"}), 2, 1, "version 2 was rejected: too slow"),
        (Policy(BEST), 1, 2, "it is the best"),
        (Policy(PINNED, 1), 2, 1, "it is pinned"),
        (Policy(MANUAL, 1), 2, 1, "it was chosen"),
    ],
)
def test_it_is_told_why(policy: Policy, before: int, after: int, says: str) -> None:
    assert why(policy, before, after) == says


def test_equal_versions_are_told_apart_by_age() -> None:
    twins = {v: replace(VERSIONS[1], version=v) for v in (1, 2, 3)}
    assert candidates(twins, Policy(BEST)) == (3, 2, 1)
