"""A look at the checkpoint directory: names and signatures of what could be served, and no content."""

import errno
import os
from collections.abc import Set
from dataclasses import dataclass, field
from pathlib import Path

from backboned.registry.errors import BackbonedError
from backboned.registry.inside import leads_out
from backboned.registry.manifest import MANIFEST_NAME, check_name, is_name
from backboned.registry.payload import SUFFIXES
from backboned.registry.sidecar import sidecar_paths
from backboned.registry.signatures import signature_path

MAX_VERSION = 2**62
TOMBSTONE_NAME = "deleted.json"
"""What is left of a deleted version whose number, or dropped file, must not be taken for a new one."""

Part = tuple[str, int | None]
"""A part of the directory: a version of a model, or, with None, all of the model."""

_ABSENT = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG)


@dataclass(frozen=True)
class Signature:
    """What changes when a file does: size in bytes, modification time in nanoseconds, inode and change time."""

    size_bytes: int
    mtime_ns: int
    inode: int
    ctime_ns: int

    @classmethod
    def of(cls, path: str | Path) -> "Signature | None":
        """The signature of the file at `path`; None if there is none. Raises `OSError` if that can't be told."""
        try:
            stat = os.stat(path)  # noqa: PTH116 - a thousand paths that are made only for this take their time
        except OSError as error:
            if error.errno in _ABSENT:
                return None
            raise
        return cls(stat.st_size, stat.st_mtime_ns, stat.st_ino, stat.st_ctime_ns)


@dataclass(frozen=True)
class Drop:
    """A dropped file: what changes when it does, when what stands beside it does, and when someone signs it."""

    model: str
    path: Path
    signature: Signature
    beside: tuple[Signature | None, ...] = ()
    signed: Signature | None = None

    @property
    def key(self) -> str:
        """What changes with its content, also over a restart: sizes, and times of modification and change."""
        signed = () if self.signed is None else (self.signed,)
        return " ".join(
            f"{s.size_bytes}@{s.mtime_ns}@{s.ctime_ns}" if s else "-" for s in (self.signature, *self.beside, *signed)
        )


def look_alike(key: str, other: str) -> bool:
    """Whether two keys of files differ at most in times of change: another owner, or a copy, changes these too."""
    return [part.split("@")[:2] for part in key.split()] == [part.split("@")[:2] for part in other.split()]


@dataclass(frozen=True)
class Seen:
    """What one look at the directory found. `refused` has paths that can't be used as they are, with the reason.

    `deleted` are versions of which only a tombstone is left. `unreadable` has the models whose folder can't be looked
    into, or not wholly, with the reason: of what isn't seen of these nothing is known. `linked` are those in which
    something is a link, so that it changes where that leads. `parts` is all that was looked at; None: everything.
    """

    versions: dict[tuple[str, int], Signature] = field(default_factory=dict)
    drops: dict[Path, Drop] = field(default_factory=dict)
    refused: dict[Path, str] = field(default_factory=dict)
    deleted: set[tuple[str, int]] = field(default_factory=set)
    unseen: set[Path] = field(default_factory=set)
    unreadable: dict[str, str] = field(default_factory=dict)
    linked: set[str] = field(default_factory=set)
    parts: Set[Part] | None = None

    @property
    def models(self) -> Set[str] | None:
        """The models that were looked at, or some of whose versions were; None: all."""
        return None if self.parts is None else {model for model, _ in self.parts}

    @property
    def nothing(self) -> bool:
        """Whether there is nothing at all."""
        return not (self.versions or self.drops or self.refused or self.deleted or self.unreadable)


def look(root: Path, models: Set[str] | None = None) -> Seen:
    """Look at what could be served, of all models or of some.

    Names that begin with a dot are passed over. A link that leads out of the directory is refused. Raises `OSError`
    if there's no root.
    """
    seen = Seen()
    real_root = os.path.realpath(root)
    for folder in _entries(root, models):
        if folder.name.startswith("."):
            continue
        if folder.is_symlink():
            seen.linked.add(folder.name)
        if not _is_folder(folder):
            continue
        try:
            for entry in _entries(folder.path):
                version = version_number(entry.name)
                if entry.name.startswith(".") or not (version or entry.name.endswith(SUFFIXES)):
                    continue
                linked = folder.is_symlink() or entry.is_symlink()
                if linked:
                    seen.linked.add(folder.name)
                try:
                    if not _seen_at_once(seen, folder.name, version, entry.path, linked=linked):
                        _look_at(seen, Path(entry.path), real_root, linked=linked)
                except PermissionError as error:  # one that we may not look at hides no other
                    seen.refused[Path(entry.path)] = _unseen(error)
                    seen.unseen.add(Path(entry.path))
        except (FileNotFoundError, NotADirectoryError):
            if not root.is_dir():
                raise
            continue  # a model that was removed meanwhile
        except OSError as error:  # one model that can't be looked at hides no other
            seen.unreadable[folder.name] = str(error)
            seen.refused[Path(folder.path)] = _unseen(error)
    return seen


def look_again(root: Path, before: Seen, parts: Set[Part]) -> Seen:
    """What is there where of what was seen `before` only some parts may have changed. Raises as `look` does."""
    models = {model for model, version in parts if version is None}
    seen = look(root, models)
    paths = set[Path]()
    for model, version in parts:
        path = root / model / str(version)
        if version is None or model in models:
            continue
        try:
            link = path.is_symlink()
            _look_at(seen, path, "", linked=False)
        except OSError:
            link = True
        if link:  # a look at all of the model tells where it leads, or what is wrong
            return look_again(root, before, parts | {(model, None)})
        paths.add(path)

    def same(path: Path) -> bool:
        return path not in paths and model_of(root, path) not in models

    versions = before.versions.copy()  # a model may have thousands: what hasn't changed isn't gone through
    if models:
        versions = {key: found for key, found in versions.items() if key[0] not in models}
    for model, version in parts:
        if version is not None:
            versions.pop((model, version), None)
    return Seen(
        versions | seen.versions,
        {path: drop for path, drop in before.drops.items() if drop.model not in models} | seen.drops,
        {path: why for path, why in before.refused.items() if same(path)} | seen.refused,
        {key for key in before.deleted if key not in parts and key[0] not in models} | seen.deleted,
        {path for path in before.unseen if same(path)} | seen.unseen,
        {model: why for model, why in before.unreadable.items() if model not in models} | seen.unreadable,
        (before.linked - models) | seen.linked,
        parts,
    )


def model_of(root: Path, path: Path) -> str:
    """The model whose folder something in the directory is, or is in."""
    return path.name if path.parent == root else path.parent.name


def version_number(name: str) -> int | None:
    """The version whose folder has this name."""
    if not (name.isascii() and name.isdigit()) or name.startswith("0"):
        return None
    return int(name) if len(name) < 20 and int(name) < MAX_VERSION else None


def _look_at(seen: Seen, path: Path, real_root: str, *, linked: bool) -> None:
    """Look at one version, or one dropped file; `linked`: it is a link, or lies behind one."""
    model, version = path.parent.name, version_number(path.name)
    if (reason := _refusal(path, real_root if linked else None)) is not None:
        seen.refused[path] = reason
        return
    if version is not None:
        signature = Signature.of(path / MANIFEST_NAME)
        if signature is not None:
            seen.versions[model, version] = signature
        elif (path / TOMBSTONE_NAME).exists():
            seen.deleted.add((model, version))
        elif (path / MANIFEST_NAME).is_symlink():
            seen.refused[path] = f"its {MANIFEST_NAME} is a link to nothing"
    elif path.is_file() and (signature := Signature.of(path)) is not None:
        beside = tuple(Signature.of(p) for p in sidecar_paths(path))
        seen.drops[path] = Drop(model, path, signature, beside, Signature.of(signature_path(path)))
    elif not path.exists():
        seen.refused[path] = "it is a link to nothing"
    else:
        seen.refused[path] = "it is not a file"


def _seen_at_once(seen: Seen, model: str, version: int | None, folder: str, *, linked: bool) -> bool:
    """Take in a version as nearly all are, which is worth no more than one question to the file system."""
    if version is None or linked or not is_name(model):
        return False
    signature = Signature.of(f"{folder}/{MANIFEST_NAME}")
    if signature is not None:
        seen.versions[model, version] = signature
    return signature is not None


def _refusal(path: Path, real_root: str | None) -> str | None:
    """Why what is at `path` isn't even looked at; None if it is. Without a root it can't lead out of it."""
    if real_root is not None and leads_out(path, real_root):
        return "it is a link that leads out of the checkpoint directory"
    if path.name != path.name.encode("utf-8", "replace").decode():
        return "its name is not UTF-8: rename it"
    try:
        check_name(path.parent.name)
    except BackbonedError as error:
        return error.message
    return None


def _unseen(error: OSError) -> str:
    return f"it can't be looked at: {error.strerror}"


def _entries(folder: str | Path, names: Set[str] | None = None) -> list["os.DirEntry[str]"]:
    with os.scandir(folder) as entries:
        return sorted((e for e in entries if names is None or e.name in names), key=lambda entry: entry.name)


def _is_folder(entry: "os.DirEntry[str]") -> bool:
    return entry.is_dir() if not entry.is_symlink() else Path(entry.path).is_dir()  # which minds no link to itself
