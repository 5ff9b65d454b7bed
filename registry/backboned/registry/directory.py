"""The checkpoint directory: what lies where, and what is there now.

<root>/<model>/<version>/manifest.json, epoch-0001.pt …    versions
<root>/<model>/<anything>.pt|.pth|.safetensors              dropped files
"""

import json
import os
import shutil
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from backboned.registry.atomic import sync_path
from backboned.registry.errors import BackbonedError
from backboned.registry.manifest import MANIFEST_NAME, check_name
from backboned.registry.payload import SUFFIXES
from backboned.registry.sidecar import sidecar_paths

MAX_VERSION = 2**62
TOMBSTONE_NAME = "deleted.json"
"""What is left of a deleted version whose number, or dropped file, must not be taken for a new one."""


@dataclass(frozen=True)
class Signature:
    """What changes when a file does: size in bytes, modification time in nanoseconds, inode and change time."""

    size_bytes: int
    mtime_ns: int
    inode: int
    ctime_ns: int

    @classmethod
    def of(cls, path: Path) -> "Signature | None":
        """The signature of the file at `path`; None if there is none."""
        try:
            stat = path.stat()
        except OSError:
            return None
        return cls(stat.st_size, stat.st_mtime_ns, stat.st_ino, stat.st_ctime_ns)


@dataclass(frozen=True)
class Drop:
    """A dropped file, with its own signature and that of what stands beside it."""

    model: str
    path: Path
    signature: Signature
    beside: tuple[Signature | None, ...] = ()

    @property
    def key(self) -> str:
        """What changes with its content, also over a restart: sizes and modification times."""
        return " ".join(f"{s.size_bytes}@{s.mtime_ns}" if s else "-" for s in (self.signature, *self.beside))


@dataclass(frozen=True)
class Seen:
    """What one look at the directory found. `refused` has paths that can't be used as they are, with the reason.

    `deleted` are versions of which only a tombstone is left.
    """

    versions: dict[tuple[str, int], Signature] = field(default_factory=dict)
    drops: dict[Path, Drop] = field(default_factory=dict)
    refused: dict[Path, str] = field(default_factory=dict)
    deleted: set[tuple[str, int]] = field(default_factory=set)


class CheckpointDirectory:
    """Paths in a checkpoint directory, and looks at it. Holds no state; safe to use from several threads."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def version(self, model: str, version: int) -> Path:
        """The folder of a version."""
        return self.root / model / str(version)

    def reserve(self, model: str, *, above: int = 0) -> int:
        """Make the folder of the model's next version, and return its number. No two callers get the same one.

        It is higher than any version whose folder is there, and than `above`.
        """
        folder = self.root / check_name(model)
        folder.mkdir(parents=True, exist_ok=True)
        version = max(above, *self.versions(model), 0)
        while True:
            version += 1
            try:
                (folder / str(version)).mkdir()
            except FileExistsError:
                continue
            return version

    def versions(self, model: str) -> list[int]:
        """The numbers that are taken, whole or not, ascending."""
        try:
            names = [entry.name for entry in (self.root / model).iterdir()]
        except OSError:
            return []
        return sorted(v for v in map(_version, names) if v is not None)

    def remove(self, model: str, version: int) -> None:
        """Delete a version. Its manifest becomes a tombstone first: then it is gone, and its number isn't given again.

        A dropped file that it was adopted from stays, and isn't adopted anew. Raises `OSError` if it can't be deleted.
        """
        folder = self.version(model, version)
        if folder.is_symlink():  # what it leads to is another version's
            folder.unlink()
            folder.mkdir()
        manifest, tombstone = folder / MANIFEST_NAME, folder / TOMBSTONE_NAME
        if manifest.exists():
            manifest.replace(tombstone)  # at one stroke, and on a disk that is full
            sync_path(folder)
        for path in folder.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            elif path != tombstone:
                path.unlink()
        source, _ = self.tombstone(model, version)
        if version != max(self.versions(model)) and not (source and (folder.parent / source).exists()):
            shutil.rmtree(folder)

    def tombstone(self, model: str, version: int) -> tuple[str, str]:
        """Of a deleted version, the name and key of the dropped file that it was adopted from; empty if of none."""
        with suppress(OSError, ValueError, LookupError, TypeError):
            values = json.loads((self.version(model, version) / TOMBSTONE_NAME).read_text(encoding="utf-8"))
            return Path(str(values["adopted_from"])).name, str(values["adopted_key"])
        return "", ""

    def scan(self) -> Seen:
        """Look at everything that could be served, at names and signatures only. Raises `OSError` if there's no root.

        Names that begin with a dot are passed over. A link that leads out of the directory is refused.
        """
        seen = Seen()
        real_root = os.path.realpath(self.root)
        for folder in _entries(self.root):
            if folder.name.startswith(".") or not folder.is_dir():
                continue
            try:
                entries = _entries(folder)
            except (FileNotFoundError, NotADirectoryError):
                if not self.root.is_dir():
                    raise
                continue  # a model that was removed meanwhile
            for path in entries:
                self._look(seen, path, real_root)
        return seen

    def _look(self, seen: Seen, path: Path, real_root: str) -> None:
        model, version = path.parent.name, _version(path.name)
        if path.name.startswith(".") or (version is None and path.suffix not in SUFFIXES):
            return
        if (reason := _refusal(path, real_root)) is not None:
            seen.refused[path] = reason
            return
        if version is not None:
            signature = Signature.of(path / MANIFEST_NAME)
            if signature is not None:
                seen.versions[model, version] = signature
            elif (path / TOMBSTONE_NAME).exists():
                seen.deleted.add((model, version))
        elif path.is_file() and (signature := Signature.of(path)) is not None:
            beside = tuple(Signature.of(p) for p in sidecar_paths(path))
            seen.drops[path] = Drop(model, path, signature, beside)
        elif not path.exists():
            seen.refused[path] = "it is a link to nothing"
        else:
            seen.refused[path] = "it is not a file"


def _refusal(path: Path, real_root: str) -> str | None:
    """Why what is at `path` isn't even looked at; None if it is."""
    if not Path(os.path.realpath(path)).is_relative_to(real_root):  # `Path.resolve` raises for a link to itself
        return "it is a link that leads out of the checkpoint directory"
    if path.name != path.name.encode("utf-8", "replace").decode():
        return "its name is not UTF-8: rename it"
    try:
        check_name(path.parent.name)
    except BackbonedError as error:
        return error.message
    return None


def _entries(folder: Path) -> list[Path]:
    return sorted(folder.iterdir())


def _version(name: str) -> int | None:
    if not (name.isascii() and name.isdigit()) or name.startswith("0"):
        return None
    return int(name) if len(name) < 20 and int(name) < MAX_VERSION else None
