"""What tests of several rooms share: real photos where there are some, and real daemons."""

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from io import BytesIO
from pathlib import Path

os.environ["GRPC_VERBOSITY"] = "ERROR"  # as the command has it: or a server that ends in one test writes into another's

import pytest
import torch
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from PIL import Image

from backboned.client import Client
from backboned.server.commands.local_daemon import LocalDaemon

StartDaemon = Callable[..., LocalDaemon]

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a shell starts what it runs in the background
    signal.signal(signal.SIGINT, signal.default_int_handler)  # commands under test must not inherit that


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real photos and weights beside the repository; tests that need it skip where it is absent."""
    folder = Path(__file__).parents[2] / "shared"
    if not (folder / "weights" / "mobilenet_v2.pth").is_file():
        pytest.skip("needs ../shared, with real photos and weights, which is not here")
    return folder


@pytest.fixture(scope="session")
def photo() -> bytes:
    """A JPEG of 320×240 pixels that looks a little like a photo: smooth colours, edges, noise."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(1, 3, 6, 8, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, size=(240, 320), mode="bicubic", align_corners=False)[0]
    noisy = (smooth + 0.05 * torch.randn(3, 240, 320, generator=generator)).clamp(0, 1)
    file = BytesIO()
    Image.fromarray((noisy * 255).byte().permute(1, 2, 0).numpy()).save(file, "JPEG", quality=92)
    return file.getvalue()


@pytest.fixture
def start_daemon(tmp_path: Path) -> Iterator[StartDaemon]:
    """Starts daemons on `tmp_path` with free ports; each takes further flags. They are stopped at the end."""
    with ExitStack() as stack:

        def start(*flags: str, folder: Path = tmp_path) -> LocalDaemon:
            defaults = (
                f"--checkpoint-dir={folder / 'checkpoints'}",
                f"--state-dir={folder / 'state'}",
                "--device=cpu",
                "--precision=fp32",
                "--compile=off",
                "--grpc-port=0",
                "--http-port=0",
            )
            return stack.enter_context(LocalDaemon.start([*defaults, *flags], folder))

        yield start


@pytest.fixture
def connect() -> Iterator[Callable[[LocalDaemon], Client]]:
    """Makes clients of daemons; they are closed at the end."""
    with ExitStack() as stack:
        yield lambda daemon: stack.enter_context(Client(daemon.grpc))


@pytest.fixture(scope="session")
def make_key(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Path, Path]]:
    """Makes a key, by default on P-256, under a name: the files of its private and its public part."""
    folder = tmp_path_factory.mktemp("keys")

    def make(
        name: str,
        key: ec.EllipticCurvePrivateKey | None = None,
        password: serialization.KeySerializationEncryption | None = None,
    ) -> tuple[Path, Path]:
        private, public = folder / f"{name}.pem", folder / f"{name}.pub.pem"
        if not private.exists():
            made = key or ec.generate_private_key(ec.SECP256R1())
            pem, pkcs8 = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
            private.write_bytes(made.private_bytes(pem, pkcs8, password or serialization.NoEncryption()))
            form = serialization.PublicFormat.SubjectPublicKeyInfo
            public.write_bytes(made.public_key().public_bytes(pem, form))
        return private, public

    return make
