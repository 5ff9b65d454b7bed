from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from sqlalchemy import Engine

from backboned.registry import BackbonedError, ErrorKind
from backboned.server.database import open_database
from backboned.server.training.events import FeatureProgress, JobState, LogLine, StateChanged
from backboned.server.training.jobs import JobRequest, JobStore
from backboned.server.training.options import TrainingOptions

REQUEST = JobRequest("flowers", "digits", "photos", TrainingOptions(trainable_stages=("layer3",)), "request-1")


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Engine]:
    engine = open_database(tmp_path / "state.sqlite")
    yield engine
    engine.dispose()


@pytest.fixture
def store(engine: Engine) -> JobStore:
    return JobStore(engine)


def test_a_job_is_kept_as_it_was_asked_for(engine: Engine, store: JobStore) -> None:
    added = store.add("a", REQUEST, "/data/photos", 3)
    assert JobStore(engine).get("a") == added
    assert (added.request, added.version, added.state) == (REQUEST, 3, JobState.QUEUED)


def test_the_same_request_is_the_same_job_and_another_one_is_refused(store: JobStore) -> None:
    job = store.add("a", REQUEST, "/data", 1)
    assert store.repeated(REQUEST) == job
    assert store.repeated(replace(REQUEST, request_id="request-2")) is None
    assert store.repeated(replace(REQUEST, request_id="")) is None
    other = replace(REQUEST, options=TrainingOptions(seed=1))
    with pytest.raises(BackbonedError, match="request-1") as caught:
        store.repeated(other)
    assert caught.value.kind is ErrorKind.ALREADY_EXISTS
    with pytest.raises(BackbonedError, match="request-1"):
        store.add("b", other, "/data", 2)


def test_states_change_the_job_and_times_are_kept(store: JobStore) -> None:
    store.add("a", REQUEST, "/data", 1)
    store.append("a", StateChanged(JobState.RUNNING))
    running = store.get("a")
    assert running.start_time is not None
    assert running.end_time is None
    store.append("a", StateChanged(JobState.FAILED, "why"))
    ended = store.get("a")
    assert (ended.state, ended.error) == (JobState.FAILED, "why")
    assert ended.end_time is not None
    store.append("a", StateChanged(JobState.RUNNING))
    assert store.get("a") == ended, "a job that has ended stays so"


def test_events_are_numbered_and_read_from_anywhere(store: JobStore) -> None:
    store.add("a", REQUEST, "/data", 1)
    store.add("b", replace(REQUEST, request_id=""), "/data", 2)
    for text in ("one", "two", "three"):
        store.append("a", LogLine(text))
    assert [(e.sequence, e.payload) for e in store.events("a", 2)] == [(3, LogLine("two")), (4, LogLine("three"))]
    assert [e.sequence for e in store.events("a", limit=2)] == [1, 2]
    assert [e.payload for e in store.events("b")] == [StateChanged(JobState.QUEUED)]


def test_events_from_many_threads_are_all_kept(store: JobStore) -> None:
    store.add("a", REQUEST, "/data", 1)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda n: store.append("a", FeatureProgress(n, 100, 1.0)), range(100)))
    assert [e.sequence for e in store.events("a")] == list(range(1, 102))


def test_jobs_are_listed_newest_first_by_model_and_state(store: JobStore) -> None:
    for n, model in enumerate(("flowers", "birds", "flowers")):
        store.add(str(n), replace(REQUEST, model=model, request_id=""), "/data", n)
    store.append("0", StateChanged(JobState.RUNNING))
    assert [j.id for j in store.jobs()] == ["2", "1", "0"]
    assert [j.id for j in store.jobs(model="flowers")] == ["2", "0"]
    assert [j.id for j in store.jobs(states=(JobState.RUNNING,))] == ["0"]
    assert store.counts()[JobState.QUEUED] == 2
    assert store.counts()[JobState.FAILED] == 0


def test_an_unknown_job_is_not_found(store: JobStore) -> None:
    for call in (
        lambda: store.get("x"),
        lambda: store.events("x"),
        lambda: store.append("x", StateChanged(JobState.RUNNING)),
    ):
        with pytest.raises(BackbonedError, match="unknown job 'x'") as caught:
            call()
        assert caught.value.kind is ErrorKind.NOT_FOUND
