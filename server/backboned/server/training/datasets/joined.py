"""Several archives as one source: shards."""

from collections.abc import Mapping

from backboned.server.training.datasets.sources import Listing, Presence, Source, in_order
from backboned.server.training.events import SkippedFile


class Joined:
    """Sources by name; their files are below that. As safe to use from several threads as they are."""

    def __init__(self, sources: Mapping[str, Source]) -> None:
        self._sources = sources

    def listing(self) -> Listing:
        """See `Source.listing`."""
        files: set[str] = set()
        folders = set(self._sources)
        skipped: list[SkippedFile] = []
        for name, source in self._sources.items():
            inner = source.listing()
            files |= {f"{name}/{file}" for file in inner.files}
            folders |= {f"{name}/{folder}" for folder in inner.folders}
            skipped += [SkippedFile(f"{name}/{file.path}", file.reason) for file in inner.skipped]
        return Listing(in_order(files), frozenset(folders), tuple(skipped))

    def find(self, name: str) -> Presence:
        """See `Source.find`."""
        source, inner = self._of(name)
        return source.find(inner) if source else Presence.ABSENT

    def read(self, name: str) -> bytes:
        """See `Source.read`."""
        source, inner = self._of(name)
        if source is None:
            raise FileNotFoundError(2, "No such file or directory", name)
        return source.read(inner)

    def stamp(self, name: str) -> str:
        """See `Source.stamp`."""
        source, inner = self._of(name)
        return source.stamp(inner) if source else ""

    def _of(self, name: str) -> tuple[Source | None, str]:
        first, _, inner = name.partition("/")
        return self._sources.get(first), inner
