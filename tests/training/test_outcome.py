import pytest

from backboned.server.training.events import JobState, StateChanged
from backboned.server.training.outcome import Ask, outcome

SUCCEEDED = StateChanged(JobState.SUCCEEDED)
CANCELLED = StateChanged(JobState.CANCELLED)
FAILED = StateChanged(JobState.FAILED, "why")


@pytest.mark.parametrize(
    ("told", "asked", "expected"),
    [
        (SUCCEEDED, None, SUCCEEDED),
        (SUCCEEDED, Ask.CANCEL, SUCCEEDED),
        (SUCCEEDED, Ask.SHUTDOWN, SUCCEEDED),
        (FAILED, None, StateChanged(JobState.FAILED, "why; kept")),
        (FAILED, Ask.CANCEL, StateChanged(JobState.FAILED, "why; kept")),
        (CANCELLED, Ask.CANCEL, CANCELLED),
        (None, Ask.CANCEL, CANCELLED),
        (None, None, StateChanged(JobState.FAILED, "killed; kept")),
        (
            CANCELLED,
            None,
            StateChanged(JobState.FAILED, "the trainer process was stopped by a signal from outside; kept"),
        ),
        (CANCELLED, Ask.SHUTDOWN, StateChanged(JobState.FAILED, "the daemon stopped while it ran; kept")),
        (None, Ask.SHUTDOWN, StateChanged(JobState.FAILED, "the daemon stopped while it ran; kept")),
    ],
)
def test_a_job_ends_as_it_was_told_or_asked(
    told: StateChanged | None, asked: Ask | None, expected: StateChanged
) -> None:
    assert outcome(told, "killed", asked, "kept") == expected


def test_where_nothing_is_kept_nothing_is_said_of_it() -> None:
    assert outcome(FAILED, "", None, "") == FAILED
    assert outcome(None, "", Ask.SHUTDOWN, "").error == (
        "the daemon stopped while it ran; no epoch had ended; start it again"
    )
