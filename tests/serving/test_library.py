"""The loader's memory: what was seen becomes what is known, and a snapshot that nobody can change."""

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from backboned.registry.directory import CheckpointDirectory
from backboned.registry.manifest import MANIFEST_NAME, Epoch, Manifest
from backboned.server.serving.library import Library
from backboned.server.serving.plan import DropState
from backboned.server.serving.snapshot import LoadedModel, Snapshot, State

MakeManifest = Callable[..., Manifest]
KEY = ("flowers", 1)


def serving(snapshot: Snapshot) -> dict[str, int]:
    """The version that answers by default, of each model that has one."""
    return {name: model.serving for name, model in snapshot.models.items() if model.serving}


@pytest.fixture
def library(tmp_path: Path) -> Library:
    (tmp_path / "flowers").mkdir()
    return Library(CheckpointDirectory(tmp_path))


@pytest.fixture
def folder(library: Library) -> Path:
    return library.directory.root / "flowers"


def look(library: Library, now: float = 0.0) -> None:
    library.update(library.directory.scan(), now)


def write(folder: Path, manifest: Manifest) -> Path:
    """Write a version with files that hold nothing; returns its folder."""
    version = folder / str(manifest.version)
    version.mkdir(exist_ok=True)
    for epoch in manifest.epochs:
        (version / epoch.file).write_bytes(b"x")
    manifest.write(version)
    return version


def states(library: Library) -> dict[int, State]:
    model = library.snapshot().models.get("flowers")
    return {n: v.state for n, v in model.versions.items()} if model else {}


def put(library: Library, load: Callable[..., LoadedModel], make_network: Callable[..., nn.Module], **of: Any) -> None:
    model = load(make_network(), **of)
    library.loaded[model.manifest.model, model.manifest.version] = model


def test_a_version_is_known_from_its_manifest_until_it_is_gone(
    library: Library, folder: Path, make_manifest: MakeManifest
) -> None:
    version = write(folder, make_manifest())
    look(library)
    assert library.manifests == {KEY: make_manifest()}
    assert states(library) == {1: State.AVAILABLE}
    (version / MANIFEST_NAME).unlink()
    look(library)
    assert not library.manifests and not library.snapshot().models


def test_a_manifest_is_read_again_when_it_changes(library: Library, folder: Path, make_manifest: MakeManifest) -> None:
    write(folder, make_manifest(complete=False))
    look(library)
    write(folder, make_manifest())
    look(library)
    assert library.manifests[KEY].complete


def test_a_manifest_that_can_no_longer_be_read_leaves_what_was_known(
    library: Library, folder: Path, make_manifest: MakeManifest
) -> None:
    version = write(folder, make_manifest())
    look(library)
    (version / MANIFEST_NAME).write_text("{")
    look(library)
    known = library.snapshot().models["flowers"].versions[1]
    assert known.state is State.QUARANTINED and known.reason.startswith("unreadable manifest.json")
    assert known.manifest == make_manifest() and library.known(frozenset()).quarantined == {KEY}
    write(folder, make_manifest())
    look(library)
    assert states(library) == {1: State.AVAILABLE}


def test_one_that_could_never_be_read_is_a_refused_file(library: Library, folder: Path) -> None:
    (folder / "1").mkdir()
    (folder / "1" / MANIFEST_NAME).write_text("{")
    look(library)
    (refused,) = library.snapshot().refused
    assert (refused.model, refused.path, refused.state) == ("flowers", folder / "1" / MANIFEST_NAME, State.QUARANTINED)
    assert not library.snapshot().models


@pytest.mark.parametrize("changed", ["epoch-0001.pt", "epoch-0001.pt.sig", MANIFEST_NAME, None])
def test_a_quarantine_is_lifted_when_the_file_or_its_signature_or_the_manifest_changes(
    library: Library, folder: Path, make_manifest: MakeManifest, changed: str | None
) -> None:
    version = write(folder, make_manifest())
    look(library)
    library.refuse(KEY, "it is broken")
    look(library)
    assert states(library) == {1: State.QUARANTINED}
    if changed is not None:
        (version / changed).touch()
        os.utime(version / changed, (1, 1))
    look(library)
    assert states(library) == {1: State.QUARANTINED if changed is None else State.AVAILABLE}


def test_what_is_loaded_is_serving_also_in_quarantine(
    library: Library, folder: Path, make_manifest: MakeManifest, load: Any, make_network: Any
) -> None:
    write(folder, make_manifest())
    look(library)
    put(library, load, make_network)
    assert states(library) == {1: State.SERVING}
    library.refuse(KEY, "a newer epoch is broken")
    snapshot = library.snapshot()
    known = snapshot.models["flowers"].versions[1]
    assert known.state is State.QUARANTINED and known.loaded is library.loaded[KEY]
    assert serving(snapshot) == {"flowers": 1}


def test_the_newest_complete_version_answers_and_completeness_is_that_of_the_manifest_on_disk(
    library: Library, folder: Path, make_manifest: MakeManifest, load: Any, make_network: Any
) -> None:
    for version, complete in ((1, True), (2, False), (3, False)):
        write(folder, make_manifest(version=version, complete=complete))
        put(library, load, make_network, version=version, complete=complete)
    look(library)
    assert serving(library.snapshot()) == {"flowers": 1}
    write(folder, make_manifest(version=2, complete=True))  # its job has ended
    look(library)
    assert serving(library.snapshot()) == {"flowers": 2}
    del library.loaded["flowers", 1], library.loaded["flowers", 2]
    assert serving(library.snapshot()) == {"flowers": 3}  # rather than nothing
    del library.loaded["flowers", 3]
    assert serving(library.snapshot()) == {}


def test_a_version_about_to_be_loaded_is_loading(library: Library, folder: Path, make_manifest: MakeManifest) -> None:
    write(folder, make_manifest())
    look(library)
    library.loading = {KEY}
    assert states(library) == {1: State.LOADING}


def test_a_drop_waits_and_its_time_begins_anew_when_it_changes(library: Library, folder: Path) -> None:
    path = folder / "mine.pt"
    path.write_bytes(b"x")
    look(library, now=1.0)
    library.settle(path, DropState.WAITING, "it is truncated")
    look(library, now=2.0)
    known = library.drops[path]
    assert (known.still_since, known.state, known.attempts, known.reason) == (
        1.0,
        DropState.WAITING,
        1,
        "it is truncated",
    )
    (refused,) = library.snapshot().refused
    assert (refused.path, refused.state, refused.size_bytes) == (path, State.LOADING, 1)
    path.write_bytes(b"xy")
    look(library, now=3.0)
    assert (library.drops[path].still_since, library.drops[path].attempts) == (3.0, 0)
    path.unlink()
    look(library, now=4.0)
    assert not library.drops and not library.snapshot().refused


def test_a_drop_that_is_settled_stays_so_until_it_or_what_is_beside_it_changes(library: Library, folder: Path) -> None:
    path = folder / "mine.pt"
    path.write_bytes(b"x")
    for state in (DropState.ADOPTED, DropState.QUARANTINED):
        look(library)
        library.settle(path, state, "reason")
        look(library)
        assert library.drops[path].state is state
        (folder / "classes.txt").write_text(state.value)
        look(library)
        assert library.drops[path].state is DropState.WAITING


def test_what_was_adopted_before_the_start_is_known_by_its_key(
    library: Library, folder: Path, make_manifest: MakeManifest
) -> None:
    path = folder / "mine.pt"
    path.write_bytes(b"x")
    (drop,) = library.directory.scan().drops.values()
    write(folder, make_manifest(version=1, adopted_from="mine.pt", adopted_key="older"))
    write(folder, make_manifest(version=2, adopted_from="mine.pt", adopted_key=drop.key))
    write(folder, make_manifest(version=3, adopted_from="other.pt", adopted_key=drop.key))
    look(library)
    assert library.drops[path].state is DropState.ADOPTED
    newest = library.adopted("flowers", "mine.pt")
    assert newest is not None and newest.version == 2
    assert library.adopted("birds", "mine.pt") is None
    again = Library(library.directory)
    os.utime(path, (1, 1))
    look(again)
    assert again.drops[path].state is DropState.WAITING


def test_what_was_written_and_loaded_just_now_is_not_read_again(
    library: Library, folder: Path, make_manifest: MakeManifest, load: Any, make_network: Any
) -> None:
    write(folder, make_manifest())
    model: LoadedModel = load(make_network())
    library.add(model)
    look(library)
    assert library.manifests[KEY] is model.manifest
    assert states(library) == {1: State.SERVING}


def test_refused_paths_are_told_under_the_name_of_their_folder_as_text(library: Library) -> None:
    folder = Path(os.fsdecode(os.fsencode(library.directory.root) + b"/\xff\xfe"))
    folder.mkdir()
    (folder / "mine.pt").write_bytes(b"x")
    look(library)
    (refused,) = library.snapshot().refused
    assert refused.model == "??" and refused.reason.encode()


def test_a_snapshot_is_not_touched_by_what_comes_after(
    library: Library, folder: Path, make_manifest: MakeManifest, load: Any, make_network: Any
) -> None:
    write(folder, make_manifest())
    look(library)
    put(library, load, make_network)
    before = library.snapshot()
    library.loaded.clear()
    other = replace(make_manifest(), version=2, epochs=(Epoch(1, "epoch-0001.pt", "b" * 64, 1, 0.0),))
    write(folder, other)
    look(library)
    assert list(before.models["flowers"].versions) == [1]
    assert before.models["flowers"].versions[1].loaded is not None
    with pytest.raises(TypeError):
        before.models["birds"] = before.models["flowers"]  # type: ignore[index]
