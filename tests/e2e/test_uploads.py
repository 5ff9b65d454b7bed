"""Uploads to a daemon that has no data root, behind a front end: trained on, predicted, killed, and deleted."""

import hashlib
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import pytest

from backboned.client import Client, ClientError
from backboned.server.commands.local_daemon import LocalDaemon
from backboned.v1 import model_service_pb2 as pb
from backboned.v1.model_service_pb2_grpc import ModelServiceStub

StartDaemon = Callable[..., LocalDaemon]
Connect = Callable[[LocalDaemon], Client]
WaitFor = Callable[[Callable[[], object]], None]


def test_photos_are_uploaded_trained_on_and_predicted_by_their_names(
    start_daemon: StartDaemon, connect: Connect, data: Path, digits_weights: Path, wait_for: WaitFor
) -> None:
    daemon = start_daemon(f"--weights=digits={digits_weights}", "--frontends=1")
    client = connect(daemon)
    dataset = client.upload_dataset(data / "squares", name="squares")
    assert (dataset.images, list(dataset.missing_sha256)) == (24, [])

    with pytest.raises(ClientError, match="did you mean") as caught:
        client.fine_tune("squares", "digits", dataset.id[:-1] + ("0" if dataset.id[-1] != "0" else "1"))
    assert (caught.value.code, caught.value.field) == (grpc.StatusCode.NOT_FOUND, "dataset")

    job = client.wait(client.fine_tune("squares", "digits", dataset.id, max_epochs=5, views=1).id)
    assert job.state == pb.JOB_STATE_SUCCEEDED, job.error
    assert list(job.best.classes) == ["blue", "red"]
    wait_for(lambda: client.get_model("squares").serving_version == 1)

    names = ["red/00.png", "blue/03.png"]
    sent = client.predict("squares", [data / "squares" / name for name in names])
    with grpc.insecure_channel(daemon.grpc) as channel:
        stub = ModelServiceStub(channel)
        images = [pb.Image(dataset_image=f"{dataset.id}/{name}") for name in names]
        named = stub.Predict(pb.PredictRequest(model="squares", images=images))
        (streamed,) = stub.PredictStream(iter([pb.PredictRequest(model="squares", images=images)]))
        for answer in (named, streamed):
            assert [list(p.classes) for p in answer.predictions] == [list(p.classes) for p in sent.predictions]
        unknown = pb.Image(dataset_image=f"{dataset.id}/red/99.png")
        with pytest.raises(grpc.RpcError) as refused:
            stub.Predict(pb.PredictRequest(model="squares", images=[*images, unknown]))
    error = ClientError.of(refused.value, "")
    assert (error.code, error.field) == (grpc.StatusCode.NOT_FOUND, "images[2]") and "image 2: " in error.message

    client.delete_dataset(dataset.id)
    assert list(client.list_datasets()) == []


def test_a_dataset_is_kept_while_a_job_needs_it(
    start_daemon: StartDaemon, connect: Connect, data: Path, digits_weights: Path
) -> None:
    client = connect(start_daemon(f"--weights=digits={digits_weights}"))
    dataset = client.upload_dataset(data / "squares")
    running = client.fine_tune("long", "digits", dataset.id, max_epochs=10_000, patience=0)
    waiting = client.fine_tune("long", "digits", dataset.id)
    for job in (running, waiting):
        with pytest.raises(ClientError, match="uses dataset") as caught:
            client.delete_dataset(dataset.id)
        assert caught.value.code is grpc.StatusCode.FAILED_PRECONDITION
        client.cancel_job(job.id)
        assert client.wait(job.id).state == pb.JOB_STATE_CANCELLED
    client.delete_dataset(dataset.id)
    with pytest.raises(ClientError, match="unknown uploaded dataset"):
        client.fine_tune("long", "digits", dataset.id)


def test_what_came_before_a_kill_need_not_come_again(
    start_daemon: StartDaemon, connect: Connect, tmp_path: Path, wait_for: WaitFor
) -> None:
    large = os.urandom(5 * 2**20)
    for name, content in (("large", large), ("small", b"small")):
        (tmp_path / "photos" / name).mkdir(parents=True)
        (tmp_path / "photos" / name / "1.png").write_bytes(content)
    daemon = start_daemon()
    with grpc.insecure_channel(daemon.grpc) as channel:
        sha256 = hashlib.sha256(large).hexdigest()
        declared = pb.DatasetEntry(path="large/1.png", labels=["large"], sha256=sha256, size_bytes=len(large))
        other = pb.DatasetEntry(
            path="small/1.png", labels=["small"], sha256=hashlib.sha256(b"small").hexdigest(), size_bytes=5
        )
        part_file = tmp_path / "state" / "uploads" / "images" / sha256[:2] / f"{sha256}.part"

        def messages() -> Iterator[pb.UploadDatasetRequest]:
            yield pb.UploadDatasetRequest(declaration=pb.DatasetDeclaration(entries=[declared, other]))
            for offset in range(0, 3 * 2**20, 2**20):
                piece = large[offset : offset + 2**20]
                yield pb.UploadDatasetRequest(chunk=pb.ImageChunk(sha256=sha256, offset=offset, data=piece))
            wait_for(lambda: part_file.is_file() and part_file.stat().st_size == 3 * 2**20)
            os.kill(daemon.pid, signal.SIGKILL)

        with pytest.raises(grpc.RpcError):
            ModelServiceStub(channel).UploadDataset(messages())
    daemon.wait()
    assert list((tmp_path / "state" / "uploads" / "datasets").iterdir()) == []

    told: list[tuple[int, int]] = []
    client = connect(start_daemon())
    dataset = client.upload_dataset(tmp_path / "photos", progress=lambda *done: told.append(done))
    assert told[0] == (3 * 2**20, len(large) + 5) and told[-1] == (len(large) + 5, len(large) + 5)
    assert (dataset.images, [d.id for d in client.list_datasets()]) == (2, [dataset.id])
