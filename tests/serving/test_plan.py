"""The plan as a table: what is known goes in, what to do comes out."""

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from backboned.registry import Preprocessing
from backboned.registry.look import Drop, Signature
from backboned.registry.manifest import Epoch, Manifest
from backboned.registry.task import Task
from backboned.server.serving.plan import (
    QUIET_SECONDS,
    Adopt,
    DropState,
    Known,
    KnownDrop,
    Limits,
    Load,
    Plan,
    Retire,
    VersionKey,
    plan,
)
from backboned.server.serving.policy import Policy, VersionPolicy

SETTLE_SECONDS = 5.0


def manifest(model: str, version: int, *, complete: bool = True, sha256: str = "") -> Manifest:
    epoch = Epoch(1, "epoch-0001.pt", sha256 or f"{model}-{version}", 1, 0.0)
    return Manifest(
        model=model,
        version=version,
        backbone="b",
        task=Task.SINGLE_LABEL,
        classes=("a", "b"),
        stages={},
        preprocessing=Preprocessing(),
        epochs=(epoch,),
        best_epoch=1,
        complete=complete,
    )


def manifests(*numbers: int, incomplete: tuple[int, ...] = ()) -> dict[VersionKey, Manifest]:
    return {("m", n): manifest("m", n, complete=n not in incomplete) for n in numbers}


def loaded(*numbers: int) -> dict[VersionKey, str]:
    return {("m", n): f"m-{n}" for n in numbers}


def planned(known: Known, *, keep: int = 2, now: float = 100.0) -> Plan:
    return plan(known, now=now, limits=Limits(SETTLE_SECONDS, keep))


def loads(result: Plan) -> list[int]:
    return [a.manifest.version for a in result.actions if isinstance(a, Load)]


def retires(result: Plan) -> list[int]:
    return [a.key[1] for a in result.actions if isinstance(a, Retire)]


@pytest.mark.parametrize(
    ("known", "to_load", "to_retire"),
    [
        pytest.param(Known(), [], [], id="nothing there, nothing to do"),
        pytest.param(Known(manifests(1)), [1], [], id="a first version is loaded"),
        pytest.param(Known(manifests(1, 2, 3)), [3, 2], [], id="the newest versions, newest first"),
        pytest.param(Known(manifests(1, 2, 3), loaded(1, 2)), [3], [1], id="a new version pushes out the oldest"),
        pytest.param(Known(manifests(1, 2), loaded(1, 2)), [], [], id="what is loaded stays"),
        pytest.param(Known({}, loaded(1)), [], [1], id="a version that is gone is retired"),
        pytest.param(Known(manifests(1), {("m", 1): "another epoch"}), [1], [], id="a better epoch takes its place"),
        pytest.param(Known(manifests(1, 2), loaded(1), {("m", 2)}), [], [], id="a quarantined one isn't loaded"),
        pytest.param(Known(manifests(1), loaded(1), {("m", 1)}), [], [], id="one that serves and is refused serves on"),
        pytest.param(
            Known(manifests(1, 2, 3, incomplete=(2, 3)), loaded(1)),
            [3, 2],
            [],
            id="training pushes out nothing that serves",
        ),
        pytest.param(
            Known(manifests(1, 2, 3), loaded(2, 3), wanted={("m", 1)}), [1], [], id="a wanted version is loaded too"
        ),
        pytest.param(Known(manifests(1), loaded(1), wanted={("m", 9)}), [], [], id="an unknown one can't be wanted"),
    ],
)
def test_versions(known: Known, to_load: list[int], to_retire: list[int]) -> None:
    result = planned(known)
    assert (loads(result), retires(result)) == (to_load, to_retire)


def test_room_is_made_before_anything_is_loaded() -> None:
    kinds = [type(a) for a in planned(Known(manifests(1, 2, 3), loaded(1, 2))).actions]
    assert kinds == [Retire, Load]


def dropped(*, still_for: float, attempts: int = 0, state: DropState = DropState.WAITING) -> Known:
    drop = Drop("m", Path("m/x.pt"), Signature(1, 2, 3, 4))
    return Known(drops={drop.path: KnownDrop(drop, 100.0 - still_for, state, attempts=attempts)})


def test_a_dropped_file_is_looked_into_once_it_has_been_still_for_a_moment() -> None:
    fresh = planned(dropped(still_for=0.0))
    assert not fresh.actions and fresh.look_again_at == pytest.approx(100.0 + QUIET_SECONDS)
    (look,) = planned(dropped(still_for=QUIET_SECONDS)).actions
    assert isinstance(look, Adopt) and not look.final


def test_an_incomplete_file_gets_until_the_deadline_and_then_a_last_look() -> None:
    waiting = planned(dropped(still_for=1.0, attempts=1))
    assert not waiting.actions and waiting.look_again_at == pytest.approx(100.0 - 1.0 + SETTLE_SECONDS)
    (look,) = planned(dropped(still_for=SETTLE_SECONDS, attempts=1)).actions
    assert isinstance(look, Adopt) and look.final


@pytest.mark.parametrize("state", [DropState.ADOPTED, DropState.QUARANTINED])
def test_a_file_that_is_settled_is_left_alone(state: DropState) -> None:
    assert planned(dropped(still_for=100.0, state=state)) == Plan()


numbers = st.sets(st.integers(1, 8))


@settings(deadline=None)
@given(present=numbers, complete=numbers, in_memory=numbers, refused=numbers, keep=st.integers(1, 4))
def test_what_serves_is_never_lost_and_what_is_refused_never_loaded(
    present: set[int], complete: set[int], in_memory: set[int], refused: set[int], keep: int
) -> None:
    known = Known(
        {("m", n): manifest("m", n, complete=n in complete) for n in present},
        {("m", n): f"m-{n}" for n in in_memory},
        {("m", n) for n in refused},
    )
    result = planned(known, keep=keep)
    assert not set(loads(result)) & refused
    assert not set(loads(result)) & set(retires(result))
    kept = in_memory - set(retires(result))
    assert not kept - present, "what is gone from disk is retired"
    if in_memory & present:
        assert kept, "some version of what served and is on disk serves on"
    if serving := in_memory & present & complete:
        assert kept & complete, f"one of {serving} answered by default, and none does now"


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        (Policy(), [5, 4]),
        (Policy(VersionPolicy.PINNED, 1), [1, 5, 4]),
        (Policy(VersionPolicy.MANUAL, 4), [4, 5]),
        (Policy(rejected={5: "worse"}), [4, 5]),
        (Policy(VersionPolicy.PROMOTE_WHEN_BETTER, 2), [2, 5, 4]),
        (Policy(VersionPolicy.PROMOTE_WHEN_BETTER, 2, {5: "worse", 4: "worse"}), [2, 5, 4, 3]),
        (Policy(VersionPolicy.ROLLBACK_WHEN_WORSE, rejected={4: "", 3: ""}), [5, 4, 2]),
    ],
)
def test_what_is_to_serve_is_loaded_first(policy: Policy, expected: list[int]) -> None:
    """Nothing else then answers in its place after a start, and nobody notes that it did."""
    assert loads(planned(Known(manifests(1, 2, 3, 4, 5), policies={"m": policy}))) == expected


def test_until_what_is_to_serve_is_loaded_the_next_one_in_line_stays() -> None:
    known = Known(manifests(1, 2, 3, 4, 5), loaded(2, 3), policies={"m": Policy(VersionPolicy.MANUAL, 4)})
    result = planned(known)
    assert loads(result) == [4, 5]
    assert [a.key for a in result.actions if isinstance(a, Retire)] == [("m", 2)]


keys = st.sets(st.tuples(st.sampled_from(["birds", "flowers", "rocks"]), st.integers(1, 4)))


@settings(deadline=None)
@given(of=st.tuples(keys, keys, keys, keys, keys), some=st.sets(st.sampled_from("bfr")))
def test_a_plan_for_some_models_is_their_part_of_the_plan_for_all(
    of: tuple[set[VersionKey], ...], some: set[str]
) -> None:
    """Where there is room for all, so that looks at what has changed do what a look at everything would."""
    present, complete, in_memory, refused, wanted = of
    known = Known(
        {key: manifest(*key, complete=key in complete) for key in present},
        {key: "-".join(map(str, key)) for key in in_memory},
        refused,
        wanted=wanted,
    )
    mine = {key for key in present | in_memory if key[0][0] in some}
    part = replace(
        known,
        manifests={key: told for key, told in known.manifests.items() if key in mine},
        loaded={key: digest for key, digest in known.loaded.items() if key in mine},
    )

    def keys_of(result: Plan, kind: type[Load | Retire]) -> list[VersionKey]:
        actions = [action for action in result.actions if isinstance(action, kind)]
        found = [a.key if isinstance(a, Retire) else (a.manifest.model, a.manifest.version) for a in actions]
        return [key for key in found if key in mine]

    for kind in (Load, Retire):
        assert keys_of(planned(part), kind) == keys_of(planned(known), kind)
