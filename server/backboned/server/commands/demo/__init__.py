"""`backboned demo`: transfer learning seen at work, on handwritten digits, offline and in about a minute."""

import contextlib
import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from backboned.server.commands.local_daemon import ended_by_signals
from backboned.server.commands.output import console, duration, print_json

app = typer.Typer(rich_markup_mode=None, add_completion=False)


@app.command()
def demo(
    output: Annotated[
        Path, typer.Option("--output", metavar="DIR", help="Folder for what it makes; an earlier demo's is replaced.")
    ] = Path("demo-output"),
    json: Annotated[bool, typer.Option("--json", help="Print the result as JSON, and the story on stderr.")] = False,
) -> None:
    """Pretrain a small network on the digits 0-4, fine-tune it over gRPC for 5-9, and compare with starting afresh.

    It starts a daemon of its own on free ports and stops it at the end. Needs no network and no GPU.
    """
    begin = time.perf_counter()
    from backboned.server.commands.demo.story import tell  # brings torch

    with ended_by_signals(), contextlib.redirect_stdout(sys.stderr) if json else contextlib.nullcontext():
        result = tell(output)
        console().print(f"\ndone in {duration(time.perf_counter() - begin)}", style="bold green")
    if json:
        print_json(result)
