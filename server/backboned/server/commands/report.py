"""`backboned report`: how good a version is, as a page."""

from pathlib import Path
from typing import Annotated

import typer

from backboned.server.commands.options import DEFAULT_ADDRESS, Json, Server
from backboned.server.commands.output import console, print_json

app = typer.Typer(rich_markup_mode=None, add_completion=False)


@app.command()
def report(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="The model's name.")],
    *,
    version: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="This version, not the newest that has a report.")
    ] = None,
    alias: Annotated[str | None, typer.Option(metavar="NAME", help="The version that this alias points to.")] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", metavar="FILE", help="Where to write it, not MODEL-VERSION.html.")
    ] = None,
    server: Server = DEFAULT_ADDRESS,
    json: Json = False,
) -> None:
    """Write the report of a version: one HTML page with its figures, plots and worst mistakes, to open in a browser.

    With --json the line that tells where it is is JSON.
    """
    if version is not None and alias is not None:
        raise typer.BadParameter("give a version or an alias, not both", param_hint="--alias")
    from backboned.client import Client  # gRPC takes its time, which `--help` needn't wait for

    with Client(server) as client:
        found = client.get_report(model, version=version, alias=alias)
    file = out or Path(f"{found.model}-{found.version}.html")
    file.write_text(found.html, encoding="utf-8")
    if json:
        print_json({"model": found.model, "version": str(found.version), "file": str(file)})
    else:
        console().print(f"{file}: how good {found.model} version {found.version} is", soft_wrap=True)
