"""`backboned checkpoints`: what is on disk, and what was refused and why."""

from typing import Annotated

import typer

from backboned.client import Client
from backboned.server.commands.options import DEFAULT_ADDRESS, Json, Server
from backboned.server.commands.output import console, label, print_json, print_table, when
from backboned.v1 import model_service_pb2 as pb

app = typer.Typer(rich_markup_mode=None, add_completion=False)


@app.command()
def checkpoints(
    model: Annotated[str, typer.Argument(metavar="[MODEL]", help="Only those of this model.")] = "",
    filter: Annotated[
        str, typer.Option("--filter", help="As in: state = SERVING AND val_accuracy >= 0.9 AND backbone:resnet")
    ] = "",
    order_by: Annotated[str, typer.Option("--order-by", help="As in: val_loss, create_time desc")] = "",
    server: Server = DEFAULT_ADDRESS,
    json: Json = False,
) -> None:
    """List checkpoints: one for each epoch on disk, and dropped files that were refused, with the reason."""
    with Client(server) as client:
        found = client.list_checkpoints(model=model, filter=filter, order_by=order_by)
        if json:
            for checkpoint in found:
                print_json(checkpoint)
            return
        refused: list[pb.Checkpoint] = []
        rows = []
        for checkpoint in found:
            rows.append(_row(checkpoint))
            refused += [checkpoint] if checkpoint.reason else []
    print_table(["model", ">version", ">epoch", "state", ">accuracy", ">loss", "created", "note"], rows, empty="none")
    for checkpoint in refused:
        console().print(f"{checkpoint.uri.removeprefix('file://')}: {checkpoint.reason}", style="red")


def _row(checkpoint: pb.Checkpoint) -> list[str]:
    return [
        checkpoint.model,
        str(checkpoint.version or ""),
        str(checkpoint.epoch or ""),
        label(pb.CheckpointState.Name(checkpoint.state), "CHECKPOINT_STATE_"),
        f"{checkpoint.val_accuracy:.4f}" if checkpoint.HasField("val_accuracy") else "",
        f"{checkpoint.val_loss:.4f}" if checkpoint.HasField("val_loss") else "",
        when(checkpoint.create_time),
        ", ".join(["best"] * checkpoint.best + list(checkpoint.aliases)),
    ]
