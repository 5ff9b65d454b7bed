"""What an upload says that its dataset is to hold: images by path, labels and digest, checked before any byte comes."""

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum

from backboned.registry.errors import BackbonedError, invalid
from backboned.server.training.datasets.samples import not_an_image

MAX_ENTRIES = 500_000
MAX_IMAGE_BYTES = 256 * 2**20
MAX_PATH_BYTES = 1024
MAX_PART_BYTES = 255
MAX_LABELS = 1000
MAX_LABEL_BYTES = 255
MAX_NAME_BYTES = 255
SEPARATOR = "|"
ID_PREFIX = "ds-"

_SHA256 = re.compile(r"[0-9a-f]{64}")


class Part(StrEnum):
    """What an image is for, as the manifest of a dataset says it."""

    TRAIN = "train"
    VALIDATION = "val"
    TEST = "test"


@dataclass(frozen=True, slots=True)
class Entry:
    """An image of a dataset: its `path` within it, with `/`, and the SHA-256 of its bytes, in lower-case hex."""

    path: str
    labels: tuple[str, ...]
    sha256: str
    size_bytes: int
    part: Part = Part.TRAIN


class Declaration:
    """The images that were declared so far. For one thread at a time."""

    def __init__(self) -> None:
        self.name = ""
        self.entries: list[Entry] = []
        self._paths: set[str] = set()
        self._images: dict[str, Entry] = {}
        self._dataset_id = ""

    def append(self, name: str, entries: Sequence[Entry]) -> None:
        """Take a further part. Raises `BackbonedError` `INVALID_ARGUMENT` naming the first path that can't be used."""
        if len(name.encode()) > MAX_NAME_BYTES or _control(name):
            raise _refused(f"the name {name!r} must be at most {MAX_NAME_BYTES} bytes, on one line", "name")
        if len(self.entries) + len(entries) > MAX_ENTRIES:
            raise _refused(f"more than {MAX_ENTRIES} images; make several datasets of them")
        self.name = self.name or name
        self._dataset_id = ""
        for entry in entries:
            if problem := _problem(entry):
                raise _refused(f"image {entry.path!r} {problem}")
            if entry.path in self._paths:
                raise _refused(f"image {entry.path!r} is declared twice")
            first = self._images.setdefault(entry.sha256, entry)
            if first.size_bytes != entry.size_bytes:
                raise _refused(
                    f"image {entry.path!r} has {entry.size_bytes} bytes, and {first.path!r}, of the same digest, "
                    f"{first.size_bytes}"
                )
            self._paths.add(entry.path)
            self.entries.append(entry)

    def check_whole(self) -> None:
        """Check what only the whole can tell. Raises `BackbonedError` `INVALID_ARGUMENT`."""
        if not self.entries:
            raise _refused("no image is declared; send a declaration first, with at least one")
        for path in self._paths:
            above = next((folder for folder in _above(path) if folder in self._paths), None)
            if above is not None:
                raise _refused(f"image {above!r} can't also be the folder of {path!r}")

    def image(self, sha256: str) -> Entry | None:
        """The first entry with this digest."""
        return self._images.get(sha256)

    @property
    def images(self) -> Iterable[Entry]:
        """An entry for each distinct image, in the order of the declaration."""
        return self._images.values()

    @property
    def size_bytes(self) -> int:
        """Of all entries together."""
        return sum(entry.size_bytes for entry in self.entries)

    @property
    def dataset_id(self) -> str:
        """The id that the content makes: equal for equal images, paths, labels and parts, in whatever order."""
        if not self._dataset_id:
            digest = hashlib.sha256()
            for entry in sorted(self.entries, key=lambda e: e.path):
                line = json.dumps([entry.path, sorted(entry.labels), entry.sha256, entry.part])
                digest.update(f"{line}\n".encode())
            self._dataset_id = ID_PREFIX + digest.hexdigest()[:16]
        return self._dataset_id


def check_path(path: str) -> str:
    """Why `path` can't be an image's path within a dataset; empty if it can."""
    parts = path.split("/")
    if not path or len(path.encode()) > MAX_PATH_BYTES or any(len(p.encode()) > MAX_PART_BYTES for p in parts):
        return f"must have a path of 1 to {MAX_PATH_BYTES} bytes, each part at most {MAX_PART_BYTES}"
    if _control(path) or "\\" in path:
        return "has a control character or a backslash in its path"
    if any(p in ("", "..") or p.startswith(".") for p in parts):
        return "must have a relative path, without empty or hidden parts and '..'"
    if any(p != p.strip() for p in parts):
        return "has a part in its path that begins or ends with a space"
    reason = not_an_image(parts[-1])
    return f"is {reason}" if reason else ""


def _problem(entry: Entry) -> str:
    if problem := check_path(entry.path):
        return problem
    if not _SHA256.fullmatch(entry.sha256):
        return f"has the sha256 {entry.sha256[:80]!r}, expected 64 hexadecimal digits in lower case"
    if not 1 <= entry.size_bytes <= MAX_IMAGE_BYTES:
        return f"has {entry.size_bytes} bytes, expected 1 to {MAX_IMAGE_BYTES}"
    return _label_problem(entry.labels)


def _label_problem(labels: Sequence[str]) -> str:
    if len(labels) > MAX_LABELS or len(set(labels)) < len(labels):
        return f"must have at most {MAX_LABELS} labels, each once"
    for label in labels:
        if not label or label != label.strip() or SEPARATOR in label or _control(label):
            return f"has the label {label!r}, which is empty or has a '{SEPARATOR}', a line break or outer spaces"
        if len(label.encode()) > MAX_LABEL_BYTES:
            return f"has a label of {len(label.encode())} bytes, at most {MAX_LABEL_BYTES} are allowed"
    return ""


def _above(path: str) -> Iterable[str]:
    while "/" in path:
        path = path.rpartition("/")[0]
        yield path


def _control(text: str) -> bool:
    return any(ord(c) < 32 or 127 <= ord(c) < 160 for c in text)


def _refused(message: str, field: str = "declaration") -> BackbonedError:
    return invalid(message, field=field)
