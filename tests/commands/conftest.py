"""The command line, called as a user would and in-process."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image

from backboned.client import Client
from backboned.registry import Catalogue
from backboned.registry.weights import seeded_state
from backboned.server.commands.application import run
from backboned.server.commands.local_daemon import LocalDaemon
from backboned.v1 import model_service_pb2 as pb


@pytest.fixture
def call(capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Run `backboned` with these arguments in this process; returns exit code, stdout and stderr."""

    def run_command(*arguments: object) -> tuple[int, str, str]:
        capfd.readouterr()
        code = run([str(argument) for argument in arguments])
        out, err = capfd.readouterr()
        return code, out, err

    return run_command


@pytest.fixture(scope="session")
def squares(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset that any network tells apart: 12 red and 12 blue squares, each a little different."""
    folder = tmp_path_factory.mktemp("datasets") / "squares"
    for name, colour in (("red", (220, 30, 30)), ("blue", (30, 30, 220))):
        (folder / name).mkdir(parents=True)
        for i in range(12):
            picture = Image.new("RGB", (24, 24), tuple(max(0, c - 2 * i) for c in colour))
            picture.save(folder / name / f"{i:02}.png")
    return folder


@pytest.fixture(scope="session")
def digits_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights for the smallest backbone."""
    file = tmp_path_factory.mktemp("weights") / "digits.pth"
    torch.save(seeded_state(Catalogue.from_entry_points().get("digits"), seed=0), file)
    return file


@pytest.fixture(scope="session")
def running(tmp_path_factory: pytest.TempPathFactory, squares: Path, digits_weights: Path) -> Iterator[LocalDaemon]:
    """A daemon that may read `squares`, with a model of that name whose first version serves."""
    folder = tmp_path_factory.mktemp("daemon")
    flags = [
        f"--checkpoint-dir={folder / 'checkpoints'}",
        f"--state-dir={folder / 'state'}",
        f"--data-root={squares}",
        f"--weights=digits={digits_weights}",
        "--device=cpu",
        "--precision=fp32",
        "--compile=off",
        "--grpc-port=0",
        "--http-port=0",
    ]
    with LocalDaemon.start(flags, folder) as daemon, Client(daemon.grpc) as client:
        job = client.fine_tune("squares", "digits", squares, max_epochs=2)
        assert client.wait(job.id).state == pb.JOB_STATE_SUCCEEDED
        deadline = time.monotonic() + 60
        while not client.get_model("squares").serving_version:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        yield daemon
