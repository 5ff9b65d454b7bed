"""What tests of the serving room share: small models in memory, and a telemetry that remembers."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from sqlalchemy import Engine
from torch import nn

from backboned.plugins.digits import digits as make_digits_backbone
from backboned.registry import Backbone, Preprocessing
from backboned.registry.manifest import Epoch, Manifest
from backboned.registry.task import Task
from backboned.registry.weights import StageWeights
from backboned.server.compute.device import Device
from backboned.server.compute.stages import StageStore
from backboned.server.database import open_database
from backboned.server.serving.snapshot import LoadedModel
from backboned.server.troubles import Troubles
from tests.serving.desk import Desk, World, make_desk, open_world
from tests.serving.rooms import Room, StartLoader, loaders, open_room


@pytest.fixture(scope="package", autouse=True)
def one_thread() -> Iterator[None]:
    """Small layers gain nothing from threads, and on a machine that is busy they wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@dataclass
class Telemetry:
    """A `ServingTelemetry` that keeps what it is told."""

    batches: list[int] = field(default_factory=list)
    phases: list[str] = field(default_factory=list)
    done: list[tuple[str, str]] = field(default_factory=list)
    losses: list[tuple[str, str, float, bool]] = field(default_factory=list)
    seen: dict[str, int] = field(default_factory=dict)
    decisions: list[tuple[str, str]] = field(default_factory=list)
    loads: list[str] = field(default_factory=list)
    serving: dict[str, int] = field(default_factory=dict)
    evictions: int = 0
    cold_calls: int = 0
    deviations: dict[str, float] = field(default_factory=dict)

    def predict_done(self, model: str, code: str) -> None:
        self.done.append((model, code))

    def predict_phase(self, phase: str, seconds: float) -> None:
        assert seconds >= 0
        self.phases.append(phase)

    def batch(self, size: int) -> None:
        self.batches.append(size)

    def serving_loss(self, model: str, role: str, loss: float, correct: bool) -> None:
        self.losses.append((model, role, loss, correct))

    def shadow_answers(self, model: str, agreeing: int, others: int) -> None:
        self.seen[model] = self.seen.get(model, 0) + agreeing + others

    def decided(self, model: str, result: str) -> None:
        self.decisions.append((model, result))

    def checkpoint_load(self, result: str, seconds: float) -> None:
        assert seconds >= 0
        self.loads.append(result)

    def evicted(self) -> None:
        self.evictions += 1

    def cold_call(self, seconds: float) -> None:
        assert seconds >= 0
        self.cold_calls += 1

    def serving_version(self, model: str, version: int) -> None:
        self.serving[model] = version

    def precision_deviation(self, model: str, deviation: float) -> None:
        self.deviations[model] = deviation

    def forget_model(self, model: str) -> None:
        self.serving.pop(model, None)

    def scanned(self, unix_seconds: float) -> None:
        assert unix_seconds > 0


@pytest.fixture
def telemetry() -> Telemetry:
    return Telemetry()


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Engine]:
    """An empty database."""
    engine = open_database(tmp_path / "state.sqlite")
    yield engine
    engine.dispose()


@pytest.fixture(scope="session")
def digits() -> Backbone:
    """The smallest backbone."""
    return make_digits_backbone()


@pytest.fixture(scope="session")
def make_network(digits: Backbone) -> Callable[..., nn.Module]:
    """Makes a `digits` network: its body from one seed, its head, of so many classes, from another."""

    def make(classes: int = 3, *, body: int = 0, head: int = 0) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(body)
            network = digits.module(classes)
        generator = torch.Generator().manual_seed(head)
        with torch.no_grad():
            for parameter in network.get_submodule("fc").parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
        return network.eval()

    return make


@pytest.fixture
def stage_store() -> StageStore:
    return StageStore(Device.choose("cpu", "fp32"))


@pytest.fixture(scope="session")
def make_manifest(digits: Backbone) -> Callable[..., Manifest]:
    """Makes a manifest of a complete version, some of whose fields are others."""

    def make(**changes: object) -> Manifest:
        fields: dict[str, object] = {
            "model": "flowers",
            "version": 1,
            "backbone": "digits",
            "task": Task.SINGLE_LABEL,
            "classes": ("ant", "bee", "wasp"),
            "stages": {},
            "preprocessing": digits.preprocessing,
            "epochs": (Epoch(1, "epoch-0001.pt", "a" * 64, 1000, 1.7e9),),
            "best_epoch": 1,
            "complete": True,
        }
        return Manifest(**fields | changes)  # type: ignore[arg-type]

    return make


@pytest.fixture
def load(
    digits: Backbone, stage_store: StageStore, make_manifest: Callable[..., Manifest]
) -> Callable[..., LoadedModel]:
    """Puts a network into memory as a version of a model."""

    def load_network(network: nn.Module, preprocessing: Preprocessing | None = None, **changes: object) -> LoadedModel:
        parts = digits.split(network.state_dict())
        weights = {name: StageWeights.of(tensors) for name, tensors in parts.items()}
        manifest = make_manifest(preprocessing=preprocessing or digits.preprocessing, **changes)
        return LoadedModel(manifest, stage_store.path(digits, weights), ())

    return load_network


@pytest.fixture
def troubles() -> Troubles:
    return Troubles()


@pytest.fixture
def start_loader(tmp_path: Path, troubles: Troubles) -> Iterator[StartLoader]:
    """Starts a loader alone, on `tmp_path`, with these backbones."""
    with loaders(tmp_path, troubles) as start:
        yield start


@pytest.fixture
def room(tmp_path: Path, photo: bytes, troubles: Troubles) -> Iterator[Room]:
    """A loader, and what answers by it, on an empty directory."""
    with open_room(tmp_path, photo, troubles) as room:
        yield room


@pytest.fixture(scope="package")
def world(
    tmp_path_factory: pytest.TempPathFactory, digits: Backbone, make_network: Callable[..., nn.Module]
) -> Iterator[World]:
    with open_world(tmp_path_factory.mktemp("world"), digits, make_network) as world:
        yield world


@pytest.fixture
async def desk_with(world: World, telemetry: Telemetry) -> AsyncIterator[Callable[..., Desk]]:
    """Makes desks with these limits; their engine isn't started yet."""
    made: list[Desk] = []

    def make(**limits: int) -> Desk:
        made.append(make_desk(world, telemetry, **limits))
        return made[-1]

    yield make
    for desk in made:
        await asyncio.to_thread(desk.engine.stop)


@pytest.fixture
def desk(desk_with: Callable[..., Desk]) -> Desk:
    """A desk that is open."""
    desk = desk_with()
    desk.engine.start()
    return desk
