from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from backboned.registry.task import Task
from backboned.server.training.datasets import Dataset

Read = Callable[..., Dataset]
Refusal = Callable[..., str]
Fill = Callable[[Mapping[str, int]], Path]


@pytest.fixture
def fill(tmp_path: Path) -> Fill:
    """Makes folders with so many files that are images by name."""

    def make(counts: Mapping[str, int]) -> Path:
        for name, count in counts.items():
            (tmp_path / "photos" / name).mkdir(parents=True)
            for i in range(count):
                (tmp_path / "photos" / name / f"{i:03}.jpg").touch()
        return tmp_path / "photos"

    return make


def by_class(dataset: Dataset) -> list[tuple[int, int, int]]:
    return [(c.train_images, c.validation_images, c.test_images) for c in dataset.report().classes]


def test_a_given_test_folder_is_held_back(fill: Fill, read: Read) -> None:
    dataset = read(fill({"train/a": 3, "train/b": 3, "val/a": 1, "val/b": 1, "test/a": 2}), test_fraction=0.5)
    assert [(s.path, s.labels) for s in dataset.test] == [("test/a/000.jpg", (0,)), ("test/a/001.jpg", (0,))]
    assert by_class(dataset) == [(3, 1, 2), (3, 1, 0)]
    assert dataset.report().test_images == 2
    assert "no test images of 'b'" in dataset.warnings


def test_a_test_folder_without_classes_is_skipped(fill: Fill, read: Read) -> None:
    folder = fill({"train/a": 3, "train/b": 3, "val/a": 1, "val/b": 1, "test": 2})
    dataset = read(folder)
    assert dataset.test == ()
    assert [s.path for s in dataset.skipped] == ["test"]


def test_a_class_in_test_that_nothing_trains_is_refused(fill: Fill, refusal: Refusal) -> None:
    folder = fill({"train/a": 3, "train/b": 3, "val/a": 1, "test/c": 2})
    assert "test/ has the class 'c', which train/ hasn't" in refusal(folder)


def test_a_fraction_of_every_class_is_held_back_before_any_other_choice(fill: Fill, read: Read) -> None:
    folder = fill({"a": 10, "b": 40, "c": 2, "d": 3})
    dataset = read(folder, test_fraction=0.2)
    assert by_class(dataset) == [(6, 2, 2), (26, 6, 8), (1, 1, 0), (1, 1, 1)]
    paths = Counter(s.path for part in (dataset.train, dataset.validation, dataset.test) for s in part)
    assert set(paths.values()) == {1}
    assert len(paths) == 55
    other = read(folder, test_fraction=0.2, validation_fraction=0.5)
    assert other.test == dataset.test
    assert read(folder, test_fraction=0.2, seed=1).test != dataset.test


def test_a_fraction_is_taken_from_training_where_validation_is_given(fill: Fill, read: Read) -> None:
    dataset = read(fill({"train/a": 10, "train/b": 10, "val/a": 1, "val/b": 1}), test_fraction=0.3)
    assert by_class(dataset) == [(7, 1, 3), (7, 1, 3)]


def test_no_test_part_is_made_unasked(fill: Fill, read: Read) -> None:
    assert read(fill({"a": 10, "b": 10})).test == ()


def test_lines_that_tell_training_and_test_leave_validation_to_us(fill: Fill, read: Read) -> None:
    folder = fill({"images": 20})
    rows = "".join(f"images/{i:03}.jpg,{'ab'[i % 2]},{'test' if i < 4 else 'train'}\n" for i in range(20))
    (folder / "labels.csv").write_text(f"file,labels,split\n{rows}")
    assert by_class(read(folder, task=Task.BINARY)) == [(6, 2, 2), (6, 2, 2)]


def test_two_images_cannot_be_three_parts(fill: Fill, refusal: Refusal) -> None:
    folder = fill({"images": 2})
    (folder / "labels.csv").write_text("file,labels\nimages/000.jpg,a\nimages/001.jpg,a\n")
    assert "fewer than three images" in refusal(folder, task=Task.MULTI_LABEL, test_fraction=0.1)
