"""A daemon that signs what it trains, and serves nothing that its keys haven't signed."""

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from torch import nn

from backboned.client import Client, ClientError
from backboned.server.commands.application import run
from backboned.server.commands.local_daemon import LocalDaemon, LocalDaemonError
from backboned.v1 import model_service_pb2 as pb

WaitFor = Callable[[Callable[[], object]], None]
StartDaemon = Callable[..., LocalDaemon]
Connect = Callable[[LocalDaemon], Client]
MakeKey = Callable[..., tuple[Path, Path]]


def reason(client: Client, file: str) -> str:
    """Why a file of this name isn't served; empty while it isn't in quarantine."""
    found = client.list_checkpoints(filter="state = QUARANTINED")
    return next((c.reason for c in found if c.uri.endswith(file)), "")


def serving(client: Client) -> int:
    try:
        return client.get_model("squares").serving_version
    except ClientError:
        return 0


def sign(key: Path, *files: Path) -> None:
    assert run(["sign", *map(str, files), f"--signing-key={key}"]) == 0


def test_what_is_trained_here_serves_what_nobody_signed_does_not_and_keys_can_change(  # noqa: PLR0917 - fixtures
    start_daemon: StartDaemon,
    connect: Connect,
    training_flags: list[str],
    networks: Mapping[tuple[str, int], nn.Module],
    make_key: MakeKey,
    wait_for: WaitFor,
    tmp_path: Path,
) -> None:
    private, public = make_key("e2e")
    other, trusted = make_key("e2e-other")
    folder = tmp_path / "checkpoints" / "squares"
    flags = [*training_flags, "--settle-seconds=0.5", "--trainer-standby=off", "--frontends=0"]

    daemon = start_daemon(*flags, f"--signing-key={private}", f"--trusted-key={public}")
    client = connect(daemon)
    job = client.wait(client.fine_tune("squares", "digits", "squares", max_epochs=1).id)
    assert job.state == pb.JOB_STATE_SUCCEEDED, job.error
    wait_for(lambda: serving(client) == 1)
    assert {p.name for p in folder.glob("1/*.sig")} == {f"{p.name}.sig" for p in folder.glob("1/*.pt")}

    torch.save({"state_dict": networks["flowers", 1].state_dict()}, folder / "mine.pt")
    wait_for(lambda: reason(client, "/mine.pt"))
    assert reason(client, "/mine.pt").startswith("it is not signed, and only signed files are served")
    assert serving(client) == 1
    sign(private, folder / "mine.pt")
    wait_for(lambda: serving(client) == 2)
    assert reason(client, "/mine.pt") == ""

    assert daemon.stop() == 0
    for file in (daemon.log, tmp_path / "state" / "backboned.sqlite", *folder.glob("*/manifest.json")):
        assert private.name.encode() not in file.read_bytes(), file

    daemon = start_daemon(*flags, f"--trusted-key={trusted}")
    client = connect(daemon)
    best = folder / "1" / Path(job.best.uri).name
    wait_for(lambda: reason(client, f"1/{best.name}") and reason(client, "2/epoch-0000.pt"))
    assert "is signed by a key that is not trusted" in reason(client, f"1/{best.name}")
    assert serving(client) == 0
    sign(other, best)
    wait_for(lambda: serving(client) == 1)
    sign(other, folder / "mine.pt")  # whose signature goes to the version that was made of it
    wait_for(lambda: serving(client) == 2)
    assert sorted(int(p.name) for p in folder.iterdir() if p.is_dir()) == [1, 2]


def test_a_daemon_does_not_start_with_a_key_that_it_cannot_use(start_daemon: StartDaemon, make_key: MakeKey) -> None:
    private, _ = make_key("e2e")
    with pytest.raises(LocalDaemonError, match=r"exit code 1: the public key .*e2e\.pem can't be used: expected a PEM"):
        start_daemon(f"--trusted-key={private}")
