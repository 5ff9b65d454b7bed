"""Answers are kept until their truth is known: after a restart, within their room, counted once."""

import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import Engine
from sqlalchemy.exc import OperationalError

from backboned.server.database import open_database
from backboned.server.serving.comparison import Score
from backboned.server.serving.remembered import Memory, Pair, Remembered
from backboned.server.troubles import Troubles

ALONE = Pair("m", 1, "first")
BOTH = Pair("m", 1, "first", 2, "second")
SCORES = (Score(1.0, right=False), Score(0.5, right=True))


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Engine]:
    database = open_database(tmp_path / "answers.sqlite")
    yield database
    database.dispose()


def answer(number: int, *, shadow: bool = True, size: int = 20, **more: object) -> Remembered:
    pair, seen = (BOTH, b"s" * size) if shadow else (ALONE, b"")
    return Remembered(f"{number:024x}", pair, b"a" * size, seen, **more)  # type: ignore[arg-type]


def test_what_was_remembered_is_found_after_a_restart(database: Engine) -> None:
    memory = Memory(database, 2**20, Troubles())
    memory.start()
    memory.remember([answer(1), answer(2, shadow=False)])
    memory.stop()
    again = Memory(database, 2**20, Troubles())
    assert again.find([f"{n:024x}" for n in (1, 2, 3)]) == {
        f"{n:024x}": a for n, a in ((1, answer(1)), (2, answer(2, shadow=False)))
    }


def test_an_outcome_is_counted_and_known_from_then_on(database: Engine) -> None:
    memory = Memory(database, 2**20, Troubles())
    memory.remember([answer(1)])
    found = memory.find([answer(1).id])[answer(1).id]
    memory.count([(found, SCORES)])
    assert memory.find([found.id])[found.id].known
    for each in (memory, Memory(database, 2**20, Troubles())):
        tally = each.tallies()[BOTH]
        assert (tally.serving.count, tally.shadow.count, tally.gain.value) == (1, 1, 0.5)
        assert (tally.answers, tally.agreements) == (1, 0)


def test_a_truth_that_comes_with_its_image_is_counted_when_it_is_written(database: Engine) -> None:
    memory = Memory(database, 2**20, Troubles())
    memory.remember([answer(1, scores=SCORES, agrees=True), answer(2, scores=(SCORES[0], None)), answer(3)])
    known = {each.id: each.known for each in memory.find([answer(n).id for n in (1, 2, 3)]).values()}
    assert list(known.values()) == [True, True, False]
    both, alone = (memory.tallies()[pair] for pair in (BOTH, ALONE))
    assert (both.serving.count, both.shadow.count, both.answers, both.agreements) == (1, 1, 3, 1)
    assert (alone.serving.count, alone.shadow.count) == (1, 0)


def test_the_oldest_go_when_there_is_no_room(database: Engine) -> None:
    memory = Memory(database, 100_000, Troubles())
    for begin in range(0, 2000, 100):
        memory.remember([answer(n, size=100) for n in range(begin, begin + 100)])
        found = memory.find([answer(n).id for n in range(2000)])
    numbers = sorted(int(each, 16) for each in found)
    assert numbers == list(range(numbers[0], 2000)), "the newest are all there"
    assert 200 < len(numbers) <= 100_000 // 350
    memory.remember([answer(5000)])
    assert memory.find([answer(5000).id])


def test_without_room_nothing_is_kept_and_truths_that_come_along_are_counted(database: Engine) -> None:
    memory = Memory(database, 0, Troubles())
    memory.remember([answer(1, scores=SCORES)])
    assert memory.find([answer(1).id]) == {}
    assert memory.tallies()[BOTH].shadow.count == 1


def test_a_database_that_cannot_be_written_costs_answers_and_nothing_else(
    database: Engine, caplog: pytest.LogCaptureFixture
) -> None:
    memory = Memory(database, 2**20, Troubles())
    with database.begin() as connection:
        connection.exec_driver_sql("ALTER TABLE answers RENAME TO elsewhere")
    memory.start()
    memory.remember([answer(1)])
    memory.stop()
    assert "answers can't be remembered: no such table" in caplog.text


def test_a_damaged_file_is_put_aside(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "answers.sqlite"
    file.write_bytes(b"no database at all, but long enough to look at" * 100)
    memory = Memory.open(file, 2**20, Troubles())
    memory.remember([answer(1)])
    assert memory.find([answer(1).id])
    memory.stop()
    assert (tmp_path / "answers.damaged").read_bytes().startswith(b"no database")
    assert "it is answers.damaged now" in caplog.text


def test_a_locked_file_is_not_taken_for_a_damaged_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "answers.sqlite"
    Memory.open(file, 2**20, Troubles()).stop()
    monkeypatch.setattr("backboned.server.database._PRAGMAS", ("busy_timeout=10",))
    with sqlite3.connect(file) as other:
        other.execute("PRAGMA journal_mode=DELETE")
        other.execute("BEGIN EXCLUSIVE")
        with pytest.raises(OperationalError, match="locked"):
            Memory.open(file, 2**20, Troubles())
    assert file.exists() and not (tmp_path / "answers.damaged").exists()
