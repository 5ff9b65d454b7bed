import json
from collections.abc import Callable
from pathlib import Path

import pytest

from backboned.registry import BackbonedError, ErrorKind
from backboned.registry.task import Task
from backboned.server.training.datasets import Dataset, resolve_dataset
from backboned.server.training.datasets.braces import expand

Members = dict[str, bytes]
Read = Callable[..., Dataset]
Refusal = Callable[..., str]
Write = Callable[..., Path]


def samples(labels: list[str | int], ending: str = "cls", first: int = 0) -> Members:
    """A shard's files: images, and their labels one after another."""
    members: Members = {}
    for i, label in enumerate(labels, first):
        members[f"{i:04}.jpg"] = b"image"
        members[f"{i:04}.{ending}"] = json.dumps({"label": label}).encode() if ending == "json" else str(label).encode()
    return members


def labels_of(dataset: Dataset) -> dict[str, str]:
    parts = (dataset.train, dataset.validation, dataset.test)
    return {s.path: "|".join(dataset.classes[i] for i in s.labels) for part in parts for s in part}


@pytest.mark.parametrize("ending", ["cls", "json", "txt"])
def test_a_label_is_a_name_in_a_file_beside_the_image(
    tmp_path: Path, read: Read, write_tar: Write, ending: str
) -> None:
    dataset = read(write_tar(tmp_path / "a.tar", samples(["cat", "dog", "dog", "cat\n"], ending)))
    assert labels_of(dataset) == {"0000.jpg": "cat", "0001.jpg": "dog", "0002.jpg": "dog", "0003.jpg": "cat"}
    assert all(dataset.read(s) == b"image" for s in dataset.train)


def test_numbers_are_classes_in_the_order_of_numbers(tmp_path: Path, read: Read, write_tar: Write) -> None:
    dataset = read(write_tar(tmp_path / "a.tar", samples([10, 2, 2, 10], "json")))
    assert dataset.classes == ("2", "10")


def test_numbers_are_named_by_a_file_of_classes(tmp_path: Path, read: Read, write_tar: Write) -> None:
    (tmp_path / "classes.txt").write_text("zebra\nlion\napple\n")
    dataset = read(write_tar(tmp_path / "a.tar", samples([0, 2, 2, 0])))
    assert dataset.classes == ("zebra", "apple")
    assert dataset.warnings[0] == "classes.txt names 1 classes that no image is of: they are left out"
    inside = write_tar(tmp_path / "b.tar", {"classes.txt": b"x\ny", **samples([0, 1, 1, 0])})
    (tmp_path / "classes.txt").unlink()
    assert read(inside).classes == ("x", "y")


@pytest.mark.parametrize("location", ["shards", "shards/flowers-{00..02}.tar", "shards/flowers-{00,01,02}.tar"])
def test_many_shards_are_one_dataset(tmp_path: Path, read: Read, write_tar: Write, location: str) -> None:
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "README.md").touch()
    for i in range(3):
        write_tar(tmp_path / "shards" / f"flowers-{i:02}.tar", samples(["cat", "dog"]))
    dataset = read(resolve_dataset(location, [tmp_path]))
    assert labels_of(dataset) == {
        f"flowers-{i:02}.tar/{n:04}.jpg": ["cat", "dog"][n] for i in range(3) for n in range(2)
    }


def test_shards_may_be_named_for_their_part(tmp_path: Path, read: Read, write_tar: Write) -> None:
    (tmp_path / "shards").mkdir()
    for name in ("train-000", "train-001", "val-000", "test_0"):
        write_tar(tmp_path / "shards" / f"{name}.tar", samples(["cat", "dog"]))
    dataset = read(tmp_path / "shards")
    assert [s.path for s in dataset.validation] == ["val-000.tar/0000.jpg", "val-000.tar/0001.jpg"]
    assert [s.path for s in dataset.test] == ["test_0.tar/0000.jpg", "test_0.tar/0001.jpg"]
    assert len(dataset.train) == 4


def test_compressed_shards_are_read_too(tmp_path: Path, read: Read, write_tar: Write) -> None:
    for i in range(2):
        write_tar(tmp_path / f"a{i}.tar.gz", samples(["cat", "dog"]), "w:gz")
    assert len(labels_of(read(tmp_path / "a{0..1}.tar.gz"))) == 4


def test_several_labels_are_for_a_multi_label_task(
    tmp_path: Path, read: Read, refusal: Refusal, write_tar: Write
) -> None:
    members: Members = {}
    for i, labels in enumerate([["sea", "sun"], [], ["sun"], ["sea"]]):
        members |= {f"{i}.png": b"", f"{i}.json": json.dumps({"labels": labels}).encode()}
    file = write_tar(tmp_path / "a.tar", members)
    assert sorted(labels_of(read(file, task=Task.MULTI_LABEL)).values()) == ["", "sea", "sea|sun", "sun"]
    assert "'0.json': 2 labels, expected 1" in refusal(file)


def test_what_belongs_to_no_image_is_skipped(tmp_path: Path, read: Read, write_tar: Write) -> None:
    members = samples(["cat", "dog", "dog", "cat"])
    members |= {
        "0000.seg.png": b"",
        "0000.npy": b"",
        "0009.cls": b"cat",
        "folder/0001.JPG": b"",
        "folder/0001.cls": b"dog",
    }
    dataset = read(write_tar(tmp_path / "a.tar", members))
    assert {(s.path, s.reason) for s in dataset.skipped} == {
        ("0000.seg.png", "a second image of its sample"),
        ("0000.npy", "not an image or a label"),
        ("0009.cls", "its sample has no image"),
    }
    assert labels_of(dataset)["folder/0001.JPG"] == "dog"


@pytest.mark.parametrize(
    ("members", "says"),
    [
        ({"1.jpg": b""}, "'1' has no label: expected 1.cls, .json or .txt beside the image"),
        ({"1.jpg": b"", "1.cls": b""}, "'1.cls': the label is empty"),
        ({"1.jpg": b"", "1.cls": b"\xff"}, "'1.cls': 'utf-8' codec can't decode"),
        ({"1.jpg": b"", "1.json": b"{"}, "'1.json': Expecting property name"),
        ({"1.jpg": b"", "1.json": b"[1]"}, "'1.json': expected an object with 'label'"),
        ({"1.jpg": b"", "1.json": b'{"label": true}'}, "'1.json': expected an object with 'label'"),
        ({"1.jpg": b"", "1.json": b'{"label": -1}'}, "'1.json': expected an object with 'label'"),
        ({f"{i}.jpg": b"" for i in range(9)}, "and 6 samples more"),
    ],
)
def test_samples_that_cannot_be_used_are_refused_by_name(
    tmp_path: Path, refusal: Refusal, write_tar: Write, members: Members, says: str
) -> None:
    assert says in refusal(write_tar(tmp_path / "a.tar", {"a.jpg": b"", "a.cls": b"cat", **members}))


@pytest.mark.parametrize(
    ("classes", "says"),
    [("cat", "class 1, but classes.txt names 1"), ("cat\ncat", "has 'cat' twice"), ("\xff", "no text in UTF-8")],
)
def test_numbers_beyond_the_classes_are_refused(
    tmp_path: Path, refusal: Refusal, write_tar: Write, classes: str, says: str
) -> None:
    (tmp_path / "classes.txt").write_bytes(classes.encode("latin-1"))
    assert says in refusal(write_tar(tmp_path / "a.tar", samples([0, 1])))


def test_notes_beside_images_in_class_folders_make_no_shard(tmp_path: Path, read: Read, write_tar: Write) -> None:
    members = {f"{name}/{i}.{ending}": b"{}" for name in "ab" for i in range(3) for ending in ("jpg", "json")}
    assert read(write_tar(tmp_path / "a.tar", members)).classes == ("a", "b")


def test_a_missing_shard_is_named(tmp_path: Path, write_tar: Write) -> None:
    write_tar(tmp_path / "a0.tar", samples(["cat", "dog"]))
    with pytest.raises(BackbonedError, match=r"means 3 files, and there is no 'a1\.tar'") as caught:
        resolve_dataset("a{0..2}.tar", [tmp_path])
    assert caught.value.kind is ErrorKind.NOT_FOUND


def test_a_shard_that_is_a_link_out_is_denied(tmp_path: Path, write_tar: Write) -> None:
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "a0.tar").symlink_to(write_tar(tmp_path / "secret.tar", samples(["cat", "dog"])))
    with pytest.raises(BackbonedError, match="a link that leads out") as caught:
        resolve_dataset("a{0..0}.tar", [tmp_path / "root"])
    assert caught.value.kind is ErrorKind.PERMISSION_DENIED


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("a.tar", ["a.tar"]),
        ("a{8..10}.tar", ["a8.tar", "a9.tar", "a10.tar"]),
        ("a{008..010}", ["a008", "a009", "a010"]),
        ("{a,b}{0..1}", ["a0", "a1", "b0", "b1"]),
    ],
)
def test_braces_mean_many_names(pattern: str, names: list[str]) -> None:
    assert expand(pattern) == names


@pytest.mark.parametrize("pattern", ["a{", "a}{b", "a{}", "a{0..}", "a{3..1}", "a{b}", "{a,}", "{{0..1}}"])
def test_braces_that_mean_nothing_are_refused(pattern: str) -> None:
    with pytest.raises(BackbonedError, match="can't be read"):
        expand(pattern)


@pytest.mark.parametrize("pattern", ["a{0..99999999999999999999999}", "{0..999}{0..999}"])
def test_braces_that_mean_too_much_are_refused(pattern: str) -> None:
    with pytest.raises(BackbonedError, match="at most"):
        expand(pattern)
