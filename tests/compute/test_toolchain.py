"""What compiling lacks is told, with what to install; and nothing is told where it would work."""

import sysconfig
from pathlib import Path

import pytest

from backboned.server.compute.toolchain import missing_for_compiling


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The one folder that programs are looked for in; it is empty."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    return tmp_path


@pytest.fixture
def headers(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of Python's headers, with a header in it."""
    folder = tmp_path_factory.mktemp("include")
    (folder / "Python.h").touch()
    monkeypatch.setattr(sysconfig, "get_path", {"include": str(folder)}.__getitem__)
    return folder


def program(folder: Path, name: str) -> Path:
    file = folder / name
    file.write_text("#!/bin/sh\n")
    file.chmod(0o755)
    return file


def test_with_a_compiler_and_headers_nothing_is_missing(programs: Path, headers: Path) -> None:
    program(programs, "g++")
    assert missing_for_compiling() == ""


def test_a_missing_compiler_is_told_and_how_to_mend_it(programs: Path, headers: Path) -> None:
    message = missing_for_compiling()
    assert message.startswith("this machine lacks a C++ compiler (g++")
    assert "Python.h" not in message and "networks run uncompiled" in message
    assert message.endswith("apt install g++ python3-dev")


def test_missing_headers_are_told(programs: Path, headers: Path) -> None:
    program(programs, "g++")
    (headers / "Python.h").unlink()
    assert missing_for_compiling().startswith("this machine lacks Python's headers (Python.h), so networks run")


def test_all_that_is_missing_is_told_at_once(programs: Path, headers: Path) -> None:
    (headers / "Python.h").unlink()
    message = missing_for_compiling()
    assert "a C++ compiler" in message and " and Python's headers (Python.h), so" in message


def test_the_compiler_that_cxx_names_counts(
    programs: Path, headers: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    named = program(tmp_path_factory.mktemp("elsewhere"), "my-compiler")
    monkeypatch.setenv("CXX", str(named))
    assert missing_for_compiling() == ""
    named.unlink()
    assert f"({named}" in missing_for_compiling()


def test_another_compiler_beside_it_is_not_used(programs: Path, headers: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program(programs, "clang++")
    assert missing_for_compiling()
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert missing_for_compiling()


def test_cxx_may_have_arguments(programs: Path, headers: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program(programs, "ccache")
    monkeypatch.setenv("CXX", "ccache g++")
    assert missing_for_compiling() == ""
