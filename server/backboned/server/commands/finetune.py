"""`backboned finetune`: a classifier from a folder of photos, by one command."""

import contextlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from backboned.client import Client, ClientError
from backboned.server.commands.jobs import follow, require_success, took_seconds
from backboned.server.commands.local_daemon import LocalDaemon, ended_by_signals, free_port, is_listening
from backboned.server.commands.options import DEFAULT_ADDRESS, ConfigFile, Json, Server
from backboned.server.commands.output import as_dict, console, duration, notice, print_json
from backboned.server.commands.uploading import is_unseen
from backboned.server.commands.uploading import upload as send
from backboned.v1 import model_service_pb2 as pb

app = typer.Typer(rich_markup_mode=None, add_completion=False)

LOOPBACK = frozenset({"127.0.0.1", "localhost", "::1", "[::1]"})


@app.command()
def finetune(
    folder: Annotated[
        str, typer.Argument(metavar="FOLDER", help="A folder of images for each class, an archive or a manifest.")
    ],
    *,
    model: Annotated[str, typer.Option(metavar="NAME", help="The model's name [default: the folder's].")] = "",
    backbone: Annotated[str, typer.Option(metavar="NAME", help="What to stand on.")] = "resnet50",
    task: Annotated[str, typer.Option(metavar="TASK", help="single_label, binary or multi_label.")] = "",
    trainable_stages: Annotated[
        list[str] | None,
        typer.Option(
            metavar="STAGES",
            help="Stages that train besides the head: names (commas, or repeatable), 'all', or 'auto': the last ones, "
            "if it pays.",
        ),
    ] = None,
    max_epochs: Annotated[int | None, typer.Option(metavar="N", help="At most so many epochs (default 20).")] = None,
    batch_size: Annotated[int | None, typer.Option(metavar="N", help="Images a step (default 32).")] = None,
    learning_rate: Annotated[
        float | None,
        typer.Option(metavar="X", help="Default: several are tried for the head alone; 0.0003 where stages train."),
    ] = None,
    weight_decay: Annotated[
        float | None,
        typer.Option(metavar="X", help="Default: several are tried for the head alone; 0.01 where stages train."),
    ] = None,
    patience: Annotated[
        int | None,
        typer.Option(metavar="N", help="Stop after so many epochs without a better one (default 5; 0: never)."),
    ] = None,
    validation_fraction: Annotated[
        float | None, typer.Option(metavar="X", help="Images that validate, if there is no val/ (default 0.2).")
    ] = None,
    test_fraction: Annotated[
        float | None,
        typer.Option(metavar="X", help="Images held back from every choice, if there is no test/ (default 0)."),
    ] = None,
    seed: Annotated[int | None, typer.Option(metavar="N", help="Makes a run repeatable (default 0).")] = None,
    views: Annotated[int | None, typer.Option(metavar="N", help="Views of each image (default 2).")] = None,
    warm_start_version: Annotated[int | None, typer.Option(metavar="N", help="Begin from this version.")] = None,
    label_smoothing: Annotated[
        float | None, typer.Option(metavar="X", help="Of targets, where stages train (default 0.1).")
    ] = None,
    ema_decay: Annotated[
        float | None,
        typer.Option(metavar="X", help="Of the weights' moving average, where stages train (default: by the steps)."),
    ] = None,
    max_gradient_norm: Annotated[
        float | None, typer.Option(metavar="X", help="Where stages train (default 1; 0: no limit).")
    ] = None,
    request_id: Annotated[str | None, typer.Option(metavar="ID", help="The same id starts the same job once.")] = None,
    weights: Annotated[
        list[str] | None,
        typer.Option(metavar="BACKBONE=FILE", help="Pretrained weights, for a daemon that this starts; repeatable."),
    ] = None,
    serve: Annotated[
        bool | None,
        typer.Option("--serve/--no-serve", help="Go on serving after training, where this started the daemon."),
    ] = None,
    upload: Annotated[
        bool | None,
        typer.Option("--upload/--no-upload", help="Upload FOLDER [default: if the daemon can't see it]."),
    ] = None,
    config: ConfigFile = None,
    server: Server = DEFAULT_ADDRESS,
    json: Json = False,
) -> None:
    """Fine-tune a classifier on a folder of images, and serve it.

    FOLDER has a folder a class, or train/ and val/ with a folder a class each. It is uploaded if the daemon is on
    another machine or may not read it. Where no daemon answers on this machine, one is started. Ctrl-C cancels the
    training.
    """
    path = Path(folder).expanduser()
    options = {
        "task": _task(task),
        "trainable_stages": [name.strip() for given in trainable_stages or [] for name in given.split(",")],
        "max_epochs": max_epochs,
        "batch_size": batch_size,
        "learning_rate": learning_rate,
        "weight_decay": weight_decay,
        "patience": patience,
        "validation_fraction": validation_fraction,
        "test_fraction": test_fraction,
        "seed": seed,
        "views": views,
        "warm_start_version": warm_start_version,
        "label_smoothing": label_smoothing,
        "ema_decay": ema_decay,
        "max_gradient_norm": max_gradient_norm,
    }
    with contextlib.ExitStack() as stack:
        daemon = None
        if not is_listening(server):
            stack.enter_context(ended_by_signals())
            daemon = stack.enter_context(_start_daemon(path, server, weights or [], config))
            server = daemon.grpc
        elif weights:
            raise typer.BadParameter(f"the daemon at {server} runs already, with its own", param_hint="--weights")
        client = stack.enter_context(Client(server))

        def start(dataset: str | Path) -> pb.Job:
            return client.fine_tune(
                model or path.resolve().name, backbone, dataset, request_id=request_id, **_given(options)
            )

        file = str(path.resolve()) if path.is_file() else folder
        job = _start(start, client, path if path.is_dir() else file, upload=upload, json=json)
        job = _train(client, job, json=json)
        goes_on = daemon is not None and (sys.stdout.isatty() and not json if serve is None else serve)
        if not json:
            _tell(job, server, serving=daemon is None or goes_on)
        if daemon is not None and goes_on:
            notice(f"serving at {daemon.grpc}, metrics at {daemon.http}/metrics, until Ctrl-C")
            with contextlib.suppress(KeyboardInterrupt):
                daemon.wait()


def _start(
    start: Callable[[str | Path], pb.Job], client: Client, folder: str | Path, *, upload: bool | None, json: bool
) -> pb.Job:
    """Start the job on a folder, or on its upload; a `folder` that isn't on this machine is a name that is sent."""
    if isinstance(folder, str):
        if upload:
            raise typer.BadParameter(f"there is no folder {folder}", param_hint="FOLDER")
        return start(folder)
    here = folder.resolve()
    elsewhere = client.address.rpartition(":")[0] not in LOOPBACK
    if not (upload or (upload is None and elsewhere)):
        try:
            return start(here)
        except ClientError as error:
            if upload is False or not is_unseen(error):
                raise
    return start(send(client, here, asked=bool(upload), json=json).id)


def _train(client: Client, job: pb.Job, *, json: bool) -> pb.Job:
    """Follow the job to its end and return it; Ctrl-C cancels it and ends the command."""
    if json:
        print_json({"job": as_dict(job)})
    else:
        notice(f"job {job.id}: version {job.version} of {job.model} on {job.request.backbone}; Ctrl-C cancels it")
    try:
        follow(client, job, json=json)
    except KeyboardInterrupt:
        notice(f"cancelling job {job.id}; checkpoints that it has finished are kept")
        client.cancel_job(job.id)
        client.wait(job.id)
        raise typer.Exit(130) from None
    job = client.get_job(job.id)
    if json:
        print_json({"job": as_dict(job)})
    require_success(job)
    return job


def _tell(job: pb.Job, server: str, *, serving: bool) -> None:
    best = job.best
    console().print(
        f"{job.model} version {job.version}: validation accuracy {best.val_accuracy:.4f} after epoch {best.epoch}, "
        f"in {duration(took_seconds(job))}",
        style="bold green",
    )
    at = "" if server == DEFAULT_ADDRESS else f" --server {server}"
    first, at = ("", at) if serving else ("backboned serve, and then: ", "")
    console().print(f"Ask it:  {first}backboned predict IMAGE... --model {job.model}{at}", soft_wrap=True)
    console().print(f"Report:  {first}backboned report {job.model}{at}", soft_wrap=True)


def _start_daemon(folder: Path, server: str, weights: list[str], config: Path | None) -> LocalDaemon:
    host, _, port = server.rpartition(":")
    if host not in LOOPBACK or not port.isdecimal():
        raise typer.BadParameter(f"no daemon answers at {server}", param_hint="--server")
    if not folder.exists():
        raise typer.BadParameter(f"there is no folder or archive {folder}", param_hint="FOLDER")
    from backboned.server.config import load_config  # brings pydantic-settings

    settings = load_config({"weights": weights} if weights else {}, config).config
    flags = [f"--host={host.strip('[]')}", f"--grpc-port={free_port(host, int(port))}"]
    flags += [f"--http-port={free_port(host, settings.http_port)}"]
    flags += [f"--data-root={root}" for root in (*settings.data_root, _root(folder.resolve()))]
    flags += [f"--weights={name}={file}" for name, file in settings.weights.items()]
    flags += ["--compile=off", "--trainer-standby=off"]  # it ends with the job: nobody would see the gain
    flags += [f"--config={config}"] if config else []
    notice(f"no daemon answers at {server}: starting one here (data in {settings.state_dir})")
    return LocalDaemon.start(flags, settings.state_dir)


def _root(path: Path) -> Path:
    return path if path.is_dir() else path.parent


def _task(given: str) -> str | None:
    if not given:
        return None
    name = "TASK_" + given.upper().replace("-", "_").removeprefix("TASK_")
    if name not in pb.Task.keys()[1:]:
        raise typer.BadParameter(f"expected single_label, binary or multi_label, got {given!r}", param_hint="--task")
    return name


def _given(options: dict[str, Any]) -> Any:
    return {name: value for name, value in options.items() if value not in (None, [])}
