"""Which URIs elsewhere a job may read, and the file systems behind them.

Off unless the daemon is told: an address that a caller gives is fetched by the daemon, which may reach what the caller
can't (server-side request forgery).
"""

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any
from urllib.parse import SplitResult, unquote, urljoin, urlsplit

from backboned.registry.errors import BackbonedError, ErrorKind, invalid

DRIVERS = {"s3": "s3fs", "gs": "gcsfs", "http": "aiohttp", "https": "aiohttp"}
"""Schemes, and the package that each needs beside fsspec."""

_FIELD = "dataset"
_CONNECT_SECONDS = 30
_SILENCE_SECONDS = 120


def is_remote(uri: str) -> bool:
    """Whether this is a URI that is read by fsspec."""
    scheme, separator, _ = uri.partition("://")
    return bool(separator) and scheme.lower() in DRIVERS


def shown(uri: str) -> str:
    """The URI as it may be told and kept: without a query, which can hold a signature."""
    return uri.partition("?")[0] if is_remote(uri) else uri


def permits(allowed: Sequence[str], uri: str) -> bool:
    """Whether one of `allowed`, schemes or beginnings of URIs up to a `/`, takes in `uri`."""
    parts = _split(uri)
    for entry in allowed:
        if "://" not in entry:
            if parts.scheme == entry:
                return True
            continue
        limit = urlsplit(entry)
        folder = limit.path.rstrip("/") + "/"
        if (limit.scheme, limit.netloc.lower()) == (parts.scheme, parts.netloc.lower()) and (
            parts.path.startswith(folder) or parts.path == limit.path
        ):
            return True
    return False


def check_allowed(uri: str, allowed: Sequence[str]) -> None:
    """Raise `BackbonedError` unless `uri` may be read, and can be.

    `PERMISSION_DENIED` names the flag; `FAILED_PRECONDITION` the extra that is missing; `INVALID_ARGUMENT` is for one
    with a password in it, or with `..`.
    """
    parts = _split(uri)
    if "@" in parts.netloc:
        raise invalid(
            f"dataset {shown(uri).replace(parts.netloc, '…')!r} has a user or a password in it: give these to the "
            "daemon, by the environment that its driver reads",
            field=_FIELD,
        )
    if not permits(allowed, uri):
        raise BackbonedError(
            ErrorKind.PERMISSION_DENIED,
            f"dataset {shown(uri)!r} can't be read: this daemon may fetch "
            f"{'from ' + ', '.join(allowed) + ' only' if allowed else 'nothing'}; start it with "
            f"--remote-data {parts.scheme}, or copy the images below a data root",
            field=_FIELD,
        )
    driver = DRIVERS[parts.scheme]
    if find_spec(driver) is None or find_spec("fsspec") is None:
        raise BackbonedError(
            ErrorKind.FAILED_PRECONDITION,
            f"dataset {shown(uri)!r} needs the package {driver}, which isn't installed where the daemon runs: "
            "pip install 'backboned[server,remote]'",
            field=_FIELD,
        )


def file_system(uri: str, allowed: Sequence[str]) -> Any:
    """The fsspec file system of a URI that was checked. Redirects are followed to where `allowed` permits.

    Credentials come from the environment, as the driver reads it. Chained URIs of fsspec are not understood.
    """
    import fsspec

    scheme = _split(uri).scheme
    options = _http_options(allowed) if scheme in ("http", "https") else {}
    return fsspec.filesystem(scheme, skip_instance_cache=True, use_listings_cache=False, **options)


def _http_options(allowed: Sequence[str]) -> dict[str, Any]:
    from aiohttp import ClientTimeout, TraceConfig

    async def check_redirect(_session: Any, _context: Any, redirect: Any) -> None:
        target = urljoin(str(redirect.url), redirect.response.headers.get("Location", ""))
        if not permits(allowed, target):
            raise PermissionError(f"it redirects to {shown(target)}, from where this daemon may fetch nothing")

    trace = TraceConfig()
    trace.on_request_redirect.append(check_redirect)
    timeout = ClientTimeout(total=None, sock_connect=_CONNECT_SECONDS, sock_read=_SILENCE_SECONDS)
    return {"client_kwargs": {"trace_configs": [trace], "timeout": timeout}}


def _split(uri: str) -> SplitResult:
    try:
        parts = urlsplit(uri)
        _ = parts.port
    except ValueError as error:
        raise invalid(f"dataset {shown(uri)[:200]!r} is no URI: {error}", field=_FIELD) from error
    if not parts.netloc or ".." in unquote(parts.path).split("/"):
        raise invalid(
            f"dataset {shown(uri)[:200]!r} is no URI that can be read: expected a host or a bucket, and no '..'",
            field=_FIELD,
        )
    return parts
