"""Which of many thumbnails show the same picture.

Two are alike if the signs of their differences (dHash, 128 bits) differ in 7 at most, and their correlation is above
0.98. Of 3,670 photos of flowers that finds 15 pairs, all of them copies or neighbours in a burst; of photos that were
saved again as JPEG of quality 40 to 75 it finds 99.3 %, of resized ones 99.8 %.
"""

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from backboned.server.training.datasets.record import THUMBNAIL_SIDE

MOST_BITS = 7
LEAST_CORRELATION = 0.98
_BANDS = MOST_BITS + 1
_PAIRS_AT_ONCE = 2**20
_COUNTS = np.array([n.bit_count() for n in range(2**16)], dtype=np.uint8)

Thumbnails = npt.NDArray[np.uint8]


def alike(thumbnails: Thumbnails) -> list[tuple[int, int]]:
    """Pairs of indices, the lower first, of `[n, 256]` thumbnails that show the same.

    Hashes are cut into 8 bands of 16 bits: two that differ in 7 bits at most are equal in a band, so that only pairs
    equal in a band are compared.
    """
    if len(thumbnails) < 2:
        return []
    bands = _hashes(thumbnails)
    normal = thumbnails.astype(np.float32)
    normal -= normal.mean(axis=1, keepdims=True)
    normal /= np.maximum(np.linalg.norm(normal, axis=1, keepdims=True), 1e-6)
    found: set[tuple[int, int]] = set()
    for band in range(_BANDS):
        for one, other in _candidates(bands[:, band]):
            close = _COUNTS[bands[one] ^ bands[other]].sum(axis=1, dtype=np.int32) <= MOST_BITS
            left, right = one[close], other[close]
            same = np.einsum("ij,ij->i", normal[left], normal[right]) > LEAST_CORRELATION
            found.update((int(min(i, j)), int(max(i, j))) for i, j in zip(left[same], right[same], strict=True))
    return sorted(found)


def _hashes(thumbnails: Thumbnails) -> npt.NDArray[np.uint16]:
    """`[n, 8]`: for each of 8×8 cells whether it is brighter than the next one in its row, and in its column."""
    half = THUMBNAIL_SIDE // 2
    cells = thumbnails.reshape(-1, half, 2, half, 2).sum(axis=(2, 4), dtype=np.int16)
    signs = [cells > np.roll(cells, -1, axis=axis) for axis in (2, 1)]
    return np.packbits(np.concatenate(signs, axis=1).reshape(len(cells), -1), axis=1).view(np.uint16)


def _candidates(band: npt.NDArray[np.uint16]) -> Iterator[tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]]:
    """All pairs of indices that are equal in a band, about a million at a time."""
    order = np.argsort(band, kind="stable")
    _, starts, counts = np.unique(band[order], return_index=True, return_counts=True)
    ends = np.repeat(starts + counts, counts)
    following = ends - np.arange(len(band)) - 1  # how many come after each in its group
    total = np.cumsum(following)
    begin = 0
    while begin < len(band):
        done = total[begin - 1] if begin else 0
        end = max(begin + 1, int(np.searchsorted(total, done + _PAIRS_AT_ONCE)))
        repeats = following[begin:end]
        left = np.repeat(np.arange(begin, end), repeats)
        offsets = np.arange(len(left)) - np.repeat(np.cumsum(repeats) - repeats, repeats)
        if len(left):
            yield order[left], order[left + 1 + offsets]
        begin = end
