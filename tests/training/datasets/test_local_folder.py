import os
from collections.abc import Callable
from pathlib import Path

import pytest

from backboned.registry import BackbonedError
from backboned.server.training.datasets import Dataset, Sample
from backboned.server.training.datasets import sources as sources_module
from backboned.server.training.events import JobEventPayload, from_json, to_json
from backboned.server.training.finetune import finetune

Read = Callable[..., Dataset]
Write = Callable[..., Path]


def test_names_that_are_no_text_are_skipped_and_can_be_told(tmp_path: Path, read: Read) -> None:
    for name in (b"a/1.jpg", b"a/2.jpg", b"b/1.jpg", b"b/2.jpg", b"b/caf\xe9.jpg", b"\xff/1.jpg"):
        path = Path(os.fsdecode(os.fsencode(tmp_path / "photos") + b"/" + name))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    dataset = read(tmp_path / "photos")
    assert dataset.classes == ("a", "b")
    assert [(s.path, s.reason) for s in dataset.skipped] == [
        ("b/caf\\xe9.jpg", "its name is no UTF-8"),
        ("\\xff", "its name is no UTF-8"),
    ]
    assert from_json(to_json(dataset.report())) == dataset.report()


def test_a_huge_file_is_not_read(tmp_path: Path, read: Read, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a/1.jpg", "a/2.jpg", "b/1.jpg", "b/2.jpg"):
        (tmp_path / "photos" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "photos" / name).touch()
    os.truncate(tmp_path / "photos" / "a" / "1.jpg", 2**40)  # a hole: it takes no room
    with pytest.raises(BackbonedError, match=r"'a/1\.jpg' has 1099\.5 GB"):
        read(tmp_path / "photos").read(Sample("a/1.jpg", (0,)))
    assert sources_module.MAX_FILE_BYTES == 2**30


def test_a_job_on_an_archive_does_what_one_on_its_folder_does(
    tmp_path: Path, paint: Write, make_spec: Callable[..., object], write_tar: Write
) -> None:
    folder = paint(tmp_path / "data" / "colours", {"red": 6, "blue": 6})
    members = {f"{p.parent.name}/{p.name}": p.read_bytes() for p in folder.glob("*/*.png")}
    archive = write_tar(tmp_path / "data" / "colours.tar.gz", members, "w:gz")
    told: list[list[JobEventPayload]] = []
    for dataset in (folder, archive):
        events: list[JobEventPayload] = []
        spec = make_spec(dataset, max_epochs=2)
        finetune(spec, events.append, lambda: None)  # type: ignore[arg-type]
        told.append([e for e in events if type(e).__name__ == "DatasetReport"])
    assert told[0] == told[1]
