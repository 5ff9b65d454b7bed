"""A daemon that signs what it trains, and serves nothing that its keys haven't signed."""

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import nn

from backboned.client import Client, ClientError
from backboned.server.commands.application import run
from backboned.server.commands.local_daemon import LocalDaemon
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


def test_what_is_trained_here_serves_and_what_nobody_signed_does_not_until_somebody_does(  # noqa: PLR0917 - fixtures
    start_daemon: StartDaemon,
    connect: Connect,
    training_flags: list[str],
    networks: Mapping[tuple[str, int], nn.Module],
    make_key: MakeKey,
    wait_for: WaitFor,
    tmp_path: Path,
) -> None:
    private, public = make_key("e2e")
    folder = tmp_path / "checkpoints" / "squares"
    flags = ["--settle-seconds=0.5", "--trainer-standby=off", "--frontends=0"]

    daemon = start_daemon(*training_flags, *flags, f"--signing-key={private}", f"--trusted-key={public}")
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
