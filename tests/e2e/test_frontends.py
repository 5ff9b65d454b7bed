"""A daemon behind front ends answers as one without: rightly, with all details, and without losing a call."""

import os
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from io import BytesIO
from pathlib import Path

import grpc
import pytest
import torch
from grpc_health.v1 import health_pb2, health_pb2_grpc
from PIL import Image
from torch import nn

from backboned.client import Client, ClientError
from backboned.server.commands.application import run
from backboned.server.commands.local_daemon import LocalDaemon
from backboned.v1 import model_service_pb2 as pb
from backboned.v1.model_service_pb2_grpc import ModelServiceStub

WaitFor = Callable[[Callable[[], object]], None]
Truth = Callable[[str, int, Image.Image], dict[str, float]]

COUNT = 2
BACKBONES = {"flowers": "digits", "scenes": "squeezenet1_1"}
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, networks: dict[tuple[str, int], nn.Module]) -> Path:
    """Checkpoints of a version of `flowers` and of `scenes`, which are prepared differently."""
    folder = tmp_path_factory.mktemp("behind")
    for model, backbone in BACKBONES.items():
        (folder / "checkpoints" / model).mkdir(parents=True)
        dropped = {"backbone": backbone, "model_state_dict": networks[model, 1].state_dict()}
        torch.save(dropped, folder / "checkpoints" / model / "dropped.pt")
    return folder


@pytest.fixture(scope="module")
def start(folder: Path, wait_for: WaitFor) -> Iterator[Callable[[], LocalDaemon]]:
    """Starts a daemon on `folder`; those that still run are stopped at the end."""
    with ExitStack() as stack:

        def begin() -> LocalDaemon:
            flags = [
                f"--checkpoint-dir={folder / 'checkpoints'}",
                f"--state-dir={folder / 'state'}",
                "--device=cpu",
                "--precision=fp32",
                "--compile=off",
                "--grpc-port=0",
                "--http-port=0",
                f"--frontends={COUNT}",
            ]
            daemon = stack.enter_context(LocalDaemon.start(flags, folder))
            with Client(daemon.grpc) as client:
                wait_for(lambda: all(m.serving_version == 1 for m in client.list_models()))
            return daemon

        yield begin


@pytest.fixture(scope="module")
def behind(start: Callable[[], LocalDaemon]) -> LocalDaemon:
    """A daemon for the tests that leave it as it is."""
    return start()


@pytest.fixture
def stubs() -> Iterator[Callable[[LocalDaemon, int], list[ModelServiceStub]]]:
    """Makes stubs for a daemon, each with a connection of its own."""
    with ExitStack() as stack:

        def make(daemon: LocalDaemon, count: int) -> list[ModelServiceStub]:
            return [ModelServiceStub(stack.enter_context(connection(daemon))) for _ in range(count)]

        yield make


def connection(daemon: LocalDaemon) -> grpc.Channel:
    return grpc.insecure_channel(daemon.grpc, options=[("grpc.use_local_subchannel_pool", 1)])


def front_ends(daemon: LocalDaemon) -> set[int]:
    """The ids of its front ends' processes."""
    found = set()
    for process in Path("/proc").glob("[0-9]*"):
        try:
            state, parent = (process / "stat").read_text().rpartition(")")[2].split()[:2]
            command = (process / "cmdline").read_text()
        except OSError:
            continue
        if int(parent) == daemon.pid and state != "Z" and "backboned.server.frontend.process" in command:
            found.add(int(process.name))
    return found


def lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def pictures(count: int) -> list[Image.Image]:
    return [Image.radial_gradient("L").resize((200 + 10 * i, 260)).rotate(20 * i).convert("RGB") for i in range(count)]


def probabilities(prediction: pb.Prediction) -> dict[str, float]:
    return {c.label: c.probability for c in prediction.classes}


def test_many_callers_of_two_models_get_right_answers(
    behind: LocalDaemon,
    stubs: Callable[[LocalDaemon, int], list[ModelServiceStub]],
    truth: Truth,
    png: Callable[[Image.Image], bytes],
) -> None:
    shown = pictures(4)
    images = [pb.Image(encoded=png(p)) for p in shown]
    both = [pb.ModelTarget(model=m) for m in BACKBONES]
    requests = [pb.PredictRequest(model=m, images=images) for m in BACKBONES] + [
        pb.PredictRequest(models=both, images=images)
    ]
    with ThreadPoolExecutor(12) as callers:
        asked = [(request, stub) for stub in stubs(behind, 6) for request in requests * 2]
        answers = list(callers.map(lambda pair: pair[1].Predict(pair[0]), asked))
    expected = {m: [list(truth(m, 1, p).values()) for p in shown] for m in BACKBONES}
    for (request, _), answer in zip(asked, answers, strict=True):
        for result in answer.results or [answer]:
            found = [[probabilities(p)[f"class_{i}"] for i in range(len(p.classes))] for p in result.predictions]
            for row, right in zip(found, expected[result.model], strict=True):
                assert row == pytest.approx(right, abs=0.02), request.model


def test_errors_have_their_details(behind: LocalDaemon, png: Callable[[Image.Image], bytes]) -> None:
    good = png(pictures(1)[0])
    with Client(behind.grpc) as client:
        for call, code, field in (
            (lambda: client.predict("flowers", [good, good[:100]]), grpc.StatusCode.INVALID_ARGUMENT, "images[1]"),
            (lambda: client.predict("flower", good), grpc.StatusCode.NOT_FOUND, "model"),
            (lambda: client.predict("flowers", good, top_k=99), grpc.StatusCode.INVALID_ARGUMENT, "top_k"),
            (lambda: client.get_model("flower"), grpc.StatusCode.NOT_FOUND, "model"),
        ):
            for _ in range(2):
                with pytest.raises(ClientError) as refused:
                    call()
                assert (refused.value.code, refused.value.field) == (code, field)
        assert "flowers" in str(refused.value)


def test_health_is_the_daemons(behind: LocalDaemon) -> None:
    with connection(behind) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        assert stub.Check(health_pb2.HealthCheckRequest(service="backboned.v1.ModelService")).status == SERVING
        with pytest.raises(grpc.RpcError) as unknown:
            stub.Check(health_pb2.HealthCheckRequest(service="other"))
        assert unknown.value.code() is grpc.StatusCode.NOT_FOUND


def test_a_front_end_that_is_killed_is_replaced_while_the_daemon_serves_on(
    behind: LocalDaemon, png: Callable[[Image.Image], bytes], wait_for: WaitFor
) -> None:
    before = front_ends(behind)
    assert len(before) == COUNT
    request = pb.PredictRequest(model="flowers", images=[pb.Image(encoded=png(pictures(1)[0]))])
    os.kill(min(before), signal.SIGKILL)
    wait_for(lambda: "was killed by signal 9; another one starts in" in behind.log.read_text())
    for _ in range(10):
        with connection(behind) as channel:
            assert ModelServiceStub(channel).Predict(request).version == 1
    wait_for(lambda: len(front_ends(behind)) == COUNT)
    assert front_ends(behind) - before and max(before) in front_ends(behind)


def test_a_port_in_use_is_said_in_one_line(
    behind: LocalDaemon, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    port = behind.grpc.rpartition(":")[2]
    flags = [f"--checkpoint-dir={tmp_path / 'c'}", f"--state-dir={tmp_path / 's'}", "--http-port=0", "--device=cpu"]
    capfd.readouterr()
    assert run(["serve", *flags, f"--grpc-port={port}", "--frontends=1"]) == 1
    output, errors = capfd.readouterr()
    assert output == "" and errors.count("\n") == 1, errors
    assert errors.startswith(f"error: can't listen on 127.0.0.1 port {port} for gRPC")


def test_a_stop_loses_no_call_and_leaves_nothing(
    start: Callable[[], LocalDaemon],
    stubs: Callable[[LocalDaemon, int], list[ModelServiceStub]],
    folder: Path,
    behind: LocalDaemon,
) -> None:
    assert behind.stop() == 0
    daemon = start()
    file = BytesIO()
    Image.radial_gradient("L").resize((4000, 3000)).convert("RGB").save(file, "JPEG")
    slow = pb.PredictRequest(model="flowers", images=[pb.Image(encoded=file.getvalue())] * 16 * (os.cpu_count() or 1))
    processes = front_ends(daemon)
    with connection(daemon) as channel:
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
        assert next(watch).status == SERVING
        callers = stubs(daemon, 4)
        in_flight = [stub.Predict.future(slow) for stub in callers]
        for stub in callers:  # once this is answered, what went before on the same connection has arrived
            stub.GetModel(pb.GetModelRequest(model="flowers"))
        assert not all(call.done() for call in in_flight)
        os.kill(daemon.pid, signal.SIGTERM)
        assert [answer.status for answer in watch] == [NOT_SERVING]
        assert [len(call.result().predictions) for call in in_flight] == [len(slow.images)] * 4
    daemon.wait()
    assert daemon.stop() == 0
    assert not any(map(lives, processes))
    assert not (folder / "state" / "frontends").exists()
    log = daemon.log.read_text()
    assert "Traceback" not in log and "never retrieved" not in log, log


def test_front_ends_end_with_a_daemon_that_is_killed_and_the_next_one_starts(
    start: Callable[[], LocalDaemon], png: Callable[[Image.Image], bytes], wait_for: WaitFor
) -> None:
    killed = start()
    processes = front_ends(killed)
    os.kill(killed.pid, signal.SIGKILL)
    killed.wait()
    wait_for(lambda: not any(map(lives, processes)))
    with Client(start().grpc) as client:
        assert client.predict("flowers", png(pictures(1)[0])).version == 1
