import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from backboned.registry.task import Task
from backboned.server.training.datasets import Dataset

Read = Callable[..., Dataset]
Refusal = Callable[..., str]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A dataset with `images/0.jpg` to `7.jpg` and no labels yet."""
    (tmp_path / "photos" / "images").mkdir(parents=True)
    for i in range(8):
        (tmp_path / "photos" / "images" / f"{i}.jpg").touch()
    return tmp_path / "photos"


def csv(folder: Path, labels: str, name: str = "labels.csv") -> Path:
    """One line an image, with the labels given one after another."""
    rows = "".join(f"images/{i}.jpg,{label}\n" for i, label in enumerate(labels.split()))
    (folder / name).write_text(f"file,labels\n{rows}")
    return folder / name


def json_lines(folder: Path, rows: list[Any]) -> Path:
    (folder / "labels.jsonl").write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return folder / "labels.jsonl"


@pytest.mark.parametrize("task", [Task.SINGLE_LABEL, Task.BINARY])
def test_one_label_each_is_enough_for_any_task(folder: Path, read: Read, task: Task) -> None:
    csv(folder, "no no yes yes no yes no yes")
    dataset = read(folder, task=task)
    assert dataset.classes == ("no", "yes")
    assert {s.path: s.labels for s in (*dataset.train, *dataset.validation)}["images/2.jpg"] == (1,)
    assert dataset.warnings == ("fewer than 5 training images of 'no' (3), 'yes' (3)",)


def test_a_manifest_may_be_named_itself_whatever_its_name(folder: Path, read: Read) -> None:
    csv(folder, "a a a a b b b b")
    other = csv(folder, "x x y y z z", name="by colour.csv")
    assert read(folder).classes == ("a", "b")
    assert read(other).classes == ("x", "y", "z")


def test_json_lines_say_the_same(folder: Path, read: Read) -> None:
    rows = [{"file": f"images/{i}.jpg", "labels": ["b", "a"][: i % 3], "more": i} for i in range(6)]
    rows += [{"file": "images/6.jpg", "labels": "a| b"}]
    dataset = read(json_lines(folder, rows), task=Task.MULTI_LABEL)
    labels = {s.path[-5]: s.labels for s in (*dataset.train, *dataset.validation)}
    assert labels == {"0": (), "1": (1,), "2": (0, 1), "3": (), "4": (1,), "5": (0, 1), "6": (0, 1)}


def test_json_lines_may_tell_the_part(folder: Path, read: Read) -> None:
    parts = ["train", "train", "train", "train", "val", "val", "test", "test"]
    rows = [{"file": f"images/{i}.jpg", "labels": ["ab"[i % 2]], "split": part} for i, part in enumerate(parts)]
    dataset = read(json_lines(folder, rows))
    assert [s.path for s in dataset.test] == ["images/6.jpg", "images/7.jpg"]
    assert len(dataset.validation) == 2


def test_the_manifest_goes_before_folders_and_that_is_told(folder: Path, read: Read) -> None:
    for name in ("cats", "dogs"):
        (folder / name).mkdir()
    csv(folder, "a a a a b b b b")
    dataset = read(folder)
    assert dataset.classes == ("a", "b")
    assert dataset.warnings[0] == ("labels are those in labels.csv; the 3 folders beside it, such as 'cats', give none")


@pytest.mark.parametrize(
    ("labels", "says"),
    [
        ("a a b |", "line 5: 0 labels, expected 1: several are for a multi-label task"),
        ("a a b a|b", "line 5: 2 labels, expected 1"),
        ("a a a", "one class only (a): add images of something else, as another label"),
        ("a a b", "class 'b' has 1 image"),
    ],
)
def test_labels_that_do_not_fit_the_task_are_refused(folder: Path, refusal: Refusal, labels: str, says: str) -> None:
    csv(folder, labels)
    assert says in refusal(folder)


def test_a_binary_task_needs_two_labels(folder: Path, refusal: Refusal) -> None:
    csv(folder, "a a b b c c")
    assert "exactly two labels, negative and positive, and it has 3 (a, b, c)" in refusal(folder, task=Task.BINARY)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{", "line 2: no JSON"),
        ("[" * 100_000, "line 2: no JSON"),
        ("[1]", "line 2: no object"),
        ('{"file": "images/1.jpg"}', "line 2: 'labels' must be a list of strings"),
        ('{"file": "images/1.jpg", "labels": [1]}', "line 2: 'labels' must be a list of strings"),
        ('{"file": 7, "labels": []}', "line 2: 'file' and 'split' must be strings"),
        ('{"labels": ["a"]}', "line 2: no file is named"),
        ('{"file": "../1.jpg", "labels": ["a"]}', "line 2: '../1.jpg' must be a path within the dataset"),
        ('{"file": "images/1.jpg", "labels": ["\\ud800"]}', "line 2: its labels are no text"),
        ('{"file": "images/\\ud800.jpg", "labels": ["a"]}', "line 2: no file is named"),
        ('{"file": "images/1.jpg", "labels": ["a"], "split": "val"}', "line 1: split is '', expected train"),
    ],
)
def test_json_lines_that_cannot_be_used_are_refused_by_line(
    folder: Path, refusal: Refusal, line: str, says: str
) -> None:
    (folder / "labels.jsonl").write_text('{"file": "images/0.jpg", "labels": ["a"]}\n' + line)
    assert says in refusal(folder)


@pytest.mark.parametrize(("name", "kind"), [("labels.csv", "CSV"), ("labels.jsonl", "JSON lines")])
def test_another_encoding_is_refused(folder: Path, refusal: Refusal, name: str, kind: str) -> None:
    (folder / name).write_bytes("file,labels\nimages/0.jpg,café\n".encode("latin-1"))
    assert f"{name} is no {kind} in UTF-8" in refusal(folder)


def test_two_manifests_are_refused(folder: Path, refusal: Refusal) -> None:
    csv(folder, "a b")
    json_lines(folder, [])
    assert "both labels.csv and labels.jsonl" in refusal(folder)


def test_files_behind_links_that_lead_out_are_skipped(
    folder: Path, read: Read, tmp_path_factory: pytest.TempPathFactory
) -> None:
    outside = tmp_path_factory.mktemp("outside") / "secret.jpg"
    outside.touch()
    (folder / "images" / "0.jpg").unlink()
    (folder / "images" / "0.jpg").symlink_to(outside)
    csv(folder, "a a a b b b")
    dataset = read(folder)
    assert [(s.path, s.reason) for s in dataset.skipped] == [
        ("images/0.jpg", "a link that leads out of the data roots")
    ]
    assert len(dataset.train) + len(dataset.validation) == 5
