"""The loader over a real directory, in this process: what is on disk is what answers."""

import asyncio
import errno
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from backboned.plugins import digits
from backboned.registry import Backbone, BackbonedError, Catalogue, ErrorKind
from backboned.registry.digest import file_digest
from backboned.registry.directory import CheckpointDirectory
from backboned.registry.look import Part, Seen
from backboned.registry.manifest import EpochMetrics, Manifest
from backboned.registry.task import Task
from backboned.registry.version import VersionWriter
from backboned.registry.weights import StageWeights, WeightStore, seeded_state
from backboned.server.compute.device import Device
from backboned.server.compute.stages import StageStore
from backboned.server.database import open_database
from backboned.server.ops.metrics import Metrics
from backboned.server.serving.admission import Admission
from backboned.server.serving.aliases import Aliases
from backboned.server.serving.budget import Arrival
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
from backboned.server.serving.snapshot import KnownModel, State
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


@pytest.fixture
def troubles() -> Troubles:
    return Troubles()


@pytest.fixture
def start_loader(tmp_path: Path, troubles: Troubles) -> Iterator[StartLoader]:
    """Starts a loader alone, on `tmp_path`, with these backbones."""
    with ExitStack() as stack:
        database = open_database(tmp_path / ".state" / "db.sqlite")
        stack.callback(database.dispose)
        records = Records.of(database)

        def start(
            known: Catalogue,
            root: Path = tmp_path,
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


@pytest.fixture
def room(tmp_path: Path, photo: bytes, troubles: Troubles) -> Iterator[Room]:
    with ExitStack() as stack:
        (tmp_path / "checkpoints").mkdir()
        database = open_database(tmp_path / "db.sqlite")
        stack.callback(database.dispose)
        telemetry = Metrics(version="0", torch_version="0", device="cpu")
        records = Records.of(database)
        stages = StageStore(Device.choose("cpu", "fp32"))
        directory = CheckpointDirectory(tmp_path / "checkpoints")
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

        yield Room(tmp_path / "checkpoints", loader, records, stages, troubles, predict)


def test_a_dropped_file_answers_and_a_second_one_takes_over(room: Room) -> None:
    room.drop("m", seed=1)
    room.wait(lambda: room.versions("m") == {1: State.SERVING})
    assert room.predict("m").version == 1
    room.drop("m", seed=2)
    room.wait(lambda: room.versions("m") == {1: State.SERVING, 2: State.SERVING})
    assert room.predict("m").version == 2
    assert room.predict("m", version=1).predictions[0].classes != room.predict("m").predictions[0].classes


def test_the_same_content_again_makes_no_version(room: Room) -> None:
    file = room.drop("m", seed=1)
    room.wait(lambda: room.versions("m") == {1: State.SERVING})
    file.write_bytes(file.read_bytes())
    marker = room.drop("other", seed=2)
    room.wait(lambda: room.versions("other"))  # the look that finds this one has looked at the first, too
    marker.unlink()
    room.wait(lambda: not room.loader.snapshot.refused)
    assert room.versions("m") == {1: State.SERVING}


def test_versions_beyond_the_limit_are_loaded_when_they_are_asked_for(room: Room) -> None:
    for version in (1, 2, 3):
        room.drop("m", seed=version)
        room.wait_for_version("m", version)
    room.wait(lambda: room.versions("m") == {1: State.AVAILABLE, 2: State.SERVING, 3: State.SERVING})
    assert room.predict("m", version=1).version == 1
    assert room.predict("m").version == 3


def test_an_alias_keeps_its_version_loaded(room: Room) -> None:
    room.drop("m", seed=1)
    room.wait(lambda: 1 in room.versions("m"))
    room.records.aliases.set("m", "stable", 1)
    for version in (2, 3, 4):
        room.drop("m", seed=version)
        room.wait_for_version("m", version)
    room.wait(lambda: room.versions("m")[2] is State.AVAILABLE)
    assert room.versions("m")[1] is State.SERVING
    assert room.predict("m", alias="stable").version == 1
    assert room.predict("m", alias="latest").version == 4


def test_a_version_that_is_removed_is_retired_and_its_stages_are_freed(room: Room) -> None:
    room.drop("m", seed=1).unlink()
    room.drop("m", seed=1)
    room.wait(lambda: room.versions("m") == {1: State.SERVING})
    (room.root / "m" / "model.pt").unlink()
    shutil.rmtree(room.root / "m" / "1")
    room.wait(lambda: not room.versions("m"))
    with pytest.raises(BackbonedError, match="unknown model 'm'"):
        room.predict("m")
    room.wait(lambda: room.stages.loaded() == (0, 0))


def test_a_directory_that_vanishes_and_comes_back_interrupts_nothing(room: Room) -> None:
    room.drop("m", seed=1)
    room.wait(lambda: room.versions("m") == {1: State.SERVING})
    room.root.rename(room.root.parent / "away")
    room.wait(lambda: room.told(TroubleKind.CHECKPOINT_DIRECTORY))
    assert room.predict("m").version == 1
    (room.root.parent / "away").rename(room.root)
    room.wait(lambda: not room.troubles.now())
    room.drop("m", seed=2)
    room.wait(lambda: 2 in room.versions("m"))
    assert room.predict("m").version == 2


def test_a_damaged_manifest_keeps_what_served_and_tells_why(room: Room) -> None:
    room.drop("m", seed=1)
    room.wait(lambda: room.versions("m") == {1: State.SERVING})
    manifest = room.root / "m" / "1" / "manifest.json"
    whole = manifest.read_text()
    manifest.write_text(whole[:50])
    room.wait(lambda: room.versions("m") == {1: State.QUARANTINED})
    assert room.predict("m").version == 1
    manifest.write_text(whole)
    room.wait(lambda: room.versions("m") == {1: State.SERVING})


def test_a_better_epoch_that_is_damaged_leaves_the_earlier_one_serving(room: Room) -> None:
    room.drop("m", seed=1)
    room.wait(lambda: room.versions("m") == {1: State.SERVING})
    before = room.predict("m").predictions[0].classes
    folder = room.root / "m" / "1"
    manifest = Manifest.read(folder)
    (folder / "epoch-0001.pt").write_bytes(b"damaged")
    torch.save(state(2, 3), room.root / "whole.pt")
    whole = file_digest(room.root / "whole.pt")
    size_bytes = (room.root / "whole.pt").stat().st_size
    better = replace(manifest.best, epoch=1, file="epoch-0001.pt", sha256=whole, size_bytes=size_bytes)
    manifest.with_epoch(better, best=True, stages=manifest.stages).write(folder)
    room.wait(lambda: room.versions("m") == {1: State.QUARANTINED})
    assert "epoch-0001.pt is truncated or altered" in room.loader.snapshot.models["m"].versions[1].reason
    assert room.predict("m").predictions[0].classes == before
    (room.root / "whole.pt").replace(folder / "epoch-0001.pt")  # mended
    room.wait(lambda: room.versions("m") == {1: State.SERVING})
    assert room.predict("m").predictions[0].classes != before


def test_newer_versions_that_are_all_damaged_do_not_push_out_the_one_that_serves(room: Room) -> None:
    room.drop("m", seed=1)
    room.wait(lambda: room.versions("m") == {1: State.SERVING})
    manifest = Manifest.read(room.root / "m" / "1")
    for version in (2, 3, 4):  # two is all that is kept loaded
        folder = room.root / "m" / str(version)
        folder.mkdir()
        (folder / manifest.best.file).write_bytes(b"damaged")
        replace(manifest, version=version).write(folder)
    room.wait(lambda: room.versions("m") == {1: State.SERVING} | dict.fromkeys((2, 3, 4), State.QUARANTINED))
    assert room.predict("m").version == 1


class SlowWeights:
    """What a plugin can fetch, once it is allowed to."""

    def __init__(self, values: Mapping[str, torch.Tensor]) -> None:
        self.values = values
        self.begun, self.allowed = threading.Event(), threading.Event()

    def get_state_dict(self, **_: Any) -> Mapping[str, torch.Tensor]:
        self.begun.set()
        assert self.allowed.wait(PATIENCE_SECONDS)
        return self.values


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


def test_while_weights_are_fetched_other_models_are_served(start_loader: StartLoader, tmp_path: Path) -> None:
    weights, known = SlowWeights(state(0, 10)), catalogue()
    fetched = replace(known.get("digits"), name="fetched", weights=weights)
    known.add(fetched, "tests")
    write_head(tmp_path / "slow", fetched, seed=1)
    loader = start_loader(known)

    def states(model: str) -> list[State]:
        found = loader.snapshot.models.get(model)
        return [v.state for v in found.versions.values()] if found else []

    wait_for(loader, lambda: states("slow") and weights.begun.is_set())
    (tmp_path / "quick").mkdir()
    torch.save({"backbone": "digits", "state_dict": state(2, 3)}, tmp_path / "quick" / "model.pt")
    wait_for(loader, lambda: states("quick") == [State.SERVING])
    assert states("slow") == [State.LOADING]
    weights.allowed.set()
    wait_for(loader, lambda: states("slow") == [State.SERVING])


def test_a_defect_in_a_round_does_not_end_the_loader(
    start_loader: StartLoader, troubles: Troubles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(_: object) -> None:
        raise ZeroDivisionError("a defect")

    with monkeypatch.context() as patch:
        patch.setattr(Aliases, "all", broken)
        loader = start_loader(catalogue())
        wait_for(loader, lambda: any("the loader failed: ZeroDivisionError" in t.text for t in troubles.now()))
    (tmp_path / "m").mkdir()
    torch.save(state(1, 3), tmp_path / "m" / "model.pt")
    wait_for(loader, lambda: "m" in loader.snapshot.models and not troubles.now())


def test_what_changes_is_looked_at_alone_and_at_once(
    start_loader: StartLoader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "there").mkdir()
    torch.save(state(0, 3), tmp_path / "there" / "model.pt")
    loader = start_loader(catalogue(), scan_interval_seconds=3600.0)
    deadline = time.monotonic() + PATIENCE_SECONDS

    def wait_for_version(model: str, version: int) -> None:
        while loader.snapshot.models.get(model, KnownModel("", {})).serving != version:
            assert time.monotonic() < deadline, "it did not happen in time"
            time.sleep(0.01)

    wait_for_version("there", 1)
    parts: list[frozenset[Part]] = []
    scan_again = CheckpointDirectory.scan_again

    def noted(self: CheckpointDirectory, before: Seen, changed: frozenset[Part]) -> Seen:
        parts.append(changed)
        return scan_again(self, before, changed)

    with monkeypatch.context() as patch:
        patch.setattr(CheckpointDirectory, "scan", None)
        patch.setattr(CheckpointDirectory, "scan_again", noted)
        (tmp_path / "new").mkdir()
        torch.save({"backbone": "digits", "state_dict": state(1, 3)}, tmp_path / "new" / "model.pt")
        wait_for_version("new", 1)
        torch.save(state(2, 3), tmp_path / "there" / "model.pt")
        wait_for_version("there", 2)
        shutil.rmtree(tmp_path / "new")
        while "new" in loader.snapshot.models:
            assert time.monotonic() < deadline, "it did not happen in time"
            time.sleep(0.01)
    models = [{model for model, _ in each} for each in parts]
    assert {"new"} in models and {"there"} in models


def test_a_model_for_which_there_is_no_room_is_told_so_whichever_look_finds_it(
    start_loader: StartLoader, tmp_path: Path
) -> None:
    """Looks at what has changed see that model alone: what else is in memory counts all the same."""
    (backbone,) = list(catalogue())
    size = sum(t.numel() * t.element_size() for t in seeded_state(backbone, 0).values())
    loader = start_loader(catalogue(), limits=Limits(0.2, 1, memory_bytes=size * 3 // 2))
    for seed, model in enumerate(("first", "second")):
        (tmp_path / model).mkdir()
        torch.save(state(seed, 3), tmp_path / model / "model.pt")
        wait_for(loader, lambda model=model: model in loader.snapshot.models)  # type: ignore[misc]

    def told(model: str) -> tuple[bool, Arrival | None]:
        (version,) = loader.snapshot.models[model].versions.values()
        return version.loaded is not None, version.arrival

    wait_for(loader, lambda: {told("first"), told("second")} == {(True, None), (False, Arrival.ON_DEMAND)})
    for model in ("second", "first", "second"):
        loader.want(model, 1)
        deadline = time.monotonic() + PATIENCE_SECONDS
        while told(model) != (True, None):
            assert time.monotonic() < deadline
            loader.refresh({model}).result(PATIENCE_SECONDS)


def test_what_is_not_there_is_told_with_the_nearest_name(room: Room) -> None:
    room.drop("flowers", seed=1)
    room.wait(lambda: room.versions("flowers"))
    with pytest.raises(BackbonedError, match="did you mean 'flowers'") as caught:
        room.predict("flower")
    assert caught.value.kind is ErrorKind.NOT_FOUND
    with pytest.raises(BackbonedError, match="unknown version of flowers '7'"):
        room.predict("flowers", version=7)


def test_a_file_that_the_full_disk_keeps_out_is_adopted_once_there_is_room(
    room: Room, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = [True]
    copy = shutil.copyfile

    def copyfile(source: Path, target: Path) -> object:
        if full[0]:
            raise OSError(errno.ENOSPC, "No space left on device")
        return copy(source, target)

    monkeypatch.setattr(shutil, "copyfile", copyfile)
    room.drop("m", seed=1)
    room.wait(lambda: any("No space left" in f.reason for f in room.loader.snapshot.refused))
    assert not room.versions("m")
    full[0] = False
    room.wait(lambda: room.versions("m") == {1: State.SERVING})
    assert not room.loader.snapshot.refused


def test_an_empty_folder_in_place_of_the_directory_takes_nothing_away(room: Room) -> None:
    room.drop("m", seed=1)
    room.wait(lambda: room.versions("m") == {1: State.SERVING})
    room.root.rename(room.root.parent / "away")
    room.root.mkdir()
    room.wait(lambda: "is its disk mounted?" in room.told(TroubleKind.CHECKPOINT_DIRECTORY))
    assert room.predict("m").version == 1
    room.drop("other", seed=2)  # whoever puts something into it means it
    room.wait(lambda: room.versions("other") == {1: State.SERVING})
    assert not room.versions("m") and not room.troubles.now()


def test_all_models_may_be_removed_as_long_as_the_directory_stays(room: Room) -> None:
    room.drop("m", seed=1)
    room.wait(lambda: room.versions("m") == {1: State.SERVING})
    shutil.rmtree(room.root / "m")
    room.wait(lambda: not room.versions("m"))
    assert not room.troubles.now()


def test_content_of_the_same_size_and_time_is_told_from_what_was_there_also_after_a_start(
    start_loader: StartLoader, tmp_path: Path
) -> None:
    file = tmp_path / "m" / "model.pt"
    file.parent.mkdir()

    def put(seed: int) -> None:  # as from an image that was built to be the same each time
        torch.save(state(seed, 3), file)
        os.utime(file, (0, 0))

    def versions(loader: Loader) -> list[int]:
        found = loader.snapshot.models.get("m")
        return sorted(found.versions) if found else []

    put(1)
    size_bytes = file.stat().st_size
    first = start_loader(catalogue())
    wait_for(first, lambda: versions(first) == [1])
    put(2)
    wait_for(first, lambda: versions(first) == [1, 2])
    first.stop()
    put(3)
    assert file.stat().st_size == size_bytes
    again = start_loader(catalogue())
    wait_for(again, lambda: versions(again) == [1, 2, 3])


def test_until_the_directory_could_be_looked_at_once_nobody_knows_what_there_is(
    start_loader: StartLoader, troubles: Troubles, tmp_path: Path
) -> None:
    (tmp_path / "away").mkdir()
    torch.save(state(1, 3), tmp_path / "away" / "model.pt")
    root = tmp_path / "checkpoints"
    loader = start_loader(catalogue(), root)
    loader.refresh().result(PATIENCE_SECONDS)
    assert not loader.has_looked and "No such file" in troubles.now()[0].text
    root.mkdir()
    (tmp_path / "away").rename(root / "m")
    wait_for(loader, lambda: "m" in loader.snapshot.models)
    root.rename(tmp_path / "away")
    wait_for(loader, troubles.now)
    assert loader.has_looked and "m" in loader.snapshot.models
