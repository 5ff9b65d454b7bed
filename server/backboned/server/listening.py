"""Sockets that listen, and what is said where one can't be had."""

import errno
import hashlib
import os
import re
import socket
import stat
import tempfile
from pathlib import Path

_LONGEST_SOCKET_PATH = 107
"""Bytes: what fits into Linux's `sockaddr_un`, see unix(7)."""

_PLAIN_PATH = re.compile(r"[A-Za-z0-9._+/-]+")


def listen(host: str, port: int, protocol: str) -> socket.socket:
    """A socket that listens on `host` and `port` (0: a free one), for the caller to close.

    Raises `OSError` whose one line names the address, the `protocol`, the reason and what to do.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=128)
    except OSError as error:
        raise _refused(host, port, protocol, error) from error


def reserve(host: str, port: int, protocol: str) -> socket.socket:
    """A socket that keeps a port (0: a free one) for processes of this user that share it; it never listens itself.

    They bind with `SO_REUSEPORT`. Whoever doesn't, and whoever reserves like this, gets `EADDRINUSE`. Raises `OSError`
    as `listen` does.
    """
    listen(host, port, protocol).close()  # what listens there may not mind sharing
    reserved = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    try:
        reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        reserved.bind((host, port))
        # Only now: a socket that binds with SO_REUSEPORT would also share a port that others have already.
        reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 0)
    except OSError as error:
        reserved.close()
        raise _refused(host, port, protocol, error) from error
    return reserved


def private_socket(folder: Path, name: str) -> Path:
    """Where to make a Unix socket called `name` that only this user can connect to, in a folder of its own.

    That is `folder`, or, where the path would be longer than a socket's may be or has characters that mean something
    in an address of gRPC's, one in the folder for temporary files, always the same. A socket that a killed process
    left there is removed. Raises `OSError` for a folder that belongs to someone else.
    """
    path = str(folder / name)
    if len(path) > _LONGEST_SOCKET_PATH or not _PLAIN_PATH.fullmatch(path):
        digest = hashlib.sha256(os.fsencode(folder)).hexdigest()[:16]
        folder = Path(tempfile.gettempdir()) / f"backboned-{os.getuid()}-{digest}"
    folder.mkdir(mode=0o700, exist_ok=True)
    status = folder.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid():
        raise OSError(errno.EPERM, f"{folder} is no folder of this user: remove it")
    folder.chmod(0o700)
    (folder / name).unlink(missing_ok=True)
    return folder / name


def _refused(host: str, port: int, protocol: str, error: OSError) -> OSError:
    reason = os.strerror(error.errno) if error.errno and error.errno > 0 else error.strerror
    message = (
        f"can't listen on {host} port {port} for {protocol} ({reason}): stop whatever listens there, or choose "
        f"another by --host and --{protocol.lower()}-port"
    )
    return OSError(error.errno, message)
