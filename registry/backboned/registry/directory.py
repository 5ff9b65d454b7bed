"""The checkpoint directory: what lies where, and how versions come and go.

<root>/<model>/<version>/manifest.json, epoch-0001.pt …    versions
<root>/<model>/<anything>.pt|.pth|.safetensors              dropped files
<any of these files>.sig                                    its signature, where files are signed
"""

import errno
import json
import os
import shutil
from collections.abc import Set
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from backboned.registry.atomic import sync_path
from backboned.registry.inside import read_inside
from backboned.registry.look import TOMBSTONE_NAME, Part, Seen, Signature, look, look_again, version_number
from backboned.registry.manifest import MANIFEST_NAME, check_name

_MAX_TOMBSTONE_BYTES = 16 * 2**20


@dataclass(frozen=True)
class Tombstone:
    """Of a deleted version, the name and key of the dropped file that it was adopted from, and its sha256."""

    adopted_from: str = ""
    adopted_key: str = ""
    sha256: str = ""


class CheckpointDirectory:
    """Paths in a checkpoint directory, and looks at it. Holds no state; safe to use from several threads."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def version(self, model: str, version: int) -> Path:
        """The folder of a version."""
        return self.root / model / str(version)

    def reserve(self, model: str, *, above: int = 0) -> int:
        """Make the folder of the model's next version, and return its number. No two callers get the same one.

        It is higher than any version whose folder is there, and than `above`. Raises `OSError` if it can't be made, as
        where the directory itself is gone.
        """
        folder = self.root / check_name(model)
        folder.mkdir(exist_ok=True)
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
            names = os.listdir(self.root / model)  # noqa: PTH208 - thousands of paths take their time
        except OSError:
            return []
        return sorted(v for v in map(version_number, names) if v is not None)

    def remove(self, model: str, version: int) -> None:
        """Delete a version: `bury` and `clear`. Raises `OSError` if it can't be deleted."""
        self.bury(model, version)
        self.clear(model, version)

    def holds(self, model: str, version: int) -> bool:
        """Whether a version is there. Raises `OSError` if that can't be told, as where the directory is gone."""
        if not any(self.root.iterdir()):
            raise FileNotFoundError(errno.ENOENT, "the checkpoint directory is empty", str(self.root))
        return Signature.of(self.version(model, version) / MANIFEST_NAME) is not None

    def bury(self, model: str, version: int) -> None:
        """Make a version's manifest a tombstone, at one stroke: then it is gone, and its number isn't given again.

        Raises `OSError` if that can't be done; then it is there as it was.
        """
        folder = self.version(model, version)
        if folder.is_symlink():  # what it leads to is another version's
            folder.unlink()
            folder.mkdir()
        manifest = folder / MANIFEST_NAME
        if manifest.exists():
            manifest.replace(folder / TOMBSTONE_NAME)  # also on a disk that is full
            sync_path(folder)

    def clear(self, model: str, version: int) -> None:
        """Remove the files of a version that was buried, as often as it takes. Raises `OSError` if some are left.

        Its tombstone stays where its number could be given again, or a dropped file that it was adopted from is still
        there: that isn't adopted anew.
        """
        folder = self.version(model, version)
        tombstone = folder / TOMBSTONE_NAME
        if not folder.is_dir():
            return
        for path in folder.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            elif path != tombstone:
                path.unlink()
        source = self.tombstone(model, version).adopted_from
        if version != max(self.versions(model)) and not (source and (folder.parent / source).exists()):
            shutil.rmtree(folder)

    def tombstone(self, model: str, version: int) -> "Tombstone":
        """What is left of a deleted version; empty if it was adopted from no file, or nothing is left."""
        with suppress(OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
            path = self.version(model, version) / TOMBSTONE_NAME
            values = json.loads(read_inside(path, self.root, most_bytes=_MAX_TOMBSTONE_BYTES))
            digests = [e["sha256"] for e in values.get("epochs", ()) if e["epoch"] == values.get("best_epoch")]
            name, key = Path(str(values["adopted_from"])).name, str(values["adopted_key"])
            return Tombstone(name, key, str(next(iter(digests), "")))
        return Tombstone()

    def scan(self) -> Seen:
        """Look at everything. Raises `OSError` if there's no root."""
        return look(self.root)

    def scan_again(self, before: Seen, parts: Set[Part]) -> Seen:
        """What is there where of what was seen `before` only some parts may have changed. Raises as `scan` does."""
        return look_again(self.root, before, parts)
