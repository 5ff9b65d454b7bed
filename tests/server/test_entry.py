"""The `backboned` command where packages are missing. Each case is a Python of its own, in which some can't import."""

import subprocess
import sys

import pytest


@pytest.mark.parametrize("package", ["typer", "torch"])
def test_a_missing_package_is_told_in_one_line_that_names_the_extra(package: str) -> None:
    done = run_without(package, "serve")
    assert (done.stdout, done.returncode) == ("", 2)
    (line,) = done.stderr.splitlines()
    assert repr(package) in line
    assert "pip install 'backboned[server]'" in line


def test_a_missing_module_of_our_own_is_a_bug_with_a_traceback() -> None:
    done = run_without("backboned.server.commands", "serve")
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "pip install" not in done.stderr


def run_without(module: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the command with `arguments` where `module` can't be imported."""
    code = f"import sys; sys.modules[{module!r}] = None; from backboned.server.entry import main; sys.exit(main())"
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
