"""What holds for every command: help, wrong usage, errors in one line."""

import subprocess
import sys
from collections.abc import Callable

import pytest

from backboned.server.commands.application import COMMANDS

Call = Callable[..., tuple[int, str, str]]
NOBODY = "127.0.0.1:1"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(call: Call, command: str) -> None:
    code, out, err = call(command, "--help")
    assert (code, err) == (0, "")
    assert out.startswith(f"Usage: backboned {command} ")


def test_without_a_command_the_help_lists_them_all(call: Call) -> None:
    code, out, _ = call()
    assert code == 0
    for command in COMMANDS:
        assert f"\n  {command} " in out


def test_the_version_can_be_asked_for(call: Call) -> None:
    code, out, _ = call("--version")
    assert code == 0
    assert out.strip()[0].isdigit()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["serv"], "no command 'serv'; did you mean serve?"),
        (["predict", "--modle", "x"], "--modle"),
        (["predict", "x.jpg"], "--model"),
        (["predict", "x.jpg", "--model", "m", "--top-k", "many"], "--top-k"),
        (["predict", "x.jpg", "--model", "m", "--version", "1", "--alias", "a"], "not both"),
        (["predict", "x.jpg", "--model", "m", "--labels", "a,b"], "2 labels for 1 images"),
        (["serve", "--grpc-port", "70000"], "--grpc-port: should be less than or equal to 65535"),
        (["serve", "--weights", "resnet50"], "--weights: expected BACKBONE=FILE"),
        (["serve", "--grpc-prt", "1"], "--grpc-port"),
        (["finetune", "somewhere", "--task", "regression"], "expected single_label, binary or multi_label"),
        (["alias", "set", "m", "production"], "VERSION"),
        (["alias"], "Missing command"),
        (["jobs", "--limit", "0"], "--limit"),
    ],
)
def test_wrong_usage_is_one_line_and_exit_code_2(call: Call, arguments: list[str], said: str) -> None:
    code, out, err = call(*arguments)
    assert (code, out) == (2, "")
    (line,) = err.splitlines()
    assert line.startswith("error: ")
    assert said in line


@pytest.mark.parametrize(
    "arguments",
    [
        ["models"],
        ["jobs", "watch", "j"],
        ["alias", "set", "m", "production", "1"],
    ],
)
def test_without_a_daemon_a_command_says_how_to_start_one(call: Call, arguments: list[str]) -> None:
    code, out, err = call(*arguments, "--server", NOBODY)
    assert (code, out) == (1, "")
    (line,) = err.splitlines()
    assert line.startswith(f"error: no daemon answers at {NOBODY}")
    assert line.endswith("start one with: backboned serve")


def test_an_unexpected_error_is_one_line_too(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ZeroDivisionError("division by zero")

    monkeypatch.delenv("BACKBONED_LOG_LEVEL", raising=False)
    monkeypatch.setattr("backboned.server.commands.models.Client", fail)
    code, _, err = call("models")
    assert code == 1
    assert err.startswith("error: unexpected ZeroDivisionError: division by zero; BACKBONED_LOG_LEVEL=debug shows")
    assert len(err.splitlines()) == 1


def test_a_traceback_is_there_for_those_who_debug(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setenv("BACKBONED_LOG_LEVEL", "debug")
    monkeypatch.setattr("backboned.server.commands.models.Client", fail)
    with pytest.raises(ZeroDivisionError):
        call("models")


@pytest.mark.parametrize("command", ["predict", "models", "checkpoints", "jobs", "alias", "finetune", "backbones"])
def test_commands_that_call_a_daemon_load_no_torch(command: str) -> None:
    code = (
        "import sys; from backboned.server.commands.application import run; "
        f"run([{command!r}, '--help']); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0


def test_the_entry_point_hands_on_the_exit_code() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "backboned.server.commands", "serv"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ")
    assert "\x1b" not in done.stderr


def test_a_daemon_begins_without_torchs_compiler_and_has_it_when_it_is_needed() -> None:
    script = (
        "import sys; from backboned.server.process import import_torchvision; import_torchvision();"
        "import backboned.server.daemon; print([m for m in sys.modules if m.startswith('torch._dynamo')]);"
        "from torchvision.ops.roi_align import is_compile_supported as supported; print(supported('cpu'));"
        "import torch._dynamo; print(supported('cpu') is torch._dynamo.utils.is_compile_supported('cpu'))"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["[]", "True", "True"]


def test_what_is_imported_is_not_looked_at_by_the_collector_again() -> None:
    script = (
        "import gc; from backboned.server.process import import_torchvision; import_torchvision();"
        "print(gc.isenabled(), gc.get_freeze_count() > 50_000, len(gc.get_objects()) < 5_000)"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["True", "True", "True"]
