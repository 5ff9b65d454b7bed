"""Compiled stages on disk: found again by all that they depend on, and never used damaged."""

import json
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch

from backboned.server.compute.artefacts import Artefact, ArtefactKey, ArtefactStore, platform_of
from backboned.server.compute.device import Device

KEY = ArtefactKey("digits", "stem", "d" * 64, (8, 3, 16, 16), "float32", "cpu AVX512 0123")
OTHERS: dict[str, object] = {
    "backbone": "other",
    "stage": "layer1",
    "digest": "e" * 64,
    "shape": (4, 3, 16, 16),
    "precision": "bfloat16",
    "platform": "cpu AVX2 0123",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "compiled"


@pytest.fixture
def store(folder: Path) -> ArtefactStore:
    return ArtefactStore(folder, limit_bytes=10_000)


def add(store: ArtefactStore, key: ArtefactKey, content: bytes = b"library", seconds: float = 0.25) -> Artefact:
    with store.work_folder() as work:
        library = work / "made.so"
        library.write_bytes(content)
        return store.add(key, Artefact(library, seconds))


def test_what_was_added_is_found(store: ArtefactStore, folder: Path) -> None:
    assert store.find(KEY) is None
    added = add(store, KEY)
    assert store.find(KEY) == ArtefactStore(folder, limit_bytes=1).find(KEY) == added
    assert added.library.read_bytes() == b"library" and added.seconds == 0.25
    assert sorted(path.name for path in folder.iterdir()) == [f"{KEY.name}.json", f"{KEY.name}.so"]
    told = json.loads((folder / f"{KEY.name}.json").read_text())
    assert (told["backbone"], told["stage"], told["torch"]) == ("digits", "stem", torch.__version__)
    assert KEY.bucket == 8


@pytest.mark.parametrize("changed", [field.name for field in fields(ArtefactKey)])
def test_it_is_found_for_nothing_else(store: ArtefactStore, changed: str) -> None:
    add(store, KEY)
    other = replace(KEY, **{changed: OTHERS[changed]})  # type: ignore[arg-type]
    assert store.find(other) is None and other.name != KEY.name


def test_another_torch_finds_nothing(store: ArtefactStore, monkeypatch: pytest.MonkeyPatch) -> None:
    add(store, KEY)
    monkeypatch.setattr(torch, "__version__", "99.0")
    assert store.find(KEY) is None


def test_what_is_made_again_takes_the_others_place(store: ArtefactStore) -> None:
    add(store, KEY, b"old", 1.0)
    add(store, KEY, b"new", 2.0)
    found = store.find(KEY)
    assert found is not None and found.library.read_bytes() == b"new" and found.seconds == 2.0


def test_a_later_measurement_replaces_the_seconds_alone(store: ArtefactStore) -> None:
    added = add(store, KEY, seconds=1.0)
    store.retime(KEY, 0.5)
    assert store.find(KEY) == replace(added, seconds=0.5)
    with pytest.raises(FileNotFoundError):
        store.retime(replace(KEY, stage="other"), 0.5)


def _cut(library: Path, description: Path) -> None:
    library.write_bytes(library.read_bytes()[:-1])


def _empty(library: Path, description: Path) -> None:
    description.write_bytes(b"")


def _other(library: Path, description: Path) -> None:
    description.write_text("[1]")


def _without(library: Path, description: Path) -> None:
    description.write_text(json.dumps({"sha256": json.loads(description.read_text())["sha256"]}))


def _a_folder(library: Path, description: Path) -> None:
    library.unlink()
    library.mkdir()


@pytest.mark.parametrize("damage", [_cut, _empty, _other, _without, _a_folder])
def test_what_is_damaged_is_not_used_and_can_be_made_again(
    store: ArtefactStore, folder: Path, damage: Callable[[Path, Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    library = add(store, KEY).library
    damage(library, library.with_suffix(".json"))
    assert store.find(KEY) is None
    assert str(library) in caplog.text
    assert not library.with_suffix(".json").exists() and not library.is_file()
    if not library.exists():
        assert add(store, KEY) == store.find(KEY)


@pytest.mark.parametrize("suffix", [".so", ".json"])
def test_half_of_it_is_nothing(store: ArtefactStore, suffix: str) -> None:
    add(store, KEY).library.with_suffix(suffix).unlink()
    assert store.find(KEY) is None


def test_what_was_not_used_for_longest_makes_room(folder: Path) -> None:
    store = ArtefactStore(folder, limit_bytes=250)
    keys = [replace(KEY, stage=name) for name in ("a", "b", "c", "d")]
    for age, key in enumerate(keys[:2]):
        os.utime(add(store, key, bytes(100)).library, (1000 + age, 1000 + age))
    assert store.find(keys[0]) is not None  # so "b" is the one that was not used
    add(store, keys[2], bytes(100))
    assert [store.find(key) is not None for key in keys[:3]] == [True, False, True]
    assert len(list(folder.iterdir())) == 4
    add(store, keys[3], bytes(1000))  # more than all the room there is: it stays alone
    assert [store.find(key) is not None for key in keys] == [False, False, False, True]


def test_work_folders_go_and_so_do_those_of_a_process_that_was_killed(store: ArtefactStore, folder: Path) -> None:
    with store.work_folder():
        pass
    (folder / "work-left").mkdir()
    (folder / "work-left" / "half.so").touch()
    with store.work_folder() as work:
        assert work.parent == folder and not (folder / "work-left").exists()
        (work / "half.so").touch()
    assert list(folder.iterdir()) == []
    assert folder.stat().st_mode & 0o077 == 0  # code that is run must be nobody else's to write


def test_what_was_never_made_is_told(store: ArtefactStore) -> None:
    with store.work_folder() as work, pytest.raises(OSError, match="never-made"):
        store.add(KEY, Artefact(work / "never-made.so", 1.0))
    assert store.find(KEY) is None


def test_many_threads_look_at_once(store: ArtefactStore) -> None:
    added = add(store, KEY, os.urandom(100_000))
    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(lambda _: store.find(KEY), range(64))) == {added}


def test_a_platform_is_the_machines_own_and_the_same_each_time(
    cpu: Device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = set()
    for flags in ("fpu avx2", "fpu avx2 avx512f", "fpu avx512f avx2", "avx2"):
        (tmp_path / "cpuinfo").write_text(f"flags\t: {flags}\n")
        monkeypatch.setattr("backboned.server.compute.device.CPU_INFO", tmp_path / "cpuinfo")
        names.add(platform_of(cpu))
        assert platform_of(cpu).startswith("cpu ")
    assert len(names) == 2  # what has nothing to do with arithmetic, and the order, make no difference
