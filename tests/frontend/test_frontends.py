"""Front ends as processes: they share a port, die, come back, and end with what they stand before."""

import asyncio
import os
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc
import pytest

from backboned.server.api.frontends import frontends_for
from backboned.server.frontend import slots
from backboned.server.listening import listen, private_socket, reserve
from backboned.v1 import model_service_pb2 as pb

pytestmark = pytest.mark.asyncio(loop_scope="module")

Start = Callable[..., Awaitable[Any]]
Eventually = Callable[[Callable[[], object]], Awaitable[None]]

RAW = pb.Image(tensor=pb.Tensor(shape=[20, 30, 3], data=bytes(20 * 30 * 3)))
REQUEST = pb.PredictRequest(model="small", images=[RAW])


def children() -> set[int]:
    """The front ends of this process that live."""
    found = set()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent, state = (folder / "stat").read_text().rpartition(")")[2].split()[1::-1]
            command = (folder / "cmdline").read_text()
        except OSError:
            continue
        if int(parent) == os.getpid() and state != "Z" and "backboned.server.frontend.process" in command:
            found.add(int(folder.name))
    return found


@pytest.mark.parametrize(
    ("cores", "device", "count"),
    [(1, "cuda", 0), (2, "cuda", 0), (4, "cuda", 1), (16, "cuda", 7), (128, "cuda", 8), (2, "cpu", 0), (128, "cpu", 0)],
)
async def test_auto_is_none_on_a_cpu_and_less_than_half_of_the_cores_beside_a_gpu(
    cores: int, device: str, count: int
) -> None:
    assert frontends_for(cores, device) == count


async def test_one_that_is_killed_is_replaced_and_no_others_calls_fail(
    start: Start, connect: Callable[[str], Any], eventually: Eventually, caplog: pytest.LogCaptureFixture
) -> None:
    before = children()
    front = await start(2)
    both = children() - before
    assert len(both) == 2
    front.service.gate.clear()
    calls = [asyncio.ensure_future(connect(front.address).Predict(REQUEST)) for _ in range(12)]
    await eventually(lambda: front.service.waiting == len(calls))
    os.kill(min(both), signal.SIGKILL)
    await eventually(lambda: "was killed by signal 9; another one starts in" in caplog.text)
    await eventually(lambda: front.service.waiting == sum(not call.done() for call in calls))
    lost = front.service.cancelled
    front.service.gate.set()
    results = await asyncio.gather(*calls, return_exceptions=True)
    failed = [r for r in results if isinstance(r, BaseException)]
    assert len(failed) == lost < len(calls)
    assert all(
        isinstance(error, grpc.aio.AioRpcError) and error.code() is grpc.StatusCode.UNAVAILABLE for error in failed
    )
    for _ in range(5):  # meanwhile, the other one has the port
        assert len((await connect(front.address).Predict(REQUEST)).predictions) == 1
    await eventually(lambda: len(children() - before) == 2 and max(both) in children())
    os.kill(max(both), signal.SIGKILL)
    stub = connect(front.address)
    assert len((await stub.Predict(REQUEST, wait_for_ready=True, timeout=60)).predictions) == 1  # of a new one
    await front.frontends.stop(0)
    assert children() == before


async def test_a_stop_finishes_what_is_in_flight_and_leaves_nothing(
    start: Start, connect: Callable[[str], Any], eventually: Eventually
) -> None:
    front = await start(2)
    front.service.gate.clear()
    calls = [asyncio.ensure_future(connect(front.address).Predict(REQUEST)) for _ in range(6)]
    watch = connect(front.address).WatchJob(pb.WatchJobRequest(job_id="j"))
    await eventually(lambda: front.service.waiting == len(calls) + 1)
    watch.cancel()
    await eventually(lambda: front.service.waiting == len(calls))
    for pid in children():
        os.kill(pid, signal.SIGTERM)  # as a terminal and systemd do; they are for the daemon to stop
        os.kill(pid, signal.SIGINT)
    stopping = asyncio.ensure_future(front.frontends.stop(30))
    host, _, port = front.address.rpartition(":")

    def refuses() -> bool:
        with socket.socket() as attempt:
            return attempt.connect_ex((host, int(port))) != 0

    await eventually(refuses)
    assert not stopping.done()
    front.service.gate.set()
    assert [len(answer.predictions) for answer in await asyncio.gather(*calls)] == [1] * len(calls)
    await stopping
    front.frontends.remove_socket()
    assert not front.path.exists() and not front.path.parent.exists()


async def test_a_front_end_ends_with_the_process_that_started_it(eventually: Eventually) -> None:
    ours, theirs = socket.socketpair()
    images = slots.create(2**20)
    process = subprocess.Popen(  # noqa: ASYNC220 - it doesn't block
        [sys.executable, "-m", "backboned.server.frontend.process", str(theirs.fileno()), str(images)],
        pass_fds=(theirs.fileno(), images),
    )
    theirs.close()
    os.close(images)
    ours.close()
    await eventually(lambda: process.poll() is not None)
    assert process.returncode == 1


async def test_a_reserved_port_is_for_those_who_share_it() -> None:
    with reserve("127.0.0.1", 0, "gRPC") as reserved:
        host, port = reserved.getsockname()
        for claim in (listen, reserve):
            with pytest.raises(OSError, match=f"can't listen on 127.0.0.1 port {port} for gRPC"):
                claim(host, port, "gRPC")
        with socket.socket() as shares:
            shares.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            shares.bind((host, port))
            shares.listen()
            with pytest.raises(OSError, match=f"can't listen on 127.0.0.1 port {port} for gRPC"):
                reserve(host, port, "gRPC")


async def test_a_port_in_use_is_said(start: Start) -> None:
    with listen("127.0.0.1", 0, "gRPC") as taken:
        port = taken.getsockname()[1]
        with pytest.raises(OSError, match=f"can't listen on 127.0.0.1 port {port} for gRPC"):
            await start(1, port)


async def test_the_socket_is_for_this_user_alone(start: Start) -> None:
    front = await start(0)
    assert stat.S_IMODE(front.path.parent.stat().st_mode) == 0o700


async def test_a_socket_in_a_deep_or_oddly_named_folder_is_made_elsewhere_always_the_same(tmp_path: Path) -> None:
    plain = private_socket(tmp_path / "plain", "s")
    assert plain == tmp_path / "plain" / "s"
    for name in ("x" * 100, "two words", "50%", "a,b", "naïve"):
        path = private_socket(tmp_path / name, "s")
        assert path.parent.parent != tmp_path and len(str(path)) < 108
        path.write_text("stale")
        assert private_socket(tmp_path / name, "s") == path and not path.exists()
        path.parent.rmdir()


async def test_a_folder_that_is_a_link_holds_no_socket(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "other")
    with pytest.raises(OSError, match="is no folder of this user"):
        private_socket(tmp_path / "link", "s")
