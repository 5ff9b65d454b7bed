"""What model-signing hashes, where the SHA-256 of the bytes is known: nothing. Importing it brings the library."""

from collections.abc import Iterable
from pathlib import PurePosixPath

from model_signing.hashing import Config, PathLike
from model_signing.manifest import FileManifestItem, Manifest, SerializationType

from model_signing._hashing.hashing import Digest  # isort: skip - the one thing that isn't public


class KnownDigest(Config):
    """Says of a single file what model-signing would by its defaults, without reading it. Immutable."""

    def __init__(self, name: str, sha256: str) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._named = name
        self._sha256 = sha256

    def hash(self, model_path: PathLike, *, files_to_hash: Iterable[PathLike] | None = None) -> Manifest:
        """A manifest with the one file, which has no name in it but `.`."""
        del model_path, files_to_hash
        item = FileManifestItem(path=PurePosixPath(), digest=Digest("sha256", bytes.fromhex(self._sha256)))
        form = SerializationType.from_args({"method": "files", "hash_type": "sha256", "allow_symlinks": False})
        return Manifest(self._named, [item], form)
