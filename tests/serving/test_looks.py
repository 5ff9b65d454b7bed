"""When the loader looks, at what, and what it makes of a directory that comes and goes."""

import os
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from backboned.registry.directory import CheckpointDirectory
from backboned.registry.look import Part, Seen
from backboned.registry.weights import seeded_state
from backboned.server.serving.aliases import Aliases
from backboned.server.serving.budget import Arrival
from backboned.server.serving.loader import Loader
from backboned.server.serving.plan import Limits
from backboned.server.serving.snapshot import KnownModel, State
from backboned.server.troubles import TroubleKind, Troubles
from tests.serving.rooms import PATIENCE_SECONDS, Room, StartLoader, catalogue, state, wait_for, write_head


class SlowWeights:
    """What a plugin can fetch, once it is allowed to."""

    def __init__(self, values: Mapping[str, torch.Tensor]) -> None:
        self.values = values
        self.begun, self.allowed = threading.Event(), threading.Event()

    def get_state_dict(self, **_: Any) -> Mapping[str, torch.Tensor]:
        self.begun.set()
        assert self.allowed.wait(PATIENCE_SECONDS)
        return self.values


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
    start_loader: StartLoader, troubles: Troubles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for seed, model in enumerate(("bystander", "there")):
        (tmp_path / model).mkdir()
        torch.save(state(seed, 3), tmp_path / model / "model.pt")
    loader = start_loader(catalogue(), scan_interval_seconds=3600.0)
    deadline = time.monotonic() + PATIENCE_SECONDS

    def wait_until(condition: Callable[[], bool]) -> None:
        while not condition():
            assert time.monotonic() < deadline, "it did not happen in time"
            time.sleep(0.01)

    def wait_for_version(model: str, version: int) -> None:
        wait_until(lambda: loader.snapshot.models.get(model, KnownModel("", {})).serving == version)

    wait_for_version("bystander", 1)
    wait_for_version("there", 1)
    looked_at: set[str] = set()
    scan_again = CheckpointDirectory.scan_again

    def noted(self: CheckpointDirectory, before: Seen, parts: frozenset[Part]) -> Seen:
        looked_at.update({model for model, _ in parts})
        return scan_again(self, before, parts)

    with monkeypatch.context() as patch:
        patch.setattr(CheckpointDirectory, "scan", None)
        patch.setattr(CheckpointDirectory, "scan_again", noted)
        (tmp_path / "marker").mkdir()
        wait_until(lambda: "marker" in looked_at)  # events keep their order: those of adopting both came before
        looked_at.clear()
        (tmp_path / "new").mkdir()
        torch.save({"backbone": "digits", "state_dict": state(2, 3)}, tmp_path / "new" / "model.pt")
        wait_for_version("new", 1)
        torch.save(state(3, 3), tmp_path / "there" / "model.pt")
        wait_for_version("there", 2)
        shutil.rmtree(tmp_path / "new")
        wait_until(lambda: "new" not in loader.snapshot.models)
    assert looked_at == {"new", "there"}
    assert not troubles.now()


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
