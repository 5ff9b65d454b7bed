"""The command `backboned`: finds the subcommand, runs it, and turns whatever it raises into one line and an exit code.

Each subcommand is a module of this package with a typer `app`, imported when it is called for: so `backboned predict`
doesn't wait for what only `backboned serve` needs.
"""

import difflib
import importlib
import os
import sys
from importlib.metadata import version as distribution_version
from typing import Annotated, Any

import typer
from typer.core import TyperGroup
from typer.main import get_command

from backboned.server.commands.output import fail

COMMANDS = (
    "serve",
    "finetune",
    "predict",
    "checkpoints",
    "models",
    "report",
    "backbones",
    "jobs",
    "datasets",
    "alias",
    "export",
    "sign",
    "demo",
    "doctor",
)


class Subcommands(TyperGroup):
    """A group whose members are the modules that `COMMANDS` names."""

    def list_commands(self, ctx: Any) -> list[str]:
        """The names of all subcommands, in the order in which people meet them."""
        del ctx
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """The subcommand `cmd_name`; ends in wrong usage, with the nearest names, when there is none."""
        if cmd_name not in COMMANDS:
            near = difflib.get_close_matches(cmd_name, COMMANDS)
            ctx.fail(f"no command {cmd_name!r}" + (f"; did you mean {' or '.join(near)}?" if near else ""))
        module = importlib.import_module(f"backboned.server.commands.{cmd_name}")
        command = get_command(module.app)
        command.name = cmd_name
        return command


app = typer.Typer(
    cls=Subcommands,
    name="backboned",
    help="One frozen backbone, a thousand fine-tuned heads: fine-tune image classifiers and serve them.",
    context_settings={"help_option_names": ["-h", "--help"]},
    invoke_without_command=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(distribution_version("backboned"))
        raise typer.Exit


@app.callback()
def backboned(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print it.")
    ] = False,
) -> None:
    """Show the help when no subcommand is named."""
    del version  # its callback has done it
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


def run(arguments: list[str]) -> int:
    """Run one command line; returns its exit code: 0 done, 1 failed, 2 wrong usage, 130 interrupted."""
    try:
        return app(arguments, prog_name="backboned", standalone_mode=False) or 0
    except (KeyboardInterrupt, typer.Abort):
        return 130
    except ModuleNotFoundError:
        raise  # the entry tells which extra has it
    except Exception as error:
        if os.environ.get("BACKBONED_LOG_LEVEL", "").lower() == "debug":
            raise
        fail(_one_line(error))
        return int(getattr(error, "exit_code", 1))


def main() -> None:
    """The entry of the command `backboned`."""
    sys.exit(run(sys.argv[1:]))


def _one_line(error: Exception) -> str:
    """What happened, for a person: typer's, the client's, the configuration's and the registry's errors say it."""
    usage = getattr(error, "format_message", None)
    message = usage() if usage else getattr(error, "message", None)
    if message is None and isinstance(error, OSError) and error.strerror:
        message = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    if message is None:
        message = f"unexpected {type(error).__name__}: {error}; BACKBONED_LOG_LEVEL=debug shows where it comes from"
    context = getattr(error, "ctx", None)
    hint = f" (see {context.command_path} --help)" if context is not None else ""
    return " ".join(str(message).split()) + hint
