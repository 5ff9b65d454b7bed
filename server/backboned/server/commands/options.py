"""Options that several commands share."""

from pathlib import Path
from typing import Annotated

import typer

DEFAULT_ADDRESS = "127.0.0.1:8001"  # as in `backboned.client`, which brings gRPC

Server = Annotated[
    str, typer.Option("--server", metavar="ADDRESS", envvar="BACKBONED_SERVER", help="The daemon, as host:port.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, an object a line, with the field names of the API.")]
ConfigFile = Annotated[
    Path | None,
    typer.Option(
        "--config", metavar="FILE", envvar="BACKBONED_CONFIG", help="Configuration file, if not ./backboned.toml."
    ),
]
