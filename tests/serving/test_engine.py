"""The engine answers everything that is queued, in as few batches as it can, and each image for itself."""

import asyncio
import gc
import math
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from backboned.registry import Backbone, BackbonedError, ErrorKind, Head, Preprocessing, Stage
from backboned.registry.manifest import Manifest
from backboned.registry.weights import StageWeights
from backboned.server.compute.device import Device
from backboned.server.compute.preprocess import normalise
from backboned.server.compute.stages import LoadedStage, StageKey, StageStore
from backboned.server.serving.calls import Pixels, Prepared, StalePreprocessing
from backboned.server.serving.engine import Engine
from backboned.server.serving.prepare import prepare
from backboned.server.serving.snapshot import LoadedModel
from backboned.server.serving.tree import Answer

MakeNetwork = Callable[..., nn.Module]
Load = Callable[..., LoadedModel]
MakeEngine = Callable[..., Engine]
Future = asyncio.Future[tuple[Answer, ...]]
TIMEOUT_SECONDS = 30.0


@pytest.fixture
def make_engine(telemetry: Any) -> Iterator[MakeEngine]:
    """Makes engines; they aren't started yet, and are stopped at the end."""
    made: list[Engine] = []

    def make(precision: str = "fp32", threads: int = 1, **options: Any) -> Engine:
        device = Device.choose("cpu", precision)
        made.append(Engine(device, telemetry, partial(prepare, max_pixels=10_000), threads=threads, **options))
        return made[-1]

    yield make
    for engine in made:
        engine.stop()


def images(count: int, size: int = 16) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, 256, (3, size, size), generator=generator, dtype=torch.uint8) for _ in range(count)]


def pixels(image: Tensor) -> Pixels:
    """An image as a call carries it."""
    return Pixels(image.permute(1, 2, 0).contiguous().numpy().tobytes(), (*image.shape[1:], 3))


def submit(engine: Engine, model: LoadedModel, *pictures: Tensor, tap: int | None = None) -> "list[Future]":
    return engine.submit([model], [pixels(picture) for picture in pictures], tap)


def expected(network: nn.Module, image: Tensor, preprocessing: Preprocessing) -> Tensor:
    with torch.inference_mode():
        return torch.as_tensor(network(normalise(image[None], preprocessing)))[0]


async def outcome(futures: "list[Future]") -> list[Answer | BaseException]:
    """What each image got of its one model."""
    outcomes = await asyncio.wait_for(asyncio.gather(*futures, return_exceptions=True), TIMEOUT_SECONDS)
    return [o if isinstance(o, BaseException) else o[0] for o in outcomes]


def failing(model: LoadedModel, error: Exception) -> LoadedModel:
    """A model whose head can't be run, as a plugin's code may fail."""

    def forward(_: nn.Module, x: Tensor) -> Tensor:
        raise error

    head = LoadedStage(StageKey("digits", "head", "broken", torch.float32), Stage("head", (), forward), nn.Module())
    return replace(model, path=(*model.path[:-1], head))


async def test_images_of_several_models_ride_in_one_batch_and_each_is_answered_by_its_own(
    make_engine: MakeEngine, load: Load, make_network: MakeNetwork, digits: Backbone, telemetry: Any
) -> None:
    engine = make_engine()
    networks = [make_network(head=0), make_network(5, head=1), make_network(head=2), make_network(body=1)]
    models = [load(network) for network in networks]
    pictures = images(12)
    futures = [f for i, picture in enumerate(pictures) for f in submit(engine, models[i % 4], picture, tap=4)]
    assert engine.depth() == 12
    engine.start()
    answers = await outcome(futures)
    assert telemetry.batches == [8, 4] and engine.depth() == 0
    for i, answer in enumerate(answers):
        assert isinstance(answer, Answer)
        torch.testing.assert_close(answer.logits, expected(networks[i % 4], pictures[i], digits.preprocessing))
        assert answer.embedding is not None and answer.embedding.shape == (256,)
        assert answer.embedding.dtype == answer.logits.dtype == torch.float32
    assert telemetry.phases.count("queue") == telemetry.phases.count("decode") == 12
    assert telemetry.phases.count("compute") == 2


async def test_a_batch_is_never_larger_than_it_may_be_and_keeps_the_order(
    make_engine: MakeEngine, load: Load, make_network: MakeNetwork, telemetry: Any
) -> None:
    engine = make_engine(max_batch_size=4)
    model = load(make_network())
    order: list[int] = []
    futures = submit(engine, model, *images(10))
    for i, future in enumerate(futures):
        future.add_done_callback(lambda _, i=i: order.append(i))  # type: ignore[misc]
    engine.start()
    await outcome(futures)
    assert telemetry.batches == [4, 4, 2]
    assert order == list(range(10))


async def test_what_is_prepared_otherwise_rides_apart(
    make_engine: MakeEngine, load: Load, make_network: MakeNetwork, digits: Backbone, telemetry: Any
) -> None:
    network, larger = make_network(), Preprocessing(32, 32, (0.1, 0.2, 0.3), (0.5, 0.5, 0.5))
    small, large = load(network), load(network, larger)
    assert small.path == large.path
    engine = make_engine()
    pictures = [images(1)[0], images(1, 32)[0], images(2)[1], images(2, 32)[1]]
    futures = [f for p in pictures for f in submit(engine, large if len(p[0]) == 32 else small, p)]
    engine.start()
    answers = await outcome(futures)
    assert telemetry.batches == [2, 2]
    for picture, answer in zip(pictures, answers, strict=True):
        assert isinstance(answer, Answer)
        preprocessing = larger if len(picture[0]) == 32 else digits.preprocessing
        torch.testing.assert_close(answer.logits, expected(network, picture, preprocessing))


async def test_what_is_cancelled_before_its_batch_is_left_out(
    make_engine: MakeEngine, load: Load, make_network: MakeNetwork, telemetry: Any
) -> None:
    engine = make_engine()
    model = load(make_network())
    futures = submit(engine, model, *images(5))
    futures[0].cancel()
    futures[3].cancel()
    engine.start()
    answers = await outcome(futures)
    assert [isinstance(a, Answer) for a in answers] == [False, True, True, False, True]
    assert telemetry.batches == [3]


async def test_when_all_are_cancelled_the_engine_goes_on(
    make_engine: MakeEngine, load: Load, make_network: MakeNetwork, telemetry: Any
) -> None:
    engine = make_engine()
    model = load(make_network())
    for future in submit(engine, model, *images(3)):
        future.cancel()
    engine.start()
    (answer,) = await outcome(submit(engine, model, *images(1)))
    assert isinstance(answer, Answer) and telemetry.batches == [1]


async def test_what_is_cancelled_during_its_batch_hurts_nobody(
    make_engine: MakeEngine, load: Load, make_network: MakeNetwork
) -> None:
    begun, go_on = threading.Event(), threading.Event()
    model = load(make_network())

    def forward(_: nn.Module, x: Tensor) -> Tensor:
        begun.set()
        assert go_on.wait(TIMEOUT_SECONDS)
        return model.path[0](x)

    held = LoadedStage(StageKey("digits", "stem", "held", torch.float32), Stage("stem", (), forward), nn.Module())
    engine = make_engine()
    futures = submit(engine, replace(model, path=(held, *model.path[1:])), *images(3))
    engine.start()
    assert await asyncio.to_thread(begun.wait, TIMEOUT_SECONDS)
    futures[1].cancel()
    go_on.set()
    answers = await outcome(futures)
    assert [isinstance(a, Answer) for a in answers] == [True, False, True]


async def test_a_model_that_fails_costs_its_own_images_alone(
    make_engine: MakeEngine, load: Load, make_network: MakeNetwork, digits: Backbone, telemetry: Any
) -> None:
    network = make_network()
    good = load(network)
    bad, full = failing(good, ValueError("broken head")), failing(good, torch.OutOfMemoryError())
    engine = make_engine()
    pictures = images(5)
    futures = [f for m, p in zip([good, bad, good, full, good], pictures, strict=True) for f in submit(engine, m, p)]
    engine.start()
    answers = await outcome(futures)
    assert telemetry.batches == [5]
    for i in (0, 2, 4):
        answer = answers[i]
        assert isinstance(answer, Answer)
        torch.testing.assert_close(answer.logits, expected(network, pictures[i], digits.preprocessing))
    assert isinstance(answers[1], ValueError)
    error = answers[3]
    assert isinstance(error, BackbonedError) and error.kind is ErrorKind.RESOURCE_EXHAUSTED
    assert error.retry_delay_seconds == 1.0


async def test_a_shadow_answers_too_and_its_failure_is_nobodys(
    make_engine: MakeEngine, load: Load, make_network: MakeNetwork, digits: Backbone
) -> None:
    serving, shadow = make_network(head=1), make_network(head=2)
    good, other = load(serving), load(shadow)
    engine = make_engine()
    pictures = images(2)
    futures = [
        *engine.submit([good], [pixels(pictures[0])], shadows=[other]),
        *engine.submit([good], [pixels(pictures[1])], shadows=[failing(other, ValueError("broken"))]),
    ]
    engine.start()
    for place, future in enumerate(futures):
        mine, seen = await asyncio.wait_for(future, TIMEOUT_SECONDS)
        torch.testing.assert_close(mine.logits, expected(serving, pictures[place], digits.preprocessing))
        truth = expected(shadow, pictures[place], digits.preprocessing)
        torch.testing.assert_close(seen.logits, truth if place == 0 else truth * math.nan, equal_nan=True)


async def test_a_batch_that_fails_as_a_whole_does_not_end_the_engine(
    make_engine: MakeEngine, load: Load, make_network: MakeNetwork, caplog: pytest.LogCaptureFixture
) -> None:
    engine = make_engine()
    model = load(make_network())
    odd = [Prepared(images(1, size)[0], model.manifest.preprocessing) for size in (16, 17)]  # can't be stacked
    futures = engine.submit([model], odd)
    engine.start()
    assert all(isinstance(a, RuntimeError) for a in await outcome(futures))
    assert "a batch of 2 images failed" in caplog.text
    (answer,) = await outcome(submit(engine, model, *images(1)))
    assert isinstance(answer, Answer)


async def test_on_a_stop_what_is_queued_is_computed_first(
    make_engine: MakeEngine, load: Load, make_network: MakeNetwork, telemetry: Any
) -> None:
    engine = make_engine(max_batch_size=2)
    model = load(make_network())
    futures = submit(engine, model, *images(7))
    engine.start()
    await asyncio.to_thread(engine.stop)
    assert all(isinstance(a, Answer) for a in await outcome(futures))
    assert sum(telemetry.batches) == 7


async def test_the_time_that_images_take_is_told_from_the_last_batches(
    make_engine: MakeEngine, load: Load, make_network: MakeNetwork
) -> None:
    engine = make_engine()
    assert engine.seconds_to_clear(10) == 1.0  # nobody knows yet
    engine.start()
    model = load(make_network())
    await outcome(submit(engine, model, *images(4)))
    assert 0 < engine.seconds_to_clear(10) == pytest.approx(10 * engine.seconds_to_clear(1))


async def test_in_bf16_answers_are_float32_and_nearly_the_same(
    make_engine: MakeEngine, load: Load, make_network: MakeNetwork, digits: Backbone, make_manifest: Any
) -> None:
    network = make_network()
    half = StageStore(Device.choose("cpu", "bf16"))
    weights = {n: StageWeights.of(t) for n, t in digits.split(network.state_dict()).items()}
    manifest: Manifest = make_manifest()
    engine = make_engine("bf16")
    engine.start()
    picture = images(1)[0]
    (answer,) = await outcome(submit(engine, LoadedModel(manifest, half.path(digits, weights), ()), picture))
    assert isinstance(answer, Answer) and answer.logits.dtype == torch.float32
    exact = expected(network, picture, digits.preprocessing)
    torch.testing.assert_close(answer.logits, exact, atol=0.2, rtol=0.05)


async def test_features_of_a_convolutional_head_are_averaged_over_the_picture(
    make_engine: MakeEngine, make_manifest: Any, stage_store: StageStore
) -> None:
    backbone = Backbone(
        "convolutional",
        lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 2, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        (Stage.of("stem", "0"),),
        Head.at("1", "1", "2", "3"),
        8,
        Preprocessing(16, 16),
    )
    network = backbone.module()
    weights = {n: StageWeights.of(t) for n, t in backbone.split(network.state_dict()).items()}
    manifest = make_manifest(preprocessing=backbone.preprocessing)
    engine = make_engine()
    engine.start()
    picture = images(1)[0]
    model = LoadedModel(manifest, stage_store.path(backbone, weights), ())
    (answer,) = await outcome(submit(engine, model, picture, tap=0))
    assert isinstance(answer, Answer)
    with torch.inference_mode():
        features = network.get_submodule("0")(normalise(picture[None], backbone.preprocessing))
    torch.testing.assert_close(answer.embedding, features[0].mean((1, 2)), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(answer.logits, expected(network, picture, backbone.preprocessing))


class Gate:
    """A stage that waits, in whatever thread runs it, until it is opened."""

    def __init__(self, model: LoadedModel) -> None:
        self.reached, self.opened = threading.Semaphore(0), threading.Event()
        stem = model.path[0]

        def forward(_: nn.Module, x: Tensor) -> Tensor:
            self.reached.release()
            assert self.opened.wait(TIMEOUT_SECONDS)
            return stem(x)

        stage = LoadedStage(replace_digest(stem.key), Stage("stem", (), forward), nn.Module())
        self.model = replace(model, path=(stage, *model.path[1:]))

    async def wait(self) -> None:
        """Until a batch has come."""
        assert await asyncio.to_thread(self.reached.acquire, timeout=TIMEOUT_SECONDS)


def replace_digest(key: StageKey) -> StageKey:
    return key._replace(digest="gate")


async def test_two_lanes_run_at_once_and_share_what_waits(
    make_engine: MakeEngine, load: Load, make_network: MakeNetwork, telemetry: Any
) -> None:
    gate = Gate(load(make_network()))
    engine = make_engine(threads=2)
    engine.start()
    futures = submit(engine, gate.model, *images(6))
    await gate.wait()
    await gate.wait()  # a second batch, while the first one is held
    gate.opened.set()
    assert all(isinstance(answer, Answer) for answer in await outcome(futures))
    assert sum(telemetry.batches) == 6 and max(telemetry.batches) <= 3


async def test_while_one_lane_is_held_the_other_goes_on(
    make_engine: MakeEngine, load: Load, make_network: MakeNetwork, digits: Backbone
) -> None:
    network = make_network(head=1)
    gate, model = Gate(load(make_network())), load(network)
    engine = make_engine(threads=2)
    engine.start()
    held = submit(engine, gate.model, *images(1))
    await gate.wait()
    pictures = images(20)
    answers = await outcome(submit(engine, model, *pictures))
    assert not held[0].done() and engine.depth() == 0
    for picture, answer in zip(pictures, answers, strict=True):
        assert isinstance(answer, Answer)
        torch.testing.assert_close(answer.logits, expected(network, picture, digits.preprocessing))
    gate.opened.set()
    assert isinstance((await outcome(held))[0], Answer)


async def test_several_lanes_answer_what_one_would(
    make_engine: MakeEngine, load: Load, make_network: MakeNetwork, digits: Backbone
) -> None:
    networks = [make_network(head=head, body=body) for body in range(2) for head in range(4)]
    models, pictures = [load(network, model=f"m{i}") for i, network in enumerate(networks)], images(7)
    engine = make_engine(threads=4, max_batch_size=3)
    engine.start()
    asked = [(model, picture) for model in range(8) for picture in range(7)] * 3
    futures = [f for model, picture in asked for f in submit(engine, models[model], pictures[picture])]
    for (model, picture), answer in zip(asked, await outcome(futures), strict=True):
        assert isinstance(answer, Answer)
        torch.testing.assert_close(
            answer.logits, expected(networks[model], pictures[picture], digits.preprocessing), atol=1e-5, rtol=1e-5
        )


@pytest.mark.parametrize("readable", [True, False])
async def test_an_engine_that_waits_holds_no_model(
    make_engine: MakeEngine, load: Load, make_network: MakeNetwork, stage_store: StageStore, readable: bool
) -> None:
    engine = make_engine()
    engine.start()
    model = load(make_network())
    await outcome(engine.submit([model], [pixels(images(1)[0]) if readable else b"no image"]))
    del model
    deadline = time.monotonic() + 3
    while stage_store.loaded() != (0, 0):
        assert time.monotonic() < deadline, stage_store.loaded()
        await asyncio.sleep(0.01)
        gc.collect()


async def test_a_flood_of_one_model_does_not_hold_up_another(
    make_engine: MakeEngine, load: Load, make_network: MakeNetwork
) -> None:
    gate = Gate(load(make_network()))
    flooding, other = load(make_network(head=1), model="flooding"), load(make_network(head=2), model="other")
    engine = make_engine(max_batch_size=4)
    engine.start()
    held = submit(engine, gate.model, *images(1))
    await gate.wait()
    order: list[str] = []
    flood, (single,) = submit(engine, flooding, *images(40)), submit(engine, other, *images(1))
    for future in flood:
        future.add_done_callback(lambda _: order.append("flooding"))
    single.add_done_callback(lambda _: order.append("other"))
    gate.opened.set()
    await outcome([*held, *flood, single])
    assert order.index("other") < 4


async def test_several_models_look_at_an_image_in_one_pass(
    make_engine: MakeEngine, load: Load, make_network: MakeNetwork, digits: Backbone, telemetry: Any
) -> None:
    networks = [make_network(head=0), make_network(5, head=1), make_network(body=1)]
    engine = make_engine()
    engine.start()
    picture = images(1)[0]
    (future,) = engine.submit([load(network) for network in networks], [pixels(picture)])
    answers = await asyncio.wait_for(future, TIMEOUT_SECONDS)
    for network, answer in zip(networks, answers, strict=True):
        torch.testing.assert_close(answer.logits, expected(network, picture, digits.preprocessing))
        assert answer.embedding is None
    assert telemetry.batches == [1]


async def test_an_image_that_cannot_be_read_costs_its_own_call_alone(
    make_engine: MakeEngine, load: Load, make_network: MakeNetwork, digits: Backbone, telemetry: Any
) -> None:
    model = load(make_network())
    elsewhere = replace(digits.preprocessing, resize_size=20)
    engine = make_engine()
    sources: list[bytes | Pixels | Prepared] = [
        pixels(images(1)[0]),
        b"no image",
        Prepared(images(1)[0], elsewhere),
        pixels(images(1)[0]),
    ]
    futures = engine.submit([model], sources)
    engine.start()
    first, bad, stale, last = await outcome(futures)
    assert isinstance(first, Answer) and isinstance(last, Answer)
    assert isinstance(bad, BackbonedError) and bad.kind is ErrorKind.INVALID_ARGUMENT
    assert isinstance(stale, StalePreprocessing)
    assert telemetry.batches == [2]


async def test_what_is_cancelled_is_not_even_decoded(
    make_engine: MakeEngine, load: Load, make_network: MakeNetwork, telemetry: Any
) -> None:
    engine = make_engine()
    futures = submit(engine, load(make_network()), *images(9))
    for future in futures[1:]:
        future.cancel()
    engine.start()
    await outcome(futures)
    assert telemetry.phases.count("decode") == 1 and telemetry.batches == [1]
