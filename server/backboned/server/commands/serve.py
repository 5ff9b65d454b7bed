"""`backboned serve`: the daemon. Its flags are the settings of `Config`, one each."""

import inspect
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import ByteSize
from pydantic.fields import FieldInfo

from backboned.server.commands.options import ConfigFile
from backboned.server.config import Config, load_config
from backboned.server.process import import_torchvision, tune_process

app = typer.Typer(rich_markup_mode=None, add_completion=False)


def serve(config: Path | None, **flags: Any) -> None:
    """Run the daemon until it is told to stop, by SIGTERM or Ctrl-C.

    A flag goes before its variable (--grpc-port: BACKBONED_GRPC_PORT), that before its key in backboned.toml
    (grpc_port), and that before the default.
    """
    given = {name: value for name, value in flags.items() if value not in (None, [])}
    loaded = load_config(given, config)
    tune_process()
    import_torchvision()
    from backboned.server.daemon import run  # brings torch

    run(loaded.config)


def _flag(name: str, field: FieldInfo) -> inspect.Parameter:
    default = _shown(field.default)
    option = typer.Option(
        f"--{name.replace('_', '-')}",
        metavar=_metavar(name, field),
        help=f"{field.description}{f' (default {default})' if default else ''}",
        show_default=False,
    )
    value = list[str] | None if isinstance(field.default, tuple | dict) else str | None
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[value, option])


def _metavar(name: str, field: FieldInfo) -> str:
    if name == "weights":
        return "BACKBONE=FILE"
    if name.endswith("_key"):
        return "FILE"
    if name.endswith(("_dir", "_root", "_file")):
        return "PATH"
    numbers = {"<class 'int'>": "N", "<class 'float'>": "SECONDS"}
    return numbers.get(str(field.annotation)) or name.rpartition("_")[2].upper()


def _shown(default: Any) -> str:
    if isinstance(default, ByteSize):
        return default.human_readable()
    return "" if default in (None, (), {}) else str(default)


# Typer reads options from a signature: this one is made of the settings, so that none is written down twice.
vars(serve)["__signature__"] = inspect.Signature(
    [
        inspect.Parameter("config", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=ConfigFile),
        *(_flag(name, field) for name, field in Config.model_fields.items()),
    ]
)
app.command()(serve)
