import errno
import hashlib
import logging
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from backboned.registry import atomic
from backboned.server.training.feature_cache import CacheSpace, FeatureCache, RowKey

VIEWS = 2
STAGES = {"stages": ["stem", "layer1"]}


def keys(images: range) -> list[RowKey]:
    return [RowKey(hashlib.sha256(b"%d" % i).digest(), view) for i in images for view in range(VIEWS)]


def rows_of(wanted: list[RowKey], width: int = 5) -> Tensor:
    """What these images and views make: always the same, and different for each."""
    seeds = [int.from_bytes(key.digest[:4], "big") + key.view for key in wanted]
    return torch.stack([torch.randn(width, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


def opened(folder: Path, limit_bytes: int = 2**20) -> CacheSpace:
    return FeatureCache(folder, limit_bytes=limit_bytes).space(STAGES)


def filled(folder: Path, images: range = range(3)) -> Path:
    """A cache with one segment, and where that is."""
    opened(folder).add(keys(images), rows_of(keys(images)))
    (segment,) = folder.glob("*/*.rows")
    return segment


def found(space: CacheSpace, wanted: list[RowKey]) -> dict[RowKey, Tensor]:
    return {key: space.rows([place])[0] for key, place in space.find(set(wanted)).items()}


def assert_right(held: dict[RowKey, Tensor]) -> None:
    for key, row in held.items():
        assert torch.equal(row, rows_of([key])[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
def test_rows_come_back_with_the_same_bits(tmp_path: Path, dtype: torch.dtype) -> None:
    wanted = keys(range(4))
    rows = (100 * torch.rand(8, 3, 2, 2)).to(dtype)
    opened(tmp_path).add(wanted, rows)
    space = opened(tmp_path)
    places = space.find(set(wanted))
    again = space.rows([places[key] for key in wanted])
    assert again.dtype == dtype
    assert torch.equal(again, rows)


def test_what_is_added_can_be_read_at_once(tmp_path: Path) -> None:
    space = opened(tmp_path)
    for images in (range(2), range(2, 4)):
        segment = space.add(keys(images), rows_of(keys(images)))
        assert torch.equal(space.rows([(segment, 3), (segment, 0)]), rows_of(keys(images))[[3, 0]])


def test_rows_are_copies(tmp_path: Path) -> None:
    filled(tmp_path)
    space = opened(tmp_path)
    places = list(space.find(set(keys(range(3)))).values())
    space.rows(places).zero_()
    assert space.rows(places).abs().sum() > 0


def test_spaces_do_not_mix(tmp_path: Path) -> None:
    filled(tmp_path)
    other = FeatureCache(tmp_path, limit_bytes=2**20).space({"stages": ["stem", "layer2"]})
    assert other.find(set(keys(range(3)))) == {}
    assert set(opened(tmp_path).find(set(keys(range(3))))) == set(keys(range(3)))


def test_only_what_is_asked_for_is_found(tmp_path: Path) -> None:
    filled(tmp_path)
    assert set(found(opened(tmp_path), keys(range(2, 9)))) == set(keys(range(2, 3)))


def test_what_was_used_least_recently_goes_first_and_what_is_in_use_stays(tmp_path: Path) -> None:
    parts = [range(n, n + 1) for n in range(4)]
    for part in parts[:3]:
        opened(tmp_path).add(keys(part), rows_of(keys(part)))
    sizes = {path: path.stat().st_size for path in tmp_path.glob("*/*.rows")}
    for age, part in ((300, parts[0]), (100, parts[1]), (200, parts[2])):
        before = {path: path.stat().st_mtime for path in sizes}
        opened(tmp_path).find(set(keys(part)))
        (touched,) = [path for path in sizes if path.stat().st_mtime != before[path]]
        os.utime(touched, (1e9 - age, 1e9 - age))
    using = opened(tmp_path, limit_bytes=3 * max(sizes.values()))
    using.find(set(keys(parts[0])))  # the oldest, until now
    using.add(keys(parts[3]), rows_of(keys(parts[3])))
    left = found(opened(tmp_path), keys(range(4)))
    assert set(left) == set(keys(parts[0]) + keys(parts[1]) + keys(parts[3]))
    assert_right(left)


def test_what_another_removes_can_still_be_read_by_who_has_it(tmp_path: Path) -> None:
    segment = filled(tmp_path)
    space = opened(tmp_path)
    places = space.find(set(keys(range(3))))
    segment.unlink()
    assert torch.equal(space.rows([places[key] for key in keys(range(3))]), rows_of(keys(range(3))))


def test_so_much_is_held_as_the_limit_and_half_the_disk_allow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = FeatureCache(tmp_path / "new", limit_bytes=1000)
    assert cache.holds(1000)
    assert not cache.holds(1001)
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 500})())
    assert cache.holds(250)
    assert not cache.holds(251)
    size = filled(tmp_path / "new").stat().st_size
    assert cache.holds(250 + size // 2)  # what is cached would make room


@settings(max_examples=150, deadline=None)
@given(part=st.floats(0, 1, exclude_max=True), mask=st.integers(1, 255))
def test_a_flipped_byte_anywhere_never_gives_a_wrong_row(part: float, mask: int) -> None:
    with tempfile.TemporaryDirectory() as name:
        wanted = keys(range(3))
        segment = filled(Path(name))
        content = bytearray(segment.read_bytes())
        content[int(part * len(content))] ^= mask
        segment.write_bytes(content)
        space = opened(Path(name))
        held = found(space, wanted)
        assert_right(held)
        missing = [key for key in wanted if key not in held]
        if missing:
            space.add(missing, rows_of(missing))
        again = found(opened(Path(name)), wanted)
        assert set(again) == set(wanted)
        assert_right(again)


@pytest.mark.parametrize("region", ["length", "header", "rows", "sums"])
def test_a_damaged_segment_is_removed_and_told(tmp_path: Path, caplog: pytest.LogCaptureFixture, region: str) -> None:
    segment = filled(tmp_path)
    content = bytearray(segment.read_bytes())
    values = 8 + int.from_bytes(content[:8], "little")  # sums come first, and rows after them
    content[{"length": 3, "header": 9, "sums": values, "rows": values + 8 * 6 + 7}[region]] ^= 0x40
    segment.write_bytes(content)
    with caplog.at_level(logging.WARNING):
        held = found(opened(tmp_path), keys(range(3)))
    assert held == {}
    assert not segment.exists()
    assert f"cached features in {segment} are damaged and are computed again" in caplog.text


def test_a_row_whose_digest_is_damaged_is_missing_and_the_others_are_right(tmp_path: Path) -> None:
    segment = filled(tmp_path)
    content, lost = segment.read_bytes(), keys(range(3))[0]
    segment.write_bytes(content.replace(lost.digest, b"?" + lost.digest[1:], 1))
    held = found(opened(tmp_path), keys(range(3)))
    assert set(held) == set(keys(range(3))) - {lost}
    assert_right(held)


def test_a_view_that_became_another_is_noticed(tmp_path: Path) -> None:
    segment = filled(tmp_path)
    content = segment.read_bytes()
    views = torch.tensor([key.view for key in keys(range(3))], dtype=torch.int32).numpy().tobytes()
    assert content.count(views) == 1
    other = torch.tensor([0, 0, 0, 1, 0, 1], dtype=torch.int32).numpy().tobytes()
    segment.write_bytes(content.replace(views, other))
    assert found(opened(tmp_path), keys(range(3))) == {}
    assert not segment.exists()


@given(part=st.floats(0, 1, exclude_max=True))
@settings(max_examples=40, deadline=None)
def test_a_truncated_segment_holds_nothing_and_is_removed(part: float) -> None:
    with tempfile.TemporaryDirectory() as name:
        segment = filled(Path(name))
        content = segment.read_bytes()
        segment.write_bytes(content[: int(part * len(content))])
        assert found(opened(Path(name)), keys(range(3))) == {}
        assert not segment.exists()


@given(content=st.binary(max_size=200))
@settings(max_examples=60, deadline=None)
def test_a_file_of_anything_is_no_segment(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as name:
        segment = filled(Path(name))
        segment.write_bytes(content)
        assert found(opened(Path(name)), keys(range(3))) == {}
        assert not segment.exists()


def test_a_full_disk_is_an_error_that_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    segment = filled(tmp_path)

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left") as caught:
        opened(tmp_path).add(keys(range(3, 5)), rows_of(keys(range(3, 5))))
    assert caught.value.errno == errno.ENOSPC
    assert list(segment.parent.iterdir()) == [segment]
    assert_right(found(opened(tmp_path), keys(range(3))))


CHILD = f"""
import hashlib, os, sys
from pathlib import Path
import torch
from backboned.registry import atomic
from backboned.server.training.feature_cache import FeatureCache, RowKey

folder, first, last, blocked = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4] == "blocked"
print("ready", flush=True)
sys.stdin.readline()
if blocked:
    def fsync(descriptor):
        print("writing", flush=True)
        sys.stdin.readline()
    atomic.os.fsync = fsync
space = FeatureCache(folder, limit_bytes=2**20).space({STAGES!r})
for i in range(first, last):
    keys = [RowKey(hashlib.sha256(b"%d" % i).digest(), view) for view in range({VIEWS})]
    seeds = [int.from_bytes(key.digest[:4], "big") + key.view for key in keys]
    space.add(keys, torch.stack([torch.randn(5, generator=torch.Generator().manual_seed(s)) for s in seeds]))
"""


def child(folder: Path, images: range, *, blocked: bool = False) -> subprocess.Popen[str]:
    """Another process that fills the space, once it is given a line; blocked: it stops while it writes."""
    arguments = [str(folder), str(images.start), str(images.stop), "blocked" if blocked else "free"]
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def begin(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.stdin.write("go\n")
    process.stdin.flush()


def test_two_processes_fill_a_space_at_once(tmp_path: Path) -> None:
    with child(tmp_path, range(12)) as first, child(tmp_path, range(6, 18)) as second:
        begin(first)
        begin(second)
        assert first.wait(60) == 0
        assert second.wait(60) == 0
    held = found(opened(tmp_path), keys(range(18)))
    assert set(held) == set(keys(range(18)))
    assert_right(held)
    assert not list(tmp_path.glob(f"*/{atomic.TEMPORARY_PREFIX}*"))


def test_a_process_that_is_killed_while_it_writes_leaves_nothing_that_hurts(tmp_path: Path) -> None:
    filled(tmp_path)
    with child(tmp_path, range(3, 5), blocked=True) as process:
        begin(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "writing\n"
        process.send_signal(signal.SIGKILL)
        process.wait(60)
    (left,) = tmp_path.glob(f"*/{atomic.TEMPORARY_PREFIX}*")
    held = found(opened(tmp_path), keys(range(5)))
    assert set(held) == set(keys(range(3)))
    assert_right(held)
    os.utime(left, (1e9, 1e9))
    opened(tmp_path).add(keys(range(3, 5)), rows_of(keys(range(3, 5))))
    assert not left.exists()
    assert set(found(opened(tmp_path), keys(range(5)))) == set(keys(range(5)))
