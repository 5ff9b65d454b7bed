"""Features of frozen stages on disk, by content: computed once, for all jobs, datasets and models.

A row is what the frozen stages made of one view of one image. A space holds the rows that one path of stages makes; its
key is a digest of all that a row depends on besides the image: preprocessing, stages, precision. Rows lie in segments,
files that are written whole and never changed: two jobs that fill a space at once write segments of their own, and what
a killed job had finished is there for the next one. A segment has a checksum of each row and of what it is of.
"""

import hashlib
import json
import logging
import os
import shutil
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple
from uuid import uuid4

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from backboned.registry.atomic import TEMPORARY_PREFIX, write_atomically

log = logging.getLogger(__name__)

_SUFFIX = ".rows"
_ABANDONED_SECONDS = 3600.0


class RowKey(NamedTuple):
    """A view of an image: the SHA-256 of the file's bytes, and the view's number."""

    digest: bytes
    view: int


class FeatureCache:
    """A folder of spaces, of at most about `limit_bytes`: what was used least recently goes first.

    Safe for several processes: what one removes, another that has it open keeps.
    """

    def __init__(self, folder: Path, *, limit_bytes: int) -> None:
        self._folder = folder
        self._limit_bytes = limit_bytes
        self._in_use: set[Path] = set()

    def space(self, description: Mapping[str, object]) -> "CacheSpace":
        """The space of rows that depend on `description`, JSON values, and on their image."""
        text = json.dumps(description, sort_keys=True, separators=(",", ":"))
        return CacheSpace(self, self._folder / hashlib.sha256(text.encode()).hexdigest()[:32])

    def holds(self, size_bytes: int) -> bool:
        """Whether so much can be kept at once, when everything else makes room: in the limit, and on half the disk."""
        self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        free = shutil.disk_usage(self._folder).free + sum(size for _, size, _ in self._segments())
        return size_bytes <= min(self._limit_bytes, free // 2)

    def use(self, segment: Path) -> None:
        """Note that a segment is used, which spares it while this object lives."""
        self._in_use.add(segment)
        with suppress(OSError):  # removed by another process just now: what is mapped stays
            os.utime(segment)

    def make_room(self, size_bytes: int) -> None:
        """Remove what was used least recently until `size_bytes` more fit in; what this process uses stays."""
        segments = sorted(self._segments())
        used = sum(size for _, size, _ in segments) + size_bytes
        for _, size, path in segments:
            if used <= self._limit_bytes:
                return
            if path not in self._in_use:
                path.unlink(missing_ok=True)
                used -= size

    def _segments(self) -> Iterator[tuple[float, int, Path]]:
        """When each segment was used last, in seconds since 1970, its size in bytes, and where it is."""
        for path in self._folder.glob(f"*/*{_SUFFIX}"):
            with suppress(OSError):
                stat = path.stat()
                yield stat.st_mtime, stat.st_size, path


class CacheSpace:
    """The rows of one path of stages. For one thread."""

    def __init__(self, cache: FeatureCache, folder: Path) -> None:
        self._cache = cache
        self._folder = folder
        self._segments: list[Tensor] = []

    def find(self, keys: set[RowKey]) -> dict[RowKey, tuple[int, int]]:
        """Where those of the rows are that the space has: segment and row, for `rows`.

        Every row is checked. A segment with a damaged one is removed: its rows count as missing.
        """
        found: dict[RowKey, tuple[int, int]] = {}
        for path in sorted(self._folder.glob(f"*{_SUFFIX}")):
            try:
                with safe_open(path, framework="pt") as file:
                    held = _keys(file.get_tensor("digests"), file.get_tensor("views"))
                    wanted = [(row, key) for row, key in enumerate(held) if key in keys and key not in found]
                    if not wanted:
                        continue
                    rows, sums = file.get_tensor("rows"), file.get_tensor("sums").tolist()
                if any(_sum(key, rows[row]) != sums[row] for row, key in wanted):
                    raise ValueError("a row doesn't match its checksum")
            except FileNotFoundError:
                continue  # another process made room
            except (OSError, SafetensorError, ValueError, TypeError, LookupError, RuntimeError) as error:
                log.warning("cached features in %s are damaged and are computed again: %s", path, error)
                path.unlink(missing_ok=True)
                continue
            self._cache.use(path)
            found.update((key, (len(self._segments), row)) for row, key in wanted)
            self._segments.append(rows)
        return found

    def add(self, keys: Sequence[RowKey], rows: Tensor) -> int:
        """Keep `rows` `[n, …]` under `keys` as a new segment, and return its number. Raises `OSError`."""
        rows = rows.contiguous()
        digests = torch.frombuffer(bytearray(b"".join(k.digest for k in keys)), dtype=torch.uint8).view(len(keys), -1)
        views = torch.tensor([k.view for k in keys], dtype=torch.int32)
        sums = torch.tensor([_sum(*pair) for pair in zip(keys, rows, strict=True)])
        content = save({"digests": digests, "views": views, "sums": sums, "rows": rows})
        self._cache.make_room(len(content))
        self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        _remove_abandoned(self._folder)
        path = self._folder / f"{uuid4().hex}{_SUFFIX}"
        write_atomically(path, lambda file: file.write(content))
        with safe_open(path, framework="pt") as file:  # mapped: the copy in memory can go
            self._segments.append(file.get_tensor("rows"))
        self._cache.use(path)
        return len(self._segments) - 1

    def rows(self, places: Sequence[tuple[int, int]]) -> Tensor:
        """The rows at these places: `[n, …]`, a copy."""
        return torch.stack([self._segments[segment][row] for segment, row in places])


def _keys(digests: Tensor, views: Tensor) -> Iterator[RowKey]:
    data, width = digests.numpy().tobytes(), digests.shape[1]
    return (RowKey(data[i * width : (i + 1) * width], view) for i, view in enumerate(views.tolist()))


def _sum(key: RowKey, row: Tensor) -> int:
    """Of the row, and of what it is a row of: a damaged view number or type must not give an image another's row."""
    about = f"{key.digest.hex()} {key.view} {row.dtype} {tuple(row.shape)}".encode()
    return zlib.crc32(row.contiguous().view(-1).view(torch.uint8).numpy().data, zlib.crc32(about))


def _remove_abandoned(folder: Path) -> None:
    """Remove what a killed process was writing."""
    for left in folder.glob(f"{TEMPORARY_PREFIX}*"):
        with suppress(OSError):
            if time.time() - left.stat().st_mtime > _ABANDONED_SECONDS:
                left.unlink()
