"""Who waits is taken in turn: a flood of one model costs another no more than a turn."""

import asyncio
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from backboned.registry import Backbone, BackbonedError, Preprocessing
from backboned.registry.weights import StageWeights
from backboned.server.compute.device import Device
from backboned.server.compute.stages import StageStore
from backboned.server.serving.admission import Admission
from backboned.server.serving.queue import FairQueue, Group, Item
from backboned.server.serving.snapshot import LoadedModel

MakeModel = Callable[..., LoadedModel]
MakeItem = Callable[..., Item]
LARGE = Preprocessing(32, 32)
NAMES = ("a", "b", "c", "D", "E")
"""Models; those in capitals read larger images, and so ride apart."""


@pytest.fixture(scope="module")
def models(
    digits: Backbone, make_network: Callable[..., nn.Module], make_manifest: Callable[..., Any]
) -> dict[str, LoadedModel]:
    """A model for each of `NAMES`."""
    parts = digits.split(make_network().state_dict())
    path = StageStore(Device.choose("cpu", "fp32")).path(digits, {n: StageWeights.of(t) for n, t in parts.items()})
    return {
        name: LoadedModel(
            make_manifest(model=name, preprocessing=LARGE if name.isupper() else digits.preprocessing), path, ()
        )
        for name in NAMES
    }


@pytest.fixture(scope="module")
def make_item(models: dict[str, LoadedModel]) -> Iterator[MakeItem]:
    """Makes items for a model that is named; each is told from the others by its source."""
    loop = asyncio.new_event_loop()

    def make(name: str, number: int = 0) -> Item:
        return Item((models[name],), f"{name}{number}".encode(), loop.create_future())

    yield make
    loop.close()


def told(item: Item | None) -> str:
    return item.source.decode() if item and isinstance(item.source, bytes) else ""


def drained(queue: FairQueue, group: Group | None = None) -> list[str]:
    taken = []
    while (item := queue.take(group)) is not None:
        taken.append(told(item))
    return taken


def test_what_is_empty_gives_nothing(models: dict[str, LoadedModel]) -> None:
    queue = FairQueue()
    queue.add([])
    assert len(queue) == 0 and queue.take() is None and queue.take(Group.of(models["a"])) is None


def test_a_single_item_waits_for_one_turn_of_a_flood(make_item: MakeItem) -> None:
    queue = FairQueue()
    queue.add([make_item("a", i) for i in range(1000)])
    assert told(queue.take()) == "a0"
    queue.add([make_item("b")])
    assert [told(queue.take()) for _ in range(3)] == ["a1", "b0", "a2"]


def test_models_of_a_group_take_turns(make_item: MakeItem) -> None:
    queue = FairQueue()
    queue.add([make_item("a", i) for i in range(4)])
    queue.add([make_item(name, i) for i in range(2) for name in "bc"])
    assert drained(queue) == ["a0", "b0", "c0", "a1", "b1", "c1", "a2", "a3"]


def test_a_model_that_comes_back_stands_behind_those_that_wait(make_item: MakeItem) -> None:
    queue = FairQueue()
    queue.add([make_item("a"), make_item("b")])
    assert told(queue.take()) == "a0"
    queue.add([make_item("a", 1)])
    assert drained(queue) == ["b0", "a1"]


def test_groups_take_turns_however_much_one_of_them_holds(make_item: MakeItem) -> None:
    queue = FairQueue()
    queue.add([make_item("a", i) for i in range(100)])
    queue.add([make_item("D", i) for i in range(2)])
    assert [told(queue.take()) for _ in range(5)] == ["a0", "D0", "a1", "D1", "a2"]


def test_a_batch_is_filled_from_its_group_alone(make_item: MakeItem, models: dict[str, LoadedModel]) -> None:
    queue = FairQueue()
    queue.add([make_item("a"), make_item("D"), make_item("b"), make_item("E"), make_item("a", 1)])
    assert drained(queue, Group.of(models["D"])) == ["D0", "E0"]
    assert Group.of(models["a"]) == Group.of(models["b"]) != Group.of(models["D"])
    assert len(queue) == 3 and drained(queue) == ["a0", "b0", "a1"]


def test_what_is_cancelled_is_left_out(make_item: MakeItem) -> None:
    queue = FairQueue()
    items = [make_item("a", i) for i in range(6)] + [make_item("D", i) for i in range(3)]
    queue.add(items)
    for cancelled in (0, 2, 3, 5, 6, 7, 8):
        items[cancelled].future.cancel()
    assert drained(queue) == ["a1", "a4"] and len(queue) == 0


ACTIONS = st.lists(
    st.one_of(
        st.tuples(st.just("add"), st.lists(st.sampled_from(NAMES), max_size=12)),
        st.tuples(st.just("take"), st.sampled_from((None, *NAMES))),
        st.tuples(st.just("cancel"), st.integers(0, 40)),
    ),
    max_size=30,
)


@settings(deadline=None)
@given(actions=ACTIONS)
def test_every_item_is_taken_once_and_in_order_unless_it_is_cancelled(
    make_item: MakeItem, models: dict[str, LoadedModel], actions: list[tuple[str, Any]]
) -> None:
    queue, added, taken = FairQueue(), defaultdict[str, list[Item]](list), defaultdict[str, list[Item]](list)

    def take(name: str | None) -> Item | None:
        group = None if name is None else Group.of(models[name])
        item = queue.take(group)
        if item is not None:
            assert not item.future.done() and group in (None, Group.of(item.models[0]))
            taken[item.owner].append(item)
        else:  # there was none indeed
            waiting = [i for n, each in added.items() for i in each if group in (None, Group.of(models[n]))]
            assert all(i.future.done() or i in taken[i.owner] for i in waiting)
        return item

    for action, value in actions:
        if action == "add":
            items = [make_item(name, i) for i, name in enumerate(value)]
            queue.add(items)
            for item in items:
                added[item.owner].append(item)
        elif action == "take":
            take(value)
        elif every := [item for each in added.values() for item in each]:
            every[value % len(every)].future.cancel()
    while take(None) is not None:
        pass
    assert len(queue) == 0
    for name, items in added.items():
        places = [next(i for i, item in enumerate(items) if item is one) for one in taken[name]]
        assert places == sorted(set(places))
        assert all(item.future.cancelled() for i, item in enumerate(items) if i not in places)


@settings(deadline=None)
@given(counts=st.dictionaries(st.sampled_from(NAMES), st.integers(1, 20), min_size=1), shuffled=st.randoms())
def test_no_item_waits_for_more_of_another_model_than_stand_before_it_in_its_own(
    make_item: MakeItem, models: dict[str, LoadedModel], counts: dict[str, int], shuffled: Any
) -> None:
    queue = FairQueue()
    names = [name for name, count in counts.items() for _ in range(count)]
    shuffled.shuffle(names)
    places = defaultdict[str, Iterator[int]](lambda: iter(range(100)))
    queue.add([make_item(name, next(places[name])) for name in names])
    for group in {Group.of(models[name]) for name in counts}:
        order = drained(queue, group)
        for name in {each[0] for each in order}:
            for turn in range(counts[name]):
                before = order[: order.index(f"{name}{turn}")]
                assert all(sum(each[0] == other for each in before) <= turn + 1 for other in counts)


@settings(deadline=None)
@given(waiting=st.lists(st.sampled_from("abc"), max_size=30), images=st.integers(1, 5))
def test_a_call_is_told_to_wait_for_what_is_taken_before_it(
    make_item: MakeItem, waiting: list[str], images: int
) -> None:
    queue, admission = FairQueue(), Admission(1000, 1000, float)
    with ExitStack() as stack:
        for name in waiting:
            queue.add([make_item(name)])
            stack.enter_context(admission.admit(name, 1, 1))
        queue.add([make_item("a", 1) for _ in range(images)])
        taken = drained(queue)
        before = taken.count("a0") + len([name for name in taken[: _last(taken, "a1")] if name[0] != "a"])
        others = len(set(waiting) - {"a"})  # each may have had its turn just before
        admission.check_wait("a", (before + others + 0.1) / 0.7, images)
        if before:
            with pytest.raises(BackbonedError):
                admission.check_wait("a", before / 0.7, images)


def _last(taken: list[str], name: str) -> int:
    return len(taken) - 1 - taken[::-1].index(name)
