"""From a checkpoint that has answers to a call: probabilities, doubts and the serving loss are as it teaches."""

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

from backboned.registry import Backbone, Catalogue
from backboned.registry.answers import Answers
from backboned.registry.directory import CheckpointDirectory
from backboned.registry.manifest import EpochMetrics, Manifest
from backboned.registry.version import VersionWriter
from backboned.registry.weights import StageWeights, WeightStore
from backboned.server.compute.device import Device
from backboned.server.compute.stages import StageStore
from backboned.server.database import open_database
from backboned.server.serving.admission import Admission
from backboned.server.serving.calls import Call, Result, Target
from backboned.server.serving.choose import Chooser
from backboned.server.serving.engine import Engine
from backboned.server.serving.loader import Loader, LoaderSettings
from backboned.server.serving.outcomes import Outcomes
from backboned.server.serving.predictor import Predictor
from backboned.server.serving.prepare import prepare
from backboned.server.serving.records import Records
from backboned.server.serving.remembered import Memory
from backboned.server.serving.telemetry import ServingTelemetry
from backboned.server.troubles import Troubles

LABEL = "bee"
TEMPERATURE = 3.0


def write_version(root: Path, number: int, manifest: Manifest, network: nn.Module, answers: Answers | None) -> None:
    """A complete version that stands on nothing but itself."""
    folder = root / "flowers" / str(number)
    folder.mkdir(parents=True)
    writer = VersionWriter(folder, replace(manifest, version=number, epochs=(), best_epoch=0))
    stages = dict.fromkeys(manifest.stages, "")
    tensors = network.state_dict()
    metrics = EpochMetrics()
    writer.write(1, tensors, stages=stages, optimizer_state={}, loss=0.1, metrics=metrics, best=True, answers=answers)
    writer.complete()


@pytest.fixture
def predictor(
    tmp_path: Path,
    digits: Backbone,
    make_network: Callable[..., nn.Module],
    make_manifest: Callable[..., Manifest],
    telemetry: ServingTelemetry,
) -> Iterator[Predictor]:
    """Serves one network thrice: without answers, with those of its own photo, and with those of something else."""
    network = make_network()
    parts = digits.split(network.state_dict())
    stages = {name: StageWeights.of(tensors).digest for name, tensors in parts.items()}
    manifest = make_manifest(stages=stages, trained=tuple(stages))
    scale = torch.full((256,), 8.0)
    near = Answers(TEMPERATURE, 0.0, 5.0, torch.zeros(1, 256).half(), scale)
    far = replace(near, centres=torch.full((1, 256), 100.0).half())
    for number, answers in enumerate((None, near, far), 1):
        write_version(tmp_path / "checkpoints", number, manifest, network, answers)
    catalogue = Catalogue()
    catalogue.add(digits, "tests")
    device = Device.choose("cpu", "fp32")
    database = open_database(tmp_path / "state.sqlite")
    records = Records.of(database)
    loader = Loader(
        CheckpointDirectory(tmp_path / "checkpoints"),
        catalogue,
        WeightStore(catalogue),
        StageStore(device),
        telemetry=telemetry,
        records=records,
        troubles=Troubles(),
        settings=LoaderSettings(),
    )
    engine = Engine(device, telemetry, partial(prepare, max_pixels=10**6), threads=1)
    loader.start()
    engine.start()
    loader.refresh().result(30)
    outcomes = Outcomes(Memory(database, 0, Troubles()), lambda: loader.snapshot, telemetry)
    yield Predictor(
        Chooser(loader, records, telemetry), engine, Admission(100, 10**8, lambda _: 0.1), outcomes, telemetry
    )
    engine.stop()
    loader.stop()
    database.dispose()


async def ask(predictor: Predictor, photo: bytes, label: str | None = None) -> list[Result]:
    targets = tuple(Target("flowers", version) for version in (1, 2, 3))
    return list(await predictor.predict(Call(targets, [photo], labels=[label] if label else ())))


async def test_probabilities_are_tempered_and_what_lies_far_off_is_doubted(predictor: Predictor, photo: bytes) -> None:
    plain, near, far = (result.predictions[0] for result in await ask(predictor, photo))
    odds = {name: math.log(p) for name, p in plain.classes}
    weights = {name: math.exp(value / TEMPERATURE) for name, value in odds.items()}
    expected = {name: w / sum(weights.values()) for name, w in weights.items()}
    assert dict(near.classes) == pytest.approx(expected, rel=1e-3)
    assert near.classes == far.classes
    told = [(p.uncertain, p.unfamiliar) for p in (plain, near, far)]
    assert told == [(False, False), (False, False), (True, True)]


async def test_the_serving_loss_is_of_what_was_answered(predictor: Predictor, photo: bytes, telemetry: object) -> None:
    results = await ask(predictor, photo, LABEL)
    expected = [-math.log(dict(result.predictions[0].classes)[LABEL]) for result in results]
    losses = [loss for _, _, loss, _ in telemetry.losses]  # type: ignore[attr-defined]
    assert losses == pytest.approx(expected, rel=1e-3)
    assert losses[0] != pytest.approx(losses[1], rel=1e-2)
