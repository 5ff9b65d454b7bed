"""Images are prepared ahead in turn of their models; one that fails or is cancelled holds nobody up."""

import asyncio
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
from torch import nn

from backboned.registry import Backbone
from backboned.registry.weights import StageWeights
from backboned.server.compute.device import Device
from backboned.server.compute.stages import StageStore
from backboned.server.serving.ahead import Ahead
from backboned.server.serving.queue import Item
from backboned.server.serving.snapshot import LoadedModel

MakeItem = Callable[..., Item]


@pytest.fixture(scope="module")
def make_item(
    digits: Backbone, make_network: Callable[..., nn.Module], make_manifest: Callable[..., Any]
) -> Iterator[MakeItem]:
    parts = digits.split(make_network().state_dict())
    path = StageStore(Device.choose("cpu", "fp32")).path(digits, {n: StageWeights.of(t) for n, t in parts.items()})
    loop = asyncio.new_event_loop()

    def make(model: str, number: int = 0) -> Item:
        loaded = LoadedModel(make_manifest(model=model), path, ())
        return Item((loaded,), f"{model}{number}".encode(), loop.create_future())

    yield make
    loop.close()


class Work:
    """Prepares what isn't bad, once the gate is open."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.ready: list[str] = []

    def prepare(self, item: Item) -> bool:
        assert self.gate.wait(30)
        return b"bad" not in bytes(item.source)  # type: ignore[arg-type]  # a test's source is bytes

    def done(self, items: Sequence[Item]) -> None:
        self.ready += [bytes(item.source).decode() for item in items]  # type: ignore[arg-type]


@pytest.fixture
def work() -> Work:
    return Work()


def test_a_flood_is_prepared_in_turn_with_what_comes_later(work: Work, make_item: MakeItem) -> None:
    ahead = Ahead(1, work.prepare, work.done)
    ahead.add([make_item("a", i) for i in range(6)])
    ahead.add([make_item("b", i) for i in range(2)])
    assert len(ahead) == 8
    work.gate.set()
    ahead.stop()
    assert sorted(work.ready[1:5]) == ["a1", "a2", "b0", "b1"] and work.ready[5:] == ["a3", "a4", "a5"]
    assert len(ahead) == 0


def test_what_is_bad_or_cancelled_is_left_out_and_nothing_else(work: Work, make_item: MakeItem) -> None:
    ahead = Ahead(3, work.prepare, work.done)
    items = [make_item(name, i) for i in range(10) for name in ("a", "bad", "c")]
    for item in items:
        if item.models[0].manifest.model == "c":
            item.future.cancel()
    ahead.add(items)
    work.gate.set()
    ahead.stop()
    assert sorted(work.ready) == [f"a{i}" for i in range(10)] and len(ahead) == 0
