"""Commands that ask a running daemon: what they print for people and for programs."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from backboned.server.commands.local_daemon import LocalDaemon

Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def ask(call: Call, running: LocalDaemon) -> Call:
    """Run a command against the running daemon."""
    return lambda *arguments: call(*arguments, "--server", running.grpc)


def objects(out: str) -> list[dict[str, Any]]:
    """One JSON object a line."""
    return [json.loads(line) for line in out.splitlines()]


def test_models_are_listed_for_people(ask: Call) -> None:
    code, out, _ = ask("models")
    assert code == 0
    heading, row = out.splitlines()
    assert heading.split() == ["model", "serving", "versions", "backbone", "classes", "accuracy", "aliases"]
    assert row.split()[0] == "squares"
    assert "digits" in row
    assert "\x1b" not in out


def test_models_are_listed_for_programs(ask: Call) -> None:
    code, out, err = ask("models", "--json")
    (model,) = objects(out)
    assert (code, err, model["name"]) == (0, "", "squares")
    assert model["versions"][0]["checkpoint"]["classes"] == ["blue", "red"]


def test_the_versions_of_a_model_are_listed(ask: Call) -> None:
    code, out, _ = ask("models", "squares")
    assert code == 0
    assert "single label" in out
    assert "serving" in out


def test_an_unknown_model_is_told_with_the_nearest(ask: Call) -> None:
    code, out, err = ask("models", "sqares")
    assert (code, out) == (1, "")
    assert err == "error: unknown model 'sqares'; did you mean 'squares'?\n"


def test_checkpoints_are_listed_filtered_and_ordered(ask: Call) -> None:
    code, out, _ = ask("checkpoints", "squares", "--filter", "epoch >= 1", "--order-by", "epoch", "--json")
    epochs = [checkpoint["epoch"] for checkpoint in objects(out) if checkpoint["version"] == "1"]
    assert (code, epochs) == (0, [1, 2])
    code, out, _ = ask("checkpoints")
    assert code == 0
    assert "best" in out


def test_a_bad_filter_is_told(ask: Call) -> None:
    code, out, err = ask("checkpoints", "--filter", "epoch >")
    assert (code, out) == (1, "")
    assert len(err.splitlines()) == 1


def test_backbones_are_the_daemons(ask: Call, digits_weights: Path) -> None:
    code, out, err = ask("backbones", "--json")
    (known,) = objects(out)
    digits = next(b for b in known["backbones"] if b["name"] == "digits")
    assert (code, err, digits["weights"]) == (0, "", str(digits_weights))
    code, out, _ = ask("backbones")
    assert code == 0
    assert "resnet50" in out


def test_predict_tells_the_class_of_each_image(ask: Call, squares: Path) -> None:
    code, out, err = ask("predict", squares / "red" / "00.png", squares / "blue", "--model", "squares")
    heading, *rows = out.splitlines()
    assert (code, len(rows)) == (0, 13)
    assert heading.split() == ["image", "class", "probability", "then"]
    assert rows[0].split()[0] == "red/00.png"
    assert f"images in {squares}, answered by version" in err


def test_predict_compares_with_labels_that_it_is_given(ask: Call, squares: Path) -> None:
    code, out, _ = ask("predict", squares, "--model", "squares", "--label-by-folder")
    assert code == 0
    assert "of 24 right: accuracy " in out.splitlines()[-1]


def test_predict_prints_an_object_an_image(ask: Call, squares: Path) -> None:
    images = [squares / "red" / "00.png", squares / "blue" / "00.png"]
    code, out, err = ask("predict", *images, "--model", "squares", "--labels", "red,blue", "--top-k", 1, "--json")
    first, second = objects(out)
    assert (code, err) == (0, "")
    assert (first["image"], first["label"], second["label"]) == (str(images[0]), "red", "blue")
    assert (first["model"], first["version"].isdecimal()) == ("squares", True)
    (best,) = first["prediction"]["classes"]
    assert best["label"] in ("red", "blue")
    assert 0 <= best["probability"] <= 1


def test_an_image_that_cannot_be_used_costs_no_other_its_answer(ask: Call, squares: Path, tmp_path: Path) -> None:
    (tmp_path / "broken.jpg").write_bytes(b"no picture")
    images = [squares / "red" / "00.png", tmp_path / "broken.jpg", tmp_path / "absent.jpg", squares / "red" / "01.png"]
    code, out, _ = ask("predict", *images, "--model", "squares", "--json")
    answers = objects(out)
    assert code == 1
    assert [answer["image"] for answer in answers] == [str(image) for image in images]
    assert ["error" in answer for answer in answers] == [False, True, True, False]

    code, out, err = ask("predict", *images, "--model", "squares")
    assert (code, len(out.splitlines())) == (1, 3)
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert [str(image) in line for image, line in zip(images[1:3], errors, strict=True)] == [True, True]


def test_a_job_can_be_listed_shown_and_watched_after_its_end(ask: Call) -> None:
    code, out, _ = ask("jobs", "--json")
    job = objects(out)[-1]
    assert (code, job["state"], job["model"]) == (0, "JOB_STATE_SUCCEEDED", "squares")
    assert job["id"] in ask("jobs")[1]
    assert "options.max_epochs" in ask("jobs", "show", job["id"])[1]

    code, out, err = ask("jobs", "watch", job["id"], "--json")
    *events, end = objects(out)
    assert (code, err) == (0, "")
    assert [int(event["sequence"]) for event in events] == list(range(1, len(events) + 1))
    assert [event["epoch"]["epoch"] for event in events if "epoch" in event] == [1, 2]
    assert end["job"]["state"] == "JOB_STATE_SUCCEEDED"

    code, out, _ = ask("jobs", "watch", job["id"])
    assert code == 0
    assert "epoch 1/2" in out
    assert "\x1b" not in out
    assert ask("jobs", "cancel", job["id"])[1] == f"job {job['id']}: succeeded\n"


def test_an_unknown_job_is_told(ask: Call) -> None:
    for command in ("show", "watch", "cancel"):
        code, out, err = ask("jobs", command, "nothing")
        assert (code, out) == (1, "")
        assert "nothing" in err


def test_an_alias_is_set_asked_listed_and_removed(ask: Call, squares: Path) -> None:
    assert ask("alias", "set", "squares", "production", 1)[:2] == (0, "squares: production → 1\n")
    code, out, _ = ask("alias", "list", "--json")
    assert (code, objects(out)) == (0, [{"model": "squares", "alias": "production", "version": "1"}])
    code, _, err = ask("predict", squares / "red" / "00.png", "--model", "squares", "--alias", "production")
    assert code == 0
    assert err.endswith("answered by version 1\n")
    code, _, err = ask("alias", "delete", "squares", "production", "--expected-version", 7)
    assert code == 1
    assert "production" in err
    assert ask("alias", "delete", "squares", "production")[0] == 0
    assert ask("alias", "list")[1:] == ("", "no alias\n")


def test_what_serves_is_chosen_divided_and_told(ask: Call) -> None:
    assert ask("models", "policy", "squares", "pinned")[:2] == (
        0,
        "squares: version 1 serves, by policy pinned\n",
    )
    ask("alias", "set", "squares", "stable", 1)
    code, out, _ = ask("models", "traffic", "squares", "stable=3")
    assert (code, out) == (0, "squares: version 1 serves, by policy pinned; divided between stable 3\n")
    assert objects(ask("models", "traffic", "squares", "--json")[1])[0]["traffic"] == {}
    assert ask("models", "policy", "squares", "latest")[1] == "squares: version 1 serves, by policy latest\n"
    ask("alias", "delete", "squares", "stable")
    code, out, _ = ask("models", "history", "squares")
    lines = out.splitlines()
    assert code == 0 and lines[0].split() == ["when", "model", "what", "who", "why"]
    for told in ("version none → 1 serves", "policy pinned, version 1", "traffic: stable 3", "alias stable: none → 1"):
        assert any(told in line for line in lines), out
    assert any("@" in line and "(ipv4:127.0.0.1:" in line for line in lines)
    assert {c["kind"] for c in objects(ask("models", "history", "--json")[1])} >= {"CHANGE_KIND_POLICY"}


def test_what_cannot_be_changed_is_told(ask: Call) -> None:
    code, _, err = ask("models", "rollback", "squares")
    assert code == 1 and "squares has no earlier version to go back to" in err
    code, _, err = ask("models", "delete", "squares", 1)
    assert code == 1 and "version 1 of squares serves: it is kept" in err
    code, _, err = ask("models", "traffic", "squares", "stable")
    assert code == 2 and "is not ALIAS=WEIGHT" in err
    code, _, err = ask("models", "policy", "squares", "oldest")
    assert code == 1 and "no policy 'oldest'; choose from latest, best, pinned, manual" in err
