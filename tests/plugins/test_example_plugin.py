"""The example of a third party's plugin, installed as a user would and found by its entry point."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "plugin"


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """The folder into which the example was installed from a copy of its source, by no index."""
    source = shutil.copytree(EXAMPLE, tmp_path / "source")
    uv = [sys.executable, "-m", "uv", "pip", "install", "--quiet", "--offline", "--no-config", "--no-deps"]
    options = ["--no-build-isolation", "--python", sys.executable, "--target", str(tmp_path / "site")]
    subprocess.run([*uv, *options, source], check=True, timeout=60)
    return tmp_path / "site"


def test_an_installed_plugin_is_found_by_its_entry_point_and_conforms(installed: Path) -> None:
    assert not (installed / "backboned").exists(), "the plugin must not bring files of the namespace that it extends"
    command = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", "--rootdir", str(EXAMPLE), str(EXAMPLE)]
    path = os.pathsep.join([str(installed), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, check=False, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "test_the_backbone_is_found_by_its_entry_point PASSED" in done.stdout
    assert "test_the_backbone_conforms PASSED" in done.stdout
