"""`backboned models`: what can be asked."""

from typing import Annotated

import typer

from backboned.client import Client
from backboned.server.commands.options import DEFAULT_ADDRESS, Json, Server
from backboned.server.commands.output import console, label, notice, print_json, print_table, runs, when
from backboned.v1 import model_service_pb2 as pb

app = typer.Typer(rich_markup_mode=None, add_completion=False)


@app.command()
def models(
    model: Annotated[str, typer.Argument(metavar="[MODEL]", help="Show the versions of this model.")] = "",
    server: Server = DEFAULT_ADDRESS,
    json: Json = False,
) -> None:
    """List models, or the versions of one."""
    with Client(server) as client:
        found = [client.get_model(model)] if model else client.list_models()
        if json:
            for each in found:
                print_json(each)
        elif model:
            _show_versions(next(iter(found)))
        else:
            columns = ["model", ">serving", ">versions", "backbone", ">classes", ">accuracy", "aliases"]
            print_table(columns, map(_row, found), empty="no model yet: backboned finetune makes one")


def _row(model: pb.Model) -> list[str]:
    serving = next((v.checkpoint for v in model.versions if v.version == model.serving_version), pb.Checkpoint())
    return [
        model.name,
        str(model.serving_version or "none"),
        str(len(model.versions)),
        serving.backbone,
        str(len(serving.classes) or ""),
        _accuracy(serving),
        ", ".join(f"{alias} → {version}" for alias, version in sorted(model.aliases.items())),
    ]


def _show_versions(model: pb.Model) -> None:
    console().print(f"{model.name}: version {model.serving_version} serves" if model.serving_version else model.name)
    rows = []
    sharing: dict[str, list[str]] = {}
    for version in model.versions:
        checkpoint = version.checkpoint
        state = "serving" if version.version == model.serving_version else "loaded" if version.loaded else "on disk"
        rows.append(
            [
                str(version.version),
                state if version.complete else f"{state}, incomplete",
                checkpoint.backbone,
                label(pb.Task.Name(checkpoint.task), "TASK_"),
                str(len(checkpoint.classes)),
                _accuracy(checkpoint),
                when(checkpoint.create_time),
                ", ".join(sorted(alias for alias, to in model.aliases.items() if to == version.version)),
            ]
        )
        if version.shared_stages:
            shared = f"{runs(version.shared_stages)} with {checkpoint.backbone}"
            sharing.setdefault(shared, []).append(str(version.version))
    columns = [">version", "state", "backbone", "task", ">classes", ">accuracy", "created", "aliases"]
    print_table(columns, rows, empty="no version")
    for shared, versions in sharing.items():
        notice(f"version {', '.join(versions)}: shares {shared}")


def _accuracy(checkpoint: pb.Checkpoint) -> str:
    return f"{checkpoint.val_accuracy:.4f}" if checkpoint.HasField("val_accuracy") else ""
