"""Where the `backboned` command begins: the only file of the command line that the light client install can run."""

import os
import sys


def main() -> int:
    """Run the command line, and return its exit code.

    Without the packages of the extra `server`, prints one line that names the extra and returns 2. A module of our
    own that is missing is a bug, and raises `ModuleNotFoundError`.
    """
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")  # or gRPC tells of every connection that a server ends
    try:
        from backboned.server.commands import main as run_command_line

        run_command_line()
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] == "backboned":
            raise
        print(  # noqa: T201
            f"backboned: the daemon and its commands need the package {error.name!r}, which is not installed here; "
            "install them with: pip install 'backboned[server]'",
            file=sys.stderr,
        )
        return 2
    return 0
