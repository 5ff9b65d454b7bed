"""`backboned backbones`: what can be stood on, and the check for those who add to it."""

from typing import Annotated

import typer

from backboned.client import Client
from backboned.server.commands.local_daemon import is_listening
from backboned.server.commands.options import DEFAULT_ADDRESS, ConfigFile, Json, Server
from backboned.server.commands.output import console, fail, notice, print_json, print_table, runs
from backboned.v1 import model_service_pb2 as pb

app = typer.Typer(
    rich_markup_mode=None, add_completion=False, invoke_without_command=True, help="List backbones, or check one."
)


@app.callback()
def backbones(
    context: typer.Context, config: ConfigFile = None, server: Server = DEFAULT_ADDRESS, json: Json = False
) -> None:
    """List backbones: the daemon's if one answers, else those that are installed here. With --json, one object."""
    if context.invoked_subcommand is not None:
        return
    if is_listening(server):
        with Client(server) as client:
            known = client.list_backbones()
    else:
        notice(f"no daemon answers at {server}: these are installed here")
        from backboned.server.commands.local_catalogue import list_backbones  # brings torch

        known = list_backbones(config)
    if json:
        print_json(known)
        return
    columns = ["backbone", ">features", ">pixels", "stages", "weights"]
    rows = [
        [b.name, str(b.feature_size), str(b.input_size), runs(b.stages), _weights(b.weights)] for b in known.backbones
    ]
    print_table(columns, rows, empty="no backbone")
    for family in known.families:
        console().print(f"{family}… makes backbones by name")
    _show_broken(known)


@app.command()
def check(
    name: Annotated[str, typer.Argument(metavar="NAME", help="The backbone, as an installed plugin offers it.")],
    config: ConfigFile = None,
    json: Json = False,
) -> None:
    """Check a backbone here, without a daemon: its stages, keys, shapes, preprocessing and what stays frozen."""
    from backboned.server.commands.local_catalogue import check_backbone  # brings torch

    report = check_backbone(name, config)
    if json:
        checks = [{"name": c.name, "passed": c.passed, "detail": c.detail} for c in report.checks]
        print_json({"backbone": name, "passed": report.passed, "checks": checks})
    else:
        rows = [["ok" if c.passed else "FAILED", c.name, c.detail] for c in report.checks]
        print_table(["", "check", "detail"], rows, empty="no check")
    if not report.passed:
        fail(f"backbone {name!r} does not conform")
        raise typer.Exit(1)


def _weights(source: str) -> str:
    """`download`, `file` or nothing; --json has the whole of it."""
    return "download" if source.startswith(("http://", "https://")) else "file" if source else ""


def _show_broken(known: pb.ListBackbonesResponse) -> None:
    for plugin in known.broken:
        notice(f"the plugin {plugin.name!r} from {plugin.origin} is broken: {plugin.reason}")
