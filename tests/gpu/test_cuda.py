"""On CUDA models answer what they answer on a CPU in fp32, from two lanes at once, compiled or not."""

import asyncio
import gc
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from backboned.registry import Backbone, Catalogue
from backboned.registry.manifest import Epoch, Manifest
from backboned.registry.task import Task
from backboned.registry.weights import StageWeights, seeded_state
from backboned.server.compute.artefacts import ArtefactStore
from backboned.server.compute.canary import Canary
from backboned.server.compute.compiler import StageCompiler
from backboned.server.compute.device import Device
from backboned.server.compute.preprocess import normalise, read
from backboned.server.compute.stages import StageStore, run_path
from backboned.server.compute.toolchain import missing_for_compiling
from backboned.server.serving.engine import Engine
from backboned.server.serving.lane import Lane
from backboned.server.serving.prepare import prepare
from backboned.server.serving.queue import Item
from backboned.server.serving.snapshot import LoadedModel
from backboned.server.serving.tree import Answer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(300),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

CLASSES = ("ant", "bee", "wasp")
TIMEOUT_SECONDS = 120.0
TOLERANCE = {"fp32": 2e-3, "bf16": 0.08, "fp16": 0.02}
"""Of a probability: convolutions in fp32 use TF32 unless told otherwise."""


class Silent:
    """A telemetry that nobody listens to."""

    def __getattr__(self, _: str) -> Callable[..., None]:
        return lambda *_: None


@pytest.fixture(scope="module")
def resnet() -> Backbone:
    return Catalogue.from_entry_points().get("resnet18")


@pytest.fixture(scope="module")
def photos() -> list[bytes]:
    """JPEGs of which no two look alike."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for _ in range(24):
        coarse = torch.rand(1, 3, 5, 6, generator=generator)
        smooth = nn.functional.interpolate(coarse, size=(240, 300), mode="bicubic", align_corners=False)[0]
        file = BytesIO()
        Image.fromarray((smooth.clamp(0, 1) * 255).byte().permute(1, 2, 0).numpy()).save(file, "JPEG")
        made.append(file.getvalue())
    return made


def head_tensors(backbone: Backbone, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(len(CLASSES), backbone.feature_size, generator=generator) / backbone.feature_size**0.5
    return {f"{backbone.head.layer}.weight": weight, f"{backbone.head.layer}.bias": torch.zeros(len(CLASSES))}


def weights(backbone: Backbone, head: int = 0) -> dict[str, StageWeights]:
    """The same body always, and a head from a seed."""
    parts = backbone.split(seeded_state(backbone, 0) | head_tensors(backbone, head))
    return {name: StageWeights.of(tensors) for name, tensors in parts.items()}


def load(store: StageStore, backbone: Backbone, stages: dict[str, StageWeights], name: str = "m") -> LoadedModel:
    manifest = Manifest(
        model=name,
        version=1,
        backbone=backbone.name,
        task=Task.SINGLE_LABEL,
        classes=CLASSES,
        stages={},
        preprocessing=backbone.preprocessing,
        epochs=(Epoch(1, "epoch-0001.pt", "", 0, 0.0),),
        best_epoch=1,
        complete=True,
    )
    return LoadedModel(manifest, store.path(backbone, stages), ())


@contextmanager
def started(device: Device, **options: Any) -> Iterator[Engine]:
    telemetry: Any = Silent()
    engine = Engine(device, telemetry, partial(prepare, max_pixels=10**6), **options)
    engine.start()
    try:
        yield engine
    finally:
        engine.stop()


def probabilities(answers: Sequence[Answer]) -> Tensor:
    return torch.stack([answer.logits for answer in answers]).softmax(1)


def truth(backbone: Backbone, stages: dict[str, StageWeights], photos: Sequence[bytes]) -> Tensor:
    """What the model alone says, on the CPU in fp32."""
    path = StageStore(Device.choose("cpu", "fp32")).path(backbone, stages)
    images = torch.stack([read(photo, backbone.preprocessing, max_pixels=10**6) for photo in photos])
    with torch.inference_mode():
        return run_path(path, normalise(images, backbone.preprocessing)).softmax(1)


async def ask(
    engine: Engine, models: Sequence[LoadedModel], photos: Sequence[bytes], tap: int | None = None
) -> list[tuple[Answer, ...]]:
    return await asyncio.wait_for(asyncio.gather(*engine.submit(models, photos, tap)), TIMEOUT_SECONDS)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
async def test_two_lanes_answer_as_a_cpu_does_in_fp32(resnet: Backbone, photos: list[bytes], precision: str) -> None:
    device = Device.choose("cuda", precision)
    store = StageStore(device)
    heads = [weights(resnet, head) for head in range(3)]
    models = [load(store, resnet, stages, f"m{head}") for head, stages in enumerate(heads)]
    with started(device, max_batch_size=8) as engine:
        assert engine.lanes == 2
        calls = [ask(engine, models, photos, tap=0) for _ in range(12)]
        answered = await asyncio.gather(*calls)
        assert engine.depth() == 0
    for place, stages in enumerate(heads):
        expected = truth(resnet, stages, photos)
        for call in answered:
            found = [answers[place] for answers in call]
            assert all(a.logits.device.type == "cpu" and a.logits.dtype == torch.float32 for a in found)
            torch.testing.assert_close(probabilities(found), expected, atol=TOLERANCE[precision], rtol=0)
            assert all(a.embedding is not None and a.embedding.shape == (64,) for a in found)


async def test_what_cannot_be_read_costs_its_own_image_and_what_is_cancelled_nothing(
    resnet: Backbone, photos: list[bytes]
) -> None:
    device = Device.choose("cuda", "fp32")
    model = load(StageStore(device), resnet, weights(resnet))
    with started(device) as engine:
        futures = engine.submit([model], [photos[0], b"no image", photos[1], photos[2]])
        futures[2].cancel()
        first, bad, gone, last = await asyncio.wait_for(
            asyncio.gather(*futures, return_exceptions=True), TIMEOUT_SECONDS
        )
        assert isinstance(bad, Exception) and isinstance(gone, asyncio.CancelledError)
        assert isinstance(first, tuple) and isinstance(last, tuple)
        expected = truth(resnet, weights(resnet), [photos[0], photos[2]])
        torch.testing.assert_close(probabilities([first[0], last[0]]), expected, atol=2e-3, rtol=0)
        assert engine.depth() == 0


async def test_a_pinned_buffer_is_used_again_and_batches_do_not_mix(resnet: Backbone, photos: list[bytes]) -> None:
    device = Device.choose("cuda", "fp32")
    model, lane = load(StageStore(device), resnet, weights(resnet)), Lane(device, 8)
    loop = asyncio.get_running_loop()
    images = [read(photo, resnet.preprocessing, max_pixels=10**6) for photo in photos]
    expected, buffers = truth(resnet, weights(resnet), photos), set()
    for _ in range(5):
        for begin in range(0, len(images), 8):
            part = images[begin : begin + 8]
            batch = [Item((model,), b"", loop.create_future(), image=image) for image in part]
            outcomes = [o for o in lane.run(batch) if not isinstance(o, Exception)]
            found = probabilities([answers[0] for answers in outcomes])
            torch.testing.assert_close(found, expected[begin : begin + 8], atol=2e-3, rtol=0)
            (pinned,) = lane._pinned.values()
            assert pinned.is_pinned() and len(pinned) == 8
            buffers.add(pinned.data_ptr())
    assert len(buffers) == 1


async def test_a_thousand_heads_share_one_backbone(resnet: Backbone, photos: list[bytes]) -> None:
    device = Device.choose("cuda", "bf16")
    store, body = StageStore(device), weights(resnet)
    heads = [StageWeights.of(head_tensors(resnet, seed)) for seed in range(1000)]
    models = [load(store, resnet, {**body, "head": head}, f"m{i}") for i, head in enumerate(heads)]
    assert store.loaded()[0] == len(resnet.stages) + 1000
    with started(device) as engine:
        calls = [ask(engine, [model], [photos[i % len(photos)]]) for i, model in enumerate(models)]
        answered = [answers for ((answers,),) in await asyncio.gather(*calls)]
    path = StageStore(Device.choose("cpu", "fp32")).path(resnet, body)
    images = torch.stack([read(photo, resnet.preprocessing, max_pixels=10**6) for photo in photos])
    with torch.inference_mode():
        features = run_path(path[:-1], normalise(images, resnet.preprocessing))
    layer = resnet.head.layer
    for i, (head, answer) in enumerate(zip(heads, answered, strict=True)):
        row = head.tensors[f"{layer}.weight"] @ features[i % len(photos)] + head.tensors[f"{layer}.bias"]
        torch.testing.assert_close(answer.logits.softmax(0), row.softmax(0), atol=TOLERANCE["bf16"], rtol=0)
    del models, engine, calls
    gc.collect()
    assert store.loaded() == (0, 0)


@pytest.mark.slow
@pytest.mark.skipif(bool(missing_for_compiling()), reason=missing_for_compiling() or "nothing")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
async def test_compiled_stages_answer_as_a_cpu_does_in_fp32(
    resnet: Backbone, photos: list[bytes], precision: str, tmp_path: Path
) -> None:
    device, stages = Device.choose("cuda", precision), weights(resnet)
    store = StageStore(device)
    model = load(store, resnet, stages)
    Canary(store).check(model.path[:2], resnet.preprocessing)  # two stages are compiled, the others run eagerly
    compiler = StageCompiler(device, ArtefactStore(tmp_path, limit_bytes=2**30), concurrency=3, largest_batch=2)
    compiler.start()
    try:
        compiler.consider([model.path])
        deadline = time.monotonic() + 200
        while compiler.pending():
            assert time.monotonic() < deadline, "it did not happen in time"
            await asyncio.sleep(0.05)
        assert compiler.compiled() == 2
        with started(device, max_batch_size=7) as engine:
            answered = await asyncio.gather(*(ask(engine, [model], photos) for _ in range(6)))
    finally:
        compiler.stop()
    expected = truth(resnet, stages, photos)
    for call in answered:
        found = probabilities([answers[0] for answers in call])
        torch.testing.assert_close(found, expected, atol=TOLERANCE[precision], rtol=0)
