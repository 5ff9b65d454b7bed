"""Files elsewhere: brought here once, by fsspec, and read from the store."""

from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any
from urllib.parse import quote

from backboned.registry.errors import BackbonedError, ErrorKind
from backboned.server.training.datasets.archive_names import ArchiveNames
from backboned.server.training.datasets.remote import shown
from backboned.server.training.datasets.sources import MAX_FILE_BYTES, Listing, Presence, check_size
from backboned.server.training.datasets.store import Store

_AT_ONCE = 16
_MARKS = ("ETag", "etag", "md5Hash", "Content-MD5", "Last-Modified", "LastModified", "updated", "mtime", "created")
"""What file systems call that which changes with a file."""


class Fetcher:
    """Brings files of one file system here. Safe to use from several threads.

    A file is fetched again only if its mark or its size has changed, or if it has no mark.
    """

    def __init__(self, file_system: Any, store: Store, check: Callable[[], None]) -> None:
        """`check` is called while a file comes, in any thread; what it raises ends that."""
        self._file_system = file_system
        self._store = store
        self._check = check

    def path_of(self, uri: str) -> str:
        """What the file system calls a URI."""
        return str(self._file_system._strip_protocol(uri))

    def info(self, path: str) -> Mapping[str, Any]:
        """What the file system tells of a file; nothing, if it can't."""
        try:
            return dict(self._file_system.info(path))
        except Exception:  # whoever fetches it gets the reason
            return {}

    def find(self, path: str) -> Mapping[str, Mapping[str, Any]]:
        """All files below a folder, by path. Raises `BackbonedError` if it can't be listed."""
        try:
            return dict(self._file_system.find(path, detail=True))
        except Exception as error:  # each file system has errors of its own
            raise _failed(path, error) from error

    def fetch(self, path: str, info: Mapping[str, Any] | None = None, *, most_bytes: int | None = None) -> Path:
        """The file, here. Raises `BackbonedError`: `NOT_FOUND`, or what kept it from coming."""
        info = self.info(path) if info is None else info
        size = info.get("size")
        mark = next((str(info[name]) for name in _MARKS if info.get(name)), "")
        key = f"{self._file_system.protocol}\0{path}\0{size}\0{mark}"
        if mark and (known := self._store.get(key, size)):
            return known
        room = self._store.room_bytes() if most_bytes is None else min(most_bytes, self._store.room_bytes())
        if size is not None and size > room:
            raise _too_large(path, size)

        def write(target: Path) -> None:
            watched = _watched(path, self._check, room)
            try:
                self._file_system.get_file(path, str(target), callback=watched)
            except Exception as error:
                raise watched.stopped or _failed(path, error) from error
            if size is not None and (came := target.stat().st_size) != size:
                raise _failed(path, EOFError(f"{came} of {size} bytes came"))

        return self._store.add(key, write)


class RemoteFiles:
    """The files below an address. Safe to use from several threads."""

    def __init__(self, fetcher: Fetcher, base: str) -> None:
        """`base` is a URI of a folder, without a `/` at its end."""
        self._fetcher = fetcher
        self._http = base.startswith("http")
        self._base = fetcher.path_of(base)
        self._infos: Mapping[str, tuple[str, Mapping[str, Any]]] = {}

    def listing(self) -> Listing:
        """See `Source.listing`. HTTP can't list a folder."""
        names: ArchiveNames[tuple[str, Mapping[str, Any]]] = ArchiveNames()
        for path, info in self._fetcher.find(self._base).items():
            name = path.removeprefix(self._base).lstrip("/")
            if name and info.get("type") != "directory":
                names.add(name, (path, info))
        self._infos, listing = names.finish(descend=False)
        return listing

    def find(self, name: str) -> Presence:
        """See `Source.find`: whether a file is there shows only when it is fetched, unless all were listed."""
        return Presence.ABSENT if self._infos and name not in self._infos else Presence.THERE

    def read(self, name: str) -> bytes:
        """See `Source.read`."""
        file = self.fetch(name)
        check_size(name, file.stat().st_size)
        return file.read_bytes()

    def fetch(self, name: str, *, most_bytes: int | None = MAX_FILE_BYTES) -> Path:
        """One file, here. Raises `BackbonedError`."""
        own = f"{self._base}/{quote(name) if self._http else name}"
        path, info = self._infos.get(name, (own, None))
        return self._fetcher.fetch(path, info, most_bytes=most_bytes)

    def fetch_all(self, names: Iterable[str], check: Callable[[], None]) -> None:
        """Bring many files here, several at once. What can't be had is left: reading it tells why.

        Raises `BackbonedError` `RESOURCE_EXHAUSTED` if there is no room for all.
        """
        with ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="fetch") as pool:
            try:
                for future in as_completed([pool.submit(self.fetch, name) for name in names]):
                    check()
                    error = future.exception()
                    if isinstance(error, BackbonedError) and error.kind is not ErrorKind.RESOURCE_EXHAUSTED:
                        continue
                    if error is not None:
                        raise error
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise

    def stamp(self, name: str) -> str:
        """The digest-like mark of the file, if there is one, and its size."""
        _, info = self._infos.get(name, ("", {}))
        return "\0".join(str(info.get(key, "")) for key in ("size", *_MARKS))


def _watched(path: str, check: Callable[[], None], room: int) -> Any:
    """A callback of fsspec that ends a transfer that is told to end, or that grows beyond `room`."""
    import fsspec

    class Watched(fsspec.callbacks.Callback):  # type: ignore[misc]  # fsspec has no types
        stopped: Exception | None = None

        def relative_update(self, inc: int = 1) -> None:
            self.value += inc
            try:
                check()
                if self.value > room:
                    raise _too_large(path, self.value)
            except Exception as error:
                self.stopped = error
                raise

    return Watched()


def _failed(path: str, error: Exception) -> BackbonedError:
    kind = ErrorKind.NOT_FOUND if isinstance(error, FileNotFoundError) else ErrorKind.FAILED_PRECONDITION
    reason = "there is no such file" if kind is ErrorKind.NOT_FOUND else f"{type(error).__name__}: {error}"
    return BackbonedError(kind, f"{shown(path)!r} can't be fetched: {reason}", field="dataset")


def _too_large(path: str, size: int) -> BackbonedError:
    return BackbonedError(
        ErrorKind.RESOURCE_EXHAUSTED,
        f"{shown(path)!r} has {size / 1e9:.1f} GB or more, which is more than is fetched: half of the free disk in the "
        "state folder, and 1 GB an image",
        field="dataset",
    )
