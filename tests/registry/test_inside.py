"""Only files that lie in the directory are opened, and no more of them is read than asked for."""

import os
import socket
from pathlib import Path

import pytest

from backboned.registry.inside import read_inside


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "outside").write_text("secret")
    (tmp_path / "root" / "folder").mkdir(parents=True)
    (tmp_path / "root" / "file").write_text("content")
    return tmp_path / "root"


def test_a_file_is_read_also_through_a_link_that_stays_inside(root: Path) -> None:
    (root / "link").symlink_to("folder/../file")
    assert (
        read_inside(root / "file", root, most_bytes=7) == read_inside(root / "link", root, most_bytes=7) == b"content"
    )


@pytest.mark.parametrize("target", ["../outside", "/dev/zero", "folder/../../outside", "/"])
def test_a_link_that_leads_out_is_refused(root: Path, target: str) -> None:
    (root / "link").symlink_to(target)
    with pytest.raises(ValueError, match="leads out"):
        read_inside(root / "link", root, most_bytes=7)


def test_a_pipe_or_a_folder_is_refused_at_once(root: Path) -> None:
    os.mkfifo(root / "pipe")
    for name in ("pipe", "folder"):
        with pytest.raises(ValueError, match="it is not a file"):
            read_inside(root / name, root, most_bytes=7)


def test_what_can_never_be_opened_is_no_file_and_what_is_not_there_may_come(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (root / "loop").symlink_to("loop")
    monkeypatch.chdir(root)
    with socket.socket(socket.AF_UNIX) as made:
        made.bind("socket")
    for name in ("loop", "socket", "x" * 300):
        with pytest.raises(ValueError, match="it is not a file: "):
            read_inside(root / name, root, most_bytes=7)
    with pytest.raises(FileNotFoundError):
        read_inside(root / "missing", root, most_bytes=7)


def test_more_than_asked_for_is_refused(root: Path) -> None:
    with pytest.raises(ValueError, match="larger than 6 bytes"):
        read_inside(root / "file", root, most_bytes=6)
