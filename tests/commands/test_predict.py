"""Which images are meant."""

from pathlib import Path

import pytest
import typer

from backboned.server.commands.predict import find_images


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
