import os
from collections.abc import Callable
from pathlib import Path

import pytest

from backboned.registry import BackbonedError, ErrorKind
from backboned.registry.task import Task
from backboned.server.training.datasets import Access, Dataset, read_dataset
from backboned.server.training.options import TrainingOptions

Fill = Callable[[dict[str, int]], Path]


@pytest.fixture
def fill(tmp_path: Path) -> Fill:
    """Makes folders with so many files that are images by name: the scan looks no further."""

    def make(counts: dict[str, int]) -> Path:
        for name, count in counts.items():
            (tmp_path / "photos" / name).mkdir(parents=True)
            for i in range(count):
                (tmp_path / "photos" / name / f"{i:03}.jpg").write_bytes(b"an image, says its name")
        return tmp_path / "photos"

    return make


def read(folder: Path, **options: object) -> Dataset:
    return read_dataset(folder, TrainingOptions(**options), Access([folder.parent]))  # type: ignore[arg-type]


def refusal(folder: Path, **options: object) -> str:
    with pytest.raises(BackbonedError) as caught:
        read(folder, **options)
    assert caught.value.kind is ErrorKind.INVALID_ARGUMENT
    assert caught.value.field == "dataset"
    assert str(folder) in caught.value.message
    return caught.value.message


def test_a_folder_a_class_is_split_with_images_of_every_class_on_either_side(fill: Fill) -> None:
    dataset = read(fill({"rose": 10, "daisy": 2, "tulip": 40}))
    assert dataset.classes == ("daisy", "rose", "tulip")
    counts = [(c.label, c.train_images, c.validation_images) for c in dataset.report().classes]
    assert counts == [("daisy", 1, 1), ("rose", 8, 2), ("tulip", 32, 8)]
    assert not {s.path for s in dataset.train} & {s.path for s in dataset.validation}


def test_a_split_depends_on_the_seed_alone(fill: Fill) -> None:
    folder = fill({"a": 50, "b": 50})
    assert read(folder) == read(folder)
    assert read(folder, seed=1).validation != read(folder).validation
    assert len(read(folder, validation_fraction=0.5).validation) == 50


def test_a_new_image_moves_few_others(fill: Fill) -> None:
    folder = fill({"a": 50, "b": 50})
    before = {s.path for s in read(folder).validation}
    (folder / "a" / "new.jpg").touch()
    assert len(before & {s.path for s in read(folder).validation}) >= len(before) - 1


@pytest.mark.parametrize("name", ["val", "valid", "validation"])
def test_a_given_validation_folder_is_used_as_it_is(fill: Fill, name: str) -> None:
    folder = fill({"train/a": 3, "train/b": 1, f"{name}/a": 2, f"{name}/b": 1, "more/a": 5})
    dataset = read(folder)
    assert [s.path for s in dataset.train] == [
        "train/a/000.jpg",
        "train/a/001.jpg",
        "train/a/002.jpg",
        "train/b/000.jpg",
    ]
    assert [s.labels for s in dataset.validation] == [(0,), (0,), (1,)]
    assert [(s.path, s.reason) for s in dataset.skipped] == [
        ("more", "neither train/ nor val/ nor test/ with class folders")
    ]


def test_a_train_folder_alone_is_split(fill: Fill) -> None:
    dataset = read(fill({"train/a": 5, "train/b": 5}))
    assert (len(dataset.train), len(dataset.validation)) == (8, 2)


def test_a_class_may_be_called_train(fill: Fill) -> None:
    assert read(fill({"bus": 5, "train": 5})).classes == ("bus", "train")


def test_files_that_are_no_images_are_skipped_with_the_reason_and_hidden_ones_silently(fill: Fill) -> None:
    folder = fill({"a": 2, "b": 2, ".cache": 3})
    (folder / "LICENSE.txt").touch()
    (folder / "stray.jpg").touch()
    (folder / "a" / "notes.txt").touch()
    (folder / "a" / "README").touch()
    (folder / "a" / ".DS_Store").touch()
    (folder / "b" / "LOUD.JPEG").touch()
    (folder / "b" / "more").mkdir()
    (folder / "b" / "more" / "deep.webp").touch()
    dataset = read(folder)
    assert {(s.path, s.reason) for s in dataset.skipped} == {
        ("LICENSE.txt", "not an image: its name ends in '.txt'"),
        ("stray.jpg", "in no class's folder"),
        ("a/notes.txt", "not an image: its name ends in '.txt'"),
        ("a/README", "not an image: its name has no ending"),
    }
    assert {"b/LOUD.JPEG", "b/more/deep.webp"} <= {s.path for s in (*dataset.train, *dataset.validation)}


def test_links_are_followed_within_the_roots_only(fill: Fill, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = fill({"a": 2, "b": 2})
    outside = tmp_path_factory.mktemp("outside")
    (outside / "secret.jpg").touch()
    (folder / "a" / "out.jpg").symlink_to(outside / "secret.jpg")
    (folder / "a" / "in.jpg").symlink_to(folder / "b" / "000.jpg")
    (folder / "a" / "gone.jpg").symlink_to(folder / "absent.jpg")
    (folder / "a" / "loop").symlink_to(folder / "a")
    (folder / "c").symlink_to(outside)
    dataset = read(folder)
    assert dataset.classes == ("a", "b")
    assert {(s.path, s.reason) for s in dataset.skipped} == {
        ("a/out.jpg", "a link that leads out of the data roots"),
        ("a/gone.jpg", "a link to nothing"),
        ("a/loop", "a link to a folder that it is in"),
        ("c", "a link that leads out of the data roots"),
    }
    assert "a/in.jpg" in {s.path for s in (*dataset.train, *dataset.validation)}


@pytest.mark.parametrize(
    ("counts", "says"),
    [
        ({".hidden": 3}, "no class folders; make a folder of images for each class"),
        ({"a": 5}, "one class only (a)"),
        ({"a": 5, "b": 0}, "'b' has no images"),
        ({"a": 5, "b": 1}, "'b' has 1 image"),
        ({"train/a": 5, "train/b": 5, "val/a": 1, "val/c": 1}, "val/ has the class 'c', which train/ hasn't"),
        ({"train/a": 5, "train/b": 0, "val/a": 1, "val/b": 1}, "'b' in train/ has no images"),
        ({"val/a": 5, "val/b": 5}, "has val/ and no train/"),
        ({"train/a": 5, "train/b": 5, "val/a": 1, "valid/a": 1}, "both val/ and valid/"),
        ({"train/a": 5, "train/b": 5, "val": 0}, "no class folders in val/"),
    ],
)
def test_a_layout_that_cannot_be_used_is_refused_with_the_remedy(fill: Fill, counts: dict[str, int], says: str) -> None:
    assert says in refusal(fill(counts))


def test_images_without_class_folders_are_refused(fill: Fill) -> None:
    folder = fill({".hidden": 0})
    for i in range(5):
        (folder / f"{i}.jpg").touch()
    assert "5 images lie there directly" in refusal(folder)


def test_a_binary_task_needs_two_folders_of_which_the_first_is_negative(fill: Fill) -> None:
    folder = fill({"weed": 4, "crop": 4})
    dataset = read(folder, task=Task.BINARY)
    assert dataset.classes == ("crop", "weed")
    assert dataset.targets(dataset.train).tolist() == [0, 0, 0, 1, 1, 1]
    (folder / "third").mkdir()
    (folder / "third" / "0.jpg").touch()
    assert "exactly two class folders" in refusal(folder, task=Task.BINARY)


def test_warnings_tell_what_a_person_should_know(fill: Fill) -> None:
    warnings = read(fill({"Rose": 100, "rose": 3, "tulip": 50})).warnings
    assert [w.split(":")[0] for w in warnings] == [
        "strong imbalance",
        "fewer than 5 training images of 'rose' (2)",
        "classes that differ by case only",
    ]


def test_a_class_that_nothing_validates_is_warned_of(fill: Fill) -> None:
    assert read(fill({"train/a": 5, "train/b": 5, "val/a": 2})).warnings == ("no validation images of 'b'",)


def test_the_fingerprint_changes_with_the_files(fill: Fill) -> None:
    folder = fill({"a": 3, "b": 3})
    first = read(folder).fingerprint
    assert read(folder).fingerprint == first
    os.utime(folder / "a" / "000.jpg", ns=(1, 1))
    assert read(folder).fingerprint != first


def test_labels_are_read_from_a_csv_file(fill: Fill) -> None:
    folder = fill({"images": 4})
    (folder / "labels.csv").write_text(
        "\ufefffile,labels,split\n"
        "images/000.jpg,sun|sea,train\nimages/001.jpg,,train\n\n"
        "images/002.jpg, sea ,Train\nimages/003.jpg,sun|sun,valid\n",
        encoding="utf-8",
    )
    dataset = read(folder, task=Task.MULTI_LABEL)
    assert dataset.classes == ("sea", "sun")
    assert dataset.targets(dataset.train).tolist() == [[1, 1], [0, 0], [1, 0]]
    assert dataset.targets(dataset.validation).tolist() == [[0, 1]]


def test_labels_without_a_split_are_split_by_their_rarest_label(fill: Fill) -> None:
    folder = fill({"images": 30})
    lines = [f"images/{i:03}.jpg,{'common|rare' if i < 4 else 'common'}" for i in range(30)]
    (folder / "labels.csv").write_text("file,labels\n" + "\n".join(lines), encoding="utf-8")
    report = read(folder, task=Task.MULTI_LABEL).report()
    assert [(c.label, c.train_images, c.validation_images) for c in report.classes] == [
        ("common", 24, 6),
        ("rare", 3, 1),
    ]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("name,tags\n", "needs the columns 'file' and 'labels' in its first line, it has name, tags"),
        ("", "it has none"),
        ("file,labels\n", "names no label"),
        ("file,labels\nimages/000.jpg,\n", "names no label"),
        ("file,labels\nimages/000.jpg,a\nimages/404.jpg,a\n", "line 3: there is no file 'images/404.jpg'"),
        ("file,labels\n../images/000.jpg,a\n", "line 2: '../images/000.jpg' must be a path within the dataset"),
        ("file,labels\n/etc/x.jpg,a\n", "line 2: '/etc/x.jpg' must be a path within the dataset"),
        ("file,labels\nnotes.txt,a\n", "line 2: 'notes.txt' is not an image"),
        ("file,labels\n,a\n", "line 2: no file is named"),
        ("file,labels\nimages/000.jpg,a\nimages/000.jpg,b\n", "line 3: 'images/000.jpg' stands in line 2 already"),
        ("file,labels\nimages/000.jpg,a,b\n", "line 2: too many cells"),
        ("file,labels,split\nimages/000.jpg,a,dev\n", "line 2: split is 'dev', expected train, val or test"),
        ("file,labels,split\nimages/000.jpg,a,train\n", "no validation images"),
        ("file,labels,split\nimages/000.jpg,a,train\nimages/001.jpg,b,val\n", "no training image has the label 'b'"),
        ('file,labels\n"images', "is no CSV in UTF-8"),
    ],
)
def test_labels_that_cannot_be_used_are_refused_by_line(fill: Fill, text: str, says: str) -> None:
    folder = fill({"images": 3})
    (folder / "labels.csv").write_text(text, encoding="utf-8")
    assert says in refusal(folder, task=Task.MULTI_LABEL)


def test_many_bad_lines_are_counted(fill: Fill) -> None:
    folder = fill({"images": 1})
    (folder / "labels.csv").write_text("file,labels\n" + ",a\n" * 10, encoding="utf-8")
    assert "line 4: no file is named; and 7 lines more" in refusal(folder, task=Task.MULTI_LABEL)


def test_a_multi_label_task_needs_a_labels_file(fill: Fill) -> None:
    assert "needs a file labels.csv" in refusal(fill({"a": 3, "b": 3}), task=Task.MULTI_LABEL)
