import pytest

from backboned.server.training.events import JobState, StateChanged
from backboned.server.training.outcome import MOST_CRASHES, MOST_KILLS, Ask, Ended, outcome

SUCCEEDED = StateChanged(JobState.SUCCEEDED)
CANCELLED = StateChanged(JobState.CANCELLED)
FAILED = StateChanged(JobState.FAILED, "why")
KEPT = StateChanged(JobState.FAILED, "why; kept")
ANOTHER_GOES_ON = None


@pytest.mark.parametrize(
    ("told", "asked", "expected"),
    [
        (SUCCEEDED, None, SUCCEEDED),
        (SUCCEEDED, Ask.CANCEL, SUCCEEDED),
        (SUCCEEDED, Ask.SHUTDOWN, SUCCEEDED),
        (FAILED, None, KEPT),
        (FAILED, Ask.CANCEL, KEPT),
        (FAILED, Ask.SHUTDOWN, KEPT),
        (CANCELLED, Ask.CANCEL, CANCELLED),
        (None, Ask.CANCEL, CANCELLED),
        (CANCELLED, Ask.SHUTDOWN, ANOTHER_GOES_ON),
        (None, Ask.SHUTDOWN, ANOTHER_GOES_ON),
        (None, None, ANOTHER_GOES_ON),
        (CANCELLED, None, ANOTHER_GOES_ON),
    ],
)
def test_a_job_ends_as_it_was_told_or_asked_and_else_goes_on(
    told: StateChanged | None, asked: Ask | None, expected: StateChanged | None
) -> None:
    assert outcome(Ended(told, "it was killed", killed=told is None), asked, 1, "kept") == expected


@pytest.mark.parametrize(
    ("ended", "most", "how"),
    [
        (Ended(None, "killed by SIGKILL", killed=True), MOST_KILLS, "killed by SIGKILL"),
        (Ended(None, "ended with code 1: no module", killed=False), MOST_CRASHES, "ended with code 1: no module"),
        (Ended(CANCELLED, "ended with code 0", killed=False), MOST_KILLS, "a signal from outside stopped it"),
    ],
)
def test_trainers_that_get_no_further_are_given_up(ended: Ended, most: int, how: str) -> None:
    assert outcome(ended, None, most - 1, "kept") is ANOTHER_GOES_ON
    given_up = f"{most} trainers in a row got no further: {how}; kept"
    assert outcome(ended, None, most, "kept") == StateChanged(JobState.FAILED, given_up)
    assert outcome(ended, Ask.SHUTDOWN, most, "kept") is ANOTHER_GOES_ON, "that the daemon stops is no fault of theirs"


def test_where_nothing_is_kept_nothing_is_said_of_it() -> None:
    assert outcome(Ended(FAILED, "", killed=False), None, 1, "") == FAILED
