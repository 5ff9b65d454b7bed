"""Jobs over the wire: watched from anywhere, cancelled in any state, and gone on with when a trainer is killed."""

import os
import signal
from collections.abc import Callable
from pathlib import Path

from backboned.client import Client
from backboned.server.commands.local_daemon import LocalDaemon
from backboned.v1 import model_service_pb2 as pb

TrainLong = Callable[[Client, str], pb.Job]


def test_a_job_is_watched_from_its_middle_and_after_its_end(client: Client, trained: pb.Job) -> None:
    events = list(client.watch(trained.id))
    assert [e.sequence for e in events] == list(range(1, len(events) + 1))
    states = [e.state for e in events if e.WhichOneof("event") == "state"]
    assert states == [pb.JOB_STATE_QUEUED, pb.JOB_STATE_RUNNING, pb.JOB_STATE_SUCCEEDED]
    assert [e.epoch.epoch for e in events if e.HasField("epoch")] == [1, 2]
    assert [e.checkpoint.epoch for e in events if e.HasField("checkpoint")] == [1, 2]
    assert events[-1].state == pb.JOB_STATE_SUCCEEDED
    middle = len(events) // 2
    assert list(client.watch(trained.id, after_sequence=middle)) == events[middle:]
    assert list(client.watch(trained.id, after_sequence=len(events))) == []


def test_jobs_are_listed_newest_first_in_pages_and_by_filter(
    client: Client, trained: pb.Job, wait_for: Callable[[Callable[[], object]], None]
) -> None:
    paged = [j.id for j in client.list_jobs(page_size=1)]
    assert paged == [j.id for j in client.list_jobs()] and trained.id in paged
    wait_for(lambda: client.get_job(trained.id).best.state == pb.CHECKPOINT_STATE_SERVING)
    found = list(client.list_jobs(model="squares", filter="state = SUCCEEDED AND version >= 1"))
    assert found == [client.get_job(trained.id)]
    assert found[0].request.request_id == "squares-1" and found[0].request.options.max_epochs == 2


def test_a_running_and_a_waiting_job_are_cancelled(
    client: Client, train_long: TrainLong, wait_for: Callable[[Callable[[], object]], None]
) -> None:
    running = train_long(client, "long")
    waiting = client.fine_tune("long", "digits", "squares")
    assert client.get_job(waiting.id).state == pb.JOB_STATE_QUEUED

    cancelled = client.cancel_job(waiting.id)
    assert cancelled.state == pb.JOB_STATE_CANCELLED and not cancelled.HasField("start_time")
    events = [e.state for e in client.watch(waiting.id)]
    assert events == [pb.JOB_STATE_QUEUED, pb.JOB_STATE_CANCELLED]

    watch = client.watch(running.id, after_sequence=2)
    assert next(watch).sequence == 3
    ended = client.cancel_job(running.id)
    assert ended.state == pb.JOB_STATE_CANCELLED and ended.error == "" and ended.HasField("end_time")
    assert list(watch)[-1].state == pb.JOB_STATE_CANCELLED  # also for those who watched

    # What it wrote is kept, and served: until the daemon has seen all of it, the best one and its state change.
    written = [e.checkpoint for e in client.watch(running.id) if e.HasField("checkpoint")]
    best = [c.epoch for c in written if c.best][-1]
    wait_for(lambda: len(list(client.list_checkpoints(model="long"))) == len(written))
    wait_for(lambda: client.get_job(running.id).best.state == pb.CHECKPOINT_STATE_SERVING)
    kept = list(client.list_checkpoints(model="long"))
    ended.best.CopyFrom(next(c for c in kept if c.epoch == best))
    assert client.cancel_job(running.id) == ended
    assert {c.version for c in kept} == {running.version}
    for checkpoint in kept:
        assert Path(checkpoint.uri.removeprefix("file://")).is_file()


def test_a_trainer_that_is_killed_is_followed_by_another_one(  # noqa: PLR0917 - fixtures
    served: LocalDaemon,
    client: Client,
    train_long: TrainLong,
    photo: bytes,
    trainer_of: Callable[[int], int | None],
    wait_for: Callable[[Callable[[], object]], None],
) -> None:
    before = client.predict("flowers", photo).predictions[0].classes
    job = train_long(client, "killed")
    pid = trainer_of(served.pid)
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    watch = client.watch(job.id)
    told = next(e.log for e in watch if "SIGKILL" in e.log)
    assert told.endswith("another one goes on from where it was")
    next(e for e in watch if e.HasField("checkpoint"))  # and it does
    assert client.predict("flowers", photo).predictions[0].classes == before
    assert client.cancel_job(job.id).state == pb.JOB_STATE_CANCELLED
    epochs = [e.checkpoint.epoch for e in client.watch(job.id) if e.HasField("checkpoint")]
    assert epochs == list(range(1, len(epochs) + 1)) and len(epochs) >= 2
    wait_for(lambda: {c.epoch for c in client.list_checkpoints(model="killed")} == set(epochs))
