"""Uploading a folder to a daemon that can't see it, with a bar."""

from pathlib import Path

import grpc
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from backboned.client import Client, ClientError
from backboned.server.commands.output import console, notice, size
from backboned.v1 import model_service_pb2 as pb

_UNSEEN = (grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.NOT_FOUND)


def is_unseen(error: ClientError) -> bool:
    """Whether a FineTune failed because the daemon has, or may read, no such folder."""
    return error.code in _UNSEEN and error.field == "dataset"


def upload(client: Client, folder: Path, *, asked: bool, json: bool) -> pb.Dataset:
    """Upload a folder, because someone asked for it or must; in a terminal a bar shows how far it is."""
    if not json:
        why = "" if asked else f"the daemon at {client.address} can't see {folder}: "
        notice(f"{why}uploading {'it' if why else folder}")
    out = console(stderr=True)
    progress = Progress(
        TextColumn("upload"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=out,
        disable=json or not out.is_terminal,
        transient=True,
    )
    with progress:
        bar = progress.add_task("upload", total=None)

        def show(done_bytes: int, total_bytes: int) -> None:
            progress.update(bar, completed=done_bytes, total=total_bytes)

        dataset = client.upload_dataset(folder, name=folder.name, progress=show)
    if not json:
        notice(f"dataset {dataset.id}: {dataset.images} images, {size(dataset.size_bytes)}")
    return dataset
