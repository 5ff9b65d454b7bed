"""Which images validate or test, where the dataset doesn't say."""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Sequence

from backboned.server.training.datasets.samples import Sample


def split(
    samples: Sequence[Sample], fraction: float, seed: int, *, leave: int = 1
) -> tuple[list[Sample], list[Sample]]:
    """`samples` as those that stay and those that are taken: about `fraction` of every class, and at least one.

    `leave` images of each class stay, even if none is taken then. An image with several labels counts for its rarest,
    one with none as a class of its own. The order of hashes of seed and path decides, so the same files are split alike
    everywhere, and a new one moves few others.
    """
    totals = Counter(label for s in samples for label in s.labels)
    groups: dict[int, list[Sample]] = defaultdict(list)
    for sample in samples:
        groups[min(sample.labels, key=lambda i: (totals[i], i), default=-1)].append(sample)
    chosen: set[str] = set()
    for group in groups.values():
        group.sort(key=lambda s: _rank(s.path, seed))
        count = min(max(round(len(group) * fraction), 1), max(len(group) - leave, 0))
        chosen.update(s.path for s in group[:count])
    return [s for s in samples if s.path not in chosen], [s for s in samples if s.path in chosen]


def _rank(path: str, seed: int) -> bytes:
    return hashlib.sha256(f"{seed}\0{path}".encode()).digest()
