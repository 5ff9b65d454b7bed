from pathlib import Path

import pytest

from backboned.registry import BackbonedError, ErrorKind
from backboned.server.training.datasets import resolve_dataset


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "root" / "flower photos").mkdir(parents=True)
    (tmp_path / "outside").mkdir()
    return tmp_path / "root"


def test_a_dataset_is_found_by_path_by_uri_and_below_a_root(root: Path) -> None:
    expected = str(root / "flower photos")
    assert resolve_dataset(expected, [root]) == expected
    assert resolve_dataset(Path(expected).as_uri(), [root]) == expected
    assert resolve_dataset(f"file://localhost{root}/flower%20photos", [root]) == expected
    assert resolve_dataset("flower photos", [root.parent / "outside", root]) == expected
    assert resolve_dataset(".", [root]) == str(root)


@pytest.mark.parametrize("name", ["../outside", "/", "/etc", "file:///etc", "flower photos/../../outside", "../absent"])
def test_what_lies_outside_is_denied_whether_it_is_there_or_not(root: Path, name: str) -> None:
    with pytest.raises(BackbonedError, match="outside the data roots") as caught:
        resolve_dataset(name, [root])
    assert caught.value.kind is ErrorKind.PERMISSION_DENIED
    assert caught.value.field == "dataset"
    assert str(root) in caught.value.message


def test_a_link_that_leads_out_is_denied_and_one_that_stays_is_followed(root: Path) -> None:
    (root / "out").symlink_to(root.parent / "outside")
    (root / "in").symlink_to(root / "flower photos")
    (root / "loop").symlink_to(root / "loop")
    assert resolve_dataset("in", [root]) == str(root / "flower photos")
    for name in ("out", "loop"):
        with pytest.raises(BackbonedError) as caught:
            resolve_dataset(name, [root])
        assert caught.value.kind is ErrorKind.PERMISSION_DENIED


def test_a_root_may_itself_be_a_link(root: Path) -> None:
    link = root.parent / "link"
    link.symlink_to(root)
    assert resolve_dataset(str(link / "flower photos"), [link]) == str(root / "flower photos")


def test_without_roots_the_error_says_how_to_give_one() -> None:
    with pytest.raises(BackbonedError, match="backboned serve --data-root DIR") as caught:
        resolve_dataset("/data", [])
    assert caught.value.kind is ErrorKind.PERMISSION_DENIED


def test_a_missing_folder_gets_the_nearest_names(root: Path) -> None:
    with pytest.raises(BackbonedError, match="did you mean 'flower photos'") as caught:
        resolve_dataset("flower_photos", [root])
    assert caught.value.kind is ErrorKind.NOT_FOUND


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("", "is empty"),
        ("a\0b", "is empty"),
        ("ftp://host/photos", "file:///data/photos"),
        ("file://elsewhere/photos", "file:///data/photos"),
        ("x" * 300, "can't be read: File name too long"),
    ],
)
def test_what_is_no_path_is_refused(root: Path, name: str, says: str) -> None:
    with pytest.raises(BackbonedError, match=says) as caught:
        resolve_dataset(name, [root])
    assert caught.value.kind is ErrorKind.INVALID_ARGUMENT


def test_a_file_in_place_of_a_folder_is_refused(root: Path) -> None:
    (root / "notes.txt").touch()
    with pytest.raises(BackbonedError, match="is a file"):
        resolve_dataset("notes.txt", [root])
