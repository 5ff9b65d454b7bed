"""`backboned finetune`: over a daemon that runs, and with one of its own."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.main import get_command

from backboned.client import Client, TrainingOptions
from backboned.server.commands.finetune import app
from backboned.server.commands.local_daemon import LocalDaemon, LocalDaemonError, is_listening
from backboned.v1 import model_service_pb2 as pb

Call = Callable[..., tuple[int, str, str]]


def test_a_person_sees_the_data_the_epochs_and_how_to_go_on(call: Call, running: LocalDaemon, squares: Path) -> None:
    code, out, err = call("finetune", squares, "--backbone", "digits", "--max-epochs", 3, "--server", running.grpc)
    assert code == 0
    assert "job" in err
    for said in ("class", "blue", "epoch 1/3", "epoch 3/3", "squares version", "validation accuracy"):
        assert said in out
    assert f"backboned predict IMAGE... --model squares --server {running.grpc}" in out
    assert f"backboned report squares --server {running.grpc}" in out
    assert "\x1b" not in out


def test_every_option_of_the_api_has_a_flag_and_is_an_option_of_the_client() -> None:
    fields = [field.name for field in pb.TrainingOptions.DESCRIPTOR.fields]
    assert list(TrainingOptions.__annotations__) == fields
    flags = {name for parameter in get_command(app).params for name in parameter.opts}
    assert {f"--{name.replace('_', '-')}" for name in fields} <= flags


def test_options_go_to_the_daemon_by_their_names_and_events_come_as_json(
    call: Call, running: LocalDaemon, squares: Path
) -> None:
    code, out, err = call(
        "finetune", squares, "--model", "options", "--backbone", "digits", "--task", "binary", "--trainable-stages",
        "layer3,pool", "--max-epochs", 1, "--batch-size", 4, "--learning-rate", "0.01", "--weight-decay", "0.1",
        "--patience", 0, "--validation-fraction", "0.25", "--seed", 7, "--views", 2, "--request-id", "once",
        "--test-fraction", "0.25", "--label-smoothing", "0.2", "--ema-decay", "0.5", "--max-gradient-norm", 2,
        "--json", "--server", running.grpc,
    )  # fmt: skip
    first, *events, last = [json.loads(line) for line in out.splitlines()]
    assert (code, err) == (0, "")
    assert first["job"]["request"]["request_id"] == "once"
    assert first["job"]["request"]["options"] == {
        "task": "TASK_BINARY",
        "trainable_stages": ["layer3", "pool"],
        "max_epochs": 1,
        "batch_size": 4,
        "learning_rate": 0.01,
        "weight_decay": 0.1,
        "patience": 0,
        "validation_fraction": 0.25,
        "seed": "7",
        "views": 2,
        "test_fraction": 0.25,
        "label_smoothing": 0.2,
        "ema_decay": 0.5,
        "max_gradient_norm": 2.0,
    }
    assert [int(event["sequence"]) for event in events] == list(range(1, len(events) + 1))
    assert {"dataset_report", "epoch", "checkpoint", "state"} <= {key for event in events for key in event}
    assert last["job"]["state"] == "JOB_STATE_SUCCEEDED"
    assert last["job"]["best"]["val_accuracy"] >= 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--backbone", "digitz"], "did you mean 'digits'?"),
        (["--backbone", "digits", "--max-epochs", "0"], "max_epochs"),
        (["--backbone", "digits", "--trainable-stages", "layer9"], "layer9"),
    ],
)
def test_what_the_daemon_refuses_is_one_line(
    call: Call, running: LocalDaemon, squares: Path, arguments: list[str], said: str
) -> None:
    code, out, err = call("finetune", squares, *arguments, "--server", running.grpc)
    assert (code, out) == (1, "")
    assert len(err.splitlines()) == 1
    assert said in err


def test_a_folder_outside_the_daemons_data_roots_is_refused_with_the_remedy(
    call: Call, running: LocalDaemon, tmp_path: Path
) -> None:
    arguments = ["--model", "m", "--backbone", "digits", "--no-upload", "--server", running.grpc]
    code, out, err = call("finetune", tmp_path, *arguments)
    assert (code, out) == (1, "")
    assert "--data-root" in err
    assert len(err.splitlines()) == 1


def test_weights_are_not_for_a_daemon_that_runs_already(call: Call, running: LocalDaemon, squares: Path) -> None:
    code, _, err = call("finetune", squares, "--weights", "digits=x.pth", "--server", running.grpc)
    assert code == 2
    assert "--weights" in err


def test_no_daemon_is_started_for_another_machine(call: Call, squares: Path) -> None:
    code, out, err = call("finetune", squares, "--backbone", "digits", "--server", "gpu.invalid:8001")
    assert (code, out) == (2, "")
    assert "no daemon answers at gpu.invalid:8001" in err


def test_a_folder_that_is_not_there_starts_no_daemon(call: Call, tmp_path: Path) -> None:
    code, _, err = call("finetune", tmp_path / "nothing", "--server", "127.0.0.1:1")
    assert code == 2
    assert "there is no folder" in err


def finetune_alone(squares: Path, weights: Path, folder: Path, *arguments: str) -> "subprocess.Popen[str]":
    """The command in a process of its own and in an empty `folder`, where no daemon answers."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("BACKBONED_")}
    command = ["finetune", str(squares), "--backbone", "digits", "--weights", f"digits={weights}", *arguments]
    return subprocess.Popen(
        [sys.executable, "-m", "backboned.server.commands", *command],
        cwd=folder,
        env={**environment, "BACKBONED_HTTP_PORT": "0"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_daemon_of_its_own_is_started_and_stopped(
    squares: Path, digits_weights: Path, tmp_path: Path, unused_tcp_port: int
) -> None:
    address = f"127.0.0.1:{unused_tcp_port}"
    process = finetune_alone(squares, digits_weights, tmp_path, "--max-epochs", "1", "--server", address)
    out, err = process.communicate(timeout=110)
    assert (process.returncode, "Traceback" in err) == (0, False)
    assert f"no daemon answers at {address}: starting one here" in err
    assert "squares version 1: validation accuracy" in out
    assert "backboned serve, and then: backboned predict" in out
    assert not is_listening(address)
    assert (tmp_path / "checkpoints" / "squares" / "1" / "manifest.json").is_file()


def test_ctrl_c_cancels_the_job(running: LocalDaemon, squares: Path) -> None:
    command = ["finetune", str(squares), "--model", "endless", "--backbone", "digits", "--max-epochs", "10000"]
    command += ["--patience", "0", "--server", running.grpc]
    process = subprocess.Popen(
        [sys.executable, "-m", "backboned.server.commands", *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    while "epoch" not in process.stdout.readline():
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, "Traceback" in err) == (130, False)
    assert "checkpoints that it has finished are kept" in err
    with Client(running.grpc) as client:
        (job,) = client.list_jobs(model="endless")
        assert job.state == pb.JOB_STATE_CANCELLED


def test_a_daemon_that_does_not_start_is_told_in_its_own_words(tmp_path: Path) -> None:
    with pytest.raises(LocalDaemonError, match=r"ended with exit code 2: --device: expected auto, cpu") as caught:
        LocalDaemon.start(["--device=gpu"], tmp_path)
    assert "\n" not in caught.value.message
