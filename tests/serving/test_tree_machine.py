"""Load, replace, drop, predict, cancel in any order: every answer is the eager fp32 model's, and nothing stays."""

import asyncio
import gc
import threading
from collections.abc import Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule
from torch import nn

from backboned.plugins.digits import digits
from backboned.registry import Backbone, Head, Preprocessing, Stage
from backboned.registry.manifest import Epoch, Manifest
from backboned.registry.task import Task
from backboned.registry.weights import StageWeights, seeded_state
from backboned.server.compute.device import Device
from backboned.server.compute.preprocess import normalise
from backboned.server.compute.stages import StageStore
from backboned.server.serving.calls import Pixels, Prepared
from backboned.server.serving.engine import Engine
from backboned.server.serving.prepare import prepare
from backboned.server.serving.queue import Group
from backboned.server.serving.snapshot import LoadedModel
from backboned.server.serving.tree import Answer

TIMEOUT_SECONDS = 30.0
SIDE = 16


def _build() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3, 2), nn.ReLU(), nn.Linear(6, 5))


BACKBONES = (
    digits(),
    Backbone(
        "plain",
        _build,
        (Stage.of("first", "0", "1"), Stage.of("second", "2", "3"), Stage.of("pool", lambda x: x.mean((2, 3)))),
        Head.at("4"),
        6,
        Preprocessing(SIDE, SIDE, (0.4, 0.5, 0.6), (0.3, 0.3, 0.3)),
    ),
)
_GENERATOR = torch.Generator().manual_seed(0)
IMAGES = tuple(torch.randint(0, 256, (3, SIDE, SIDE), generator=_GENERATOR, dtype=torch.uint8) for _ in range(6))


@pytest.fixture(scope="module", autouse=True)
def frozen_garbage() -> Iterator[None]:
    """What torch and pytest have made so far needn't be looked through at every collection."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


class Recipe(NamedTuple):
    """What a model is made of: seeds of its body and head, and of those stages from `depth` on that were unfrozen."""

    backbone: int
    body: int
    depth: int
    unfrozen: int
    head: int
    classes: int

    def weights(self) -> dict[str, StageWeights]:
        """Its weights by stage."""
        stages = {}
        for place, name in enumerate(BACKBONES[self.backbone].stage_names):
            stages[name] = body(self.backbone, self.unfrozen if place >= self.depth else self.body)[name]
        return {**stages, "head": head(self.backbone, self.head, self.classes)}


@lru_cache
def body(backbone: int, seed: int) -> dict[str, StageWeights]:
    """Random weights of all stages."""
    parts = BACKBONES[backbone].split(seeded_state(BACKBONES[backbone], seed))
    return {name: StageWeights.of(tensors) for name, tensors in parts.items()}


@lru_cache
def head(backbone: int, seed: int, classes: int) -> StageWeights:
    """Random weights of a head, large enough that images get clearly different answers."""
    layer, features = BACKBONES[backbone].head.layer, BACKBONES[backbone].feature_size
    weight = torch.randn(classes, features, generator=torch.Generator().manual_seed(seed))
    return StageWeights.of({f"{layer}.weight": weight, f"{layer}.bias": torch.zeros(classes)})


RECIPES = st.builds(
    Recipe,
    backbone=st.integers(0, 1),
    body=st.integers(0, 1),
    depth=st.integers(0, 5),
    unfrozen=st.integers(0, 2),
    head=st.integers(0, 2),
    classes=st.integers(1, 3),
)


@lru_cache(4096)
@torch.inference_mode()
def expected(recipe: Recipe, image: int, tap: int | None) -> Answer:
    """What the model alone makes of one image."""
    backbone = BACKBONES[recipe.backbone]
    network = backbone.module(recipe.classes).eval()
    network.load_state_dict({key: t for stage in recipe.weights().values() for key, t in stage.tensors.items()})
    x, embedding = normalise(IMAGES[image][None], backbone.preprocessing), None
    for place, stage in enumerate(backbone.chain):
        x = stage.forward(network, x)
        if place == tap:
            embedding = (x.mean((2, 3)) if x.dim() == 4 else x)[0]
    return Answer(x[0], embedding)


@dataclass
class Asked:
    """Images that some models look at, and what was promised for each of them."""

    recipes: tuple[Recipe, ...]
    images: tuple[int, ...]
    tap: int | None
    futures: "list[asyncio.Future[tuple[Answer, ...]]]"
    cancelled: set[int] = field(default_factory=set)


class Silent:
    """A telemetry that nobody listens to."""

    def __getattr__(self, _: str) -> Callable[..., None]:
        return lambda *_: None


class Tree(RuleBasedStateMachine):
    """A stage store and an engine of two lanes, with whatever models are loaded now."""

    def __init__(self) -> None:
        super().__init__()
        self.store = StageStore(Device.choose("cpu", "fp32"))
        telemetry: Any = Silent()
        self.engine = Engine(
            self.store.device, telemetry, partial(prepare, max_pixels=1000), max_batch_size=5, threads=2
        )
        self.engine.start()
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever)
        self.thread.start()
        self.loaded: dict[str, tuple[Recipe, LoadedModel]] = {}
        self.under_way: list[Asked] = []

    def in_loop(self, job: Coroutine[Any, Any, Any]) -> Any:
        """The outcome of `job`, run where futures belong."""
        return asyncio.run_coroutine_threadsafe(job, self.loop).result(TIMEOUT_SECONDS)

    @rule(name=st.sampled_from("abcd"), recipe=RECIPES)
    def load_or_replace(self, name: str, recipe: Recipe) -> None:
        backbone = BACKBONES[recipe.backbone]
        manifest = Manifest(
            model=name,
            version=1,
            backbone=backbone.name,
            task=Task.SINGLE_LABEL,
            classes=("x", "y", "z")[: recipe.classes],
            stages={},
            preprocessing=backbone.preprocessing,
            epochs=(Epoch(1, "epoch-0001.pt", "", 0, 0.0),),
            best_epoch=1,
            complete=True,
        )
        self.loaded[name] = recipe, LoadedModel(manifest, self.store.path(backbone, recipe.weights()), ())

    @precondition(lambda self: self.loaded)
    @rule(data=st.data())
    def drop(self, data: st.DataObject) -> None:
        del self.loaded[data.draw(st.sampled_from(sorted(self.loaded)))]

    @precondition(lambda self: self.loaded)
    @rule(
        data=st.data(),
        images=st.lists(st.integers(0, len(IMAGES) - 1), min_size=1, max_size=7),
        tap=st.none() | st.integers(0, 2),
        cancelled=st.sets(st.integers(0, 6), max_size=3),
    )
    def predict(self, data: st.DataObject, images: list[int], tap: int | None, cancelled: set[int]) -> None:
        """Ask one or several models, which needn't be of one backbone; take back some images at once."""
        names = data.draw(st.lists(st.sampled_from(sorted(self.loaded)), min_size=1, max_size=4))
        groups: dict[Group, list[tuple[Recipe, LoadedModel]]] = {}
        for name in names:
            groups.setdefault(Group.of(self.loaded[name][1]), []).append(self.loaded[name])
        for members in groups.values():
            self.under_way.append(self.in_loop(self._submit(members, tuple(images), tap, cancelled)))

    async def _submit(
        self, members: Sequence[tuple[Recipe, LoadedModel]], images: tuple[int, ...], tap: int | None, back: set[int]
    ) -> Asked:
        sources: list[bytes | Pixels | Prepared] = []
        for image in images:
            if image % 2:
                sources.append(Prepared(IMAGES[image], members[0][1].manifest.preprocessing))
            else:
                sources.append(Pixels(IMAGES[image].permute(1, 2, 0).contiguous().numpy().tobytes(), (SIDE, SIDE, 3)))
        futures = self.engine.submit([model for _, model in members], sources, tap)
        asked = Asked(tuple(recipe for recipe, _ in members), images, tap, futures)
        asked.cancelled = {place for place in back if place < len(futures) and futures[place].cancel()}
        return asked

    @precondition(lambda self: self.under_way)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        """Take back an image that may be anywhere: queued, in a batch, answered."""
        asked = data.draw(st.sampled_from(self.under_way))
        place = data.draw(st.integers(0, len(asked.futures) - 1))

        async def take_back() -> None:
            if asked.futures[place].cancel():
                asked.cancelled.add(place)

        self.in_loop(take_back())

    @precondition(lambda self: self.under_way)
    @rule()
    def look_at_the_answers(self) -> None:
        for asked in self.under_way:
            outcomes = self.in_loop(_all(asked.futures))
            for place, outcome in enumerate(outcomes):
                if place in asked.cancelled:
                    assert isinstance(outcome, asyncio.CancelledError)
                    continue
                assert not isinstance(outcome, BaseException), outcome
                for recipe, answer in zip(asked.recipes, outcome, strict=True):
                    truth = expected(recipe, asked.images[place], asked.tap)
                    torch.testing.assert_close(answer, truth, atol=1e-4, rtol=1e-4)
        self.under_way.clear()

    def teardown(self) -> None:
        try:
            self.look_at_the_answers()
            held = {stage for _, model in self.loaded.values() for stage in model.path}
            self.engine.stop()
            assert self.engine.depth() == 0  # only now: what was cancelled is queued until a lane meets it
            self.in_loop(asyncio.sleep(0))  # what lanes have delivered is held until the loop comes to it
            gc.collect()
            assert self.store.loaded() == (len(held), sum(stage.size_bytes for stage in held))
            held.clear()
            self.loaded.clear()
            gc.collect()
            assert self.store.loaded() == (0, 0)
        finally:
            self.engine.stop()
            self.loop.call_soon_threadsafe(self.loop.stop)
            self.thread.join(TIMEOUT_SECONDS)
            self.loop.close()


async def _all(futures: "Sequence[asyncio.Future[tuple[Answer, ...]]]") -> list[tuple[Answer, ...] | BaseException]:
    return await asyncio.gather(*futures, return_exceptions=True)


TestTree = pytest.mark.timeout(400)(Tree.TestCase)  # what fails is shrunk for up to five minutes
TestTree.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)
