"""`pip install backboned`, with no extra, in an empty environment."""

import subprocess
from pathlib import Path


def test_the_client_and_the_stubs_import_without_a_warning(client_bin: Path) -> None:
    done = run(
        client_bin / "python", "-W", "error", "-c", "import backboned.client, backboned.v1.model_service_pb2_grpc"
    )
    assert (done.stdout, done.stderr, done.returncode) == ("", "", 0)


def test_torch_is_not_there(client_bin: Path) -> None:
    assert "No module named 'torch'" in run(client_bin / "python", "-c", "import torch").stderr


def test_the_command_names_the_missing_extra_in_one_line(client_bin: Path) -> None:
    done = run(client_bin / "backboned", "serve")
    assert (done.stdout, done.returncode) == ("", 2)
    (line,) = done.stderr.splitlines()
    assert "pip install 'backboned[server]'" in line


def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    """What `command` printed, and its exit code."""
    return subprocess.run(command, capture_output=True, text=True, check=False)
