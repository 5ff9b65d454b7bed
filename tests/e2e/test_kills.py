"""Trainers and daemons are killed at random moments: every job ends well, with the weights of one left alone."""

import logging
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from backboned.client import Client
from backboned.registry.digest import file_digest
from backboned.registry.manifest import Manifest
from backboned.server.commands.local_daemon import LocalDaemon
from backboned.v1 import model_service_pb2 as pb

_logger = logging.getLogger(__name__)
KILLS = int(os.environ.get("BACKBONED_KILLS", "2"))
SEED = 2
DAEMON_SHARE = 0.3
"""So many of the kills are the daemon's, the others a trainer's."""

STARTUP_SHARE = 0.25
"""So many of the kills come while a trainer starts, the others after it has written something."""

ALL_JOBS: Mapping[str, dict[str, Any]] = {
    "head": {"max_epochs": 15, "views": 1},
    "rate": {"max_epochs": 60, "views": 1, "seed": 3, "learning_rate": 0.01, "weight_decay": 0.01},
    "stage": {"max_epochs": 60, "views": 1, "trainable_stages": ["layer3"]},
    "auto": {"max_epochs": 30, "views": 1, "trainable_stages": ["auto"]},
}
FEW = ("rate", "stage")
"""These alone are run where there are few kills."""

JOBS = ALL_JOBS if KILLS >= 5 else {name: ALL_JOBS[name] for name in FEW}
PATIENCE_SECONDS = 120.0 + 20.0 * KILLS

Start = Callable[..., LocalDaemon]
TrainerOf = Callable[[int], int | None]


class Killer:
    """Kills the daemon or its trainer until it has done so often enough, and starts the daemon anew."""

    def __init__(self, start: Callable[[], LocalDaemon], checkpoints: Path, trainer_of: TrainerOf) -> None:
        self._start = start
        self._trainer_of = trainer_of
        self._checkpoints = checkpoints
        self._random = random.Random(SEED)
        self.daemon = start()
        self.killed: Counter[str] = Counter()
        self.early = 0

    def kill(self, over: Callable[[], bool]) -> None:
        """Once more, at some moment; or not, when it is `over`."""
        victim = "daemon" if self._random.random() < DAEMON_SHARE else "trainer"
        early = self._random.random() < STARTUP_SHARE
        trainer, written, look_again = None, self._written(), 0.0
        while trainer is None or not (early or self._written() > written):
            if time.monotonic() > look_again:
                look_again = time.monotonic() + 0.5
                if over():
                    return
            time.sleep(0.005)
            trainer = trainer if trainer and lives(trainer) else self._trainer_of(self.daemon.pid)
        time.sleep(self._random.uniform(0, 3.0 if early else 0.4))
        if victim == "daemon":
            os.kill(self.daemon.pid, signal.SIGKILL)
            self.daemon.wait()
            self.daemon = self._start()
        elif lives(trainer):
            os.kill(trainer, signal.SIGKILL)
        else:
            return
        self.killed[victim] += 1
        self.early += early

    def _written(self) -> int:
        return sum(1 for _ in self._checkpoints.glob("*/*/epoch-*.pt"))


def lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def submit(client: Client, name: str) -> pb.Job:
    return client.fine_tune(name, "digits", "squares", request_id=name, patience=0, **JOBS[name.partition("-")[0]])


@pytest.fixture
def undisturbed(start_daemon: Start, training_flags: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint directory of a daemon that did the same jobs and was left in peace."""
    folder = tmp_path_factory.mktemp("undisturbed")
    with start_daemon(*training_flags, folder=folder) as daemon, Client(daemon.grpc) as client:
        jobs = [submit(client, name) for name in JOBS]
        ended = [client.wait(job.id) for job in jobs]
        assert {job.state for job in ended} == {pb.JOB_STATE_SUCCEEDED}, ended
    return folder / "checkpoints"


@pytest.mark.timeout(2 * PATIENCE_SECONDS)
def test_jobs_end_as_if_nobody_had_been_killed(
    undisturbed: Path,
    start_daemon: Start,
    training_flags: list[str],
    trainer_of: TrainerOf,
    tmp_path: Path,
) -> None:
    checkpoints = tmp_path / "checkpoints"
    killer = Killer(lambda: start_daemon(*training_flags), checkpoints, trainer_of)
    rounds, jobs = 0, dict[str, str]()
    deadline = time.monotonic() + PATIENCE_SECONDS
    while killer.killed.total() < KILLS:
        rounds += 1
        with Client(killer.daemon.grpc) as client:
            new = {name: submit(client, name).id for name in (f"{name}-{rounds}" for name in JOBS)}
        jobs |= new

        def over(new: Mapping[str, str] = new) -> bool:
            assert time.monotonic() < deadline, f"{killer.killed} of {KILLS}"
            with Client(killer.daemon.grpc) as client:
                now = {name: client.get_job(job_id) for name, job_id in new.items()}
            ended_badly = (pb.JOB_STATE_FAILED, pb.JOB_STATE_CANCELLED)
            assert not {name: job.error for name, job in now.items() if job.state in ended_badly}
            return all(job.state == pb.JOB_STATE_SUCCEEDED for job in now.values())

        while killer.killed.total() < KILLS and not over():
            killer.kill(over)
    _logger.warning("%s, %d of them during start-up, %d jobs", dict(killer.killed), killer.early, len(jobs))

    with Client(killer.daemon.grpc) as client:
        for name, job_id in jobs.items():
            ended = client.wait(job_id)
            assert ended.state == pb.JOB_STATE_SUCCEEDED, f"{name}: {ended.error}"
            assert submit(client, name).id == job_id, "the same request is the same job, also after all this"
        assert {job.id for job in client.list_jobs()} == set(jobs.values())
        for name, job_id in jobs.items():
            check_events(list(client.watch(job_id)), checkpoints / name / "1")
    for name in jobs:
        assert [f.name for f in (checkpoints / name).iterdir()] == ["1"]
        check_equal(checkpoints / name / "1", undisturbed / name.partition("-")[0] / "1")
    assert not list((tmp_path / "state" / "work").glob("job-*"))


def check_events(events: list[pb.JobEvent], version: Path) -> None:
    """Each thing was told once and in order, and what was told of checkpoints is so."""
    assert [e.sequence for e in events] == list(range(1, len(events) + 1))
    assert events[-1].state == pb.JOB_STATE_SUCCEEDED
    epochs = Manifest.read(version).epochs
    numbers = [epoch.epoch for epoch in epochs]
    assert numbers == list(range(1, len(epochs) + 1))
    assert [e.epoch.epoch for e in events if e.HasField("epoch")] == numbers
    told = [(e.checkpoint.epoch, e.checkpoint.sha256) for e in events if e.HasField("checkpoint")]
    assert told == [(epoch.epoch, epoch.sha256) for epoch in epochs]
    assert sum(e.HasField("evaluation") for e in events) == 1
    reports = [e.dataset_report.SerializeToString(deterministic=True) for e in events if e.HasField("dataset_report")]
    assert len(reports) == len(set(reports))


def check_equal(version: Path, other: Path) -> None:
    """Two versions are whole, and have the same epochs and tensors, bit for bit."""
    one, two = Manifest.read(version), Manifest.read(other)
    assert one.complete and two.complete
    assert (one.best_epoch, len(one.epochs)) == (two.best_epoch, len(two.epochs))
    listed = {"manifest.json", "report.html", "evaluation.json", *(epoch.file for epoch in one.epochs)}
    assert {f.name for f in version.iterdir()} == listed, "nothing half written is left"
    for mine, its in zip(one.epochs, two.epochs, strict=True):
        assert file_digest(version / mine.file) == mine.sha256
        a, b = (torch.load(f, weights_only=True) for f in (version / mine.file, other / its.file))
        assert a["model_state_dict"].keys() == b["model_state_dict"].keys()
        for key, tensor in a["model_state_dict"].items():
            assert torch.equal(tensor, b["model_state_dict"][key]), f"{version} epoch {mine.epoch}: {key}"
