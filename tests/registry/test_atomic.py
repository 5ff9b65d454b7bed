"""A file is whole or not there, whatever happens while it is written."""

import threading
from pathlib import Path
from typing import BinaryIO

import pytest

from backboned.registry.atomic import sync_path, write_atomically


def test_a_new_file_is_there_whole_and_alone(tmp_path: Path) -> None:
    write_atomically(tmp_path / "a.bin", lambda file: file.write(b"content"))
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == {"a.bin": b"content"}


def test_an_existing_file_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(b"old and longer")
    write_atomically(tmp_path / "a.bin", lambda file: file.write(b"new"))
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == {"a.bin": b"new"}


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), ValueError("no"), KeyboardInterrupt()])
def test_an_error_in_the_middle_leaves_the_old_file_and_nothing_else(tmp_path: Path, error: BaseException) -> None:
    def write(file: BinaryIO) -> None:
        file.write(b"half")
        raise error

    (tmp_path / "a.bin").write_bytes(b"old")
    for name in ("a.bin", "b.bin"):
        with pytest.raises(type(error)):
            write_atomically(tmp_path / name, write)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == {"a.bin": b"old"}


def test_while_it_is_written_the_old_file_stands_and_the_new_one_is_hidden(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")

    def write(file: BinaryIO) -> None:
        file.write(b"new")
        file.flush()
        assert path.read_bytes() == b"old"
        (temporary,) = (p for p in tmp_path.iterdir() if p != path)
        assert temporary.name.startswith(".")

    write_atomically(path, write)
    assert path.read_bytes() == b"new"


def test_a_reader_never_sees_a_part(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    contents = [bytes([i]) * 100_000 for i in range(20)]
    write_atomically(path, lambda file: file.write(contents[0]))
    done = threading.Event()
    seen: set[bytes] = set()

    def read() -> None:
        while not done.is_set():
            seen.add(path.read_bytes())

    reader = threading.Thread(target=read)
    reader.start()
    for content in contents:
        write_atomically(path, lambda file, content=content: file.write(content))  # type: ignore[misc]
    done.set()
    reader.join()
    assert seen <= set(contents)


def test_a_name_as_long_as_the_file_system_allows_can_be_written(tmp_path: Path) -> None:
    path = tmp_path / ("漢" * 85)
    write_atomically(path, lambda file: file.write(b"x"))
    assert path.read_bytes() == b"x"


def test_a_missing_folder_is_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        write_atomically(tmp_path / "missing" / "a.bin", lambda file: file.write(b""))
    with pytest.raises(FileNotFoundError):
        sync_path(tmp_path / "missing")
