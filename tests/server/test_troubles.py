"""What is wrong is told while it is, and logged when it begins and when it is over."""

import pytest

from backboned.server.troubles import TroubleKind, Troubles


def test_what_is_told_is_what_is_wrong_until_it_is_told_to_be_well(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    troubles = Troubles()
    troubles.tell(TroubleKind.DATABASE)
    assert not troubles.now() and not caplog.messages
    troubles.tell(TroubleKind.LOADING, "a.pt: no space", "b.pt: no space")
    troubles.tell(TroubleKind.CHECKPOINT_DIRECTORY, "it is gone")
    assert [t.text for t in troubles.now()] == [
        "checkpoint_directory: it is gone",
        "loading: a.pt: no space (and 1 more)",
    ]
    begun = troubles.now()[1].since
    troubles.tell(TroubleKind.LOADING, "a.pt: no space")
    assert troubles.now()[1].since == begun
    assert troubles.has(TroubleKind.LOADING) and not troubles.has(TroubleKind.ANSWERS)
    troubles.tell(TroubleKind.LOADING)
    assert [t.kind for t in troubles.now()] == [TroubleKind.CHECKPOINT_DIRECTORY]
    assert caplog.messages == [
        "trouble with loading: a.pt: no space; what is loaded serves on",
        "trouble with loading: b.pt: no space; what is loaded serves on",
        "trouble with checkpoint directory: it is gone; what is loaded serves on",
        "the trouble with loading is over",
    ]


def test_a_thousand_files_of_one_trouble_do_not_fill_the_log(caplog: pytest.LogCaptureFixture) -> None:
    troubles = Troubles()
    for _ in range(3):
        troubles.tell(TroubleKind.LOADING, *(f"{i}.pt: no space" for i in range(1000)))
    assert len(caplog.messages) == 11 and caplog.messages[-1] == "trouble with loading: 990 more of the kind"
