"""The report is one page with everything in it, that a browser reads as it was meant, whatever names there are."""

import json
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path

import pytest
import torch
from PIL import Image

from backboned.registry.backbone import Preprocessing
from backboned.registry.directory import CheckpointDirectory
from backboned.registry.errors import BackbonedError, ErrorKind
from backboned.registry.manifest import Epoch, EpochMetrics, Manifest
from backboned.registry.reports import EVALUATION_NAME, REPORT_NAME, read_report
from backboned.registry.task import Task
from backboned.server.training.events import ClassCount, DatasetReport, Duplicates, SkippedFile, from_json
from backboned.server.training.familiarity import Familiarity
from backboned.server.training.judging import Outputs, answers_of, evaluate
from backboned.server.training.report.photos import MOST, Judged, mistakes
from backboned.server.training.report.writing import write_report

HOSTILE = '<script>alert("x")</script>&\u202e\x00</style>\''
VOID = {"meta", "img", "br"}


class Page(HTMLParser):
    """Checks that tags match, and keeps tags, attributes and text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    def count(self, tag: str) -> int:
        return sum(found == tag for found, _ in self.tags)


def picture(path: str) -> bytes:
    """An image file for any path, but for those that are gone or damaged."""
    if "gone" in path:
        raise FileNotFoundError(path)
    if "damaged" in path:
        return b"no image"
    file = BytesIO()
    Image.new("RGB", (640, 480), (200, 40, 40)).save(file, "PNG")
    return file.getvalue()


def judged(task: Task, classes: int, n: int, seed: int, path: str = "class/{}.jpg") -> Judged:
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(n, task.outputs(classes), generator=generator)
    several = task is Task.MULTI_LABEL
    targets = torch.randint(2 if several else classes, (n, classes) if several else (n,), generator=generator)
    features = torch.randn(n, 6, generator=generator)
    return Judged(
        Outputs(logits, targets.float() if several else targets, features), [path.format(i) for i in range(n)]
    )


Write = Callable[..., Page]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes a report of a task into a version's folder, and reads the page."""

    def write_one(
        task: Task = Task.SINGLE_LABEL,
        classes: tuple[str, ...] = ("ant", "bee", "wasp"),
        *,
        validation: Judged | None = None,
        test: Judged | None = None,
        dataset: DatasetReport | None = None,
        epochs: int = 4,
    ) -> Page:
        validation = validation or judged(task, len(classes), 60, 1)
        epoch = Epoch(1, "epoch-0001.pt", "a" * 64, 1, 1.7e9, EpochMetrics(1.5, 0.5, 1.25, 0.75))
        manifest = Manifest(
            model="flowers",
            version=1,
            backbone="digits",
            task=task,
            classes=classes,
            stages={},
            preprocessing=Preprocessing(8, 8),
            epochs=tuple(replace(epoch, epoch=i + 1) for i in range(epochs)),
            best_epoch=1,
            complete=True,
            options={"learning_rate": 0.001, "trainable_stages": ("head",), "note": HOSTILE},
        )
        outputs = validation.outputs
        familiarity = Familiarity.of(task, outputs.features, outputs.targets, len(classes))
        answers = answers_of(task, outputs, familiarity)
        evaluation = evaluate(
            task, classes, answers, 1, validation=outputs, test=None if test is None else test.outputs
        )
        folder = tmp_path / "flowers" / "1"
        folder.mkdir(parents=True, exist_ok=True)
        write_report(
            folder,
            manifest=manifest,
            answers=answers,
            evaluation=evaluation,
            validation=validation,
            test=test,
            dataset=dataset,
            read=picture,
            max_image_pixels=10**6,
        )
        assert sorted(p.name for p in folder.iterdir()) == [EVALUATION_NAME, REPORT_NAME]
        assert from_json((folder / EVALUATION_NAME).read_text()) == evaluation
        return Page((folder / REPORT_NAME).read_text())

    return write_one


@pytest.mark.parametrize("task", list(Task))
@pytest.mark.parametrize("tested", [True, False])
def test_every_task_has_a_whole_page(write: Write, task: Task, tested: bool) -> None:
    classes = ("no", "yes") if task is Task.BINARY else ("ant", "bee", "wasp")
    page = write(task, classes, test=judged(task, len(classes), 40, 2) if tested else None)
    assert page.count("svg") == 3 and page.count("main") == 1
    assert ("accuracy on 40 test images" in page.text) == tested
    assert ("a little better than the truth" in page.text) != tested
    assert ("What is confused with what" in page.text) == (task is not Task.MULTI_LABEL)
    assert 0 < page.count("img") <= MOST
    assert "nan" not in page.text.lower()


def test_nothing_is_fetched_and_nothing_runs(write: Write) -> None:
    page = write(test=judged(Task.SINGLE_LABEL, 3, 40, 2))
    assert not {tag for tag, _ in page.tags} & {"script", "link", "iframe", "object", "embed", "base", "form"}
    for tag, attributes in page.tags:
        assert not [name for name in attributes if name.startswith("on")]
        for name in ("src", "href", "xlink:href", "srcset", "action"):
            value = attributes.get(name)
            assert value is None or (tag == "img" and value.startswith("data:image/jpeg;base64,"))
    policy = next(a["content"] for tag, a in page.tags if tag == "meta" and "http-equiv" in a)
    assert policy is not None and policy.startswith("default-src 'none'")


def test_hostile_names_are_only_text(write: Write) -> None:
    classes = (f"{HOSTILE}1", "bee", "wa\nsp" * 20)
    report = DatasetReport(
        classes=tuple(ClassCount(c, 1, 1, 1) for c in classes),
        train_images=3,
        validation_images=3,
        unreadable=(SkippedFile(HOSTILE, HOSTILE),),
        skipped=(SkippedFile(HOSTILE, HOSTILE),),
        unreadable_count=30,
        skipped_count=1,
        warnings=(HOSTILE,),
        duplicates=(Duplicates((HOSTILE, HOSTILE), True, True, True),),
        duplicates_count=1,
    )
    page = write(classes=classes, validation=judged(Task.SINGLE_LABEL, 3, 60, 1, HOSTILE + "\udc80{}"), dataset=report)
    assert page.count("script") == 0 and page.count("style") == 1
    assert '<script>alert("x")</script>&\ufffd\ufffd</style>' in page.text
    assert "\u202e" not in page.text and "\x00" not in page.text


def test_photos_are_the_most_wrong_and_small_and_those_that_cannot_be_read_are_left_out(write: Write) -> None:
    logits = torch.tensor([[9.0, 0.0]] * 3 + [[1.0, 0.0]] * 3 + [[4.0, 0.0]] * 20)
    targets = torch.tensor([1] * 6 + [0] * 20)
    paths = ["gone.jpg", "damaged.jpg", "worst.jpg", "b.jpg", "c.jpg", "d.jpg"] + ["right.jpg"] * 20
    validation = Judged(Outputs(logits, targets, torch.randn(26, 6)), paths)
    page = write(classes=("ant", "bee"), validation=validation)
    images = [a for tag, a in page.tags if tag == "img"]
    assert len(images) == 4
    assert images[0]["alt"] == "Shows bee, was said to be ant"
    assert page.text.index("worst.jpg") < page.text.index("b.jpg")
    assert "right.jpg" not in page.text and "The 4 worst of 6 wrong answers." in page.text
    assert all(len(a["src"] or "") < 20_000 for a in images)


def test_mistakes_tell_what_is_true_and_what_was_said() -> None:
    outputs = Outputs(torch.tensor([[3.0, -3.0, 3.0]]), torch.tensor([[1.0, 1.0, 0.0]]), torch.randn(1, 6))
    (found,) = mistakes(Task.MULTI_LABEL, ("a", "b", "c"), 1.0, "test", Judged(outputs, ["x.jpg"]))
    assert [n for n, _ in found.true] == ["a", "b"] and [n for n, _ in found.said] == ["a", "c"]


def test_without_a_mistake_it_says_so(write: Write) -> None:
    targets = torch.arange(60) % 3
    outputs = Outputs(10 * torch.eye(3)[targets], targets, torch.randn(60, 6))
    page = write(validation=Judged(outputs, ["x.jpg"] * 60))
    assert page.count("img") == 0
    assert "No answer was wrong." in page.text and "Nothing was confused." in page.text


def test_of_many_classes_the_matrix_gives_way_to_the_pairs_confused_most(write: Write) -> None:
    classes = tuple(f"class {i}" for i in range(700))
    page = write(classes=classes, epochs=1)
    assert "Rows: what the" not in page.text and "Confused most often." in page.text
    assert "The other 200 classes are in evaluation.json." in page.text


def test_the_newest_version_that_has_a_report_is_read(write: Write, tmp_path: Path) -> None:
    write()
    (tmp_path / "flowers" / "2").mkdir()
    directory = CheckpointDirectory(tmp_path)
    version, html = read_report(directory, "flowers")
    assert version == 1 and html.startswith("<!doctype html>")
    with pytest.raises(BackbonedError, match="flowers version 2 has no report") as caught:
        read_report(directory, "flowers", 2)
    assert caught.value.kind is ErrorKind.NOT_FOUND
    (tmp_path / "flowers" / "1" / REPORT_NAME).write_bytes(b"\xff")
    with pytest.raises(BackbonedError, match="it is no UTF-8"):
        read_report(directory, "flowers")


def test_a_report_beside_checkpoints_is_no_checkpoint(write: Write, tmp_path: Path) -> None:
    write()
    seen = CheckpointDirectory(tmp_path).scan()
    assert not seen.drops and not seen.versions and not seen.refused
    assert json.loads((tmp_path / "flowers" / "1" / EVALUATION_NAME).read_text())["kind"] == "evaluation"
