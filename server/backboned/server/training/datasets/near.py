"""Which of many thumbnails show the same picture.

Two are alike if their difference hashes (dHash, 128 bits) differ in 7 bits at most, and their correlation is above
0.98. Of 3,670 photos of flowers that finds 15 pairs, all of them versions of one picture; each of 459 that were
saved again, as JPEG of quality 40 to 75 or at 0.4 to 1.5 times the size, is found.
"""

from collections import defaultdict
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from backboned.server.training.datasets.record import THUMBNAIL_SIDE

MOST_BITS = 7
LEAST_CORRELATION = 0.98
_BANDS = MOST_BITS + 1
_MARGIN = 4 * 2
_PAIRS_AT_ONCE = 2**15
_MOST_FOLLOWING = 100
_COUNTS = np.array([n.bit_count() for n in range(2**16)], dtype=np.uint8)

Thumbnails = npt.NDArray[np.uint8]
Hashes = npt.NDArray[np.uint16]
Indices = npt.NDArray[np.int64]


def groups_alike(thumbnails: Thumbnails) -> list[list[int]]:
    """Indices of `[n, 256]` thumbnails in groups of two or more, of which each is like another one of its group.

    Hashes are cut into 8 bands of 16 bits: two that differ in 7 bits at most are equal in a band, so that only pairs
    equal in a band are compared. Where more than 100 are equal in a band, each is compared with the next 100 of them in
    the order of their hashes. What has no contrast is like nothing.
    """
    hashes = _hashes(thumbnails)
    normal = thumbnails.astype(np.float32)
    normal -= normal.mean(axis=1, keepdims=True)
    normal /= np.maximum(np.linalg.norm(normal, axis=1, keepdims=True), 1e-6)
    group = np.arange(len(thumbnails))
    for band in range(_BANDS):
        for one, other in _candidates(hashes, band, np.nonzero(hashes.any(axis=1))[0]):
            pairs = np.stack([one, other])
            pairs = pairs[:, group[one] != group[other]]
            bits = _COUNTS[hashes[pairs[0]] ^ hashes[pairs[1]]].sum(axis=1, dtype=np.int32)
            pairs = pairs[:, bits <= MOST_BITS]
            correlation = np.einsum("ij,ij->i", normal[pairs[0]], normal[pairs[1]])
            _join(group, pairs[:, correlation > LEAST_CORRELATION])
    members: dict[int, list[int]] = defaultdict(list)
    for index, lowest in enumerate(group.tolist()):
        members[lowest].append(index)
    return [indices for indices in members.values() if len(indices) > 1]


def _hashes(thumbnails: Thumbnails) -> Hashes:
    """`[n, 8]`: of each of 8×8 cells whether it is brighter than the next one in its row, and in its column.

    By two levels of grey at least: a plain background is no matter of chance then.
    """
    half = THUMBNAIL_SIDE // 2
    cells = thumbnails.reshape(-1, half, 2, half, 2).sum(axis=(2, 4), dtype=np.int16)
    signs = [cells > np.roll(cells, -1, axis=axis) + _MARGIN for axis in (2, 1)]
    return np.packbits(np.concatenate(signs, axis=1).reshape(len(cells), 128), axis=1).view(np.uint16)


def _candidates(hashes: Hashes, band: int, which: Indices) -> Iterator[tuple[Indices, Indices]]:
    """Pairs of indices among `which` that are equal in a band, some thousands at a time."""
    hashes = hashes[which]
    others = [hashes[:, b] for b in range(_BANDS) if b != band]
    order = np.lexsort([*others, hashes[:, band]])
    _, starts, counts = np.unique(hashes[order, band], return_index=True, return_counts=True)
    ends = np.repeat(starts + counts, counts)
    following = np.minimum(ends - np.arange(len(order)) - 1, _MOST_FOLLOWING)
    total = np.cumsum(following)
    begin = 0
    while begin < len(order):
        done = int(total[begin - 1]) if begin else 0
        end = max(begin + 1, int(np.searchsorted(total, done + _PAIRS_AT_ONCE, side="right")))
        repeats = following[begin:end]
        position = np.repeat(np.arange(begin, end), repeats)
        step = np.arange(len(position)) - np.repeat(np.cumsum(repeats) - repeats, repeats) + 1
        if len(position):
            yield which[order[position]], which[order[position + step]]
        begin = end


def _join(group: Indices, pairs: Indices) -> None:
    """Let each pair be in one group; a group is called by one of its members."""
    for one, other in pairs.T.tolist():
        first, second = group[one], group[other]
        if first != second:
            group[group == max(first, second)] = min(first, second)
