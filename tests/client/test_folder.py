"""What the client takes of a folder: the same layouts as the daemon."""

import json
import os
from pathlib import Path

import grpc
import pytest

from backboned import _client_folder
from backboned._client_folder import photos
from backboned.client import ClientError
from backboned.server.training.datasets import samples


def fill(folder: Path, *paths: str) -> Path:
    for path in paths:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(os.fsencode(path))
    return folder


def found(folder: Path) -> dict[str, tuple[tuple[str, ...], str]]:
    return {photo.path: (photo.labels, photo.part) for photo in photos(folder)}


def refused(folder: Path) -> str:
    with pytest.raises(ClientError) as caught:
        photos(folder)
    assert (caught.value.code, caught.value.field) == (grpc.StatusCode.INVALID_ARGUMENT, "folder")
    return caught.value.message


def test_images_are_the_files_that_the_daemon_takes_for_images() -> None:
    assert _client_folder.SUFFIXES == samples.SUFFIXES


def test_a_folder_a_class(tmp_path: Path) -> None:
    fill(tmp_path, "red/1.png", "red/deep/2.JPG", "blue/1.jpeg", "red/notes.txt", "red/.1.png", ".git/1.png", "1.png")
    (tmp_path / "red" / "empty.png").touch()
    (tmp_path / "red" / "loop").symlink_to(tmp_path / "red")
    (tmp_path / "red" / "nothing.png").symlink_to(tmp_path / "gone")
    assert found(tmp_path) == {
        "red/1.png": (("red",), "train"),
        "red/deep/2.JPG": (("red",), "train"),
        "blue/1.jpeg": (("blue",), "train"),
    }
    assert [p.file.read_bytes().decode() for p in photos(tmp_path)] == sorted(found(tmp_path))


def test_parts_that_have_a_folder_a_class_each(tmp_path: Path) -> None:
    fill(tmp_path, "train/red/1.png", "valid/red/2.png", "test/blue/3.png", "other/red/4.png")
    assert found(tmp_path) == {
        "train/red/1.png": (("red",), "train"),
        "valid/red/2.png": (("red",), "val"),
        "test/blue/3.png": (("blue",), "test"),
    }


def test_a_class_may_be_called_train(tmp_path: Path) -> None:
    fill(tmp_path, "train/1.png", "bus/1.png")
    assert found(tmp_path) == {"train/1.png": (("train",), "train"), "bus/1.png": (("bus",), "train")}


def test_a_manifest_says_all(tmp_path: Path) -> None:
    fill(tmp_path, "a.png", "b/c.png", "left/out.png")
    (tmp_path / "labels.csv").write_text("\ufefffile,labels,split\na.png, x| y|x ,train\nb/c.png,,Validation\n")
    expected = {"a.png": (("x", "y"), "train"), "b/c.png": ((), "val")}
    assert found(tmp_path) == expected
    lines = [{"file": "a.png", "labels": "x|y"}, {"file": "b/c.png", "labels": "", "split": "test"}]
    (tmp_path / "labels.jsonl").write_text("".join(json.dumps(line) + "\n\n" for line in lines))
    assert found(tmp_path) == expected | {"b/c.png": ((), "test")}


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("labels.csv", "file\na.png\n", "needs the columns 'file' and 'labels'"),
        ("labels.csv", "file,labels\n../a.png,x\n", "line 2: '../a.png' is no path within the folder"),
        ("labels.csv", "file,labels\n/a.png,x\n", "no path within"),
        ("labels.csv", "file,labels\nb.png,x\n", "line 2: there is no file 'b.png'"),
        ("labels.csv", "file,labels,split\na.png,x,tset\n", "split is 'tset', expected train, val or test"),
        ("labels.csv", 'file,labels\n"a.png,x\n', "can't be read"),
        ("labels.jsonl", "[]\n", "line 1 is no JSON object"),
        ("labels.jsonl", "{\n", "can't be read"),
    ],
)
def test_a_manifest_that_cannot_be_used_is_told_by_its_line(tmp_path: Path, name: str, content: str, said: str) -> None:
    fill(tmp_path, "a.png")
    (tmp_path / name).write_text(content)
    message = refused(tmp_path)
    assert said in message and "\n" not in message


def test_a_folder_without_images_is_refused(tmp_path: Path) -> None:
    fill(tmp_path, "1.png")
    assert "make a folder of images for each class" in refused(tmp_path)
    assert "there is no such folder" in refused(tmp_path / "gone")
    fill(tmp_path, os.fsdecode(b"red/\xff.png"))
    assert "is no UTF-8" in refused(tmp_path)
