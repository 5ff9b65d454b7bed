"""Looks at images as they go by, and tells afterwards which are copies of others, tiny or odd."""

import threading
from collections import defaultdict
from collections.abc import Iterator, Sequence

import numpy as np
from torch import Tensor

from backboned.server.training.datasets.dataset import Dataset
from backboned.server.training.datasets.findings import Findings
from backboned.server.training.datasets.near import groups_alike
from backboned.server.training.datasets.record import THUMBNAIL_SIDE, Record, inspect
from backboned.server.training.datasets.samples import Sample
from backboned.server.training.events import Duplicates

TINY_PIXELS = 32
LONGEST_SIDES = 4
_EXAMPLES = 3
_PATHS = 20


class Inspector:
    """Collects the records of a dataset's images. Safe to use from several threads."""

    def __init__(self, dataset: Dataset, *, crop_size: int) -> None:
        """`crop_size` is the side, in pixels, of what the backbone reads."""
        parts = {"training": dataset.train, "validation": dataset.validation, "test": dataset.test}
        self._part = {s.path: name for name, samples in parts.items() for s in samples}
        self._least_side = max(TINY_PIXELS, crop_size // 4)
        self._lock = threading.Lock()
        self._records: dict[Sample, Record] = {}

    def see(self, sample: Sample, data: bytes, pixels: Tensor) -> Record:
        """Add an image from its file's bytes and its pixels, `[3, height, width]` uint8 as served."""
        record = inspect(data, pixels)
        self.add(sample, record)
        return record

    def add(self, sample: Sample, record: Record) -> None:
        """Add an image that was inspected before. Of one that is added twice the later record counts."""
        with self._lock:
            self._records[sample] = record

    def findings(self) -> Findings:
        """What was found in all images so far. Takes seconds for 100,000."""
        with self._lock:
            records = dict(sorted(self._records.items(), key=lambda item: item[0].path))
        groups = [*_equal(records), *_near(records)]
        duplicates = [self._duplicates(group, exact) for group, exact in groups]
        duplicates.sort(key=lambda d: (not d.across_parts, not d.labels_differ, not d.exact))
        return Findings(tuple(duplicates), (*self._overlap([g for g, _ in groups]), *self._odd(records)))

    def _duplicates(self, group: Sequence[Sample], exact: bool) -> Duplicates:
        return Duplicates(
            paths=tuple(s.path for s in group[:_PATHS]),
            exact=exact,
            across_parts=len({self._part.get(s.path) for s in group}) > 1,
            labels_differ=len({s.labels for s in group}) > 1,
        )

    def _overlap(self, groups: Sequence[Sequence[Sample]]) -> Iterator[str]:
        """Warnings of groups across parts, and of those whose labels differ."""
        for part, others in (("validation", {"training"}), ("test", {"training", "validation"})):
            seen = {
                s.path: g for g in groups if others & {self._part.get(s.path) for s in g} for s in g
                if self._part.get(s.path) == part
            }  # fmt: skip
            if seen:
                path, group = next(iter(seen.items()))
                twin = next(s.path for s in group if self._part.get(s.path) in others)
                where = "training" if part == "validation" else "training or validation"
                yield (
                    f"{_count(len(seen), f'{part} image')} also in {where}, as a copy or nearly so ({path} is {twin}): "
                    "figures look better than they are; keep copies in one part"
                )
        differing = [g for g in groups if len({s.labels for s in g}) > 1]
        if differing:
            first, other = next((a, b) for a in differing[0] for b in differing[0] if a.labels != b.labels)
            yield (
                f"{len({s.path for g in differing for s in g})} images show the same as another that is labelled "
                f"otherwise ({first.path}, {other.path}): one of the labels is wrong, or both belong together"
            )

    def _is_tiny(self, record: Record) -> bool:
        return min(record.width, record.height) < self._least_side

    def _odd(self, records: dict[Sample, Record]) -> Iterator[str]:
        tiny, long, blank = (
            [s.path for s, r in records.items() if matches(r)]
            for matches in (
                self._is_tiny,
                _is_long,
                _is_blank,
            )
        )
        if tiny:
            yield f"{_count(len(tiny), 'image')} less than {self._least_side} pixels high or wide: {_named(tiny)}"
        if long:
            yield (
                f"{_count(len(long), 'image')} more than {LONGEST_SIDES} times as long as wide, and only the middle is "
                f"looked at: {_named(long)}"
            )
        if blank:
            yield f"{_count(len(blank), 'image')} of one colour: {_named(blank)}"


def _is_long(record: Record) -> bool:
    return max(record.width, record.height) > LONGEST_SIDES * min(record.width, record.height)


def _is_blank(record: Record) -> bool:
    return record.blank


def _equal(records: dict[Sample, Record]) -> Iterator[tuple[list[Sample], bool]]:
    groups: dict[str, list[Sample]] = defaultdict(list)
    for sample, record in records.items():
        groups[record.digest].append(sample)
    return ((group, True) for group in groups.values() if len(group) > 1)


def _near(records: dict[Sample, Record]) -> Iterator[tuple[list[Sample], bool]]:
    """Groups of images of which each is like another one, copies among them. What has one colour is like nothing."""
    copies: dict[str, list[Sample]] = defaultdict(list)
    thumbnails: dict[str, bytes] = {}
    for sample, record in records.items():
        copies[record.digest].append(sample)
        if not record.blank:
            thumbnails[record.digest] = record.thumbnail
    by_thumbnail: dict[bytes, list[str]] = defaultdict(list)
    for digest, thumbnail in thumbnails.items():
        by_thumbnail[thumbnail].append(digest)
    distinct = list(by_thumbnail)  # what looks just the same is compared with others once
    pixels = np.frombuffer(b"".join(distinct), dtype=np.uint8).reshape(-1, THUMBNAIL_SIDE**2)
    together = groups_alike(pixels)
    alone = set(range(len(distinct))) - {index for group in together for index in group}
    for group in (*together, *([index] for index in sorted(alone))):
        digests = [digest for index in group for digest in by_thumbnail[distinct[index]]]
        if len(digests) > 1:
            members = [sample for digest in digests for sample in copies[digest]]
            yield sorted(members, key=lambda s: s.path), False


def _count(number: int, what: str) -> str:
    return f"{number} {what} is" if number == 1 else f"{number} {what}s are"


def _named(paths: Sequence[str]) -> str:
    more = len(paths) - _EXAMPLES
    return ", ".join(paths[:_EXAMPLES]) + (f" and {more} more" if more > 0 else "")
