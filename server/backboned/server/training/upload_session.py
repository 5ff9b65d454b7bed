"""One upload, from its declaration to its dataset: what a call's messages do, in their order."""

from collections.abc import Sequence
from dataclasses import dataclass

from backboned.registry.errors import invalid
from backboned.server.training.upload_declaration import Declaration, Entry
from backboned.server.training.upload_images import Writer
from backboned.server.training.uploads import MissingImages, UploadedDataset, UploadStore


@dataclass(frozen=True)
class Incomplete:
    """What an upload came to that isn't whole: the digests of what is missing, and the bytes that came of some."""

    dataset_id: str
    name: str
    images: int
    size_bytes: int
    missing: Sequence[str]
    received: dict[str, int]


class UploadSession:
    """Takes the messages of one call. For one thread at a time; `close` may be called from another."""

    def __init__(self, store: UploadStore) -> None:
        self._store = store
        self._declaration = Declaration()
        self._writer = Writer()
        self._begun = False

    def declare(self, name: str, entries: Sequence[Entry]) -> None:
        """Take a declaration, or a further part of it. Raises `BackbonedError` `INVALID_ARGUMENT`."""
        if self._begun:
            raise invalid("a declaration came after the first piece of an image", field="declaration")
        self._declaration.append(name, entries)

    def write(self, sha256: str, offset: int, data: bytes) -> None:
        """Take a piece of an image. Raises `BackbonedError` `INVALID_ARGUMENT` or `RESOURCE_EXHAUSTED`."""
        self._begin()
        entry = self._declaration.image(sha256)
        if entry is None:
            raise invalid(f"a piece came of an image that wasn't declared: {sha256[:80]!r}", field="chunk.sha256")
        self._store.images.write(self._writer, entry, offset, data)

    def finish(self) -> UploadedDataset | Incomplete:
        """The dataset, if all its images are here. Raises `BackbonedError`."""
        self._begin()
        try:
            return self._store.make(self._declaration)
        except MissingImages as missing:
            return self._incomplete(missing.sha256)

    def close(self) -> None:
        """The call has ended, however it did."""
        self._store.images.release(self._writer)

    def _begin(self) -> None:
        """After the declaration: whether it can be, and whether there is room for what is missing."""
        if self._begun:
            return
        self._declaration.check_whole()
        self._store.make_room(self._declaration)
        self._begun = True

    def _incomplete(self, missing: Sequence[str]) -> Incomplete:
        declaration, images = self._declaration, self._store.images
        received = {sha256: count for sha256 in missing if (count := images.received(sha256))}
        return Incomplete(
            declaration.dataset_id,
            declaration.name,
            len(declaration.entries),
            declaration.size_bytes,
            missing,
            received,
        )
