"""`backboned models`: what can be asked, which version of it answers, and who changed that."""

import getpass
import socket
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from backboned.client import Client
from backboned.server.commands.comparison_view import compared
from backboned.server.commands.drift_view import drifted
from backboned.server.commands.options import DEFAULT_ADDRESS, Json, Server
from backboned.server.commands.output import console, label, notice, print_json, print_table, runs, when
from backboned.v1 import model_service_pb2 as pb


class ShowsByDefault(TyperGroup):
    """A group in which whatever is no subcommand is an argument of `show`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Put `show` where no subcommand is named."""
        if not args or args[0] not in (*self.commands, *ctx.help_option_names):
            args = ["show", *args]
        return super().parse_args(ctx, args)


app = typer.Typer(
    cls=ShowsByDefault,
    rich_markup_mode=None,
    add_completion=False,
    help="Models, which version of each answers, and who changed that. Without a command: `show`.",
)

Model = Annotated[str, typer.Argument(metavar="MODEL", help="The model.")]


def as_user(server: str) -> Client:
    """A client that tells who uses it, for the history."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container's user may have no name
        user = "someone"
    return Client(server, actor=f"{user}@{socket.gethostname()}")


@app.command()
def show(
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


@app.command()
def history(
    model: Annotated[str, typer.Argument(metavar="[MODEL]", help="Only this model's.")] = "",
    server: Server = DEFAULT_ADDRESS,
    json: Json = False,
) -> None:
    """Tell what served when, and who changed what; newest first."""
    with Client(server) as client:
        changes = client.list_history(model=model)
        if json:
            for change in changes:
                print_json(change)
            return
        rows = [[when(c.time), c.model, _told(c), c.actor or "the daemon", c.reason] for c in changes]
    print_table(["when", "model", "what", "who", "why"], rows, empty="nothing has changed yet")


@app.command()
def policy(
    model: Model,
    policy: Annotated[
        str,
        typer.Argument(
            metavar="POLICY", help="latest, best, pinned, manual, promote_when_better or rollback_when_worse."
        ),
    ],
    version: Annotated[
        int | None,
        typer.Option("--version", help="For pinned, manual and promote_when_better; unset: what serves now."),
    ] = None,
    server: Server = DEFAULT_ADDRESS,
    json: Json = False,
) -> None:
    """Choose how the version is found that answers where a call names none."""
    with as_user(server) as client:
        _tell(client.set_version_policy(model, policy, version=version), json=json)


@app.command()
def rollback(
    model: Model,
    expected_version: Annotated[
        int | None, typer.Option("--expected-version", help="Only if this version serves now.")
    ] = None,
    reason: Annotated[str, typer.Option("--reason", help="Why, for the history.")] = "",
    server: Server = DEFAULT_ADDRESS,
    json: Json = False,
) -> None:
    """Go back to the version that served before, and don't choose the present one again."""
    with as_user(server) as client:
        _tell(client.roll_back(model, expected_version=expected_version, reason=reason), json=json)


@app.command()
def traffic(
    model: Model,
    weights: Annotated[
        list[str] | None, typer.Argument(metavar="ALIAS=WEIGHT…", help="None: traffic isn't divided any more.")
    ] = None,
    server: Server = DEFAULT_ADDRESS,
    json: Json = False,
) -> None:
    """Divide calls that name no version between aliases, by weight."""
    split = dict(map(_weight, weights or ()))
    with as_user(server) as client:
        _tell(client.set_traffic(model, split), json=json)


@app.command()
def delete(
    model: Model,
    version: Annotated[int, typer.Argument(metavar="VERSION", help="The version.")],
    server: Server = DEFAULT_ADDRESS,
) -> None:
    """Delete a version and its files, unless it is in use."""
    with as_user(server) as client:
        client.delete_model_version(model, version)
    console().print(f"{model}: version {version} is deleted")


def _weight(text: str) -> tuple[str, int]:
    alias, equals, weight = text.partition("=")
    if not equals or not weight.isdigit():
        raise typer.BadParameter(f"{text!r} is not ALIAS=WEIGHT", param_hint="weights")
    return alias, int(weight)


def _tell(model: pb.Model, *, json: bool) -> None:
    if json:
        print_json(model)
        return
    how = label(pb.VersionPolicy.Name(model.policy), "VERSION_POLICY_")
    divided = ", ".join(f"{alias} {weight}" for alias, weight in sorted(model.traffic.items()))
    shares = f"; divided between {divided}" if divided else ""
    which = f"version {model.serving_version}" if model.serving_version else "no version"
    console().print(f"{model.name}: {which} serves, by policy {how}{shares}")


def _told(change: pb.Change) -> str:  # noqa: PLR0911 - one for each kind
    after, before = (str(v) if v else "none" for v in (change.version, change.previous_version))
    match change.kind:
        case pb.CHANGE_KIND_SERVING:
            return f"version {before} → {after} serves"
        case pb.CHANGE_KIND_POLICY:
            return f"policy {change.subject.lower()}" + (f", version {after}" if change.version else "")
        case pb.CHANGE_KIND_ALIAS:
            return f"alias {change.subject}: {before} → {after}"
        case pb.CHANGE_KIND_TRAFFIC:
            return f"traffic: {change.subject or 'not divided'}"
        case pb.CHANGE_KIND_REJECTED:
            return f"version {before} rejected for {after}"
        case pb.CHANGE_KIND_PROMOTED:
            return f"version {after} promoted over {before}"
        case pb.CHANGE_KIND_DELETED:
            return f"version {before} deleted"
        case _:
            return pb.ChangeKind.Name(change.kind)


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
        state = _state(model, version)
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
    for line in (*compared(model), *drifted(model)):
        notice(line)
    for version in model.versions:
        if version.checkpoint.reason:
            quarantined = version.checkpoint.state == pb.CHECKPOINT_STATE_QUARANTINED
            notice(f"version {version.version}{' is quarantined' * quarantined}: {version.checkpoint.reason}")
    for shared, versions in sharing.items():
        notice(f"version {', '.join(versions)}: shares {shared}")


def _state(model: pb.Model, version: pb.ModelVersion) -> str:
    quarantined = version.checkpoint.state == pb.CHECKPOINT_STATE_QUARANTINED
    if version.version == model.serving_version:
        state = "serving" if version.loaded else "serving on demand"
    elif version.version == model.shadow_version:
        state = "shadow"
    elif version.loaded:
        state = "loaded"
    else:
        state = "quarantined" if quarantined else "on disk"
    return f"{state}, rejected" if version.rejected else state


def _accuracy(checkpoint: pb.Checkpoint) -> str:
    return f"{checkpoint.val_accuracy:.4f}" if checkpoint.HasField("val_accuracy") else ""
