"""The RPCs of uploaded datasets, and Predict's images that lie in one."""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ParamSpec, TypeVar

import grpc
from google.protobuf.empty_pb2 import Empty

from backboned.registry.errors import BackbonedError, invalid
from backboned.registry.query import paginate
from backboned.server.api.checkpoints import timestamp
from backboned.server.training.supervisor import JobSupervisor
from backboned.server.training.upload_declaration import Entry, Part
from backboned.server.training.upload_session import Incomplete, UploadSession
from backboned.server.training.uploads import UploadedDataset, UploadStore, find_upload
from backboned.v1 import model_service_pb2 as pb
from backboned.v1 import model_service_pb2_grpc as pb_grpc

log = logging.getLogger(__name__)

Context = grpc.aio.ServicerContext[Any, Any]

RECEIVED_KEY = "backboned-received"
"""Trailing metadata of UploadDataset: "SHA256=BYTES" for each image of which so many bytes have come."""

_MAX_RECEIVED = 32
_MAX_MISSING = 100_000
_THREADS = 2
_PURGE_SECONDS = 10.0

_P = ParamSpec("_P")
_T = TypeVar("_T")


class Uploads(pb_grpc.ModelServiceServicer):
    """The part of the service that is about uploaded datasets. For one event loop.

    What touches the disk runs in threads of its own, so that uploads slow no other call down.
    """

    def __init__(self, store: UploadStore, jobs: JobSupervisor, max_message_bytes: int) -> None:
        self._store = store
        self._jobs = jobs
        self._max_message_bytes = max_message_bytes
        self._purging: set[asyncio.Task[None]] = set()
        self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="upload")

    async def UploadDataset(self, requests: AsyncIterator[pb.UploadDatasetRequest], context: Context) -> pb.Dataset:
        """Take images, and make a dataset of them once all are here."""
        session = UploadSession(self._store)
        try:
            async for request in requests:
                match request.WhichOneof("content"):
                    case "declaration":
                        await self._in_thread(_declare, session, request.declaration)
                    case "chunk":
                        chunk = request.chunk
                        await self._in_thread(session.write, chunk.sha256, chunk.offset, chunk.data)
                    case _:
                        raise invalid("a message of the upload is empty: set `declaration` or `chunk`", field="content")
            outcome = await self._in_thread(session.finish)
        finally:
            session.close()
        if isinstance(outcome, UploadedDataset):
            return _message(outcome)
        received = list(outcome.received.items())[:_MAX_RECEIVED]
        context.set_trailing_metadata(tuple((RECEIVED_KEY, f"{sha256}={count}") for sha256, count in received))
        return _incomplete(outcome, min(_MAX_MISSING, self._max_message_bytes // 2 // 66))

    async def ListDatasets(self, request: pb.ListDatasetsRequest, context: Context) -> pb.ListDatasetsResponse:
        """Uploaded datasets, newest first."""
        datasets = await asyncio.to_thread(self._store.list_datasets)
        page = paginate(datasets, request.page_size, request.page_token, identity=lambda d: d.id)
        return pb.ListDatasetsResponse(datasets=map(_message, page.items), next_page_token=page.next_page_token)

    async def DeleteDataset(self, request: pb.DeleteDatasetRequest, context: Context) -> Empty:
        """Delete a dataset that no job needs; what it took is given back within seconds, or if it is large, later."""
        dataset_id = request.dataset_id
        folder = await asyncio.to_thread(find_upload, self._store.datasets_folder, dataset_id, field="dataset_id")
        detached = await self._jobs.release(folder, lambda: self._store.detach(dataset_id))
        purging = asyncio.create_task(self._in_thread(self._store.purge, detached))
        self._purging.add(purging)
        purging.add_done_callback(self._purged)
        await asyncio.wait([purging], timeout=_PURGE_SECONDS)
        return Empty()

    def _purged(self, task: "asyncio.Task[None]") -> None:
        self._purging.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("a deleted dataset could not be removed from the disk", exc_info=error)

    async def with_dataset_images(self, request: pb.PredictRequest) -> pb.PredictRequest:
        """The request with the bytes of each image that it names by dataset and path; itself, where it names none.

        Raises `BackbonedError` naming the image's index.
        """
        if all(image.WhichOneof("source") != "dataset_image" for image in request.images):
            return request
        return await asyncio.to_thread(self._with_images, request)

    def _with_images(self, request: pb.PredictRequest) -> pb.PredictRequest:
        filled = pb.PredictRequest()
        filled.CopyFrom(request)
        size_bytes = 0
        for index, image in enumerate(filled.images):
            if image.WhichOneof("source") == "dataset_image":
                field = f"images[{index}]"
                try:
                    file = self._store.image(image.dataset_image)
                    size_bytes += file.stat().st_size
                    if size_bytes > self._max_message_bytes:
                        raise invalid(
                            f"the images of the request have more than {self._max_message_bytes} bytes together; send "
                            "fewer at once"
                        )
                    image.encoded = file.read_bytes()
                except BackbonedError as error:
                    raise BackbonedError(error.kind, f"image {index}: {error.message}", field=field) from error
                except FileNotFoundError as error:
                    raise invalid(f"image {index}: its dataset was deleted just now", field=field) from error
        return filled

    async def _in_thread(self, work: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> _T:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._pool, lambda: work(*args, **kwargs))


def _declare(session: UploadSession, declaration: pb.DatasetDeclaration) -> None:
    session.declare(declaration.name, [_entry(entry) for entry in declaration.entries])


def _entry(entry: pb.DatasetEntry) -> Entry:
    if entry.validation and entry.test:
        raise invalid(f"image {entry.path!r} can't both validate and test", field="declaration")
    part = Part.VALIDATION if entry.validation else Part.TEST if entry.test else Part.TRAIN
    return Entry(entry.path, tuple(entry.labels), entry.sha256, entry.size_bytes, part)


def _message(dataset: UploadedDataset) -> pb.Dataset:
    return pb.Dataset(
        id=dataset.id,
        name=dataset.name,
        images=dataset.images,
        size_bytes=dataset.size_bytes,
        create_time=timestamp(dataset.create_time),
    )


def _incomplete(outcome: Incomplete, most: int) -> pb.Dataset:
    return pb.Dataset(
        id=outcome.dataset_id,
        name=outcome.name,
        images=outcome.images,
        size_bytes=outcome.size_bytes,
        missing_sha256=outcome.missing[:most],
    )
