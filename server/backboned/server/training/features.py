"""What the frozen stages make of images: from the cache, or computed once and cached, then read batch by batch."""

import hashlib
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor

from backboned.registry.backbone import Preprocessing
from backboned.registry.errors import BackbonedError, ErrorKind
from backboned.server.compute.decode import decode
from backboned.server.compute.preprocess import augment, read
from backboned.server.training.datasets import Record, inspect
from backboned.server.training.feature_cache import CacheSpace, FeatureCache, RowKey
from backboned.server.training.frozen_stages import RECIPE, Frozen

_SEGMENT_BYTES = 64 * 2**20
_SEGMENT_SECONDS = 2.0

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


@dataclass(frozen=True)
class Images:
    """Images and the views that are taken of each. View 0 is the image as it is served.

    `load(index)` gives the bytes of one of the `count` images, from any thread.
    """

    load: Callable[[int], bytes]
    count: int
    views: int
    preprocessing: Preprocessing
    max_pixels: int

    def pixels(self, data: bytes, views: Sequence[int]) -> Tensor:
        """Some views of an image file: `[views, 3, crop, crop]` uint8. Raises `BackbonedError`.

        A view is a pure function of the bytes, its number and the preprocessing.
        """
        digest = hashlib.sha256(data).digest()
        image = decode(data, max_pixels=self.max_pixels) if any(views) else None
        taken = []
        for view in views:
            if view == 0 or image is None:
                taken.append(read(data, self.preprocessing, max_pixels=self.max_pixels))
            else:
                seed = hashlib.sha256(digest + view.to_bytes(4, "big")).digest()[:7]
                taken.append(augment(image, self.preprocessing, int.from_bytes(seed, "big")))
        return torch.stack(taken)


@dataclass
class Prepared:
    """What became of a pass over all images: why some can't be read, by index, and how many rows came whence.

    `records` are what is known of the images, by index: of those that are computed now, or were by an earlier job.
    """

    unreadable: dict[int, str] = field(default_factory=dict)
    records: dict[int, Record] = field(default_factory=dict)
    cached: int = 0
    computed: int = 0


class Features:
    """The activations at the freezing boundary for images, in one or more views each. For one thread.

    Worker threads decode and run a few images each, with one thread of torch: on two cores that is twice as fast as one
    pass over both, and a busy neighbour doesn't stall it. What the cache can't hold is computed whenever it is read.
    """

    def __init__(self, images: Images, frozen: Frozen, cache: FeatureCache, *, workers: int) -> None:
        self._images = images
        self._frozen = frozen
        self._workers = workers
        self._cache = cache
        self._space = cache.space(frozen.describe())
        self._record_space = cache.space({"records": RECIPE, "preprocessing": frozen.preprocessing.to_dict()})
        self._digests: list[bytes | None] = [None] * images.count
        self._places: dict[tuple[int, int], tuple[int, int]] = {}
        self._recorded: set[int] = set()

    @property
    def cached(self) -> bool:
        """Whether all rows lie in the cache, so that reading them costs next to nothing."""
        readable = sum(digest is not None for digest in self._digests)
        return len(self._places) == readable * self._images.views

    def prepare(self, progress: Callable[[Prepared], None]) -> Prepared:
        """Read all images once; find their rows in the cache, and compute and keep what is missing.

        `progress` is called in this thread after every few rows; what it raises ends the work, and what was computed
        stays. Raises `OSError` for a full disk.
        """
        done = Prepared()
        self._read_digests(done, progress)
        wanted = [(i, v) for i, digest in enumerate(self._digests) if digest for v in range(self._images.views)]
        found = self._space.find({self._key(*row) for row in wanted})
        for row in wanted:
            if (place := found.get(self._key(*row))) is not None:
                self._places[row] = place
        done.cached = len(self._places)
        self._find_records(done)
        progress(done)
        missing = [row for row in wanted if row not in self._places]
        if missing and self._cache.holds(len(wanted) * self._frozen.row_bytes):
            self._compute(missing, done, progress)
        elif missing:
            self._check(done, progress)
        for index in done.unreadable:
            self._digests[index] = None
        return done

    def batch(self, images: Tensor, views: Tensor) -> Tensor:
        """`[n]` indices of images and of their views → `[n, …]` float32 on the device, ready for autograd."""
        rows = list(zip(images.tolist(), views.tolist(), strict=True))
        if all(row in self._places for row in rows):
            return self._frozen.inputs(self._space.rows([self._places[row] for row in rows]))
        batches = list(self._in_parallel(rows))
        if lost := [reason for batch in batches for reason in batch.reasons.values()]:
            raise BackbonedError(ErrorKind.FAILED_PRECONDITION, f"an image is lost: {lost[0]}", field="dataset")
        return self._frozen.inputs(torch.cat([batch.values for batch in batches if batch.values is not None]))

    def _read_digests(self, done: Prepared, progress: Callable[[Prepared], None]) -> None:
        def digest(index: int) -> bytes | str:
            try:
                return hashlib.sha256(self._images.load(index)).digest()
            except (BackbonedError, OSError) as error:
                return _reason(error)

        with ThreadPoolExecutor(self._workers) as pool:
            for index, found in enumerate(_in_order(pool, digest, range(self._images.count), 8 * self._workers)):
                if isinstance(found, str):
                    done.unreadable[index] = found
                else:
                    self._digests[index] = found
                if index % 256 == 0:
                    progress(done)

    def _check(self, done: Prepared, progress: Callable[[Prepared], None]) -> None:
        """See which images can't be decoded, where nothing is computed ahead."""

        def problem(index: int) -> str:
            try:
                self._images.pixels(self._images.load(index), (0,))
            except (BackbonedError, OSError) as error:
                return _reason(error)
            return ""

        readable = [index for index, digest in enumerate(self._digests) if digest]
        with ThreadPoolExecutor(self._workers) as pool:
            for index, reason in zip(readable, _in_order(pool, problem, readable, 8 * self._workers), strict=True):
                if reason:
                    done.unreadable[index] = reason
                progress(done)

    def _compute(self, missing: list[tuple[int, int]], done: Prepared, progress: Callable[[Prepared], None]) -> None:
        keeper = _Keeper(self._space, self._places, self._key)
        try:
            for batch in self._in_parallel(missing):
                done.unreadable |= batch.reasons
                done.records |= batch.records
                done.computed += len(batch.rows)
                if batch.values is not None:
                    keeper.take(batch.rows, batch.values)
                progress(done)
        finally:
            keeper.flush()
            self._keep_records(done)

    def _find_records(self, done: Prepared) -> None:
        found = self._record_space.find({self._key(i, 0) for i, digest in enumerate(self._digests) if digest})
        for index, digest in enumerate(self._digests):
            if digest and (place := found.get(RowKey(digest, 0))) is not None:
                done.records[index] = Record.from_bytes(self._record_space.rows([place]).numpy().tobytes())
        self._recorded = set(done.records)

    def _keep_records(self, done: Prepared) -> None:
        new = [index for index in done.records if index not in self._recorded]
        if new:
            content = bytearray(b"".join(done.records[index].to_bytes() for index in new))
            rows = torch.frombuffer(content, dtype=torch.uint8).view(len(new), -1)
            self._record_space.add([self._key(index, 0) for index in new], rows)

    def _in_parallel(self, rows: Sequence[tuple[int, int]]) -> Iterator["_Batch"]:
        """Compute rows in their order, a batch at a time; those of unreadable images are left out, and told."""
        size, _ = self._frozen.batch, self._frozen.path  # loaded before several threads want it
        chunks = [rows[start : start + size] for start in range(0, len(rows), size)]
        with ThreadPoolExecutor(self._workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            yield from _in_order(pool, self._batch, chunks, 2 * self._workers)

    def _batch(self, chunk: Sequence[tuple[int, int]]) -> "_Batch":
        by_image: dict[int, list[int]] = {}
        for index, view in chunk:
            by_image.setdefault(index, []).append(view)
        batch, pixels = _Batch(), []
        for index, views in by_image.items():
            try:
                data = self._images.load(index)
                if hashlib.sha256(data).digest() != self._digests[index]:  # else its rows would pass for another's
                    batch.reasons[index] = "it was changed while it was read"
                    continue
                taken = self._images.pixels(data, views)
            except (BackbonedError, OSError) as error:
                batch.reasons[index] = _reason(error)
                continue
            pixels.append(taken)
            batch.rows += [(index, view) for view in views]
            if views[0] == 0 and index not in self._recorded:
                batch.records[index] = inspect(data, taken[0])
        if pixels:
            batch.values = self._frozen.rows(torch.cat(pixels))
        return batch

    def _key(self, index: int, view: int) -> RowKey:
        digest = self._digests[index]
        assert digest is not None  # only readable images have rows
        return RowKey(digest, view)


@dataclass
class _Batch:
    """Rows, what they are (`[n, …]`, None if there are none), and what was seen of their images, by index."""

    rows: list[tuple[int, int]] = field(default_factory=list)
    values: Tensor | None = None
    reasons: dict[int, str] = field(default_factory=dict)
    records: dict[int, Record] = field(default_factory=dict)


class _Keeper:
    """Puts computed rows into the cache, a segment every few seconds, and notes where they are."""

    def __init__(
        self, space: CacheSpace, places: dict[tuple[int, int], tuple[int, int]], key: Callable[[int, int], RowKey]
    ) -> None:
        self._space = space
        self._places = places
        self._key = key
        self._rows: list[tuple[int, int]] = []
        self._values: list[Tensor] = []
        self._size_bytes = 0
        self._since = time.monotonic()

    def take(self, rows: Sequence[tuple[int, int]], values: Tensor) -> None:
        """Rows and what they are, `[n, …]`."""
        self._rows += rows
        self._values.append(values)
        self._size_bytes += values.nbytes
        if self._size_bytes >= _SEGMENT_BYTES or time.monotonic() - self._since >= _SEGMENT_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Put what was taken on disk. Raises `OSError`."""
        if self._rows:
            segment = self._space.add([self._key(*row) for row in self._rows], torch.cat(self._values))
            self._places.update((row, (segment, n)) for n, row in enumerate(self._rows))
        self._rows, self._values, self._size_bytes, self._since = [], [], 0, time.monotonic()


def _in_order(
    pool: ThreadPoolExecutor, function: Callable[[_Item], _Result], items: Iterable[_Item], ahead: int
) -> Iterator[_Result]:
    """`function` of each item, in their order, with `ahead` of them under way at most."""
    waiting: deque[Future[_Result]] = deque()
    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) >= ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()


def _reason(error: Exception) -> str:
    if isinstance(error, BackbonedError):
        return error.message
    return f"can't be read: {error.strerror}" if isinstance(error, OSError) else str(error)
