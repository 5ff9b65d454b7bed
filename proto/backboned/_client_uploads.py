"""Uploading a folder: ask what is missing, send that, and go on where a call broke off."""

import hashlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import grpc

from backboned._client_folder import photos
from backboned._client_status import ClientError
from backboned.v1 import model_service_pb2 as pb

Progress = Callable[[int, int], None]

PIECE_BYTES = 2**19

_DECLARATION_BYTES = 2**19
_RECEIVED_KEY = "backboned-received"
_CALLS_IN_VAIN = 5
_CONNECT_SECONDS = 2.0
_RECONNECT_SECONDS = 60.0
_PAUSE_SECONDS = 0.3
_LOST = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)


def upload(
    method: Any, folder: Path, *, name: str, progress: Progress | None, address: str, max_message_bytes: int
) -> pb.Dataset:
    """Upload by the stub's `UploadDataset`; see `Client.upload_dataset`."""
    entries, files = _read(folder)
    declarations = _declarations(name, entries, min(_DECLARATION_BYTES, max_message_bytes // 2))
    sizes = {entry.sha256: entry.size_bytes for entry in entries}
    return _Upload(
        method, declarations, files, sizes, progress, address, min(PIECE_BYTES, max_message_bytes // 2)
    ).run()


class _Upload:
    def __init__(  # noqa: PLR0917 - made in one place
        self,
        method: Any,
        declarations: Sequence[pb.UploadDatasetRequest],
        files: Mapping[str, Path],
        sizes: Mapping[str, int],
        progress: Progress | None,
        address: str,
        piece_bytes: int,
    ) -> None:
        self._method = method
        self._declarations = declarations
        self._files = files
        self._sizes = sizes
        self._progress = progress
        self._address = address
        self._piece_bytes = piece_bytes
        self._total = self._left = sum(sizes.values())
        self._answered = False

    def run(self) -> pb.Dataset:
        """Call until the dataset is whole. Only so many calls may follow each other that bring it no nearer to that."""
        dataset, received = self._call((), {})
        in_vain, least = 0, self._left
        while dataset.missing_sha256:
            if in_vain == _CALLS_IN_VAIN:
                message = f"the daemon still misses {len(dataset.missing_sha256)} images that were sent to it"
                raise ClientError(grpc.StatusCode.ABORTED, message)
            dataset, received = self._call(dataset.missing_sha256, received)
            in_vain = 0 if self._left < least else in_vain + 1
            least = min(least, self._left)
        return dataset

    def _call(self, missing: Sequence[str], received: Mapping[str, int]) -> tuple[pb.Dataset, Mapping[str, int]]:
        """Declare, send what is `missing`, and return what is missing then; asks again if the connection is lost."""
        give_up_at = 0.0
        while True:
            failures: list[ClientError] = []
            try:
                dataset, call = self._method.with_call(self._requests(missing, received, failures))
            except grpc.RpcError as error:
                failure = failures[0] if failures else ClientError.of(error, self._address)
                patience = _RECONNECT_SECONDS if self._answered else _CONNECT_SECONDS
                give_up_at = give_up_at or time.monotonic() + patience
                if failures or failure.code not in _LOST or time.monotonic() > give_up_at:
                    raise failure from None
                time.sleep(_PAUSE_SECONDS)
                missing, received = (), {}  # ask what has come meanwhile
            else:
                self._answered = True
                received = _received(call.trailing_metadata())
                self._left = sum(self._sizes[s] - received.get(s, 0) for s in dataset.missing_sha256)
                self._report(self._left)
                return dataset, received

    def _requests(
        self, missing: Sequence[str], received: Mapping[str, int], failures: list[ClientError]
    ) -> Iterator[pb.UploadDatasetRequest]:
        left = self._left
        try:
            yield from self._declarations
            for sha256 in missing:
                offset = received.get(sha256, 0)
                for piece in _pieces(self._files[sha256], offset, self._piece_bytes):
                    yield pb.UploadDatasetRequest(chunk=pb.ImageChunk(sha256=sha256, offset=offset, data=piece))
                    offset += len(piece)
                    left -= len(piece)
                    self._report(left)
        except ClientError as error:  # gRPC would hide what its sending thread raised
            failures.append(error)
            raise

    def _report(self, left_bytes: int) -> None:
        if self._progress is not None:
            self._progress(self._total - max(left_bytes, 0), self._total)


def _read(folder: Path) -> tuple[list[pb.DatasetEntry], dict[str, Path]]:
    """What a folder is to be declared as, and the file of each image by its digest."""
    entries, files = [], {}
    for photo in photos(folder):
        sha256, size_bytes = _digest(photo.file)
        files[sha256] = photo.file
        entries.append(
            pb.DatasetEntry(
                path=photo.path,
                labels=photo.labels,
                sha256=sha256,
                size_bytes=size_bytes,
                validation=photo.part == "val",
                test=photo.part == "test",
            )
        )
    return entries, files


def _declarations(name: str, entries: Sequence[pb.DatasetEntry], max_bytes: int) -> list[pb.UploadDatasetRequest]:
    """Declarations that have so many bytes at most, or one entry."""
    declarations: list[pb.DatasetDeclaration] = []
    held_bytes = max_bytes
    for entry in entries:
        size_bytes = entry.ByteSize() + 8
        if held_bytes + size_bytes > max_bytes:
            declarations.append(pb.DatasetDeclaration(name=name))
            held_bytes = len(name.encode()) + 16
        declarations[-1].entries.append(entry)
        held_bytes += size_bytes
    return [pb.UploadDatasetRequest(declaration=declaration) for declaration in declarations]


def _received(metadata: Any) -> Mapping[str, int]:
    pairs = (value.partition("=") for key, value in metadata or () if key == _RECEIVED_KEY)
    return {sha256: int(count) for sha256, _, count in pairs}


def _pieces(file: Path, offset: int, size_bytes: int) -> Iterator[bytes]:
    try:
        with file.open("rb") as opened:
            opened.seek(offset)
            while piece := opened.read(size_bytes):
                yield piece
    except OSError as error:
        raise _unreadable(file, error) from None


def _digest(file: Path) -> tuple[str, int]:
    """The SHA-256 of a file, in hex, and its size in bytes."""
    try:
        with file.open("rb") as opened:
            return hashlib.file_digest(opened, "sha256").hexdigest(), opened.tell()
    except OSError as error:
        raise _unreadable(file, error) from None


def _unreadable(file: Path, error: OSError) -> ClientError:
    return ClientError(grpc.StatusCode.INVALID_ARGUMENT, f"can't read {file}: {error.strerror}", "folder")
