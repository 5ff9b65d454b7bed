"""A loader, and what answers by it, on a real directory in this process."""

import asyncio
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from backboned.plugins import digits
from backboned.registry import Backbone, Catalogue
from backboned.registry.directory import CheckpointDirectory
from backboned.registry.manifest import EpochMetrics, Manifest
from backboned.registry.task import Task
from backboned.registry.version import VersionWriter
from backboned.registry.weights import StageWeights, WeightStore, seeded_state
from backboned.server.compute.device import Device
from backboned.server.compute.stages import StageStore
from backboned.server.database import open_database
from backboned.server.ops.metrics import Metrics
from backboned.server.serving.admission import Admission
from backboned.server.serving.calls import Call, Result, Target
from backboned.server.serving.choose import Chooser
from backboned.server.serving.engine import Engine
from backboned.server.serving.loader import Loader, LoaderSettings
from backboned.server.serving.outcomes import Outcomes
from backboned.server.serving.plan import Limits
from backboned.server.serving.predictor import Predictor
from backboned.server.serving.prepare import prepare
from backboned.server.serving.records import Records
from backboned.server.serving.remembered import Memory
from backboned.server.serving.snapshot import State
from backboned.server.troubles import TroubleKind, Troubles

PATIENCE_SECONDS = 30.0
StartLoader = Callable[..., Loader]


@dataclass(frozen=True)
class Room:
    root: Path
    loader: Loader
    records: Records
    stages: StageStore
    troubles: Troubles
    predict: Callable[..., Result]

    def drop(self, model: str, seed: int, classes: int = 3) -> Path:
        """Drop a state_dict of `digits` with its own head; returns the file."""
        file = self.root / model / "model.pt"
        file.parent.mkdir(exist_ok=True)
        torch.save(state(seed, classes), file)
        return file

    def wait(self, condition: Callable[[], object]) -> None:
        wait_for(self.loader, condition)

    def wait_for_version(self, model: str, version: int) -> None:
        self.wait(lambda: version in self.versions(model))

    def told(self, kind: TroubleKind) -> str:
        """What is wrong of a kind; empty if nothing is."""
        return next((trouble.text for trouble in self.troubles.now() if trouble.kind is kind), "")

    def versions(self, model: str) -> Mapping[int, State]:
        known = self.loader.snapshot.models.get(model)
        return {v: k.state for v, k in known.versions.items()} if known else {}


def wait_for(loader: Loader, condition: Callable[[], object]) -> None:
    """Have the loader look again and again, until it holds."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        loader.refresh().result(PATIENCE_SECONDS)


def state(seed: int, classes: int) -> dict[str, torch.Tensor]:
    (backbone,) = list(catalogue())
    values = seeded_state(backbone, seed)
    layer = backbone.head.layer
    generator = torch.Generator().manual_seed(seed)
    values[f"{layer}.weight"] = torch.randn(classes, backbone.feature_size, generator=generator)
    values[f"{layer}.bias"] = torch.zeros(classes)
    return values


def catalogue() -> Catalogue:
    made = Catalogue()
    made.add(digits, "the plugin itself")
    return made


def write_head(folder: Path, backbone: Backbone, seed: int) -> None:
    """Write version 1 of a model as its trainer would: a head of three classes on the weights of seed 0."""
    head = {k: t for k, t in state(seed, 3).items() if k.startswith("fc.")}
    parts = backbone.split(state(0, 10) | head)
    manifest = Manifest(
        model=folder.name,
        version=1,
        backbone=backbone.name,
        task=Task.SINGLE_LABEL,
        classes=("a", "b", "c"),
        stages={},
        preprocessing=backbone.preprocessing,
        epochs=(),
        best_epoch=0,
        complete=True,
        trained=("head",),
    )
    (folder / "1").mkdir(parents=True)
    VersionWriter(folder / "1", manifest).write(
        1,
        head,
        stages={name: StageWeights.of(tensors).digest for name, tensors in parts.items()},
        optimizer_state={},
        loss=0.5,
        metrics=EpochMetrics(),
        best=True,
    )


@contextmanager
def loaders(folder: Path, troubles: Troubles) -> Iterator[StartLoader]:
    """Starts a loader alone, on `folder`, with these backbones."""
    with ExitStack() as stack:
        database = open_database(folder / ".state" / "db.sqlite")
        stack.callback(database.dispose)
        records = Records.of(database)

        def start(
            known: Catalogue,
            root: Path = folder,
            limits: Limits = Limits(),  # noqa: B008 - immutable
            scan_interval_seconds: float = 0.2,
        ) -> Loader:
            loader = Loader(
                CheckpointDirectory(root),
                known,
                WeightStore(known),
                StageStore(Device.choose("cpu", "fp32")),
                telemetry=Metrics(version="0", torch_version="0", device="cpu"),
                records=records,
                troubles=troubles,
                settings=LoaderSettings(scan_interval_seconds, limits=limits),
            )
            loader.start()
            stack.callback(loader.stop)
            return loader

        yield start


@contextmanager
def open_room(folder: Path, photo: bytes, troubles: Troubles) -> Iterator[Room]:
    with ExitStack() as stack:
        (folder / "checkpoints").mkdir()
        database = open_database(folder / "db.sqlite")
        stack.callback(database.dispose)
        telemetry = Metrics(version="0", torch_version="0", device="cpu")
        records = Records.of(database)
        stages = StageStore(Device.choose("cpu", "fp32"))
        directory = CheckpointDirectory(folder / "checkpoints")
        known = catalogue()
        loader = Loader(
            directory,
            known,
            WeightStore(known),
            stages,
            telemetry=telemetry,
            records=records,
            troubles=troubles,
            settings=LoaderSettings(scan_interval_seconds=0.2, limits=Limits(0.5, 2)),
        )
        loader.start()
        stack.callback(loader.stop)
        engine = Engine(stages.device, telemetry, partial(prepare, max_pixels=10**6), threads=1)
        engine.start()
        stack.callback(engine.stop)

        def predict(model: str, version: int | None = None, alias: str | None = None) -> Result:
            async def ask() -> tuple[Result, ...]:
                admission = Admission(100, 10**7, engine.seconds_to_clear)
                outcomes = Outcomes(Memory(database, 0, Troubles()), lambda: loader.snapshot, telemetry)
                predictor = Predictor(Chooser(loader, records, telemetry), engine, admission, outcomes, telemetry)
                return await predictor.predict(Call((Target(model, version, alias),), [photo]))

            (result,) = asyncio.run(ask())
            return result

        yield Room(folder / "checkpoints", loader, records, stages, troubles, predict)
