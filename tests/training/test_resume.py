import errno
import logging
import os
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from backboned.server.training.resume import NAME, ResumeFile


def written(folder: Path) -> Path:
    ResumeFile(folder).write(trainer={"steps": 3, "weights": torch.arange(40.0)}, head=None)
    return folder / NAME


def test_there_is_nothing_to_go_on_from_at_first(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert ResumeFile(tmp_path).state == {}
    assert caplog.text == ""


def test_what_is_written_comes_back_and_is_added_to(tmp_path: Path) -> None:
    written(tmp_path)
    ResumeFile(tmp_path).write(head=torch.ones(2))
    state = ResumeFile(tmp_path).state
    assert set(state) == {"trainer", "head"}
    assert torch.equal(state["trainer"]["weights"], torch.arange(40.0))
    assert torch.equal(state["head"], torch.ones(2))


@given(part=st.floats(0, 1, exclude_max=True))
@settings(max_examples=40, deadline=None)
def test_a_truncated_file_is_begun_anew(part: float) -> None:
    with tempfile.TemporaryDirectory() as name:
        file = written(Path(name))
        content = file.read_bytes()
        file.write_bytes(content[: int(part * len(content))])
        assert ResumeFile(Path(name)).state == {}


@given(content=st.binary(max_size=300))
@settings(max_examples=60, deadline=None)
def test_a_file_of_anything_is_begun_anew(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as name:
        (Path(name) / NAME).write_bytes(content)
        assert ResumeFile(Path(name)).state == {}


@given(part=st.floats(0, 1, exclude_max=True), mask=st.integers(1, 255))
@settings(max_examples=200, deadline=None)
def test_a_flipped_byte_gives_the_state_or_none(part: float, mask: int) -> None:
    with tempfile.TemporaryDirectory() as name:
        file = written(Path(name))
        content = bytearray(file.read_bytes())
        content[int(part * len(content))] ^= mask
        file.write_bytes(content)
        state = ResumeFile(Path(name)).state
        assert state == {} or torch.equal(state["trainer"]["weights"], torch.arange(40.0))


def test_a_damaged_file_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = written(tmp_path)
    file.write_bytes(file.read_bytes()[:-100])
    with caplog.at_level(logging.WARNING):
        assert ResumeFile(tmp_path).state == {}
    assert f"{file} can't be read, the job begins anew" in caplog.text


def test_code_in_a_file_is_not_run(tmp_path: Path) -> None:
    class Harm:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.mkdir, (str(tmp_path / "harm"),)

    torch.save({"trainer": Harm()}, tmp_path / NAME)
    assert ResumeFile(tmp_path).state == {}
    assert not (tmp_path / "harm").exists()


def test_a_full_disk_is_an_error_and_the_last_state_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written(tmp_path)

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        ResumeFile(tmp_path).write(trainer=None)
    assert ResumeFile(tmp_path).state["trainer"]["steps"] == 3
    assert [path.name for path in tmp_path.iterdir()] == [NAME]
