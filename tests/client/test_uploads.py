"""Uploads by the client to the daemon's own service: only what is missing is sent, also over a bad connection."""

import asyncio
import hashlib
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from backboned import _client_uploads
from backboned.client import Client, ClientError
from backboned.registry import BackbonedError, ErrorKind
from backboned.server.api.errors import ErrorInterceptor
from backboned.server.api.uploads import Uploads
from backboned.server.training.uploads import UploadStore
from backboned.v1 import model_service_pb2 as pb
from backboned.v1.model_service_pb2_grpc import add_ModelServiceServicer_to_server

MAX_MESSAGE_BYTES = 2**20
LARGE = bytes(range(256)) * 8 * 1024  # 2 MiB
PHOTOS = {"red/1.png": b"first", "red/2.png": LARGE, "blue/1.png": b"third", "blue/2.png": b"first"}


class Jobs:
    async def release(self, _: Path, remove: Any) -> Any:
        return remove()


class Service(Uploads):
    """The daemon's own, whose connection is lost after each number of pieces in `breaks`; counts what comes."""

    def __init__(self, store: UploadStore) -> None:
        super().__init__(store, Jobs(), MAX_MESSAGE_BYTES)  # type: ignore[arg-type]
        self.breaks: list[int] = []
        self.calls = 0
        self.declarations = 0
        self.pieces: list[tuple[str, int]] = []

    async def UploadDataset(self, requests: AsyncIterator[Any], context: Any) -> pb.Dataset:  # noqa: N802
        self.calls += 1
        return await super().UploadDataset(self._watched(requests), context)

    async def _watched(self, requests: AsyncIterator[Any]) -> AsyncIterator[Any]:
        pieces = 0
        async for request in requests:
            self.declarations += request.HasField("declaration")
            if request.HasField("chunk"):
                if self.breaks and pieces == self.breaks[0]:
                    self.breaks.pop(0)
                    raise BackbonedError(ErrorKind.UNAVAILABLE, "gone")
                pieces += 1
                self.pieces.append((request.chunk.sha256, request.chunk.offset))
            yield request


class Running:
    """The service on a port, in a thread of its own."""

    def __init__(self, store: UploadStore) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._start(store), self._loop).result(20)

    async def _start(self, store: UploadStore) -> None:
        self.service = Service(store)  # type: ignore[abstract]  # what isn't called needs no answer
        options = [("grpc.max_receive_message_length", MAX_MESSAGE_BYTES)]
        self._server = grpc.aio.server(interceptors=[ErrorInterceptor()], options=options)
        add_ModelServiceServicer_to_server(self.service, self._server)
        self.port = self._server.add_insecure_port("127.0.0.1:0")
        await self._server.start()

    def close(self) -> None:
        asyncio.run_coroutine_threadsafe(self._server.stop(None), self._loop).result(20)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(20)
        self._loop.close()


@pytest.fixture
def store(tmp_path: Path) -> UploadStore:
    store = UploadStore(tmp_path / "uploads", 8 * 2**20)
    store.open()
    return store


@pytest.fixture
def running(store: UploadStore) -> Iterator[Running]:
    running = Running(store)
    yield running
    running.close()


@pytest.fixture
def service(running: Running) -> Service:
    return running.service


@pytest.fixture
def client(running: Running) -> Iterator[Client]:
    with Client(f"127.0.0.1:{running.port}", max_message_bytes=MAX_MESSAGE_BYTES) as client:
        yield client


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for path, data in PHOTOS.items():
        (tmp_path / "photos" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "photos" / path).write_bytes(data)
    return tmp_path / "photos"


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def test_a_folder_is_uploaded_once(client: Client, service: Service, store: UploadStore, folder: Path) -> None:
    told: list[tuple[int, int]] = []
    made = client.upload_dataset(folder, name="colours", progress=lambda done, total: told.append((done, total)))
    assert (made.name, made.images, list(made.missing_sha256)) == ("colours", 4, [])
    kept = store.datasets_folder / made.id
    assert {p: (kept / p).read_bytes() for p in PHOTOS} == PHOTOS
    assert sum(sha256 == digest(b"first") for sha256, _ in service.pieces) == 1  # it is there twice
    total = len(LARGE) + len(b"first") + len(b"third")
    assert told == sorted(told) and told[0] == (0, total) and told[-1] == (total, total)

    before = len(service.pieces)
    assert client.upload_dataset(folder) == made
    (folder / "blue" / "3.png").write_bytes(b"new")
    more = client.upload_dataset(folder)
    assert more.id != made.id and [sha256 for sha256, _ in service.pieces[before:]] == [digest(b"new")]
    assert [d.id for d in client.list_datasets(page_size=1)] == [more.id, made.id]
    client.delete_dataset(made.id)
    assert list(client.list_datasets()) == [more]


def test_what_breaks_off_goes_on_at_its_byte(client: Client, service: Service, folder: Path) -> None:
    service.breaks = [1, 2, 1]
    made = client.upload_dataset(folder)
    assert made.HasField("create_time") and service.breaks == []
    assert len(service.pieces) == len(set(service.pieces))  # nothing came twice
    assert {offset for sha256, offset in service.pieces if sha256 == digest(LARGE)} == {0, 2**19, 2**20, 3 * 2**19}


def test_a_connection_that_never_lasts_is_given_up(
    client: Client, service: Service, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_client_uploads, "_PAUSE_SECONDS", 0.0)
    service.breaks = [0] * 1000
    with pytest.raises(ClientError, match="still misses 3 images"):
        client.upload_dataset(folder)


def test_a_daemon_that_is_not_there_is_said_soon(
    folder: Path, monkeypatch: pytest.MonkeyPatch, unused_tcp_port: int
) -> None:
    monkeypatch.setattr(_client_uploads, "_CONNECT_SECONDS", 0.1)
    with Client(f"127.0.0.1:{unused_tcp_port}") as client, pytest.raises(ClientError, match="no daemon answers"):
        client.upload_dataset(folder)


def test_what_the_daemon_refuses_is_raised_at_once(client: Client, service: Service, folder: Path) -> None:
    for i in range(4):
        (folder / "red" / f"large-{i}.png").write_bytes(bytes([i]) * 2 * 2**20)
    with pytest.raises(ClientError, match="quota") as caught:
        client.upload_dataset(folder)
    assert caught.value.code is grpc.StatusCode.RESOURCE_EXHAUSTED and service.calls == 1 and not service.pieces


def test_a_file_that_changes_meanwhile_is_named(client: Client, folder: Path) -> None:
    changed = folder / "blue" / "1.png"

    def change(*_: int) -> None:
        changed.write_bytes(b"THIRD")

    with pytest.raises(ClientError, match=r"image 'blue/1\.png': its bytes have the SHA-256"):
        client.upload_dataset(folder, progress=change)


def test_a_file_that_goes_meanwhile_is_named(client: Client, folder: Path) -> None:
    def remove(*_: int) -> None:
        (folder / "blue" / "1.png").unlink(missing_ok=True)

    with pytest.raises(ClientError, match=r"can't read .*blue/1\.png: No such file"):
        client.upload_dataset(folder, progress=remove)


def test_more_may_be_missing_than_one_answer_tells(
    client: Client, service: Service, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("backboned.server.api.uploads._MAX_MISSING", 1)
    assert client.upload_dataset(folder).HasField("create_time")
    assert service.calls == 4 and len(service.pieces) == len(set(service.pieces)) == 6


def test_a_long_declaration_is_sent_in_parts(client: Client, service: Service, tmp_path: Path) -> None:
    folder = tmp_path / "many"
    for name in ("a" * 200, "b" * 200):
        (folder / name / ("c" * 200)).mkdir(parents=True)
        for i in range(700):
            (folder / name / ("c" * 200) / f"{i:0200}.png").write_bytes(b"%d" % (i % 3))
    assert client.upload_dataset(folder).images == 1400
    assert service.calls == 2 and service.declarations == 2 * 3
