"""What fits into the memory for models, as a table, and in any order of events."""

from collections.abc import Mapping

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from backboned.registry import Preprocessing
from backboned.registry.manifest import Epoch, Manifest
from backboned.registry.task import Task
from backboned.server.compute.stages import StageKey
from backboned.server.serving.budget import Arrival, Footprint, Wish, fit
from backboned.server.serving.plan import IDLE_SECONDS, Known, Limits, Load, Plan, Retire, VersionKey, plan
from backboned.server.serving.policy import Policy, VersionPolicy

NOW = 1000.0
LONG_AGO = NOW - 2 * IDLE_SECONDS


def stages(**sizes: int) -> Footprint:
    return {StageKey("b", name, name, torch.float32): size for name, size in sizes.items()}


def test_what_is_shared_counts_once() -> None:
    wishes = [Wish(name, stages(body=100, **{name: 1})) for name in ("one", "two", "three")]
    assert fit(wishes, 102).kept == {"one", "two"}
    assert fit(wishes, 102).left_out == {"three": 1}
    assert fit(wishes, 103).kept == {"one", "two", "three"}


def test_one_that_is_too_large_keeps_out_no_other() -> None:
    found = fit([Wish("large", stages(a=500)), Wish("small", stages(b=5))], 100)
    assert found.kept == {"small"}
    assert found.left_out == {"large": 500}


def test_without_a_budget_everything_fits() -> None:
    assert fit([Wish("large", stages(a=10**15))], None).kept == {"large"}


@settings(deadline=None)
@given(st.lists(st.dictionaries(st.sampled_from("abcdef"), st.just(10), max_size=4), max_size=8), st.integers(0, 80))
def test_the_first_ones_are_kept_and_never_more_than_there_is_room_for(
    wanted: list[dict[str, int]], budget: int
) -> None:
    wishes = [Wish(i, stages(**sizes)) for i, sizes in enumerate(wanted)]
    found = fit(wishes, budget)
    held: set[StageKey] = set()
    for wish in wishes:
        together = 10 * len(held | wish.stages.keys())
        assert (wish.key in found.kept) == (together <= budget)
        held |= wish.stages.keys() if wish.key in found.kept else set()
    assert 10 * len(held) <= budget
    assert found.kept | found.left_out.keys() == set(range(len(wishes)))


class Memory:
    """Models on a device with little memory, each version with 10 bytes of its own and 30 that all share."""

    def __init__(self, budget: int, **models: int) -> None:
        """`models` have so many versions; of each the newest one alone is kept in memory."""
        self.budget = budget
        self.manifests = {(m, v): manifest(m, v) for m, count in models.items() for v in range(1, count + 1)}
        self.loaded: dict[VersionKey, str] = {}
        self.used: dict[VersionKey, float] = {}
        self.policies: dict[str, Policy] = {}
        self.wanted: set[VersionKey] = set()
        self.last = Plan()

    def add(self, model: str) -> VersionKey:
        key = model, 1 + max((v for m, v in self.manifests if m == model), default=0)
        self.manifests[key] = manifest(*key)
        return key

    def look(self, now: float = NOW) -> Plan:
        """Plan, and act."""
        keys = self.manifests.keys() | self.loaded.keys()
        footprints = {key: stages(body=30, **{f"{key[0]}{key[1]}": 10}) for key in keys}
        known = Known(
            manifests=self.manifests,
            loaded=dict(self.loaded),
            policies=self.policies,
            wanted=self.wanted,
            used=self.used,
            footprint=lambda key: footprints[key],
            held={key: footprints[key] for key in self.loaded},
        )
        self.last = plan(known, now=now, limits=Limits(5.0, 1, self.budget))
        for action in self.last.actions:
            if isinstance(action, Retire):
                del self.loaded[action.key]
            elif isinstance(action, Load):
                key = action.manifest.model, action.manifest.version
                self.loaded[key] = action.manifest.best.sha256
                assert self.bytes() <= self.budget
        return self.last

    def bytes(self) -> int:
        return 30 * bool(self.loaded) + 10 * len(self.loaded)

    def names(self) -> set[str]:
        return {f"{model}{version}" for model, version in self.loaded}

    def evicted(self) -> list[VersionKey]:
        return [a.key for a in self.last.actions if isinstance(a, Retire) and a.evicted]


def manifest(model: str, version: int) -> Manifest:
    epoch = Epoch(1, "epoch-0001.pt", f"{model}{version}", 1, 0.0)
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
        complete=True,
    )


def test_what_was_asked_for_last_stays_and_the_rest_is_loaded_on_demand() -> None:
    memory = Memory(50, a=1, b=1, c=1)
    memory.look()
    assert memory.names() == {"a1", "b1"}
    assert memory.last.out["c", 1].arrival is Arrival.ON_DEMAND
    assert "it isn't in memory" in memory.last.out["c", 1].reason
    memory.used = {("b", 1): NOW - 2, ("c", 1): NOW - 1}
    memory.look()
    assert memory.names() == {"b1", "c1"} and memory.evicted() == [("a", 1)]
    assert memory.last.out["a", 1].arrival is Arrival.ON_DEMAND
    assert not memory.look().actions, "and so it stays"


def test_a_new_version_pushes_out_whoever_was_not_asked_for_and_never_what_it_replaces() -> None:
    memory = Memory(50, a=1, b=1)
    memory.used = {("a", 1): NOW - 1, ("b", 1): NOW - 2}
    memory.look()
    memory.add("a")
    memory.look()
    assert memory.names() == {"a1", "a2"} and memory.evicted() == [("b", 1)]
    memory.look()
    assert memory.names() == {"a2", "b1"}, "the old one has gone, and there is room again"


def test_a_version_that_does_not_fit_beside_the_one_that_serves_waits_and_says_why() -> None:
    memory = Memory(40, a=1)
    memory.used = {("a", 1): NOW - 1}
    memory.look()
    memory.add("a")
    memory.look()
    assert memory.names() == {"a1"}
    waiting = memory.last.out["a", 2]
    assert waiting.arrival is Arrival.LATER and "isn't in memory" in waiting.reason
    memory.look(NOW + 2 * IDLE_SECONDS)
    assert memory.names() == {"a2"}, "nobody asks: the old one goes first"


def test_one_that_is_larger_than_everything_leaves_the_one_that_serves_alone() -> None:
    memory = Memory(39, a=1)
    memory.look()
    assert not memory.names() and memory.last.out["a", 1].arrival is Arrival.NEVER
    memory.budget = 40
    memory.used = {("a", 1): LONG_AGO}
    memory.look()
    assert memory.names() == {"a1"}


def test_the_version_of_an_alias_goes_when_others_are_asked_for_and_it_is_not() -> None:
    memory = Memory(50, a=2, b=1)
    memory.policies = {"a": Policy(VersionPolicy.PINNED, 2)}
    memory.wanted = {("a", 1)}
    memory.used = {("a", 2): NOW - 1, ("b", 1): NOW - 2, ("a", 1): NOW - 3}
    memory.look()
    assert memory.names() == {"a2", "b1"} and memory.last.out["a", 1].arrival is Arrival.ON_DEMAND
    memory.used["a", 1] = NOW
    memory.look()
    assert memory.names() == {"a1", "a2"}


def test_a_shadow_goes_before_whatever_serves() -> None:
    memory = Memory(50, a=2, b=1)
    memory.policies = {"a": Policy(VersionPolicy.MANUAL, 1)}
    memory.used = {("a", 1): NOW - 1}
    memory.look()
    assert memory.names() == {"a1", "b1"} and ("a", 2) in memory.last.out


EVENTS = st.lists(
    st.tuples(st.sampled_from(["ask", "add", "remove", "look"]), st.sampled_from("abc"), st.integers(0, 3)),
    max_size=40,
)


@pytest.mark.parametrize("budget", [30, 40, 60])
@settings(deadline=None)
@given(events=EVENTS)
def test_whatever_happens_memory_suffices_and_whoever_is_asked_for_comes(
    budget: int, events: list[tuple[str, str, int]]
) -> None:
    memory, now = Memory(budget, a=1, b=2), NOW
    for kind, model, number in events:
        now += 1.0
        versions = sorted(v for m, v in memory.manifests if m == model)
        if kind == "add":
            memory.add(model)
        elif kind == "remove" and versions:
            key = model, versions[number % len(versions)]
            del memory.manifests[key]
            memory.look(now)  # what is gone from disk is let go of
            memory.used.pop(key, None)
        elif kind == "ask" and versions:
            memory.used[model, versions[-1]] = now
            before = answering(memory.loaded, model)
            memory.look(now)
            assert memory.bytes() <= budget
            if budget >= 40:
                assert answering(memory.loaded, model), "it was asked for, and is there"
                assert before is None or before == answering(memory.loaded, model) or versions[-1] > before
        memory.look(now)
        assert memory.bytes() <= budget
    for _ in range(len(memory.manifests) + 1):
        memory.look(now)
    assert not memory.look(now).actions, "it comes to rest"


def answering(loaded: Mapping[VersionKey, str], model: str) -> int | None:
    return max((v for m, v in loaded if m == model), default=None)
