"""requirements.lock pins what pyproject.toml asks for, and tells nothing of the machine where it was made."""

import re
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name


def test_the_lock_names_no_index_and_no_folder(root: Path) -> None:
    lines = (root / "requirements.lock").read_text().splitlines()
    assert [line for line in lines if re.search(r"://|^\s*-(?!-hash=)| @ |[\w-]+\.(org|com|io|net)\b", line)] == []


def test_every_requirement_is_met_by_a_pin(root: Path) -> None:
    lock = (root / "requirements.lock").read_text()
    pins = dict(re.findall(r"^([\w.-]+)==([^\s;]+)", lock, re.MULTILINE))
    unmet = [str(r) for r in requirements(root) if not r.specifier.contains(pins.get(canonicalize_name(r.name), "0"))]
    assert unmet == [], "run 'make lock' and commit it"


def requirements(root: Path) -> list[Requirement]:
    """What pyproject.toml asks for: the base, all extras and the development tools."""
    pyproject = tomllib.loads((root / "pyproject.toml").read_text())
    base = pyproject["project"]["dependencies"]
    extras = pyproject["project"]["optional-dependencies"].values()
    return [Requirement(line) for group in (base, *extras, pyproject["dependency-groups"]["dev"]) for line in group]
