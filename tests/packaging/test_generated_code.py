"""The code beside the proto is what `make proto` generates from it, and runs on the oldest packages that we allow."""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version


def test_generated_code_is_up_to_date(root: Path, tmp_path: Path) -> None:
    proto = root / "proto"
    sources = sorted(path.relative_to(proto) for path in proto.rglob("*.proto"))
    outputs = [f"--{kind}_out={tmp_path}" for kind in ("python", "grpc_python", "mypy", "mypy_grpc")]
    tools = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}"}
    subprocess.run([sys.executable, "-m", "grpc_tools.protoc", "-I", proto, *outputs, *sources], env=tools, check=True)
    fresh, committed = generated(tmp_path), generated(proto)
    assert sources
    stale = sorted(path for path in fresh.keys() | committed.keys() if fresh.get(path) != committed.get(path))
    assert stale == [], "run 'make proto' and commit what it changes"


def test_the_floors_of_the_base_are_those_of_the_generated_code(root: Path) -> None:
    text = "".join(path.read_text() for path in (root / "proto").rglob("*_pb2*.py"))
    grpcio = {Version(found) for found in re.findall(r"GRPC_GENERATED_VERSION = '([\d.]+)'", text)}
    protobuf = {Version(found) for found in re.findall(r"# Protobuf Python Version: ([\d.]+)", text)}
    assert floors(root) == {"grpcio": max(grpcio), "protobuf": max(protobuf)}


def generated(folder: Path) -> dict[str, str]:
    """The text of each generated file, by its path in `folder`."""
    files = [file for file in folder.rglob("*_pb2*") if file.suffix in {".py", ".pyi"}]
    return {str(file.relative_to(folder)): file.read_text() for file in files}


def floors(root: Path) -> dict[str, Version]:
    """The oldest version of each package that the base allows."""
    base = tomllib.loads((root / "pyproject.toml").read_text())["project"]["dependencies"]
    return {r.name: Version(s.version) for r in map(Requirement, base) for s in r.specifier if s.operator == ">="}
