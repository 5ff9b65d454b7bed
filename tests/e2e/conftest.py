"""One daemon that several files of tests ask, with models whose answers are known, and datasets good and bad."""

import os
import struct
import time
import urllib.error
import urllib.request
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from io import BytesIO
from pathlib import Path

import grpc
import pytest
import torch
from google.protobuf.message import Message
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from PIL import Image
from torch import nn
from torchvision import models, transforms

from backboned.client import Client, ClientError
from backboned.registry import Catalogue
from backboned.registry.weights import seeded_state
from backboned.server.commands.local_daemon import LocalDaemon
from backboned.v1 import model_service_pb2 as pb
from backboned.v1.model_service_pb2_grpc import ModelServiceStub

FLOWERS = ("daisy", "dandelion", "roses", "sunflowers", "tulips")
SCENES = ("city", "forest", "sea")
BACKBONES = {"flowers": "digits", "scenes": "squeezenet1_1"}
PATIENCE_SECONDS = 60.0
WEIGHTLESS = """
from dataclasses import replace

from backboned.plugins.digits import digits
from backboned.registry import register


@register
def weightless():
    return replace(digits(), name="weightless")
"""
LARGE_MESSAGES = [("grpc.max_send_message_length", 2**28), ("grpc.max_receive_message_length", 2**28)]


@pytest.fixture(scope="session")
def wait_for() -> Callable[[Callable[[], object]], None]:
    """Waits until a condition holds; fails when it doesn't within a minute."""

    def wait(condition: Callable[[], object]) -> None:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not condition():
            assert time.monotonic() < deadline, "it did not happen in time"
            time.sleep(0.02)

    return wait


@pytest.fixture(scope="session")
def fetch() -> Callable[[str], str]:
    """What is at an HTTP address, whatever the status; empty where nobody answers."""

    def get(url: str) -> str:
        try:
            with urllib.request.urlopen(url, timeout=10) as response:  # noqa: S310 - http, on loopback
                return str(response.read().decode())
        except urllib.error.HTTPError as error:
            with error:
                return error.read().decode()
        except OSError:
            return ""

    return get


@pytest.fixture(scope="session")
def digits_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights for the smallest backbone."""
    file = tmp_path_factory.mktemp("weights") / "digits.pth"
    torch.save(seeded_state(Catalogue.from_entry_points().get("digits"), seed=0), file)
    return file


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data root: `squares` is a good dataset; `mixed` is one with a corrupt photo and a text file; others are bad."""
    root = tmp_path_factory.mktemp("data")
    for name in ("squares", "mixed"):
        _squares(root / name, red=12, blue=12)
    (root / "mixed" / "red" / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 this was a photo once")
    (root / "mixed" / "red" / "notes.txt").write_text("red ones")
    _squares(root / "one-class", red=4)
    _squares(root / "empty-class", red=4, blue=4, green=0)
    _squares(root / "single-image", red=4, blue=1)
    (root / "no-classes").mkdir()
    (root / "photo.png").write_bytes(_png(Image.new("RGB", (8, 8))))
    outside = tmp_path_factory.mktemp("outside")
    _squares(outside / "squares", red=4, blue=4)
    (root / "leads-out").symlink_to(outside / "squares")
    return root


@pytest.fixture(scope="session")
def training_flags(data: Path, digits_weights: Path) -> list[str]:
    """Flags of a daemon that may train digits on `data`."""
    return [f"--data-root={data}", f"--weights=digits={digits_weights}"]


@pytest.fixture(scope="session")
def networks() -> Mapping[tuple[str, int], nn.Module]:
    """What is behind each version that is served: three of `flowers` on digits, one of `scenes` on squeezenet1_1."""
    digits = Catalogue.from_entry_points().get("digits")
    found: dict[tuple[str, int], nn.Module] = {}
    for version in (1, 2, 3):
        network = digits.module()
        network.load_state_dict(seeded_state(digits, seed=version))
        network.fc = _decided(nn.Linear(digits.feature_size, len(FLOWERS)), deviation=1.0, seed=version)
        found["flowers", version] = network.eval()
    torch.manual_seed(0)
    scenes = models.squeezenet1_1(num_classes=len(SCENES))
    scenes.classifier[1] = _decided(scenes.classifier[1], deviation=0.02, seed=0)
    found["scenes", 1] = scenes.eval()
    return found


@pytest.fixture(scope="session")
def truth(networks: Mapping[tuple[str, int], nn.Module]) -> Callable[[str, int, Image.Image], dict[str, float]]:
    """The probabilities, by label, that a version gives for a picture, found in this process by torchvision alone."""
    views = {
        "flowers": _view(16, 16, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
        "scenes": _view(256, 224, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    }

    def probabilities(model: str, version: int, picture: Image.Image) -> dict[str, float]:
        with torch.inference_mode():
            row = networks[model, version](views[model](picture)[None])[0].softmax(0)
        return dict(zip(FLOWERS if model == "flowers" else SCENES, row.tolist(), strict=True))

    return probabilities


@pytest.fixture(scope="session")
def weightless(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A plugin module, importable by daemons that start now: a backbone of which nobody has weights."""
    folder = tmp_path_factory.mktemp("plugin")
    (folder / "weightless.py").write_text(WEIGHTLESS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(folder), prepend=os.pathsep)
        yield "weightless"


@pytest.fixture(scope="session")
def served(
    tmp_path_factory: pytest.TempPathFactory,
    networks: Mapping[tuple[str, int], nn.Module],
    training_flags: list[str],
    weightless: str,
    wait_for: Callable[[Callable[[], object]], None],
) -> Iterator[LocalDaemon]:
    """A daemon that serves `networks`, has the alias `stable` of flowers on version 1, and may read `data`."""
    folder = tmp_path_factory.mktemp("served")
    for (model, version), network in networks.items():
        (folder / "checkpoints" / model).mkdir(parents=True, exist_ok=True)
        dropped = {"backbone": BACKBONES[model], "model_state_dict": network.state_dict()}
        torch.save(dropped, folder / "checkpoints" / model / f"{version}.pt")
    (folder / "checkpoints" / "flowers" / "classes.txt").write_text("\n".join(FLOWERS))
    (folder / "checkpoints" / "scenes" / "classes.txt").write_text("\n".join(SCENES))
    flags = [
        f"--checkpoint-dir={folder / 'checkpoints'}",
        f"--state-dir={folder / 'state'}",
        *training_flags,
        f"--plugin={weightless}",
        "--device=cpu",
        "--precision=fp32",
        "--compile=off",
        "--grpc-port=0",
        "--http-port=0",
    ]
    with LocalDaemon.start(flags, folder) as daemon, Client(daemon.grpc) as client:
        wait_for(lambda: {m.name: m.serving_version for m in client.list_models()} == {"flowers": 3, "scenes": 1})
        client.set_alias("flowers", "stable", 1)
        yield daemon
    assert daemon.stop() == 0
    log = daemon.log.read_text()
    assert "Traceback" not in log and "never retrieved" not in log, log


@pytest.fixture(scope="session")
def client(served: LocalDaemon) -> Iterator[Client]:
    """A client of `served`."""
    with Client(served.grpc) as client:
        yield client


@pytest.fixture(scope="session")
def stub(served: LocalDaemon) -> Iterator[ModelServiceStub]:
    """The bare stub for `served`: for requests that no client would make, and answers as they came."""
    with grpc.insecure_channel(served.grpc, options=LARGE_MESSAGES) as channel:
        yield ModelServiceStub(channel)


@pytest.fixture(scope="session")
def refusal(stub: ModelServiceStub) -> Callable[[str, Message], ClientError]:
    """The error that an RPC of `served` ends in for a request, with details that agree with it."""

    def refuse(rpc: str, request: Message) -> ClientError:
        try:
            answer = getattr(stub, rpc)(request)
            pytest.fail(f"{rpc} took it: {answer if isinstance(answer, Message) else list(answer)}")
        except grpc.RpcError as error:
            status = rpc_status.from_call(error)
            found = ClientError.of(error, "")
        assert status is not None and status.message == found.message
        reason = error_details_pb2.ErrorInfo()
        assert status.details[0].Unpack(reason)
        assert (reason.domain, reason.reason) == ("backboned", found.code.name)
        return found

    return refuse


@pytest.fixture(scope="session")
def train_long() -> Callable[[Client, str], pb.Job]:
    """Starts a job that trains a model on `squares` for a very long time, and waits for its first checkpoint."""

    def start(client: Client, model: str) -> pb.Job:
        job = client.fine_tune(
            model, "digits", "squares", trainable_stages=["all"], max_epochs=10_000, patience=0, batch_size=1, views=16
        )
        next(e for e in client.watch(job.id) if e.HasField("checkpoint"))
        return client.get_job(job.id)

    return start


@pytest.fixture(scope="session")
def trained(client: Client) -> pb.Job:
    """A job of `served` that has ended well: `squares`, two epochs on the dataset with a corrupt photo."""
    job = client.wait(client.fine_tune("squares", "digits", "mixed", request_id="squares-1", max_epochs=2).id)
    assert job.state == pb.JOB_STATE_SUCCEEDED, job.error
    return job


@pytest.fixture(scope="session")
def png() -> Callable[[Image.Image], bytes]:
    """A picture as the bytes of a PNG file."""
    return _png


@pytest.fixture(scope="session")
def bomb() -> bytes:
    """A PNG of 20,000 × 20,000 pixels, all of them there, in 50 kB."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", 20_000, 20_000, 1, 0, 0, 0, 0)
    pixels = zlib.compress(bytes(20_000 * (1 + 20_000 // 8)))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def _squares(folder: Path, **counts: int) -> None:
    """Squares of each colour, each a little different: any network tells them apart."""
    colours = {"red": (220, 30, 30), "blue": (30, 30, 220), "green": (30, 220, 30)}
    for name, count in counts.items():
        (folder / name).mkdir(parents=True)
        for i in range(count):
            picture = Image.new("RGB", (24, 24), tuple(max(0, c - 2 * i) for c in colours[name]))
            picture.save(folder / name / f"{i:02}.png")


def _png(picture: Image.Image) -> bytes:
    file = BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()


def _decided(layer: nn.Module, *, deviation: float, seed: int) -> nn.Module:
    """`layer` with new weights, large enough that pictures get clearly different answers."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(0, deviation, generator=generator)
    return layer


def _view(
    resize: int, crop: int, mean: tuple[float, float, float], std: tuple[float, float, float]
) -> transforms.Compose:
    return transforms.Compose(
        [
            transforms.Resize(resize),
            transforms.CenterCrop(crop),
            transforms.ToTensor(),
            transforms.Normalize(mean, std),
        ]
    )


@pytest.fixture
def trainer_of() -> Callable[[int], int | None]:
    """Finds the trainer process below a daemon's process, or below its fork server."""

    def children(pid: int, module: bytes) -> list[int]:
        found = list[int]()
        for told in Path(f"/proc/{pid}/task").glob("*/children"):
            with suppress(OSError):  # it ends meanwhile
                below = told.read_text().split()
                found += [int(child) for child in below if module in Path(f"/proc/{child}/cmdline").read_bytes()]
        return found

    def find(daemon: int) -> int | None:
        forks = (fork for server in children(daemon, b"training.fork_server") for fork in children(server, b"training"))
        return next((pid for pid in (*children(daemon, b"training.trainer"), *forks)), None)

    return find
