"""Sockets that listen, and what is said where one can't be had."""

import os
import socket


def listen(host: str, port: int, protocol: str) -> socket.socket:
    """A socket that listens on `host` and `port` (0: a free one), for the caller to close.

    Raises `OSError` whose one line names the address, the `protocol`, the reason and what to do.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=128)
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno and error.errno > 0 else error.strerror
        message = (
            f"can't listen on {host} port {port} for {protocol} ({reason}): stop whatever listens there, or choose "
            f"another by --host and --{protocol.lower()}-port"
        )
        raise OSError(error.errno, message) from error
