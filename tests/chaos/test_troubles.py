"""Disks and files fail under one daemon, in turn: it serves on, tells what is wrong, and goes on by itself."""

import os
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from PIL import Image

from backboned.v1 import model_service_pb2 as pb
from tests.chaos.served import Served, drop, fetch, start_without_privileges, wait_for


def mount(*arguments: str | Path) -> None:
    done = subprocess.run(["mount", *arguments], capture_output=True, check=False)
    if done.returncode:
        pytest.skip(f"nothing can be mounted here: {done.stderr.decode().strip()}")


def unmount(folder: Path) -> None:
    subprocess.run(["umount", "--lazy", folder], check=False, capture_output=True)


def fill(disk: Path) -> Path:
    """Leave not one block free; returns the file that takes them."""
    filler = disk / "filler"
    with filler.open("wb", buffering=0) as file:
        for size in (1 << 20, 1 << 12, 1 << 9):
            try:
                while True:
                    file.write(bytes(size))
            except OSError:
                continue
    return filler


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("picture") / "grey.png"
    Image.new("RGB", (16, 16), "grey").save(file)
    return file


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, picture: Path) -> Iterator[Served]:
    """A daemon whose two folders each lie on a small disk of their own, where disks can be mounted."""
    folder = tmp_path_factory.mktemp("troubles")
    place = folder / "place"
    for name in ("disk", "state", "place/checkpoints"):
        (folder / name).mkdir(parents=True)
    with ExitStack() as stack:
        for name, size in (("disk", "48m"), ("state", "12m")):
            stack.callback(unmount, folder / name)
            subprocess.run(
                ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder / name], check=False, capture_output=True
            )
        stack.callback(unmount, place / "checkpoints")
        (folder / "disk" / "data").mkdir()
        subprocess.run(
            ["mount", "--bind", folder / "disk" / "data", place / "checkpoints"], check=False, capture_output=True
        )
        flags = [
            f"--checkpoint-dir={place / 'checkpoints'}", f"--state-dir={folder / 'state'}", "--device=cpu",
            "--precision=fp32", "--compile=off", "--grpc-port=0", "--http-port=0", "--scan-interval-seconds=0.2",
            "--settle-seconds=1",
            "--max-loaded-versions=2",
        ]  # fmt: skip
        daemon = stack.enter_context(start_without_privileges(flags, folder))
        there = Served(daemon, place, picture)
        stack.callback(there.channel.close)
        stack.callback(there.client.close)
        there.make_steady()
        yield there
        assert daemon.stop() == 0
        assert "Traceback" not in daemon.log.read_text()


@pytest.fixture
def disk(served: Served) -> Path:
    """The disk that the checkpoint directory is on."""
    if not os.path.ismount(served.root):
        pytest.skip("nothing can be mounted here")
    return served.place.parent / "disk"


def refused(call: Callable[[], object]) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.RpcError) as caught:
        call()
    return caught.value.code(), str(caught.value.details())


def test_a_directory_that_is_renamed_away(served: Served) -> None:
    served.place.rename(served.place.with_name("away"))
    try:
        with served.in_trouble("checkpoint_directory", "No such file"):
            served.place.with_name("away").rename(served.place)
            served.takes_in_what_is_dropped()
    finally:
        if not served.place.exists():
            served.place.with_name("away").rename(served.place)
    assert served.answers("steady", alias="canary") == 2


def test_a_disk_that_is_unmounted_leaves_an_empty_folder_behind(served: Served, disk: Path) -> None:
    unmount(served.root)
    with served.in_trouble("checkpoint_directory", "is its disk mounted?"):
        assert not list(served.root.iterdir())
        mount("--bind", disk / "data", served.root)
        served.takes_in_what_is_dropped()
    assert len(served.client.get_model("steady").versions) == 3


def test_a_directory_that_may_only_be_read(served: Served, disk: Path) -> None:
    while served.fresh < 2:  # so that the first one doesn't serve
        served.takes_in_what_is_dropped()
    mount("-o", "remount,bind,ro", served.root)
    try:
        served.fresh += 1
        drop(disk / "data" / "fresh", served.fresh)
        with served.in_trouble("loading", f"{served.fresh}.pt: it can't be adopted yet: Read-only file system"):
            (waiting,) = served.client.list_checkpoints(model="fresh", filter="state = LOADING")
            assert "Read-only" in waiting.reason
            code, text = refused(
                lambda: served.stub.DeleteModelVersion(pb.DeleteModelVersionRequest(model="fresh", version=1))
            )
            assert code is grpc.StatusCode.FAILED_PRECONDITION and "Read-only" in text
            mount("-o", "remount,bind,rw", served.root)
            wait_for(lambda: served.serves("fresh") == served.fresh)
    finally:
        mount("-o", "remount,bind,rw", served.root)
    served.takes_in_what_is_dropped()


def test_a_full_disk_of_checkpoints(served: Served, disk: Path) -> None:
    served.fresh += 1
    dropped = drop(disk / "data" / "fresh", served.fresh)
    hidden = dropped.rename(dropped.with_suffix(".not-yet"))
    filler = fill(disk)
    hidden.rename(dropped)
    with served.in_trouble("loading", "No space left on device"):
        filler.unlink()
        wait_for(lambda: served.serves("fresh") == served.fresh)
    assert not list(served.root.glob("*/.writing-*"))
    served.takes_in_what_is_dropped()


@pytest.mark.parametrize("name", [".", "steady", "steady/1"])
def test_permission_denied(served: Served, name: str) -> None:
    folder = served.root / name
    folder.chmod(0)
    try:
        with served.in_trouble("checkpoint_directory", "Permission denied"):
            if name != ".":
                served.takes_in_what_is_dropped()  # what is wrong with one model is nothing to another
            folder.chmod(0o755)
    finally:
        folder.chmod(0o755)
    served.takes_in_what_is_dropped()
    assert len(served.client.get_model("steady").versions) == 3


def test_a_dropped_file_and_a_version_that_may_not_be_read_yet(served: Served) -> None:
    while served.fresh < 5:  # so that the first one is not in memory
        served.takes_in_what_is_dropped()
    served.fresh += 1
    file = drop(served.root / "fresh", served.fresh)
    file.chmod(0)
    with served.in_trouble("loading", "Permission denied"):
        file.chmod(0o644)
        wait_for(lambda: served.serves("fresh") == served.fresh)
    (epoch,) = (served.root / "fresh" / "1").glob("epoch-*")
    epoch.chmod(0)
    assert refused(lambda: served.stub.Predict(request(served, "fresh", 1)))[0] is grpc.StatusCode.UNAVAILABLE
    with served.in_trouble("loading", "fresh version 1 can't be read"):
        epoch.chmod(0o644)
        wait_for(lambda: served.client.get_model("fresh").versions[-1].loaded)
    assert served.answers("fresh", version=1) == 1


def request(served: Served, model: str, version: int) -> pb.PredictRequest:
    images = [pb.Image(encoded=served.picture.read_bytes())]
    return pb.PredictRequest(model=model, version=version, images=images)


def test_a_database_that_is_locked(served: Served) -> None:
    noted = len(list(served.client.list_history()))
    alias = pb.SetAliasRequest(model="steady", alias="locked", version=1)
    with closing(sqlite3.connect(served.place.parent / "state" / "backboned.sqlite", isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        with served.in_trouble("database", "locked by another process"):
            code, text = refused(lambda: served.stub.SetAlias(alias))
            assert code is grpc.StatusCode.UNAVAILABLE and "locked" in text
            served.takes_in_what_is_dropped()
            assert "locked" not in served.client.get_model("steady").aliases
            other.execute("ROLLBACK")
    wait_for(lambda: len(list(served.client.list_history())) > noted)
    new = list(served.client.list_history())[:-noted]
    assert [(c.model, c.version) for c in new] == [("fresh", served.fresh)]  # what happened, and nothing that didn't
    served.client.set_alias("steady", "locked", 1)
    served.client.delete_alias("steady", "locked")
    served.takes_in_what_is_dropped()


def test_a_full_disk_of_the_state_folder(served: Served, disk: Path) -> None:
    before = dict(served.client.get_model("steady").aliases)
    noted = len(list(served.client.list_history()))
    filler = fill(disk.with_name("state"))
    made, error = 0, None
    while error is None:  # as long as what was freed in the file has room
        try:
            served.stub.SetAlias(pb.SetAliasRequest(model="steady", alias=f"full-{made}", version=1))
            made += 1
        except grpc.RpcError as caught:
            error = caught
        assert made < 2000
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED and "full" in str(error.details())
    with served.in_trouble("database", "the disk of the state folder is full"):
        served.takes_in_what_is_dropped()
        wait_for(lambda: "full" in served.troubles().get("answers", ""))
        aliases = served.client.get_model("steady").aliases
        assert dict(aliases) == before | {f"full-{i}": 1 for i in range(made)}
        filler.unlink()
    wait_for(lambda: not served.troubles())
    for i in range(made):
        served.client.delete_alias("steady", f"full-{i}")
    wait_for(lambda: len(list(served.client.list_history())) == noted + 2 * made + 1)
    served.takes_in_what_is_dropped()


@pytest.mark.parametrize("seconds", [-86_400, 0, 4_102_444_800, 300_000_000_000])
def test_files_of_other_times(served: Served, seconds: int) -> None:
    """A clock that was wrong when a file was written keeps nothing from being served, or listed."""
    served.fresh += 1
    served.picture.parent.joinpath("model").mkdir(exist_ok=True)
    file = drop(served.picture.parent / "model", served.fresh)
    broken = file.with_name(f"broken-{served.fresh}.pt")
    broken.write_bytes(b"nothing")
    for each in (file, broken):
        try:
            os.utime(each, (seconds, seconds))
        except (OverflowError, OSError):
            pytest.skip("this file system knows no such time")
    (served.root / "fresh").mkdir(exist_ok=True)
    subprocess.run(["cp", "--preserve=timestamps", file, broken, served.root / "fresh"], check=True)
    wait_for(lambda: served.serves("fresh") == served.fresh)
    wait_for(lambda: any(c.uri.endswith(broken.name) for c in served.client.list_checkpoints(model="fresh")))


@pytest.mark.skipif("BACKBONED_CHAOS" not in os.environ, reason="takes long: set BACKBONED_CHAOS to run it")
def test_a_daemon_that_cannot_look_at_its_start_is_not_ready_until_it_can(tmp_path: Path, picture: Path) -> None:
    root = tmp_path / "checkpoints"
    drop(tmp_path / "steady", 1)
    root.mkdir(mode=0)
    flags = [
        f"--checkpoint-dir={root}", f"--state-dir={tmp_path / 'state'}", "--device=cpu", "--precision=fp32",
        "--compile=off", "--grpc-port=0", "--http-port=0",
    ]  # fmt: skip
    with start_without_privileges(flags, tmp_path) as daemon:
        there = Served(daemon, tmp_path, picture)
        health = health_pb2_grpc.HealthStub(there.channel)
        told = fetch(f"{daemon.http}/readyz").splitlines()
        assert told[0] == "the checkpoint directory could not be looked at yet" and "Permission denied" in told[1]
        assert health.Check(health_pb2.HealthCheckRequest()).status != health_pb2.HealthCheckResponse.SERVING
        root.chmod(0o755)
        (tmp_path / "steady").rename(root / "steady")
        wait_for(lambda: fetch(f"{daemon.http}/readyz") == "ready\n")
        wait_for(lambda: health.Check(health_pb2.HealthCheckRequest()).status == health_pb2.HealthCheckResponse.SERVING)
        wait_for(partial(there.has, "steady", 1))
        there.client.close()
        there.channel.close()


@pytest.mark.skipif("BACKBONED_CHAOS" not in os.environ, reason="takes long: set BACKBONED_CHAOS to run it")
def test_a_database_on_a_full_disk_keeps_a_daemon_from_starting_and_says_why(tmp_path: Path) -> None:
    (tmp_path / "state").mkdir()
    mount("-t", "tmpfs", "-o", "size=64k", "tmpfs", tmp_path / "state")
    try:
        fill(tmp_path / "state")
        command = [sys.executable, "-m", "backboned.server.commands", "serve", f"--state-dir={tmp_path / 'state'}"]
        flags = [f"--checkpoint-dir={tmp_path / 'checkpoints'}", "--grpc-port=0", "--http-port=0"]
        ended = subprocess.run([*command, *flags], capture_output=True, text=True, check=False, timeout=100)
    finally:
        unmount(tmp_path / "state")
    assert ended.returncode == 1
    assert ended.stderr.splitlines()[-1].startswith("error: the database can't be"), ended.stderr
