"""What has come up since the last look is seen to by the next one, once."""

from concurrent.futures import CancelledError
from pathlib import Path

import pytest

from backboned.registry.look import Part
from backboned.server.serving.agenda import Agenda, Turn
from backboned.server.serving.snapshot import Snapshot

NOTHING = Turn(frozenset(), frozenset(), ())


def test_changes_are_taken_once_and_together() -> None:
    agenda = Agenda()
    agenda.changed({("flowers", 2)})
    agenda.changed({("birds", None)}, Path("birds/a.pt"))
    agenda.changed((), Path("..data"))
    assert agenda.wait(0) and agenda.has_more
    parts, closed = frozenset({("birds", None), ("flowers", 2)}), frozenset({Path("birds/a.pt"), Path("..data")})
    assert agenda.take() == Turn(parts, closed, ())
    assert agenda.take() == NOTHING
    assert not agenda.wait(0) and not agenda.has_more


def test_anything_is_more_than_something() -> None:
    agenda = Agenda()
    agenda.everything()
    agenda.changed({("flowers", None)})
    assert agenda.take().parts is None
    assert agenda.take() == NOTHING


@pytest.mark.parametrize(("models", "looked_at"), [(None, None), ({"flowers"}, frozenset({("flowers", None)}))])
def test_who_asks_waits_for_the_next_look(models: set[str] | None, looked_at: frozenset[Part] | None) -> None:
    agenda = Agenda()
    asked = agenda.asked(models)
    assert agenda.waited_for
    turn = agenda.take()
    assert turn.parts == looked_at and turn.waiters == (asked,)
    assert not agenda.waited_for
    turn.waiters[0].set_result(Snapshot())
    assert asked.result(0) == Snapshot()


def test_nobody_waits_for_looks_that_never_come() -> None:
    agenda = Agenda()
    asked = agenda.asked(None)
    agenda.close()
    with pytest.raises(CancelledError):
        asked.result(0)
