"""`backboned export`: a version as a plain, full state_dict, for whoever serves or trains elsewhere."""

from pathlib import Path
from typing import Annotated

import typer

from backboned.server.commands.options import ConfigFile
from backboned.server.commands.output import notice, print_json
from backboned.server.config import load_config

app = typer.Typer(rich_markup_mode=None, add_completion=False)


@app.command()
def export(  # noqa: PLR0917 - typer calls it by name
    model: Annotated[str, typer.Argument(metavar="MODEL", help="The model's name.")],
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FILE", help="A new file: .pt, .pth or .safetensors.")
    ],
    version: Annotated[
        int | None, typer.Option("--version", metavar="N", help="Its version (default: the newest complete one).")
    ] = None,
    checkpoint_dir: Annotated[
        Path | None, typer.Option("--checkpoint-dir", metavar="PATH", help="Folder of models and their checkpoints.")
    ] = None,
    weights: Annotated[
        list[str] | None,
        typer.Option("--weights", metavar="BACKBONE=FILE", help="A backbone's pretrained weights; repeatable."),
    ] = None,
    config: ConfigFile = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Write a version's best epoch with all its weights: torchvision's own model takes it, every key matches.

    Needs no daemon; reads the checkpoint directory and the backbone's weights as `backboned serve` would.
    """
    given = {"checkpoint_dir": checkpoint_dir, "weights": weights}
    settings = load_config({k: v for k, v in given.items() if v}, config).config
    from backboned.registry import Catalogue  # brings torch
    from backboned.registry.export import check_suffix, read_for_export, write_state_dict

    check_suffix(output)
    catalogue = Catalogue.installed(settings.plugin)
    found = read_for_export(settings.checkpoint_dir, model, version, catalogue, settings.weights)
    write_state_dict(found, output)
    manifest = found.manifest
    if json:
        print_json(
            {
                "file": str(output),
                "model": manifest.model,
                "version": manifest.version,
                "epoch": manifest.best_epoch,
                "backbone": manifest.backbone,
                "classes": list(manifest.classes),
            }
        )
        return
    notice(
        f"{output}: {manifest.model} version {manifest.version}, epoch {manifest.best_epoch}, a state_dict of "
        f"{manifest.backbone} with {len(manifest.classes)} classes: {', '.join(manifest.classes[:8])}"
    )
