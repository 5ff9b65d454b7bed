"""`backboned finetune` on a folder that the daemon can't see, and `backboned datasets`."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from backboned.server.commands.local_daemon import LocalDaemon

Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def unseen(squares: Path, tmp_path: Path) -> Path:
    """A dataset outside the data roots of `running`."""
    return Path(shutil.copytree(squares, tmp_path / "unseen"))


def test_a_folder_that_the_daemon_cannot_see_is_uploaded_and_trained_on(
    call: Call, running: LocalDaemon, unseen: Path
) -> None:
    arguments = ["--backbone", "digits", "--max-epochs", 1, "--server", running.grpc]
    code, out, err = call("finetune", unseen, *arguments)
    assert code == 0, err
    assert f"can't see {unseen}: uploading it" in err and ": 24 images, " in err and "\x1b" not in err
    assert "unseen version 1: validation accuracy" in out

    code, out, _ = call("datasets", "--json", "--server", running.grpc)
    (dataset,) = map(json.loads, out.splitlines())
    assert (dataset["name"], dataset["images"], dataset["missing_sha256"]) == ("unseen", "24", [])
    code, out, _ = call("datasets", "--server", running.grpc)
    assert code == 0 and out.splitlines()[0].split() == ["dataset", "name", "images", "size", "uploaded"]
    assert out.splitlines()[1].startswith(f"{dataset['id']}  unseen")

    code, out, err = call("finetune", dataset["id"], "--model", "again", *arguments, "--json")
    assert (code, err) == (0, "")
    assert json.loads(out.splitlines()[0])["job"]["request"]["dataset"] == dataset["id"]

    code, out, _ = call("datasets", "delete", dataset["id"], "--server", running.grpc)
    assert (code, out) == (0, f"dataset {dataset['id']} is deleted\n")
    code, out, err = call("datasets", "delete", dataset["id"], "--server", running.grpc)
    assert (code, out) == (1, "") and "unknown uploaded dataset" in err
    code, out, err = call("datasets", "--server", running.grpc)
    assert (code, out, err) == (0, "", "no uploaded dataset\n")


def test_a_folder_is_uploaded_to_another_machine_or_if_that_is_wanted(
    call: Call, running: LocalDaemon, squares: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def dataset(*arguments: str) -> str:
        always = ["--backbone", "digits", "--max-epochs", 1, "--json", "--server", running.grpc]
        code, out, err = call("finetune", squares, *always, *arguments)
        assert (code, err) == (0, "")
        return str(json.loads(out.splitlines()[0])["job"]["request"]["dataset"])

    ids = [dataset("--upload")]
    monkeypatch.setattr("backboned.server.commands.finetune.LOOPBACK", frozenset())  # as if it were another machine
    ids.append(dataset())
    assert ids[0] == ids[1] and ids[0].startswith("ds-")
    assert dataset("--no-upload") == str(squares)
    code, out, _ = call("datasets", "delete", ids[0], "--json", "--server", running.grpc)
    assert (code, json.loads(out)) == (0, {"deleted": ids[0]})


@pytest.mark.parametrize(
    ("arguments", "said"), [(["--backbone", "digitz"], "did you mean 'digits'?"), (["--max-epochs", "0"], "max_epochs")]
)
def test_nothing_is_uploaded_for_a_job_that_cannot_be(
    call: Call, running: LocalDaemon, unseen: Path, arguments: list[str], said: str
) -> None:
    code, out, err = call("finetune", unseen, "--backbone", "digits", *arguments, "--server", running.grpc)
    assert (code, out) == (1, "")
    assert said in err and "upload" not in err


def test_a_folder_that_is_no_dataset_is_one_line(call: Call, running: LocalDaemon, tmp_path: Path) -> None:
    code, out, err = call("finetune", tmp_path, "--model", "m", "--backbone", "digits", "--server", running.grpc)
    assert (code, out) == (1, "")
    assert "make a folder of images for each class" in err and err.count("error: ") == 1


def test_what_is_not_there_cannot_be_uploaded(call: Call, running: LocalDaemon, tmp_path: Path) -> None:
    code, _, err = call("finetune", tmp_path / "gone", "--upload", "--server", running.grpc)
    assert code == 2 and "there is no folder" in err
