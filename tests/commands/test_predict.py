"""Which images are meant, and which models."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import typer

from backboned.client import Client
from backboned.server.commands.local_daemon import LocalDaemon
from backboned.server.commands.predict import find_images

Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """`photos/{cat,dog}/{1.jpg,2.PNG}` and a text, in the working folder."""
    for name in ("cat", "dog"):
        folder = tmp_path / "photos" / name
        folder.mkdir(parents=True)
        for file in ("1.jpg", "2.PNG", "notes.txt"):
            (folder / file).touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path / "photos"


def test_a_folder_means_all_images_below_it_in_order(photos: Path) -> None:
    found = find_images(["photos"])
    assert [str(path) for path in found] == [
        "photos/cat/1.jpg",
        "photos/cat/2.PNG",
        "photos/dog/1.jpg",
        "photos/dog/2.PNG",
    ]


def test_a_pattern_means_what_it_matches(photos: Path) -> None:
    assert find_images(["photos/*/1.jpg"]) == [Path("photos/cat/1.jpg"), Path("photos/dog/1.jpg")]
    assert len(find_images(["**/*.PNG"])) == 2
    assert find_images([f"{photos}/d*/1.*"]) == [photos / "dog" / "1.jpg"]


def test_files_stay_in_the_order_that_they_are_given_in(photos: Path) -> None:
    given = ["photos/dog/1.jpg", "photos/cat/1.jpg", "nowhere.jpg"]
    assert find_images(given) == [Path(name) for name in given]


def test_a_file_whose_name_looks_like_a_pattern_is_taken_as_it_is(photos: Path) -> None:
    (photos / "a[1].jpg").touch()
    assert find_images(["photos/a[1].jpg"]) == [Path("photos/a[1].jpg")]


def test_a_folder_without_images_is_wrong_usage(photos: Path) -> None:
    (photos / "empty").mkdir()
    with pytest.raises(typer.BadParameter, match="no images in the folder photos/empty"):
        find_images(["photos/empty"])


def test_a_pattern_that_matches_nothing_is_wrong_usage(photos: Path) -> None:
    with pytest.raises(typer.BadParameter, match=r"nothing matches photos/\*\.bmp"):
        find_images(["photos/*.bmp"])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ["--model", "a", "--model", "b", "--version", "2"],
            "--version: write it behind the model's name: --model a@2",
        ),
        (["--model", "a", "--model", "b", "--alias", "x"], "--alias: write it behind the model's name: --model a@x"),
        (["--model", "a@1", "--alias", "x"], "write it behind the model's name: --model a@x"),
        (["--model", "a", "--version", "0"], "--version"),
    ],
)
def test_a_version_that_is_not_of_one_model_is_wrong_usage(call: Call, arguments: list[str], said: str) -> None:
    code, out, err = call("predict", "x.jpg", *arguments)
    assert (code, out) == (2, "")
    (line,) = err.splitlines()
    assert said in line


@pytest.fixture
def ask(call: Call, running: LocalDaemon) -> Iterator[Call]:
    """Ask the running daemon, whose model `squares` has the alias `first` on version 1, what images show."""
    with Client(running.grpc) as client:
        client.set_alias("squares", "first", 1)
        yield lambda *arguments: call("predict", *arguments, "--server", running.grpc)
        client.delete_alias("squares", "first")


def test_several_models_are_compared_in_one_table(ask: Call, squares: Path) -> None:
    code, out, err = ask(squares, "--model", "squares@1", "--model", "squares@first", "--label-by-folder", "--top-k", 1)
    heading, *rows, accuracy, other = out.splitlines()
    assert (code, len(rows)) == (0, 48)
    assert heading.split() == ["image", "model", "class", "probability", "right", "then"]
    assert {row.split()[1] for row in rows} == {"squares@1"}
    assert [row.split()[0] for row in rows[:3]] == ["blue/00.png", "blue/00.png", "blue/01.png"]
    assert accuracy.startswith("squares@1: ") and other.startswith("squares@first: ")
    assert accuracy.partition(": ")[2] == other.partition(": ")[2]
    assert err.endswith("answered by squares@1\n")


def test_several_models_print_an_object_each_for_an_image(ask: Call, squares: Path, tmp_path: Path) -> None:
    (tmp_path / "broken.jpg").write_bytes(b"no picture")
    images = [squares / "red" / "00.png", tmp_path / "broken.jpg"]
    code, out, _ = ask(*images, "--model", "squares@1", "--model", "squares", "--json")
    one, same, broken = map(json.loads, out.splitlines())
    assert code == 1
    assert (one["model"], one["version"], one["image"], same["image"]) == ("squares", "1", str(images[0]), one["image"])
    assert one["prediction"]["classes"] and same["prediction"]["classes"]
    assert broken.keys() == {"image", "error"} and "not an image" in broken["error"]


def test_the_features_of_a_stage_are_printed(ask: Call, squares: Path) -> None:
    code, out, _ = ask(squares / "red" / "00.png", "--model", "squares", "--embedding-stage", "layer2", "--json")
    assert (code, len(json.loads(out)["prediction"]["embedding"])) == (0, 32)
    code, out, err = ask(squares / "red" / "00.png", "--model", "squares", "--embedding-stage", "layer9")
    assert (code, out) == (1, "")
    assert "stem, layer1, layer2, layer3, pool" in err


def test_an_unknown_one_of_several_models_is_named(ask: Call, squares: Path) -> None:
    code, out, err = ask(squares / "red" / "00.png", "--model", "squares", "--model", "sqares")
    assert (code, out, err) == (1, "", "error: unknown model 'sqares'; did you mean 'squares'?\n")
