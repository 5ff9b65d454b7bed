"""The source tree, the wheel that is built from it, and an environment that has the wheel and nothing more."""

import subprocess
import sys
import venv
from importlib.metadata import distribution
from pathlib import Path

import pytest

CLIENT_PACKAGES = ("grpcio", "protobuf", "typing_extensions")


@pytest.fixture(scope="session")
def root() -> Path:
    return Path(__file__).parents[2]


@pytest.fixture(scope="session")
def wheel(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The path of a wheel built from the source tree, by the installed hatchling."""
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run([sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", folder], cwd=root, check=True)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="session")
def client_bin(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The `bin` of an environment with what the wheel requires, copied from this one, and the wheel; by no index."""
    environment = tmp_path_factory.mktemp("client")
    venv.create(environment, with_pip=False)
    (site_packages,) = environment.glob("lib/python*/site-packages")
    for name in CLIENT_PACKAGES:
        for file in distribution(name).files or ():
            if ".." not in file.parts and file.suffix != ".pyc":
                target = site_packages / file
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(file.read_binary())
    python = environment / "bin" / "python"
    uv = [sys.executable, "-m", "uv", "pip", "install", "--quiet", "--offline", "--no-index", "--no-config"]
    subprocess.run([*uv, "--python", python, wheel], check=True)
    return python.parent
