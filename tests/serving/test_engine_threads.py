"""How many cores a batch is computed by."""

import asyncio
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

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


async def test_what_is_alone_is_computed_by_all_cores_unless_there_was_a_crowd_just_now(
    load: Callable[..., LoadedModel],
    make_network: Callable[..., nn.Module],
    telemetry: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    used: list[int] = []

    def forward(_: nn.Module, x: Tensor) -> Tensor:
        used.append(torch.get_num_threads())
        return x.flatten(1)[:, :3]

    monkeypatch.setattr(engine_module, "usable_cores", lambda: CORES)
    head = LoadedStage(StageKey("digits", "head", "it counts", torch.float32), Stage("head", (), forward), nn.Module())
    model = load(make_network())
    model = replace(model, path=(*model.path[:-1], head))
    engine = Engine(Device.choose("cpu", "fp32"), telemetry, partial(prepare, max_pixels=10_000))

    async def ask(images: int) -> None:
        await asyncio.wait_for(asyncio.gather(*engine.submit([model], [PICTURE] * images)), 30)

    engine.start()
    try:
        for _ in range(20):
            await ask(1)
        assert set(used) == {CORES}, "nobody else has asked"
        await ask(16)
        used.clear()
        for _ in range(5):
            await ask(1)
        assert set(used) == {1}, "those who asked a moment ago may be back"
        for _ in range(60):
            await ask(1)
        assert used[-1] == CORES, "they were not"
    finally:
        engine.stop()
