"""Which folders a job may read: those below the data roots, and nothing else."""

from collections.abc import Sequence
from pathlib import Path
from urllib.parse import unquote, urlsplit

from backboned.registry.errors import BackbonedError, ErrorKind, invalid, suggestion

_FIELD = "dataset"


def resolve_dataset(uri: str, roots: Sequence[Path]) -> Path:
    """The real path of the dataset folder called `uri`: an absolute path, a file:// URI, or relative to a root.

    Raises `BackbonedError`: `PERMISSION_DENIED` for what isn't below one of the `roots` once links are followed,
    whether it exists or not; `NOT_FOUND` with the nearest names; `INVALID_ARGUMENT` for what is no folder.
    """
    path = _path(uri)
    try:
        return _resolve(uri, path, roots)
    except OSError as error:
        raise invalid(f"dataset {uri[:200]!r} can't be read: {error.strerror}", field=_FIELD) from error


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
    folder = next((c for c in allowed if c.exists()), None)
    if folder is None:
        siblings = [d.name for c in allowed if c.parent.is_dir() for d in c.parent.iterdir() if _shown(d)]
        where = " or ".join(str(c.parent) for c in allowed)
        raise BackbonedError(
            ErrorKind.NOT_FOUND,
            f"no dataset {allowed[0].name!r} in {where}{suggestion(allowed[0].name, siblings)}",
            field=_FIELD,
        )
    if not folder.is_dir():
        raise invalid(f"dataset {uri!r} is a file: give the folder that has a folder of images a class", field=_FIELD)
    return folder


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
            f"dataset {uri!r} can't be read: give a path on the daemon's machine, or a URI such as file:///data/photos",
            field=_FIELD,
        )
    return Path(unquote(parts.path))


def _shown(path: Path) -> bool:
    return path.is_dir() and not path.name.startswith(".")


def _denied(message: str) -> BackbonedError:
    return BackbonedError(ErrorKind.PERMISSION_DENIED, message, field=_FIELD)
