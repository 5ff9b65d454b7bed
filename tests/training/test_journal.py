"""A database that can't be written for a while costs a job nothing: its events come later, each once and in order."""

import asyncio
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from sqlalchemy import Engine
from sqlalchemy.exc import OperationalError

from backboned.server.database import open_database
from backboned.server.training.events import JobState, LogLine, StateChanged
from backboned.server.training.jobs import JobRequest, JobStore
from backboned.server.training.journal import JobJournal
from backboned.server.training.options import TrainingOptions


class Telemetry:
    """Takes what it is told."""

    def training_jobs(self, counts: Mapping[JobState, int]) -> None:
        assert sum(counts.values()) == 1


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Engine]:
    engine = open_database(tmp_path / "state.sqlite")
    yield engine
    engine.dispose()


async def test_events_wait_for_the_database_and_come_once(database: Engine) -> None:
    store = JobStore(database)
    store.add("a", JobRequest("flowers", "digits", "photos", TrainingOptions()), "/data", 1)
    journal = JobJournal(store, Telemetry())  # type: ignore[arg-type]

    def read_only(on: int) -> None:
        with database.connect() as connection:  # the pool has one, which all calls share
            connection.exec_driver_sql(f"PRAGMA query_only={on}")

    read_only(1)
    with pytest.raises(OperationalError):
        await journal.publish("a", LogLine("nobody waits for this one"))
    waiting = asyncio.create_task(journal.keep("a", LogLine("first")))
    done, _ = await asyncio.wait([waiting], timeout=0.2)
    assert not done
    read_only(0)
    await waiting
    await journal.keep("a", StateChanged(JobState.RUNNING))
    told = [event.payload for event in await journal.so_far("a")]
    assert told == [StateChanged(JobState.QUEUED), LogLine("first"), StateChanged(JobState.RUNNING)]
