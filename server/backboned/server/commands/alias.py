"""`backboned alias`: names for versions, such as `production`."""

from typing import Annotated

import typer

from backboned.client import Client
from backboned.server.commands.models import as_user
from backboned.server.commands.options import DEFAULT_ADDRESS, Json, Server
from backboned.server.commands.output import console, print_json, print_table

app = typer.Typer(rich_markup_mode=None, add_completion=False, no_args_is_help=False, help="Point aliases to versions.")

Model = Annotated[str, typer.Argument(metavar="MODEL", help="The model.")]
Alias = Annotated[str, typer.Argument(metavar="ALIAS", help="The alias.")]
Expected = Annotated[
    int | None, typer.Option("--expected-version", help="Only if it points to this version now; 0: to none.")
]


@app.command("set")
def set_(
    model: Model,
    alias: Alias,
    *,
    version: Annotated[int, typer.Argument(metavar="VERSION", help="Where it is to point.")],
    expected_version: Expected = None,
    server: Server = DEFAULT_ADDRESS,
    json: Json = False,
) -> None:
    """Point an alias to a version."""
    with as_user(server) as client:
        changed = client.set_alias(model, alias, version, expected_version=expected_version)
    if json:
        print_json(changed)
    else:
        console().print(f"{model}: {alias} → {version}")


@app.command()
def delete(
    model: Model, alias: Alias, expected_version: Expected = None, server: Server = DEFAULT_ADDRESS, json: Json = False
) -> None:
    """Remove an alias."""
    with as_user(server) as client:
        changed = client.delete_alias(model, alias, expected_version=expected_version)
    if json:
        print_json(changed)
    else:
        console().print(f"{model}: no {alias} any more")


@app.command("list")
def list_(
    model: Annotated[str, typer.Argument(metavar="[MODEL]", help="Only those of this model.")] = "",
    server: Server = DEFAULT_ADDRESS,
    json: Json = False,
) -> None:
    """List aliases and the versions that they point to."""
    with Client(server) as client:
        models = [client.get_model(model)] if model else client.list_models()
        found = [(each.name, alias, version) for each in models for alias, version in sorted(each.aliases.items())]
    if json:
        for name, alias, version in found:
            print_json({"model": name, "alias": alias, "version": str(version)})
    else:
        rows = [[name, alias, str(version)] for name, alias, version in found]
        print_table(["model", "alias", ">version"], rows, empty="no alias")
