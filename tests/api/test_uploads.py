"""Uploads over a real channel: streams that break, pieces out of place, and Predict of what was uploaded."""

import asyncio
import hashlib
import threading
from collections.abc import AsyncIterator, Callable, Iterable
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc import StatusCode

from backboned.client import ClientError
from backboned.registry import BackbonedError, ErrorKind
from backboned.server.api.errors import ErrorInterceptor
from backboned.server.api.uploads import RECEIVED_KEY, Uploads
from backboned.server.training.uploads import UploadStore
from backboned.v1 import model_service_pb2 as pb
from backboned.v1.model_service_pb2_grpc import ModelServiceStub, add_ModelServiceServicer_to_server

PHOTOS = {"red/1.png": b"first", "red/2.png": b"second", "blue/1.png": bytes(3 * 2**20)}
LARGE = PHOTOS["blue/1.png"]
MAX_MESSAGE_BYTES = 4 * 2**20
TIMEOUT_SECONDS = 60.0

Message = pb.UploadDatasetRequest


class Jobs:
    """Stands for the supervisor: `using` is the folder that a job uses."""

    def __init__(self) -> None:
        self.using: Path | None = None

    async def release(self, folder: Path, remove: Callable[[], Any]) -> Any:
        if folder == self.using:
            raise BackbonedError(ErrorKind.FAILED_PRECONDITION, "job 1 uses it")
        return remove()


class Server:
    """The service, its store and its jobs, and a channel to it."""

    def __init__(self, folder: Path) -> None:
        self.store = UploadStore(folder, 2**30)
        self.store.open()
        self.jobs = Jobs()
        self.service = Uploads(self.store, self.jobs, MAX_MESSAGE_BYTES)  # type: ignore[abstract,arg-type]

    async def __aenter__(self) -> "Server":
        self._server = grpc.aio.server(interceptors=[ErrorInterceptor()])
        add_ModelServiceServicer_to_server(self.service, self._server)
        port = self._server.add_insecure_port("127.0.0.1:0")
        await self._server.start()
        self._channel = grpc.aio.insecure_channel(f"127.0.0.1:{port}")
        self.stub: Any = ModelServiceStub(self._channel)  # its asynchronous form
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._channel.close()
        await self._server.stop(None)

    async def upload(self, *messages: Message) -> pb.Dataset:
        dataset: pb.Dataset = await self.stub.UploadDataset(iter(messages), timeout=TIMEOUT_SECONDS)
        return dataset


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[Server]:
    async with Server(tmp_path / "uploads") as server:
        yield server


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def declaration(photos: dict[str, bytes] = PHOTOS, name: str = "", **fields: Any) -> Message:
    entries = [
        pb.DatasetEntry(path=p, labels=[p.split("/")[0]], sha256=digest(d), size_bytes=len(d), **fields)
        for p, d in photos.items()
    ]
    return Message(declaration=pb.DatasetDeclaration(name=name, entries=entries))


def chunk(data: bytes, start: int = 0, end: int | None = None) -> Message:
    return Message(chunk=pb.ImageChunk(sha256=digest(data), offset=start, data=data[start:end]))


def pieces(data: bytes, start: int = 0) -> Iterable[Message]:
    return (chunk(data, at, at + 2**19) for at in range(start, len(data), 2**19))


async def refused(call: Any) -> ClientError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return ClientError.of(caught.value, "")


async def test_a_dataset_is_uploaded_listed_and_deleted(server: Server) -> None:
    asked = await server.upload(declaration(name="colours"))
    assert list(asked.missing_sha256) == [digest(d) for d in PHOTOS.values()] and not asked.HasField("create_time")
    made = await server.upload(declaration(name="colours"), chunk(b"first"), chunk(b"second"), *pieces(LARGE))
    assert (made.id, made.name, made.images, list(made.missing_sha256)) == (asked.id, "colours", 3, [])
    assert made.size_bytes == sum(map(len, PHOTOS.values())) and made.create_time.seconds > 0
    assert await server.upload(declaration()) == made  # nothing needs to be sent again
    other = await server.upload(declaration({"a/1.png": b"first"}))
    listed = await server.stub.ListDatasets(pb.ListDatasetsRequest(page_size=1))
    assert list(listed.datasets) == [other] and listed.next_page_token
    listed = await server.stub.ListDatasets(pb.ListDatasetsRequest(page_size=1, page_token=listed.next_page_token))
    assert list(listed.datasets) == [made] and not listed.next_page_token
    await server.stub.DeleteDataset(pb.DeleteDatasetRequest(dataset_id=made.id))
    listed = await server.stub.ListDatasets(pb.ListDatasetsRequest())
    assert list(listed.datasets) == [other]
    assert server.store.images.used_bytes == len(b"first")


async def test_a_stream_that_breaks_off_is_gone_on_with(server: Server) -> None:
    began = asyncio.Event()

    async def broken() -> AsyncIterator[Message]:
        yield declaration()
        yield chunk(b"first")
        yield chunk(LARGE, 0, 700_000)
        began.set()
        await asyncio.Event().wait()

    call = server.stub.UploadDataset(broken())
    await began.wait()
    deadline = asyncio.get_running_loop().time() + TIMEOUT_SECONDS
    while server.store.images.received(digest(LARGE)) < 700_000:
        assert asyncio.get_running_loop().time() < deadline
        await asyncio.sleep(0.01)
    call.cancel()

    asking = server.stub.UploadDataset(iter([declaration()]))
    asked = await asking
    assert list(asked.missing_sha256) == [digest(b"second"), digest(LARGE)]
    trailers = await asking.trailing_metadata()
    assert [value for key, value in trailers if key == RECEIVED_KEY] == [f"{digest(LARGE)}=700000"]
    made = await server.upload(declaration(), *pieces(LARGE, 700_000), chunk(b"second"))
    assert made.HasField("create_time")
    assert server.store.image(f"{made.id}/blue/1.png").read_bytes() == LARGE


async def test_a_declaration_may_come_in_parts(server: Server) -> None:
    parts = [declaration({path: data}) for path, data in PHOTOS.items()]
    whole = await server.upload(declaration())
    assert (await server.upload(*parts)).id == whole.id


@pytest.mark.parametrize(
    ("messages", "field", "said"),
    [
        ([], "declaration", "no image is declared"),
        ([Message()], "content", "is empty"),
        ([chunk(b"first")], "declaration", "no image is declared"),
        ([declaration(), chunk(b"first"), declaration()], "declaration", "after the first piece"),
        ([declaration(), chunk(b"other")], "chunk.sha256", "wasn't declared"),
        ([declaration(), chunk(b"second", 1)], "chunk.offset", "image 'red/2.png': a piece begins at byte 1, and 0"),
        ([declaration(), chunk(LARGE)], "chunk.data", "expected 1 to 1048576"),
        ([declaration(), declaration()], "declaration", "'red/1.png' is declared twice"),
        ([declaration({"../1.png": b"x"})], "declaration", "image '../1.png' must have a relative path"),
        ([declaration({"a.png": b"x"}, validation=True, test=True)], "declaration", "both validate and test"),
    ],
)
async def test_what_cannot_be_is_named(server: Server, messages: list[Message], field: str, said: str) -> None:
    error = await refused(server.upload(*messages))
    assert (error.code, error.field) == (StatusCode.INVALID_ARGUMENT, field)
    assert said in error.message
    assert server.store.list_datasets() == []


async def test_wrong_bytes_name_the_image_and_the_right_ones_are_taken(server: Server) -> None:
    wrong = Message(chunk=pb.ImageChunk(sha256=digest(b"second"), data=b"sECOND"))
    error = await refused(server.upload(declaration(), chunk(b"first"), wrong))
    assert (error.code, error.field) == (StatusCode.INVALID_ARGUMENT, "chunk.sha256")
    assert "image 'red/2.png': its bytes have the SHA-256" in error.message
    made = await server.upload(declaration(), chunk(b"second"), *pieces(LARGE))
    assert made.HasField("create_time")


async def test_two_clients_upload_the_same_at_once(server: Server) -> None:
    photos = {f"{'ab'[i % 2]}/{i}.png": bytes([i]) * 100_000 for i in range(30)}
    messages = [declaration(photos), *(chunk(d, at, at + 50_000) for d in photos.values() for at in (0, 50_000))]
    made = await asyncio.gather(*(server.upload(*messages) for _ in range(4)))
    if missing := set(made[0].missing_sha256):  # overtaken by another: what a client does then is send the rest
        rest = [d for d in photos.values() if digest(d) in missing]
        made.append(await server.upload(declaration(photos), *map(chunk, rest)))
    assert len({d.id for d in made}) == 1 and made[-1].images == 30
    assert len(server.store.list_datasets()) == 1
    assert server.store.images.used_bytes == 30 * 100_000


async def test_a_dataset_that_a_job_uses_is_kept(server: Server) -> None:
    made = await server.upload(declaration({"a/1.png": b"first"}), chunk(b"first"))
    server.jobs.using = server.store.datasets_folder / made.id
    error = await refused(server.stub.DeleteDataset(pb.DeleteDatasetRequest(dataset_id=made.id)))
    assert error.code is StatusCode.FAILED_PRECONDITION
    assert len(server.store.list_datasets()) == 1
    near = made.id[:-2] + "zz"
    error = await refused(server.stub.DeleteDataset(pb.DeleteDatasetRequest(dataset_id=near)))
    assert (error.code, error.field) == (StatusCode.NOT_FOUND, "dataset_id") and made.id in error.message


async def test_a_deletion_that_takes_long_is_answered_and_goes_on(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = await server.upload(declaration({"a/1.png": b"first"}), chunk(b"first"))
    purge, go_on, ended = server.store.purge, threading.Event(), threading.Event()

    def slow(detached: Path) -> None:
        assert go_on.wait(TIMEOUT_SECONDS)
        purge(detached)
        ended.set()

    monkeypatch.setattr(server.store, "purge", slow)
    monkeypatch.setattr("backboned.server.api.uploads._PURGE_SECONDS", 0.01)
    await server.stub.DeleteDataset(pb.DeleteDatasetRequest(dataset_id=made.id))
    assert server.store.list_datasets() == [] and server.store.images.used_bytes == 5
    go_on.set()
    assert await asyncio.to_thread(ended.wait, TIMEOUT_SECONDS)
    assert server.store.images.used_bytes == 0


async def test_images_of_a_dataset_take_the_place_of_their_names(server: Server) -> None:
    made = await server.upload(declaration(), chunk(b"first"), chunk(b"second"), *pieces(LARGE))

    def asking(*names: str) -> pb.PredictRequest:
        images = [pb.Image(encoded=b"sent"), *(pb.Image(dataset_image=name) for name in names)]
        return pb.PredictRequest(model="m", top_k=2, images=images)

    plain = asking()
    assert await server.service.with_dataset_images(plain) is plain
    request = asking(f"{made.id}/red/2.png", f"{made.id}/red/1.png")
    filled = await server.service.with_dataset_images(request)
    assert [image.encoded for image in filled.images] == [b"sent", b"second", b"first"]
    assert (filled.model, filled.top_k, request.images[1].encoded) == ("m", 2, b"")
    for names, kind, said in (
        ([f"{made.id}/red/1.png", f"{made.id}/red/3.png"], ErrorKind.NOT_FOUND, "image 2: dataset"),
        (["x", "ds-00000000/red/1.png"], ErrorKind.INVALID_ARGUMENT, "image 1: 'x' names no image"),
        ([f"{made.id}/../x.png"], ErrorKind.INVALID_ARGUMENT, "image 1: "),
        ([f"{made.id}/blue/1.png"] * 2, ErrorKind.INVALID_ARGUMENT, "more than 4194304 bytes together"),
    ):
        with pytest.raises(BackbonedError) as caught:
            await server.service.with_dataset_images(asking(*names))
        assert caught.value.kind is kind and said in caught.value.message
        assert (caught.value.field or "").startswith("images[")
