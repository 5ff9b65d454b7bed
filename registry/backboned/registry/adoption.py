"""Dropped files on their way to a version, where several daemons share a directory, and any may be killed."""

import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from backboned.registry.atomic import TEMPORARY_PREFIX, sync_path
from backboned.registry.directory import CheckpointDirectory
from backboned.registry.errors import BackbonedError
from backboned.registry.lock import abandoned, locked
from backboned.registry.look import Drop
from backboned.registry.manifest import MANIFEST_NAME, Manifest
from backboned.registry.signatures import write_signature
from backboned.registry.told import says_the_same

LOCK_NAME = ".lock"
"""In the checkpoint directory: who holds it may add a version of a dropped file."""

MARKER_NAME = ".adopting"
"""In a version's folder while its files are moved there."""


@dataclass(frozen=True)
class Before:
    """What is known of versions that were adopted from a file of the same name.

    `previous` is the newest of them; `deleted` has the sha256 of those that were deleted, of files that looked the
    same. `versions` are all numbers of the model that are known: of others, another daemon may have made one just now.
    """

    previous: Manifest | None = None
    deleted: Collection[str] = ()
    versions: Collection[int] = ()


def taken_by_another(directory: CheckpointDirectory, drop: Drop, manifest: Manifest, known: Collection[int]) -> bool:
    """Whether a version that isn't `known` was adopted from the same file. Call it with the lock held."""
    for version in directory.versions(drop.model):
        if version in known:
            continue
        told = directory.tombstone(drop.model, version)
        if (told.adopted_from, told.adopted_key) == (drop.path.name, drop.key):
            return True
        with suppress(BackbonedError):
            other = Manifest.read(directory.version(drop.model, version))
            if other.adopted_from == drop.path.name and says_the_same(manifest, other):
                return True
    return False


@contextmanager
def adding(directory: CheckpointDirectory) -> Iterator[None]:
    """Be the only one who adds a version of a dropped file. Raises `OSError`."""
    with locked(directory.root / LOCK_NAME):
        yield


def keep(copy: Path, manifest: Manifest, folder: Path, signature: bytes | None = None) -> None:
    """Move a checked file, and its signature, into the folder of its version, all or nothing. Raises `OSError`."""
    marker = folder / MARKER_NAME
    try:
        with locked(marker):
            _put(copy, folder / manifest.best.file)
            if signature is not None:
                write_signature(folder / manifest.best.file, signature)
            sync_path(folder)
            manifest.write(folder)
            marker.unlink()
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _put(copy: Path, target: Path) -> None:
    """Have a file under another name, which isn't taken.

    Not renamed, where links can be made: of a rename out of a folder inotify tells in two halves, and where the other
    folder is too new to be watched, watchdog waits half a second for the second one, with all that comes after it.
    """
    try:
        target.hardlink_to(copy)
    except OSError:
        copy.replace(target)


def remove_abandoned(directory: CheckpointDirectory) -> None:
    """Remove what daemons that were killed have left half done; what others are doing now is left alone."""
    for copy in directory.root.glob(f"*/{TEMPORARY_PREFIX}*"):
        if copy.is_file() and abandoned(copy):
            with suppress(OSError):
                copy.unlink()
    for marker in directory.root.glob(f"*/*/{MARKER_NAME}"):
        if not abandoned(marker):
            continue
        if (marker.parent / MANIFEST_NAME).exists():
            with suppress(OSError):
                marker.unlink()
        else:
            shutil.rmtree(marker.parent, ignore_errors=True)
