import asyncio
import os
import signal
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from sqlalchemy import Engine

from backboned.registry import BackbonedError, Catalogue, ErrorKind
from backboned.registry.directory import CheckpointDirectory
from backboned.registry.manifest import Manifest
from backboned.registry.weights import WeightStore
from backboned.server.database import open_database
from backboned.server.training.events import (
    CheckpointWritten,
    DatasetReport,
    EpochDone,
    JobState,
    LogLine,
    StateChanged,
)
from backboned.server.training.jobs import Job, JobEvent, JobRequest, JobStore
from backboned.server.training.options import TrainingOptions
from backboned.server.training.settings import TrainingSettings
from backboned.server.training.standby import Standby
from backboned.server.training.supervisor import JobSupervisor

pytestmark = pytest.mark.asyncio(loop_scope="module")

ENDLESS: dict[str, Any] = {"max_epochs": 10_000, "patience": 0, "views": 1}
EPOCHS = 200
LONG: dict[str, Any] = {**ENDLESS, "max_epochs": EPOCHS, "learning_rate": 0.01, "weight_decay": 0.01}
"""One candidate only, with epochs of a hundredth of a second: so many that it is not over before it is looked at."""


class Telemetry:
    """Remembers what it was told."""

    def __init__(self) -> None:
        self.epochs: list[tuple[str, int]] = []
        self.counts: Mapping[JobState, int] = {}
        self.durations: list[float] = []
        self.images = {"computed": 0, "cache": 0}

    def training_epoch(self, model: str, epoch: int, *figures: float) -> None:
        assert len(figures) == 4
        self.epochs.append((model, epoch))

    def training_jobs(self, counts: Mapping[JobState, int]) -> None:
        self.counts = counts

    def job_duration(self, seconds: float) -> None:
        self.durations.append(seconds)

    def feature_images(self, source: str, count: int) -> None:
        assert count >= 0
        self.images[source] += count


class Daemon:
    """What surrounds a supervisor; several may follow each other on the same folders."""

    def __init__(
        self, tmp_path: Path, engine: Engine, catalogue: Catalogue, weights_file: Path, standby: Standby
    ) -> None:
        self.root = tmp_path
        self.standby = standby
        self.work = tmp_path / "work"
        self.directory = CheckpointDirectory(tmp_path / "checkpoints")
        self.directory.root.mkdir(exist_ok=True)
        self.served: list[tuple[str, int, JobState]] = []
        self.telemetry = Telemetry()
        self._store = JobStore(engine)
        self._catalogue = catalogue
        self._files = {"digits": weights_file}

    @asynccontextmanager
    async def run(self, **settings: Any) -> AsyncIterator[JobSupervisor]:
        supervisor = JobSupervisor(
            self._store,
            directory=self.directory,
            catalogue=self._catalogue,
            weights=WeightStore(self._catalogue, self._files),
            settings=TrainingSettings(
                **{
                    "work_dir": self.work,
                    "cache_dir": self.root / "features",
                    "data_roots": (self.root / "data",),
                    "weight_files": self._files,
                    "device": "cpu",
                    **settings,
                },
            ),
            telemetry=self.telemetry,
            standby=self.standby,
            before_success=self._serve,
        )
        await supervisor.start()
        try:
            yield supervisor
        finally:
            await supervisor.stop(20)

    async def _serve(self, model: str, version: int) -> None:
        (job,) = self._store.jobs(model=model)
        self.served.append((model, version, job.state))


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def standby() -> AsyncIterator[Standby]:
    """Torch is imported once for the trainers of all tests."""
    standby = Standby(())
    yield standby
    standby.close()


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Engine]:
    engine = open_database(tmp_path / "state.sqlite")
    yield engine
    engine.dispose()


@pytest.fixture
def daemon(
    request: pytest.FixtureRequest, tmp_path: Path, engine: Engine, standby: Standby, paint: Callable[..., Path]
) -> Daemon:
    paint(tmp_path / "data" / "colours", {"red": 6, "blue": 6})
    catalogue, weights_file = request.getfixturevalue("catalogue"), request.getfixturevalue("weights_file")
    return Daemon(tmp_path, engine, catalogue, weights_file, standby)


async def submit(supervisor: JobSupervisor, model: str = "colours", **options: Any) -> Job:
    request_id = options.pop("request_id", "")
    return await supervisor.submit(
        model=model,
        backbone=options.pop("backbone", "digits"),
        dataset=options.pop("dataset", "colours"),
        options=TrainingOptions(**options),
        request_id=request_id,
    )


async def watch_until(supervisor: JobSupervisor, job: Job, kind: type, count: int = 1) -> None:
    async for event in supervisor.watch(job.id):
        count -= isinstance(event.payload, kind)
        if count == 0:
            return
    pytest.fail(f"the job ended before: {await supervisor.get(job.id)}")


async def watch_all(supervisor: JobSupervisor, job: Job, after_sequence: int = 0) -> list[JobEvent]:
    return [event async for event in supervisor.watch(job.id, after_sequence)]


async def test_a_job_runs_and_everyone_sees_every_event(daemon: Daemon) -> None:
    async with daemon.run() as supervisor:
        job = await submit(supervisor, max_epochs=2)
        assert (job.version, job.state) == (1, JobState.QUEUED)
        events, same = await asyncio.gather(watch_all(supervisor, job), watch_all(supervisor, job))
        assert same == events
        assert [e.sequence for e in events] == list(range(1, len(events) + 1))
        states = [e.payload.state for e in events if isinstance(e.payload, StateChanged)]
        assert states == [JobState.QUEUED, JobState.RUNNING, JobState.SUCCEEDED]
        for kind, count in ((DatasetReport, 2), (EpochDone, 2), (CheckpointWritten, 2)):
            assert sum(isinstance(e.payload, kind) for e in events) == count
        assert await watch_all(supervisor, job, after_sequence=4) == events[4:], "also of a job that has ended"
        assert await watch_all(supervisor, job, after_sequence=len(events)) == []
        assert daemon.served == [("colours", 1, JobState.RUNNING)], "served before it is said to have succeeded"
        ended = await supervisor.get(job.id)
        assert ended.end_time is not None
        assert await supervisor.cancel(job.id) == ended, "cancelling what has ended changes nothing"
    assert Manifest.read(daemon.directory.version("colours", 1)).complete
    assert daemon.telemetry.epochs == [("colours", 1), ("colours", 2)]
    assert daemon.telemetry.images == {"computed": 2 * 10 + 2, "cache": 0}
    assert daemon.telemetry.counts[JobState.SUCCEEDED] == 1
    assert len(daemon.telemetry.durations) == 1
    assert not list((daemon.root / "work").iterdir())


async def test_a_killed_trainer_is_followed_by_another_one_that_goes_on(daemon: Daemon) -> None:
    async with daemon.run() as supervisor:
        job = await submit(supervisor, **LONG)
        await watch_until(supervisor, job, CheckpointWritten, count=2)
        os.kill(_trainer_pid(), signal.SIGKILL)
        events = await watch_all(supervisor, job)
    assert events[-1].payload == StateChanged(JobState.SUCCEEDED)
    assert [e.sequence for e in events] == list(range(1, len(events) + 1))
    for kind in (EpochDone, CheckpointWritten):
        assert [e.payload.epoch for e in events if isinstance(e.payload, kind)] == list(range(1, EPOCHS + 1))
    told = {e.payload.file: e.payload.sha256 for e in events if isinstance(e.payload, CheckpointWritten)}
    assert told == {e.file: e.sha256 for e in Manifest.read(daemon.directory.version("colours", 1)).epochs}
    assert [type(e.payload) for e in events].count(DatasetReport) == 2, "before and after the images were looked at"
    (line,) = [e.payload.text for e in events if isinstance(e.payload, LogLine) and "SIGKILL" in e.payload.text]
    assert line.endswith("another one goes on from where it was")
    assert daemon.telemetry.epochs == [("colours", epoch) for epoch in range(1, EPOCHS + 1)]
    assert daemon.telemetry.images == {"computed": 12, "cache": 12}
    assert not list(daemon.work.iterdir())


@pytest.fixture
def dying(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Standby:
    """Every trainer dies as soon as it has begun."""
    (tmp_path / "dies_at_once.py").write_text("import os\nos.write(2, b'no such library\\n')\nos._exit(7)\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    return Standby(("dies_at_once",), enabled=False)


async def test_trainers_that_die_at_once_are_given_up(daemon: Daemon, dying: Standby) -> None:
    daemon.standby = dying
    async with daemon.run() as supervisor:
        job = await submit(supervisor)
        await watch_all(supervisor, job)
        failed = await supervisor.get(job.id)
    assert failed.state is JobState.FAILED
    said = "3 trainers in a row got no further: the trainer process ended with code 7: no such library"
    assert failed.error == said
    assert not list(daemon.work.iterdir())
    assert not daemon.directory.version("colours", 1).exists()


async def test_a_job_is_cancelled_between_two_trainers(daemon: Daemon, dying: Standby) -> None:
    daemon.standby = dying
    async with daemon.run() as supervisor:
        job = await submit(supervisor)
        await watch_until(supervisor, job, LogLine, count=2)
        assert (await supervisor.cancel(job.id)).state is JobState.CANCELLED


async def test_cancelling_keeps_what_is_finished_and_removes_what_never_began(daemon: Daemon) -> None:
    async with daemon.run() as supervisor:
        job = await submit(supervisor, **ENDLESS)
        waiting = await submit(supervisor, model="waiting")
        assert (await supervisor.cancel(waiting.id)).state is JobState.CANCELLED
        assert not daemon.directory.version("waiting", 1).exists()
        await watch_until(supervisor, job, CheckpointWritten, count=2)
        cancelled = await supervisor.cancel(job.id)
        assert (cancelled.state, cancelled.error) == (JobState.CANCELLED, "")
        manifest = Manifest.read(daemon.directory.version("colours", 1))
        assert len(manifest.epochs) >= 2
        assert not manifest.complete
        assert (await watch_all(supervisor, job))[-1].payload == StateChanged(JobState.CANCELLED)


async def test_jobs_survive_a_restart(daemon: Daemon) -> None:
    async with daemon.run() as supervisor:
        running = await submit(supervisor, **LONG)
        waiting = await submit(supervisor, model="waiting", max_epochs=1)
        await watch_until(supervisor, running, CheckpointWritten)
        watcher = asyncio.create_task(watch_all(supervisor, waiting))
    with pytest.raises(BackbonedError, match="watch again with after_sequence=1"):
        await watcher
    async with daemon.run() as supervisor:
        events = await watch_all(supervisor, running)
        assert [e.payload.epoch for e in events if isinstance(e.payload, EpochDone)] == list(range(1, EPOCHS + 1))
        states = [e.payload.state for e in events if isinstance(e.payload, StateChanged)]
        assert states == [JobState.QUEUED, JobState.RUNNING, JobState.QUEUED, JobState.RUNNING, JobState.SUCCEEDED]
        assert (await watch_all(supervisor, waiting, after_sequence=1))[-1].payload == StateChanged(JobState.SUCCEEDED)


async def test_a_trainer_that_does_not_stop_in_time_is_killed_and_its_job_goes_on_later(daemon: Daemon) -> None:
    async with daemon.run() as supervisor:
        job = await submit(supervisor, **ENDLESS)
        await watch_until(supervisor, job, CheckpointWritten)
        await supervisor.stop(0)  # and once more when this ends
        assert (await supervisor.get(job.id)).state is JobState.RUNNING
        assert (daemon.work / f"job-{job.id}").is_dir()


async def test_a_job_that_is_cancelled_while_the_daemon_stops_does_not_come_back(daemon: Daemon) -> None:
    async with daemon.run() as supervisor:
        job = await submit(supervisor, **ENDLESS)
        await watch_until(supervisor, job, CheckpointWritten)
        stopping = asyncio.create_task(supervisor.stop(20))
        await asyncio.sleep(0)  # the stop comes first
        assert (await supervisor.cancel(job.id)).state is JobState.CANCELLED
        await stopping


async def test_a_job_that_a_killed_daemon_left_running_goes_on_and_keeps_its_folder(
    daemon: Daemon, engine: Engine
) -> None:
    store = JobStore(engine)
    version = daemon.directory.reserve("colours")
    folder = str(daemon.root / "data" / "colours")
    store.add("left", JobRequest("colours", "digits", "colours", TrainingOptions(max_epochs=1)), folder, version)
    store.append("left", StateChanged(JobState.RUNNING))
    for name in ("job-left", "job-ended"):
        (daemon.work / name).mkdir(parents=True)
    daemon.directory.version("colours", version).rmdir()  # as a daemon does that is killed before it says "cancelled"
    async with daemon.run() as supervisor:
        assert [f.name for f in daemon.work.iterdir()] == ["job-left"]
        with pytest.raises(BackbonedError, match="job left uses dataset"):
            await supervisor.release(Path(folder), lambda: None)
        assert [e async for e in supervisor.watch("left")][-1].payload == StateChanged(JobState.SUCCEEDED)


async def test_a_repeated_request_is_the_same_job(daemon: Daemon) -> None:
    async with daemon.run() as supervisor:
        first, second = await asyncio.gather(*(submit(supervisor, request_id="r", max_epochs=1) for _ in range(2)))
        assert first.id == second.id
        assert len(await supervisor.list_jobs()) == 1
        with pytest.raises(BackbonedError) as caught:
            await submit(supervisor, request_id="r", max_epochs=2)
        assert caught.value.kind is ErrorKind.ALREADY_EXISTS
        assert daemon.directory.versions("colours") == [1]


@pytest.mark.parametrize(
    ("request_", "kind", "says"),
    [
        ({"model": "no/slash"}, ErrorKind.INVALID_ARGUMENT, "model name"),
        ({"backbone": "digts"}, ErrorKind.NOT_FOUND, "did you mean 'digits'"),
        ({"dataset": "colors"}, ErrorKind.NOT_FOUND, "did you mean 'colours'"),
        ({"dataset": "/etc"}, ErrorKind.PERMISSION_DENIED, "data roots"),
        ({"max_epochs": 0}, ErrorKind.INVALID_ARGUMENT, "options.max_epochs"),
        ({"request_id": "r" * 129}, ErrorKind.INVALID_ARGUMENT, "129 characters"),
        ({"warm_start_version": 4}, ErrorKind.NOT_FOUND, "no version 4"),
    ],
)
async def test_a_request_that_cannot_work_is_refused_at_once(
    daemon: Daemon, request_: dict[str, Any], kind: ErrorKind, says: str
) -> None:
    async with daemon.run() as supervisor:
        with pytest.raises(BackbonedError) as caught:
            await submit(supervisor, **request_)
        assert caught.value.kind is kind
        assert says in caught.value.message
        assert await supervisor.list_jobs() == []


async def test_too_many_waiting_jobs_are_refused(daemon: Daemon) -> None:
    async with daemon.run(max_queued_jobs=1) as supervisor:
        running = await submit(supervisor, **ENDLESS)
        await watch_until(supervisor, running, StateChanged, count=2)
        await submit(supervisor, model="waiting")
        with pytest.raises(BackbonedError, match="1 jobs are queued already") as caught:
            await submit(supervisor, model="refused")
        assert caught.value.kind is ErrorKind.RESOURCE_EXHAUSTED
        assert caught.value.retry_delay_seconds
        assert daemon.directory.versions("refused") == []


def _trainer_pid() -> int:
    """The only child of the only child of this process that forks trainers."""
    (server,) = [pid for pid in _children(os.getpid()) if b"fork_server" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    (pid,) = _children(server)
    return pid


def _children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii").split()]
