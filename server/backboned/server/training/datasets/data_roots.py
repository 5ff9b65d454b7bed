"""Where a dataset is: below the data roots, or where the daemon allows it elsewhere; and nowhere else."""

from collections.abc import Sequence
from pathlib import Path
from urllib.parse import unquote, urlsplit

from backboned.registry.errors import BackbonedError, ErrorKind, invalid, suggestion
from backboned.server.training.datasets import remote as remote_files
from backboned.server.training.datasets.braces import expand

ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
MANIFESTS = (".csv", ".jsonl")
_FIELD = "dataset"


def resolve_dataset(uri: str, roots: Sequence[Path], remote: Sequence[str] = ()) -> str:
    """The real path of the dataset called `uri`: an absolute path, a file:// URI, or relative to a root.

    A folder, an archive, a manifest, or shards with braces in their name. Another URI is answered as it is, if `remote`
    allows it: nothing is looked up elsewhere. Raises `BackbonedError`: `PERMISSION_DENIED` for what isn't below one of
    the `roots` once links are followed, whether it exists or not, or isn't allowed; `NOT_FOUND` with the nearest names;
    `INVALID_ARGUMENT` for what can be no dataset.
    """
    if remote_files.is_remote(uri):
        remote_files.check_allowed(uri, remote)
        expand(uri)
        return uri
    path = _path(uri)
    try:
        return str(_resolve(uri, path, roots))
    except OSError as error:
        raise invalid(f"dataset {uri[:200]!r} can't be read: {error.strerror}", field=_FIELD) from error


def shard_paths(location: str, roots: Sequence[Path]) -> list[Path]:
    """The files that a path with braces in its name means. Raises `BackbonedError` naming the first that is missing."""
    path = Path(location)
    real_roots = [root.resolve() for root in roots]
    found = [path.parent / name for name in expand(path.name)]
    for file in found:
        if not within(file, real_roots):
            raise _denied(f"dataset {location!r} lies outside the data roots: {file.name} is a link that leads out")
        if not file.is_file():
            raise BackbonedError(
                ErrorKind.NOT_FOUND,
                f"dataset {location!r} means {len(found)} files, and there is no {file.name!r}",
                field=_FIELD,
            )
    return found


def is_pattern(location: str) -> bool:
    """Whether a path names several files by braces, and no file of just that name is there."""
    path = Path(location)
    return "{" in path.name and not path.exists()


def _resolve(uri: str, path: Path, roots: Sequence[Path]) -> Path:
    if not roots:
        raise _denied(f"dataset {uri!r} can't be read: this daemon has no data roots; start it with "
                      "backboned serve --data-root DIR")  # fmt: skip
    real_roots = [root.resolve() for root in roots]
    candidates = [path] if path.is_absolute() else [root / path for root in real_roots]
    allowed = [c.resolve() for c in candidates if within(c, real_roots)]
    if not allowed:
        names = ", ".join(map(str, real_roots))
        raise _denied(f"dataset {uri!r} lies outside the data roots ({names}); move it there, or start the daemon "
                      "with --data-root DIR")  # fmt: skip
    place = next((c for c in allowed if c.exists()), None)
    if place is None and (pattern := next((c for c in allowed if "{" in c.name and c.parent.is_dir()), None)):
        shard_paths(str(pattern), roots)
        return pattern
    if place is None:
        siblings = [p.name for c in allowed if c.parent.is_dir() for p in c.parent.iterdir() if _shown(p)]
        where = " or ".join(str(c.parent) for c in allowed)
        raise BackbonedError(
            ErrorKind.NOT_FOUND,
            f"no dataset {allowed[0].name!r} in {where}{suggestion(allowed[0].name, siblings)}",
            field=_FIELD,
        )
    if not place.is_dir() and not place.name.lower().endswith(ARCHIVES + MANIFESTS):
        raise invalid(
            f"dataset {uri!r} is a file: give the folder that has a folder of images a class, an archive of one "
            f"({', '.join(ARCHIVES)}) or a manifest ({', '.join(MANIFESTS)})",
            field=_FIELD,
        )
    return place


def within(path: Path, real_roots: Sequence[Path]) -> bool:
    """Whether `path`, once links are followed, is one of the (resolved) roots or below one."""
    try:
        real = path.resolve()
    except (OSError, RuntimeError):  # a loop of links
        return False
    return any(real.is_relative_to(root) for root in real_roots)


def _path(uri: str) -> Path:
    if not uri or "\0" in uri:
        raise invalid("dataset is empty: give a folder below one of the daemon's data roots", field=_FIELD)
    scheme, separator, _ = uri.partition("://")
    if not separator:
        return Path(uri)
    parts = urlsplit(uri)
    if scheme != "file" or parts.netloc not in ("", "localhost") or not parts.path:
        raise invalid(
            f"dataset {uri!r} can't be read: give a path on the daemon's machine, a URI such as file:///data/photos, "
            f"or one that begins with {', '.join(remote_files.DRIVERS)}",
            field=_FIELD,
        )
    return Path(unquote(parts.path))


def _shown(path: Path) -> bool:
    return not path.name.startswith(".") and (path.is_dir() or path.name.lower().endswith(ARCHIVES + MANIFESTS))


def _denied(message: str) -> BackbonedError:
    return BackbonedError(ErrorKind.PERMISSION_DENIED, message, field=_FIELD)
