import pytest

from backboned.server.training.events import (
    CheckpointWritten,
    ClassCount,
    DatasetReport,
    EpochDone,
    FeatureProgress,
    JobEventPayload,
    JobState,
    LogLine,
    SkippedFile,
    StateChanged,
    from_json,
    to_json,
)

REPORT = DatasetReport(
    classes=(ClassCount("daisy", 3, 1),),
    train_images=3,
    validation_images=1,
    unreadable=(SkippedFile("daisy/ü.jpg", "truncated\nfile"),),
    skipped=(),
    unreadable_count=1,
    skipped_count=0,
    warnings=("few images",),
)


@pytest.mark.parametrize(
    "payload",
    [
        REPORT,
        FeatureProgress(16, 64, 12.5),
        EpochDone(1, 0.7, 0.5, 0.6, 0.75, 1e-3, 1000.0, best=True),
        CheckpointWritten(1, "epoch-0001.pt", "ab" * 32, 1234, 1.7e9, best=False),
        StateChanged(JobState.FAILED, "why"),
        LogLine("two\nlines"),
    ],
    ids=lambda p: type(p).__name__,
)
def test_an_event_survives_as_one_line_of_json(payload: JobEventPayload) -> None:
    line = to_json(payload)
    assert "\n" not in line
    assert from_json(line) == payload


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"kind": "nothing"}', '{"kind": "log", "text": "a", "more": 1}', '{"kind": "epoch"}']
)
def test_anything_else_is_no_event(text: str) -> None:
    with pytest.raises((ValueError, KeyError, TypeError, AttributeError)):
        from_json(text)


def test_what_is_not_finite_is_never_written() -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        to_json(FeatureProgress(0, 1, float("inf")))
