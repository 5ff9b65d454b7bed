"""How many cores a batch is computed by, and which threads stay for that."""

import asyncio
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from backboned.registry import Stage
from backboned.server.compute.device import Device
from backboned.server.compute.stages import LoadedStage, StageKey
from backboned.server.serving import engine as engine_module
from backboned.server.serving.calls import Pixels
from backboned.server.serving.engine import Engine
from backboned.server.serving.prepare import prepare
from backboned.server.serving.snapshot import LoadedModel

CORES = 2
PICTURE = Pixels(bytes(16 * 16 * 3), (16, 16, 3))


class Run(NamedTuple):
    """The thread that ran a batch, how many it had, and its niceness."""

    thread: threading.Thread
    threads: int
    niceness: int


@pytest.fixture
def used() -> list[Run]:
    """A run for each batch."""
    return []


@pytest.fixture
def model(
    load: Callable[..., LoadedModel],
    make_network: Callable[..., nn.Module],
    used: list[Run],
) -> LoadedModel:
    """A model that tells `used` by what it is run."""

    def forward(_: nn.Module, x: Tensor) -> Tensor:
        used.append(Run(threading.current_thread(), torch.get_num_threads(), niceness()))
        return x.flatten(1)[:, :3]

    head = LoadedStage(StageKey("digits", "head", "it counts", torch.float32), Stage("head", (), forward), nn.Module())
    model = load(make_network())
    return replace(model, path=(*model.path[:-1], head))


@pytest.fixture
def engine(telemetry: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Engine]:
    """An engine on a machine of two cores, where another thread sets its own threads whenever a lane has."""
    set_threads = torch.set_num_threads

    def with_another(threads: int) -> None:
        set_threads(threads)
        another = threading.Thread(target=set_threads, args=(1,))
        another.start()
        another.join()

    monkeypatch.setattr(torch, "set_num_threads", with_another)
    monkeypatch.setattr(engine_module, "usable_cores", lambda: CORES)
    engine = Engine(Device.choose("cpu", "fp32"), telemetry, partial(prepare, max_pixels=10_000))
    engine.start()
    yield engine
    engine.stop()


def niceness() -> int:
    return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())


async def ask(engine: Engine, model: LoadedModel, images: int = 1) -> None:
    await asyncio.wait_for(asyncio.gather(*engine.submit([model], [PICTURE] * images)), 30)


async def test_what_is_alone_is_computed_by_all_cores_unless_there_was_a_crowd_just_now(
    engine: Engine, model: LoadedModel, used: list[Run]
) -> None:
    for _ in range(20):
        await ask(engine, model)
    assert {run.threads for run in used} == {CORES}, "nobody else has asked"
    await ask(engine, model, 16)
    used.clear()
    for _ in range(5):
        await ask(engine, model)
    assert {run.threads for run in used} == {1}, "those who asked a moment ago may be back"
    for _ in range(60):
        await ask(engine, model)
    assert used[-1].threads == CORES, "they were not"


async def test_only_one_thread_stays_that_has_used_all_cores(
    engine: Engine, model: LoadedModel, used: list[Run]
) -> None:
    deadline = time.monotonic() + 60
    while len({run.thread for run in used if run.threads == CORES}) < 3:
        assert time.monotonic() < deadline, "both lanes take batches that are alone"
        await ask(engine, model, 16)  # wakes both lanes: either may be the last to wait, and so the next to be woken
        for _ in range(60):
            await ask(engine, model)
    await asyncio.sleep(0.2)
    await ask(engine, model)
    wide = {run.thread for run in used if run.threads == CORES}
    for thread in wide - {used[-1].thread}:
        thread.join(10)
    assert [thread for thread in wide if thread.is_alive()] == [used[-1].thread]
    await ask(engine, model, 16)
    assert sum(thread.name.startswith("engine-") for thread in threading.enumerate()) == CORES


async def test_a_lane_goes_on_where_no_new_thread_can_be_had(
    engine: Engine, model: LoadedModel, used: list[Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    refused: list[str] = []
    start = threading.Thread.start

    def none_for_lanes(thread: threading.Thread) -> None:
        if thread.name.startswith("engine-"):
            refused.append(thread.name)
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", none_for_lanes)
    deadline = time.monotonic() + 60
    while not refused:
        assert time.monotonic() < deadline, "a lane is to be given a new thread"
        await ask(engine, model, 16)
        for _ in range(60):
            await ask(engine, model)
    used.clear()
    while len({run.thread for run in used}) < CORES:
        assert time.monotonic() < deadline, "both lanes answer still"
        await ask(engine, model, 16)


async def test_lanes_let_the_thread_that_takes_calls_go_first(
    engine: Engine, model: LoadedModel, used: list[Run]
) -> None:
    await ask(engine, model)
    assert used[0].niceness == min(niceness() + 5, 19)
