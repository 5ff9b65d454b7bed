"""From where a dataset is to its files: which kind of folder, archive or address it is, and what was found in it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from backboned.registry.errors import BackbonedError, ErrorKind
from backboned.registry.task import Task
from backboned.server.training.datasets.braces import expand
from backboned.server.training.datasets.class_folders import scan_folders
from backboned.server.training.datasets.compressed import plain_tar
from backboned.server.training.datasets.data_roots import ARCHIVES, MANIFESTS, is_pattern, shard_paths, within
from backboned.server.training.datasets.fetching import Fetcher, RemoteFiles
from backboned.server.training.datasets.joined import Joined
from backboned.server.training.datasets.local_folder import LocalFolder
from backboned.server.training.datasets.manifest import NAMES, read_manifest
from backboned.server.training.datasets.remote import check_allowed, file_system, is_remote, shown
from backboned.server.training.datasets.samples import Found, unusable
from backboned.server.training.datasets.shards import CLASSES, class_names, holds_samples, read_shards
from backboned.server.training.datasets.sources import Listing, Presence, Source
from backboned.server.training.datasets.store import Store
from backboned.server.training.datasets.tar_archive import TarArchive
from backboned.server.training.datasets.zip_archive import ZipArchive


@dataclass(frozen=True)
class Access:
    """What a job may read, and where it keeps what it fetched or unpacked.

    `remote` are schemes and beginnings of URIs. `check` is called often; what it raises ends the work.
    """

    roots: Sequence[Path]
    remote: Sequence[str] = ()
    store: Store | None = None
    check: Callable[[], None] = field(default=lambda: None)


@dataclass(frozen=True)
class _Opened:
    """Files, the manifest among them if one was named, whether they are shards, and the names of classes by number."""

    source: Source
    manifest: str | None = None
    shards: bool = False
    classes: bytes = b""


def find_samples(location: str, task: Task, access: Access) -> tuple[Source, Found]:
    """The files of the dataset at `location`, a real path or a URI, and the images among them with their labels.

    Raises `BackbonedError` saying what to do, and `OSError`.
    """
    opened = _open_remote(location, access) if is_remote(location) else _open_local(location, access)
    where, source = shown(location), opened.source
    if opened.manifest is not None:
        return source, read_manifest(where, source, opened.manifest, task)
    if not isinstance(source, RemoteFiles) and (found := _by_manifest(where, source, task, None)):
        return source, found
    listing = source.listing()
    if opened.shards or (isinstance(source, TarArchive) and holds_samples(listing)):
        content = opened.classes
        if not content and CLASSES in listing.files:
            content = source.read(CLASSES)
        names = class_names(where, content)
        return source, read_shards(where, source, listing, task, names, access.check)
    if found := _by_manifest(where, source, task, listing):
        return source, found
    if task is Task.MULTI_LABEL:
        raise unusable(where, f"a multi-label task needs a file {NAMES[0]} or {NAMES[1]} in it, with columns 'file' "
                              "and 'labels' (separated by '|')")  # fmt: skip
    return source, scan_folders(where, listing)


def _by_manifest(where: str, source: Source, task: Task, listing: Listing | None) -> Found | None:
    """What the manifest at the top tells, if there is one. `listing` is given where looking for a file is slow."""
    there = [n for n in NAMES if (n in listing.files if listing else source.find(n) is Presence.THERE)]
    if not there:
        return None
    if len(there) > 1:
        raise unusable(where, f"it has both {there[0]} and {there[1]}: keep one, or name the one as the dataset")
    found = read_manifest(where, source, there[0], task)
    if task is Task.MULTI_LABEL:
        return found
    folders = [n for n in (listing or source.listing()).within("") if n not in ("train", "val", "test")]
    if len(folders) < 2 or set(folders) == set(found.classes):
        return found
    warning = f"labels are those in {there[0]}; the {len(folders)} folders beside it, such as {folders[0]!r}, give none"
    return Found(**{**vars(found), "warnings": (*found.warnings, warning)})


def _open_local(location: str, access: Access) -> _Opened:
    path = Path(location)
    if is_pattern(location):
        return _shards(location, {p.name: p for p in shard_paths(location, access.roots)}, path.parent, access)
    name = path.name.lower()
    if name.endswith(MANIFESTS):
        return _Opened(LocalFolder(path.parent, access.roots), manifest=path.name)
    if not path.is_dir():
        return _Opened(_archive(path, path.name, location, access), classes=_classes_in(path.parent, access))
    real_roots = [r.resolve() for r in access.roots]
    files = [p for p in sorted(path.iterdir()) if not p.name.startswith(".")]
    shards = [p for p in files if _is_tar(p.name) and p.is_file() and within(p, real_roots)]
    if shards and all(p.name == CLASSES or p in shards or p.suffix in (".md", ".json") for p in files):
        return _shards(location, {p.name: p for p in shards}, path, access)
    return _Opened(LocalFolder(path, access.roots))


def _open_remote(uri: str, access: Access) -> _Opened:
    check_allowed(uri, access.remote)
    fetcher = Fetcher(file_system(uri, access.remote), _store(uri, access), access.check)
    parts = urlsplit(uri)
    folder, _, name = parts.path.rstrip("/").rpartition("/")
    base = f"{parts.scheme}://{parts.netloc}{folder}"
    if name.lower().endswith(MANIFESTS):
        return _Opened(RemoteFiles(fetcher, base), manifest=name)
    if name.lower().endswith(ARCHIVES):
        uris = expand(uri)
        files = {urlsplit(u).path.rpartition("/")[2]: fetcher.fetch(fetcher.path_of(u)) for u in uris}
        classes = _remote_classes(RemoteFiles(fetcher, base))
        if len(files) > 1:
            return _Opened(_joined(uri, files, access), shards=True, classes=classes)
        ((file_name, file),) = files.items()
        return _Opened(_archive(file, file_name, shown(uri), access), classes=classes)
    if parts.scheme in ("http", "https"):
        raise unusable(shown(uri), f"files can't be listed over {parts.scheme}: give an archive "
                                   f"({', '.join(ARCHIVES)}) or a manifest ({', '.join(MANIFESTS)})")  # fmt: skip
    source = RemoteFiles(fetcher, uri.rstrip("/"))
    names = source.listing().files
    if not names:
        raise BackbonedError(ErrorKind.NOT_FOUND, f"there is nothing at {shown(uri)!r}", field="dataset")
    shards = [n for n in names if _is_tar(n) and "/" not in n]
    if shards and len(shards) >= len([n for n in names if n != CLASSES]):
        files = {n: source.fetch(n, most_bytes=None) for n in shards}
        content = source.read(CLASSES) if CLASSES in names else b""
        return _Opened(_joined(uri, files, access), shards=True, classes=content)
    return _Opened(source)


def _shards(location: str, files: dict[str, Path], folder: Path, access: Access) -> _Opened:
    return _Opened(_joined(location, files, access), shards=True, classes=_classes_in(folder, access))


def _joined(location: str, files: dict[str, Path], access: Access) -> Joined:
    return Joined({name: _archive(file, name, shown(location), access, shard=True) for name, file in files.items()})


def _archive(file: Path, name: str, where: str, access: Access, *, shard: bool = False) -> Source:
    """`name` tells its kind: in the store files are called otherwise."""
    if name.lower().endswith(".zip"):
        return ZipArchive(file, where, name=name)
    if not _is_tar(name):
        raise unusable(where, f"{name} is no archive: its name must end in {', '.join(ARCHIVES)}")
    plain = plain_tar(file, where, access.store, access.check)
    return TarArchive(plain, where, access.check, name=name, descend=not shard)


def _classes_in(folder: Path, access: Access) -> bytes:
    """The names of classes by number that lie beside shards."""
    source = LocalFolder(folder, access.roots)
    return source.read(CLASSES) if source.find(CLASSES) is Presence.THERE else b""


def _remote_classes(source: RemoteFiles) -> bytes:
    try:
        return source.read(CLASSES)
    except BackbonedError:
        return b""


def _is_tar(name: str) -> bool:
    return name.lower().endswith(tuple(a for a in ARCHIVES if a != ".zip"))


def _store(uri: str, access: Access) -> Store:
    if access.store is None:
        raise ValueError(f"there is nowhere to keep what is fetched from {shown(uri)}")
    return access.store
