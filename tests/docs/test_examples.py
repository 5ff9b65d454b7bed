"""The examples that people copy are run, against a real daemon."""

import re
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import chdir
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn

from backboned.client import Client, ClientError
from backboned.registry import Catalogue
from backboned.registry.weights import seeded_state
from backboned.server.commands.application import run
from backboned.server.commands.local_daemon import LocalDaemon

PATIENCE_SECONDS = 60.0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the scripts run, with random weights of two backbones, whose own would be downloaded, and photos."""
    folder = tmp_path_factory.mktemp("examples")
    for name in ("resnet18", "digits"):
        torch.save(seeded_state(Catalogue.from_entry_points().get(name), seed=0), folder / f"{name}.pth")
    for colour in ("red", "blue"):
        (folder / "photos" / colour).mkdir(parents=True)
        for i in range(8):
            Image.new("RGB", (24, 24), colour).save(folder / "photos" / colour / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def daemon(folder: Path) -> Iterator[LocalDaemon]:
    """As `backboned serve` in that folder, on free ports."""
    flags = ["--weights=resnet18=resnet18.pth", "--weights=digits=digits.pth", "--data-root=photos"]
    here = ["--device=cpu", "--precision=fp32", "--compile=off", "--grpc-port=0", "--http-port=0"]
    with chdir(folder), LocalDaemon.start([*flags, *here], folder) as started:
        yield started


@pytest.fixture(scope="module")
def client(daemon: LocalDaemon) -> Iterator[Client]:
    with Client(daemon.grpc) as client:
        yield client


def test_every_form_of_a_dropped_file_in_the_pages_is_served(folder: Path, blocks: list[Any], client: Client) -> None:
    script = "".join(b.text for b in blocks if b.page.name == "checkpoints.md" and b.language == "python")
    dropping, exporting, exported = script.partition("model = models.resnet18(num_classes=3)")
    named, unnamed = ("daisy", "rose", "tulip"), ("class_0", "class_1", "class_2")
    expected: dict[str, tuple[str, ...]] = {
        "plain": named,
        "resumable": named,
        "parallel": unnamed,
        "wrapped": ("sick", "healthy"),
        "head": unnamed,
        "safe": unnamed,
        "signed": named,
    }
    assert {f"checkpoints/{name}" for name in expected} == set(re.findall(r"checkpoints/\w+", dropping))
    names: dict[str, Any] = {}
    execute(dropping, folder, names)
    wait_until_serving(client, list(expected))
    assert {name: tuple(client.get_model(name).versions[0].checkpoint.classes) for name in expected} == expected
    assert list(client.list_checkpoints(filter="state = QUARANTINED")) == []

    with chdir(folder):
        assert run(["export", "plain", "--output", "flowers.pt", "--weights", "resnet18=resnet18.pth"]) == 0
    execute(exporting + exported, folder, names)
    assert isinstance(names["model"], nn.Module)


def test_the_model_that_the_readme_drops_in_is_served(folder: Path, blocks: list[Any], client: Client) -> None:
    (script,) = (b.text for b in blocks if b.page.name == "README.md" and "torch.save" in b.text)
    execute(script, folder, {})
    wait_until_serving(client, ["pets"])
    (version,) = client.get_model("pets").versions
    assert tuple(version.checkpoint.classes) == ("cat", "dog")


def test_the_example_client_trains_and_asks(folder: Path, root: Path, daemon: LocalDaemon) -> None:
    command = [sys.executable, str(root / "examples" / "client.py"), "photos", "digits", daemon.grpc]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=PATIENCE_SECONDS, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "epoch 1: validation accuracy" in done.stdout and "16 of 16 photos right" in done.stdout


def execute(script: str, folder: Path, names: dict[str, Any]) -> None:
    with chdir(folder):
        exec(script.replace('weights="DEFAULT"', "weights=None"), names)  # noqa: S102 - it is ours


def wait_until_serving(client: Client, names: Sequence[str]) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not all(serving_version(client, name) for name in names):
        assert time.monotonic() < deadline, list(client.list_checkpoints(filter="state = QUARANTINED"))
        time.sleep(0.05)


def serving_version(client: Client, name: str) -> int:
    try:
        return client.get_model(name).serving_version
    except ClientError:
        return 0
