"""How a job is shown: what is new once, and the order of things."""

import re
from collections.abc import Callable, Iterator, Sequence

import pytest
from google.protobuf.timestamp_pb2 import Timestamp

from backboned.server.commands.dataset_view import report_lines
from backboned.server.commands.training_view import TrainingView, features_line
from backboned.v1 import model_service_pb2 as pb

Show = Callable[..., list[str]]


@pytest.fixture
def shown(capsys: pytest.CaptureFixture[str]) -> Show:
    """The lines that a job's events make where nothing is a terminal."""

    def show(*events: pb.JobEvent, options: pb.TrainingOptions | None = None) -> list[str]:
        with TrainingView(pb.Job(request=pb.FineTuneRequest(options=options))) as view:
            for event in events:
                view.show(event)
        out: str = capsys.readouterr().out
        return out.splitlines()

    return show


def report(*, test: int = 0, unreadable: int = 0, duplicates: Sequence[pb.Duplicates] = ()) -> pb.DatasetReport:
    return pb.DatasetReport(
        classes=[
            pb.ClassCount(label=name, train_images=8, validation_images=2, test_images=test) for name in ("blue", "red")
        ],
        train_images=16,
        validation_images=4,
        test_images=2 * test,
        skipped=[pb.SkippedFile(path="notes.txt", reason="not an image")],
        skipped_count=1,
        unreadable=[pb.SkippedFile(path=f"red/{i}.png", reason="cut off") for i in range(unreadable)],
        unreadable_count=unreadable,
        warnings=["strong imbalance"],
        duplicates=duplicates,
        duplicates_count=len(duplicates),
    )


def test_images_that_test_are_a_column_only_where_there_are_any(shown: Show) -> None:
    header, blue, *_ = shown(pb.JobEvent(dataset_report=report()))
    assert header.split() == ["class", "train", "validation"]
    assert blue.split() == ["blue", "8", "2"]
    header, blue, _, whole, *_ = shown(pb.JobEvent(dataset_report=report(test=3)))
    assert header.split() == ["class", "train", "validation", "test"]
    assert blue.split() == ["blue", "8", "2", "3"]
    assert whole.split() == ["all", "16", "4", "6"]


def test_a_second_report_tells_only_what_is_new(shown: Show) -> None:
    first = report()
    second = report(unreadable=1, duplicates=[pb.Duplicates(paths=["blue/1.png", "blue/2.png"], exact=True)])
    second.warnings.append("1 image is tiny")
    before = shown(pb.JobEvent(dataset_report=first))
    after = shown(pb.JobEvent(dataset_report=first), pb.JobEvent(dataset_report=second))
    assert after[: len(before)] == before
    assert after[len(before) :] == [
        "unreadable: red/0.png: cut off",
        "duplicates: 1 group of images shows the same or nearly so, 1 of them the very same bytes; among them "
        "blue/1.png and blue/2.png",
        "1 image is tiny",
    ]


def test_many_unreadable_files_and_duplicates_take_few_lines() -> None:
    groups = [pb.Duplicates(paths=[f"a/{i}.png", f"b/{i}.png", f"c/{i}.png"]) for i in range(50)]
    lines = list(report_lines(report(unreadable=20, duplicates=groups)))
    assert sum(line.startswith("unreadable: red/") for line in lines) == 5
    assert "unreadable: 15 more" in lines
    (told,) = [line for line in lines if line.startswith("duplicates")]
    assert told == ("duplicates: 50 groups of images show the same or nearly so; among them a/0.png and b/0.png")


def test_how_many_are_equal_is_not_said_of_a_list_that_was_cut() -> None:
    told = report(duplicates=[pb.Duplicates(paths=["a.png", "b.png"], exact=True)])
    told.duplicates_count = 5000
    (line,) = [line for line in report_lines(told) if line.startswith("duplicates")]
    assert "5000 groups" in line
    assert "bytes" not in line


@pytest.mark.parametrize(
    ("done", "images", "said"),
    [
        (pb.FeatureProgress(done=9, total=9, cached=9), 9, "features of 9 images from the cache"),
        (pb.FeatureProgress(done=9, total=9, images_per_second=41.6), 9, "features of 9 images at 42 images/s"),
        (
            pb.FeatureProgress(done=9, total=9, cached=4, images_per_second=2),
            9,
            "features of 9 images (4 cached) at 2 images/s",
        ),
        (
            pb.FeatureProgress(done=16, total=16, cached=4, images_per_second=2),
            9,
            "features of 16 images (each view counted; 4 cached) at 2 images/s",
        ),
        (pb.FeatureProgress(done=16, total=16), 9, "features of 16 images (each view counted)"),
    ],
)
def test_what_became_of_features_is_one_line(done: pb.FeatureProgress, images: int, said: str) -> None:
    assert features_line(done, images) == said


def test_features_are_done_once_however_many_parts_and_trainers_say_so(shown: Show) -> None:
    lines = shown(
        pb.JobEvent(feature_progress=pb.FeatureProgress(done=5, total=10, images_per_second=3)),
        pb.JobEvent(feature_progress=pb.FeatureProgress(done=10, total=10, images_per_second=3)),
        pb.JobEvent(feature_progress=pb.FeatureProgress(done=10, total=10, images_per_second=4)),
        pb.JobEvent(feature_progress=pb.FeatureProgress(done=4, total=10, cached=4)),
        pb.JobEvent(feature_progress=pb.FeatureProgress(done=10, total=10, cached=10)),
    )
    assert lines == ["features of 10 images at 3 images/s"]


def epochs(stages: Sequence[Sequence[str]]) -> Iterator[pb.JobEvent]:
    for i, names in enumerate(stages, start=1):
        metrics = pb.EpochMetrics(epoch=i, val_loss=0.5, trainable_stages=names, best=i == 2)
        yield pb.JobEvent(epoch=metrics, time=Timestamp(seconds=10 * i))


def test_epochs_that_trained_stages_say_so_once(shown: Show) -> None:
    options = pb.TrainingOptions(trainable_stages=["auto"], max_epochs=2)
    stages = ["layer2", "layer3", "layer4", "pool"]
    lines = shown(*epochs([[], stages, stages]), options=options)
    assert [line.split("  ")[0] for line in lines] == [
        "epoch 1/3",
        "layer2…layer4 pool and the head train together:",
        "epoch 2/3",
        "epoch 3/3",
    ]
    assert [line.endswith("  best") for line in lines] == [False, False, True, False]


def test_the_head_alone_says_nothing_of_stages(shown: Show) -> None:
    lines = shown(*epochs([[], []]), options=pb.TrainingOptions(max_epochs=2))
    assert [line.split("  ")[0] for line in lines] == ["epoch 1/2", "epoch 2/2"]


@pytest.mark.parametrize(
    ("events", "said"),
    [
        (
            [pb.JobEvent(feature_progress=pb.FeatureProgress(done=100, total=500, images_per_second=50))],
            " 50 images/s, 8.0 s left",
        ),
        (list(epochs([[], []])), " 0 images/s, up to 30.0 s left"),
        (list(epochs([[], ["layer3"]])), " 0 images/s\n"),  # how long stages take isn't known yet
    ],
)
def test_in_a_terminal_bars_tell_how_long_is_left(
    shown: Show, monkeypatch: pytest.MonkeyPatch, events: list[pb.JobEvent], said: str
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    out = "\n".join(shown(*events, options=pb.TrainingOptions(max_epochs=5)))
    assert said in re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", out)


def test_a_job_shows_how_good_its_version_is(shown: Show) -> None:
    judged = pb.Judgement(
        images=50, accuracy=0.92, accuracy_low=0.81, accuracy_high=0.97, calibration_error=0.031, majority_accuracy=0.5
    )
    evaluation = pb.Evaluation(validation=judged, temperature=1.4, uncertain_below=0.71, epoch=3)
    header, validation, doubt = shown(pb.JobEvent(evaluation=evaluation))
    assert header.split("  ")[0] == "epoch 3"
    assert validation.split() == ["validation", "50", "92.0%", "81.0%", "-", "97.0%", "50.0%", "3.1%"]
    assert doubt == "an answer with a probability below 71.0% is uncertain"
    evaluation.test.CopyFrom(judged)
    evaluation.test.accuracy = 0.88
    _, first, second, _ = shown(pb.JobEvent(evaluation=evaluation))
    assert first.split() == validation.split()
    assert second.startswith("test, held back") and " 88.0%" in second
