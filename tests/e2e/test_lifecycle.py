"""A daemon starts, stops while it is busy, is killed, and comes back: nothing is lost that was promised."""

import os
import signal
import socket
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest
import torch
from grpc_health.v1 import health_pb2, health_pb2_grpc
from torch import nn

from backboned.client import Client
from backboned.plugins.digits import digits
from backboned.registry.digest import file_digest
from backboned.registry.manifest import Epoch, Manifest
from backboned.registry.task import Task
from backboned.server.commands.application import run
from backboned.server.commands.local_daemon import LocalDaemon
from backboned.v1 import model_service_pb2 as pb
from backboned.v1.model_service_pb2_grpc import ModelServiceStub

Start = Callable[..., LocalDaemon]
Connect = Callable[[LocalDaemon], Client]
WaitFor = Callable[[Callable[[], object]], None]
TrainLong = Callable[[Client, str], pb.Job]
HOLDING = """
import time
from dataclasses import replace
from pathlib import Path

from backboned.plugins.digits import digits
from backboned.registry import register


def wait(name):
    while Path("{folder}", name).exists():
        time.sleep(0.02)


def build():
    wait("held")
    network = digits().build()
    network.stem.register_forward_pre_hook(lambda *_: wait("busy"))
    return network


@register
def held():
    return replace(digits(), name="held", build=build)
"""


@pytest.fixture
def ports() -> tuple[int, int]:
    """Two ports that are free, for a daemon that comes back to them."""
    with socket.create_server(("127.0.0.1", 0)) as one, socket.create_server(("127.0.0.1", 0)) as two:
        return one.getsockname()[1], two.getsockname()[1]


@pytest.fixture
def start(
    start_daemon: Callable[..., LocalDaemon],
    training_flags: list[str],
    ports: tuple[int, int],
    tmp_path: Path,
    networks: dict[tuple[str, int], nn.Module],
) -> Callable[..., LocalDaemon]:
    """Starts the daemon, again and again, on the same ports and folders, with a version of `flowers`."""
    (tmp_path / "checkpoints" / "flowers").mkdir(parents=True)
    dropped = {"backbone": "digits", "state_dict": networks["flowers", 1].state_dict()}
    torch.save(dropped, tmp_path / "checkpoints" / "flowers" / "dropped.pt")
    return lambda *flags: start_daemon(*training_flags, f"--grpc-port={ports[0]}", f"--http-port={ports[1]}", *flags)


@pytest.fixture
def held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, networks: dict[tuple[str, int], nn.Module]) -> Path:
    """A file: as long as it is there, the plugin `held` doesn't get its backbone built, of which there is a version.

    As long as there is a file `busy` beside it, that computes nothing.
    """
    file = tmp_path / "held"
    file.touch()
    (tmp_path / "holding.py").write_text(HOLDING.format(folder=tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    folder = tmp_path / "checkpoints" / "held" / "1"
    folder.mkdir(parents=True)
    path = folder / "epoch-0001.pt"
    torch.save(networks["flowers", 1].state_dict(), path)
    Manifest(
        model="held",
        version=1,
        backbone="held",
        task=Task.SINGLE_LABEL,
        classes=tuple("abcde"),
        stages={},
        preprocessing=digits().preprocessing,
        epochs=(Epoch(1, path.name, file_digest(path), path.stat().st_size, 1.7e9),),
        best_epoch=1,
        complete=True,
    ).write(folder)
    return file


def serves(client: Client, model: str) -> bool:
    return any(m.name == model and m.serving_version for m in client.list_models())


def test_ready_means_loaded_and_a_stop_finishes_what_is_in_flight(  # noqa: PLR0917 - fixtures
    start: Start, ports: tuple[int, int], held: Path, fetch: Callable[[str], str], wait_for: WaitFor, photo: bytes
) -> None:
    http = f"http://127.0.0.1:{ports[1]}"
    with ThreadPoolExecutor() as aside:
        starting = aside.submit(start, "--plugin=holding", "--compile=off")
        wait_for(lambda: starting.done() or fetch(f"{http}/healthz"))
        assert fetch(f"{http}/healthz") == "alive\n"
        assert fetch(f"{http}/readyz") == "starting: models are being loaded\n"
        assert not starting.done()
        held.unlink()
        daemon = starting.result()
    assert fetch(f"{http}/readyz") == "ready\n"

    with grpc.insecure_channel(daemon.grpc) as channel, Client(daemon.grpc) as client:
        stub, health = ModelServiceStub(channel), health_pb2_grpc.HealthStub(channel)
        wait_for(lambda: serves(client, "flowers"))
        watches = [health.Watch(health_pb2.HealthCheckRequest(service=s)) for s in ("", "backboned.v1.ModelService")]
        assert [next(w).status for w in watches] == [health_pb2.HealthCheckResponse.SERVING] * 2
        busy = held.with_name("busy")
        busy.touch()
        request = pb.PredictRequest(model="held", images=[pb.Image(encoded=photo)] * 3)
        in_flight = [stub.Predict.future(request) for _ in range(2)]
        wait_for(lambda: '_seconds_count{phase="decode"} 0.0' not in fetch(f"{http}/metrics"))

        os.kill(daemon.pid, signal.SIGTERM)
        assert [next(w).status for w in watches] == [health_pb2.HealthCheckResponse.NOT_SERVING] * 2
        assert fetch(f"{http}/readyz") == "stopping\n"

        def is_unavailable() -> bool:
            with pytest.raises(grpc.RpcError) as refused:
                stub.Predict(request)
            code = refused.value.code()
            assert code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)  # just then: grpc/grpc#41785
            return code is grpc.StatusCode.UNAVAILABLE

        wait_for(is_unavailable)
        assert not any(call.done() for call in in_flight)
        busy.unlink()
        assert [len(call.result().predictions) for call in in_flight] == [3, 3]
        assert [list(w) for w in watches] == [[], []]  # they end, and hold up nothing
    daemon.wait()
    assert daemon.stop() == 0


def test_after_a_stop_the_running_job_goes_on_and_the_waiting_one_still_waits(
    start: Start, connect: Connect, train_long: TrainLong, wait_for: WaitFor
) -> None:
    first = start()
    client = connect(first)
    wait_for(lambda: serves(client, "flowers"))
    client.set_alias("flowers", "kept", 1)
    job = train_long(client, "long")
    waiting = client.fine_tune("short", "digits", "squares", max_epochs=1)
    watch = client.watch(job.id)
    seen = [next(watch)]
    assert first.stop() == 0

    client = connect(start())
    last = max(c.epoch for c in client.list_checkpoints(model="long"))
    for event in watch:  # it came back to its ports: the watcher goes on where it was
        seen.append(event)
        if event.checkpoint.epoch > last:
            break
    assert [e.sequence for e in seen] == list(range(1, len(seen) + 1))
    states = [e.state for e in seen if e.WhichOneof("event") == "state"]
    assert states == 2 * [pb.JOB_STATE_QUEUED, pb.JOB_STATE_RUNNING]
    assert [e.checkpoint.epoch for e in seen if e.HasField("checkpoint")] == list(range(1, last + 2))
    assert client.get_job(waiting.id).state == pb.JOB_STATE_QUEUED
    client.cancel_job(job.id)
    assert any(e.state == pb.JOB_STATE_RUNNING for e in client.watch(waiting.id))  # its turn has come
    assert client.get_model("flowers").aliases == {"kept": 1}


def test_a_killed_daemon_comes_back_with_its_models_and_jobs_and_its_trainer_is_replaced(
    start: Start, connect: Connect, train_long: TrainLong, wait_for: WaitFor, photo: bytes
) -> None:
    first = start()
    client = connect(first)
    wait_for(lambda: serves(client, "flowers"))
    before = client.predict("flowers", photo)
    job = train_long(client, "long")
    trainer = int(first.log.read_text().split("trainer process ")[1].split()[0])
    assert lives(trainer)
    os.kill(first.pid, signal.SIGKILL)
    first.wait()

    client = connect(start())
    after = client.predict("flowers", photo)  # ready means loaded
    assert (after.version, after.predictions[0].classes) == (before.version, before.predictions[0].classes)
    (listed,) = client.list_jobs()
    assert (listed.id, listed.version, listed.start_time) == (job.id, job.version, job.start_time)
    assert listed.state in (pb.JOB_STATE_QUEUED, pb.JOB_STATE_RUNNING)
    wait_for(lambda: not lives(trainer))
    last = max(c.epoch for c in client.list_checkpoints(model="long"))
    assert any(e.checkpoint.epoch > last for e in client.watch(job.id))
    client.cancel_job(job.id)


def lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_second_daemon_on_the_same_ports_or_folder_says_so_in_one_line(
    served: LocalDaemon, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    grpc_port, http_port = served.grpc.rpartition(":")[2], served.http.rpartition(":")[2]
    (state_dir,) = (a for a in Path(f"/proc/{served.pid}/cmdline").read_text().split("\0") if "--state-dir" in a)
    free = [f"--checkpoint-dir={tmp_path}", f"--state-dir={tmp_path}", "--grpc-port=0", "--http-port=0"]
    for clash, message in (
        (f"--grpc-port={grpc_port}", f"can't listen on 127.0.0.1 port {grpc_port} for gRPC"),
        (f"--http-port={http_port}", f"can't listen on 127.0.0.1 port {http_port} for HTTP"),
        (state_dir, "another daemon uses the state folder"),
    ):
        capfd.readouterr()
        code = run(["serve", *free, clash])  # as the command does, in this process: what it needs is imported
        output, errors = capfd.readouterr()
        assert (code, output) == (1, "")
        assert errors.startswith(f"error: {message}") and errors.count("\n") == 1, errors
