"""`backboned sign`: signatures for checkpoint files that were made elsewhere, or before files were signed here."""

from pathlib import Path
from typing import Annotated

import typer

from backboned.server.commands.options import ConfigFile
from backboned.server.commands.output import notice
from backboned.server.config import load_config

app = typer.Typer(rich_markup_mode=None, add_completion=False)


@app.command()
def sign(
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="Checkpoints: .pt, .pth or .safetensors.")],
    signing_key: Annotated[
        Path | None, typer.Option("--signing-key", metavar="FILE", help="Private key, a PEM file without a password.")
    ] = None,
    config: ConfigFile = None,
) -> None:
    """Write FILE.sig beside each file. Needs no daemon; an older signature is replaced.

    Without --signing-key it is by the key of the configuration, as `backboned serve` has it.
    """
    settings = load_config({"signing_key": signing_key} if signing_key else {}, config).config
    if settings.signing_key is None:
        raise typer.BadParameter("there is none in the configuration either", param_hint="--signing-key")
    from backboned.registry.digest import file_digest  # brings torch
    from backboned.registry.export import check_suffix
    from backboned.registry.signatures import Signer, write_signature

    for file in files:
        check_suffix(file)
    signer = Signer(settings.signing_key)
    for file in files:
        path = write_signature(file, signer.sign(file.name, file_digest(file)))
        notice(f"{path}: a signature of {file.name}")
