"""`backboned report` and GetReport, on a real daemon: the newest page that there is, or why there is none."""

import json
from collections.abc import Callable
from pathlib import Path

import grpc
import pytest

from backboned.client import Client, ClientError
from backboned.server.commands.asking import Answer, Said
from backboned.server.commands.local_daemon import LocalDaemon
from backboned.server.commands.predict import _show
from backboned.v1 import model_service_pb2 as pb

Call = Callable[..., tuple[int, str, str]]
PAGE = "<!doctype html><title>ünïcode</title>"


@pytest.fixture
def report(running: LocalDaemon) -> Path:
    """The report of the first version of `squares`, the only one now, with a page of ours."""
    with Client(running.grpc) as client:
        uri = client.get_model("squares").versions[-1].checkpoint.uri
    file = Path(uri.removeprefix("file://")).with_name("report.html")
    for written in file.parents[1].glob("*/report.html"):
        written.unlink()
    file.write_text(PAGE, encoding="utf-8")
    return file


def test_the_page_is_written_under_the_names_of_model_and_version(
    call: Call, running: LocalDaemon, report: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = call("report", "squares", "--version", 1, "--server", running.grpc)
    assert (code, out, err) == (0, "squares-1.html: how good squares version 1 is\n", "")
    assert Path("squares-1.html").read_text(encoding="utf-8") == PAGE


def test_it_is_written_where_one_wants_it_and_told_to_programs(
    call: Call, running: LocalDaemon, report: Path, tmp_path: Path
) -> None:
    out_file = tmp_path / "page.html"
    with Client(running.grpc) as client:
        client.set_alias("squares", "shown", 1)
    code, out, _ = call("report", "squares", "--alias", "shown", "-o", out_file, "--json", "--server", running.grpc)
    assert code == 0
    assert json.loads(out) == {"model": "squares", "version": "1", "file": str(out_file)}
    assert out_file.is_file()


def test_the_newest_version_that_has_one_is_taken(running: LocalDaemon, report: Path) -> None:
    with Client(running.grpc) as client:
        found = client.get_report("squares")
    assert (found.model, found.version, found.html) == ("squares", 1, PAGE)


@pytest.mark.parametrize(
    ("model", "which", "told"),
    [
        ("sqares", {}, "unknown model 'sqares'; did you mean 'squares'?"),
        ("squares", {"version": 77}, "unknown version of squares '77'"),
        ("squares", {"alias": "prod"}, "unknown alias of squares 'prod'"),
        ("../squares", {}, "unknown model '../squares'"),
    ],
)
def test_what_is_not_known_is_named(
    running: LocalDaemon, report: Path, model: str, which: dict[str, int], told: str
) -> None:
    with Client(running.grpc) as client, pytest.raises(ClientError) as caught:
        client.get_report(model, **which)  # type: ignore[arg-type]
    assert caught.value.code is grpc.StatusCode.NOT_FOUND
    assert caught.value.message.startswith(told)


@pytest.mark.parametrize("version", [None, 1])
def test_a_version_without_a_report_says_why(running: LocalDaemon, report: Path, version: int | None) -> None:
    report.unlink()
    with Client(running.grpc) as client, pytest.raises(ClientError) as caught:
        client.get_report("squares", version=version)
    assert "report: a FineTune writes one as it ends well" in caught.value.message
    assert caught.value.code is grpc.StatusCode.NOT_FOUND


@pytest.mark.parametrize(
    ("uncertain", "unfamiliar", "told"),
    [(False, False, ""), (True, False, " (uncertain)"), (True, True, " (unfamiliar)")],
)
def test_predict_shows_what_is_doubted(
    capsys: pytest.CaptureFixture[str], uncertain: bool, unfamiliar: bool, told: str
) -> None:
    classes = [pb.ClassProbability(label="red", probability=0.75)]
    prediction = pb.Prediction(classes=classes, uncertain=uncertain, unfamiliar=unfamiliar)
    _show([Answer(Path("a.png"), None, (Said("squares", 1, prediction),))], ["squares"], None)
    row = capsys.readouterr().out.splitlines()[1]
    assert row.split() == f"a.png red{told} 0.750".split()
