"""`backboned datasets`: what was uploaded."""

from typing import Annotated

import typer

from backboned.client import Client
from backboned.server.commands.options import DEFAULT_ADDRESS, Json, Server
from backboned.server.commands.output import console, print_json, print_table, size, when
from backboned.v1 import model_service_pb2 as pb

app = typer.Typer(
    rich_markup_mode=None,
    add_completion=False,
    invoke_without_command=True,
    help="List uploaded datasets, or delete one.",
)


@app.callback()
def datasets(context: typer.Context, server: Server = DEFAULT_ADDRESS, json: Json = False) -> None:
    """List uploaded datasets, newest first; or delete one."""
    if context.invoked_subcommand is not None:
        return
    with Client(server) as client:
        found = client.list_datasets()
        if json:
            for dataset in found:
                print_json(dataset)
        else:
            columns = ["dataset", "name", ">images", ">size", "uploaded"]
            print_table(columns, map(_row, found), empty="no uploaded dataset")


@app.command()
def delete(
    dataset_id: Annotated[str, typer.Argument(metavar="ID", help="The dataset's id.")],
    server: Server = DEFAULT_ADDRESS,
    json: Json = False,
) -> None:
    """Delete a dataset, and the images that no other one holds."""
    with Client(server) as client:
        client.delete_dataset(dataset_id)
    if json:
        print_json({"deleted": dataset_id})
    else:
        console().print(f"dataset {dataset_id} is deleted")


def _row(dataset: pb.Dataset) -> list[str]:
    return [dataset.id, dataset.name, str(dataset.images), size(dataset.size_bytes), when(dataset.create_time)]
