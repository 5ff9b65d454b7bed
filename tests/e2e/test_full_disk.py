"""A disk that is full fails the job that needs it, says so, and touches nothing that serves."""

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from backboned.client import Client
from backboned.server.commands.local_daemon import LocalDaemon
from backboned.v1 import model_service_pb2 as pb


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MiB, where the system lets us mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", folder], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


def test_a_job_fails_when_its_checkpoints_fill_the_disk_and_what_serves_goes_on(  # noqa: PLR0917 - fixtures
    small_disk: Path,
    start_daemon: Callable[..., LocalDaemon],
    connect: Callable[[LocalDaemon], Client],
    training_flags: list[str],
    networks: dict[tuple[str, int], nn.Module],
    photo: bytes,
    wait_for: Callable[[Callable[[], object]], None],
) -> None:
    (small_disk / "flowers").mkdir()
    torch.save(networks["flowers", 1].state_dict(), small_disk / "flowers" / "1.pt")
    client = connect(start_daemon(*training_flags, f"--checkpoint-dir={small_disk}"))
    wait_for(lambda: any(m.name == "flowers" and m.serving_version for m in client.list_models()))
    before = client.predict("flowers", photo).predictions[0].classes

    job = client.fine_tune("large", "digits", "squares", trainable_stages=["all"], max_epochs=10_000, patience=0)
    ended = client.wait(job.id)
    assert ended.state == pb.JOB_STATE_FAILED
    assert ended.error.startswith("disk full"), ended.error
    kept = list(client.list_checkpoints(model="large"))
    assert [c.epoch for c in reversed(kept)] == list(range(1, len(kept) + 1))
    assert f"epochs up to {len(kept)} are kept" in ended.error
    assert client.predict("flowers", photo).predictions[0].classes == before
    assert not list(small_disk.glob("*/*/.writing-*"))
