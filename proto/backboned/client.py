"""A light Python client of a Backboned daemon: it needs grpcio and protobuf, and nothing else.

    from backboned.client import Client

    with Client("127.0.0.1:8001") as client:
        job = client.fine_tune("flowers", "mobilenet_v2", "/photos/flowers", max_epochs=10)
        job = client.wait(job.id)
        reply = client.predict("flowers", ["rose.jpg"], top_k=3)
        print(reply.version, reply.predictions[0].classes[0].label)

Methods take plain values and return the messages of `backboned.v1`, which are the stable API. They raise
`ClientError`. A client may be shared between threads.
"""

import os
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Self, TypeVar, Unpack

import grpc

from backboned._client_channel import channel_options
from backboned._client_images import Image, batches, read, several
from backboned._client_questions import to_one, to_outcomes, to_policy, to_report, to_several
from backboned._client_status import ClientError
from backboned._client_streams import answers
from backboned._client_throttle import Throttle, for_model
from backboned._client_training import TrainingOptions
from backboned._client_uploads import upload
from backboned.v1 import model_service_pb2 as pb
from backboned.v1.model_service_pb2_grpc import ModelServiceStub

__all__ = ["DEFAULT_ADDRESS", "FINAL_STATES", "Client", "ClientError", "Throttle", "TrainingOptions"]

DEFAULT_ADDRESS = "127.0.0.1:8001"
MAX_MESSAGE_BYTES = 64 * 2**20
FINAL_STATES = frozenset({pb.JOB_STATE_SUCCEEDED, pb.JOB_STATE_FAILED, pb.JOB_STATE_CANCELLED})

_Reply = TypeVar("_Reply")


class Client:
    """A connection to the daemon at `address` (`host:port`), made when it is first used.

    `timeout_seconds` bounds each call, its retries included; streams have no deadline. `max_message_bytes` bounds a
    message in either direction and should not be above the daemon's own limit. Calls that are safe to repeat are
    retried, a few times within about a second, while the daemon is unavailable or full; while it refuses most Predict
    calls, most are refused here at once (see `Throttle`). `actor` is who changes models by it, for the history.
    """

    def __init__(
        self,
        address: str = DEFAULT_ADDRESS,
        *,
        timeout_seconds: float = 60.0,
        max_message_bytes: int = MAX_MESSAGE_BYTES,
        actor: str = "",
    ) -> None:
        self.address = address
        self._timeout_seconds = timeout_seconds
        self._max_message_bytes = max_message_bytes
        self._channel = grpc.insecure_channel(address, options=channel_options(max_message_bytes))
        self._stub = ModelServiceStub(self._channel)
        self._metadata = [("backboned-actor", actor)] if actor else []
        self._throttle = Throttle()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the connection and every call that is under way."""
        self._channel.close()

    def predict(
        self,
        model: str,
        images: Image | Iterable[Image],
        *,
        version: int | None = None,
        alias: str | None = None,
        top_k: int = 0,
        labels: Sequence[str] = (),
        return_embedding: bool = False,
        embedding_stage: str = "",
        sticky_key: str = "",
    ) -> pb.PredictResponse:
        """Classify up to 256 images, given as a file's bytes or as paths, in one call.

        `version` or `alias` choose who answers (neither: what serves by default); `top_k` 0 returns every class;
        `labels` are the true classes, if known, and feed the daemon's serving loss. `return_embedding` adds the
        features that the head reads; `embedding_stage` adds that stage's output instead, averaged over positions. Where
        traffic is divided between versions, calls with one `sticky_key` are answered by one of them.
        """
        request = to_one(
            model, version, alias, top_k=top_k, return_embedding=return_embedding, embedding_stage=embedding_stage
        )
        request.sticky_key = sticky_key
        return self._predict(request, images, labels)

    def predict_models(
        self,
        models: str | Iterable[str],
        images: Image | Iterable[Image],
        *,
        top_k: int = 0,
        labels: Sequence[str] = (),
        return_embedding: bool = False,
        embedding_stage: str = "",
    ) -> Sequence[pb.ModelPredictions]:
        """Classify images by up to 64 models in one call, which computes once what they have in common.

        Each of `models` is a name, or a name with a version or an alias: `["flowers@3", "flowers@stable", "pets"]`. The
        results are in their order. The rest is as for `predict`, and holds for each model.
        """
        request = to_several(models, top_k=top_k, return_embedding=return_embedding, embedding_stage=embedding_stage)
        return self._predict(request, images, labels).results

    def predict_stream(
        self,
        model: str,
        images: Iterable[Image],
        *,
        version: int | None = None,
        alias: str | None = None,
        top_k: int = 0,
        labels: Iterable[str] = (),
        return_embedding: bool = False,
        embedding_stage: str = "",
        batch_size: int = 16,
    ) -> Iterator[pb.PredictResponse]:
        """Classify any number of images over one stream; yields a reply for every `batch_size` images, in order.

        `images` and `labels` are read as the daemon keeps up, so they may be generators. The first error ends it.
        """
        question = to_one(
            model, version, alias, top_k=top_k, return_embedding=return_embedding, embedding_stage=embedding_stage
        )
        failures: list[ClientError] = []

        def requests() -> Iterator[pb.PredictRequest]:
            try:
                for held, known in batches(several(images), labels, batch_size, self._max_message_bytes // 2):
                    request = pb.PredictRequest(images=[pb.Image(encoded=data) for data in held], labels=known)
                    request.MergeFrom(question)
                    yield request
            except ClientError as error:  # gRPC would hide what its sending thread raised
                failures.append(error)
                raise

        try:
            yield from answers(lambda: self._stub.PredictStream(requests()))
        except grpc.RpcError as error:
            raise (failures[0] if failures else ClientError.of(error, self.address)) from None

    def fine_tune(
        self,
        model: str,
        backbone: str,
        dataset: str | os.PathLike[str],
        *,
        request_id: str | None = None,
        **options: Unpack[TrainingOptions],
    ) -> pb.Job:
        """Start a job that trains the next version of `model`; returns at once.

        `dataset` is a folder on the daemon's machine, sent as it is (so make a relative path absolute, unless it is
        meant relative to the daemon's data root), or the id of an uploaded dataset. `request_id` defaults to a new
        UUID: one call, one job, however often it is retried.
        """
        if unknown := set(options) - set(TrainingOptions.__annotations__):
            raise TypeError(
                f"no training options: {', '.join(unknown)}; known: {', '.join(TrainingOptions.__annotations__)}"
            )
        request = pb.FineTuneRequest(
            model=model,
            backbone=backbone,
            dataset=os.fspath(dataset),
            request_id=str(uuid.uuid4()) if request_id is None else request_id,
            options=pb.TrainingOptions(**options),  # type: ignore[arg-type]  # a task may be given by its name
        )
        return self._call(self._stub.FineTune, request)

    def watch(self, job_id: str, after_sequence: int = 0, *, reconnect_seconds: float = 60.0) -> Iterator[pb.JobEvent]:
        """A job's events, from the first or after `after_sequence`, until it ends; each comes once and in order.

        When the daemon goes away, as in a restart, this waits up to `reconnect_seconds` for it and goes on.
        """
        give_up_at = 0.0
        while True:
            request = pb.WatchJobRequest(job_id=job_id, after_sequence=after_sequence)
            try:
                with closing(answers(partial(self._stub.WatchJob, request))) as events:
                    for event in events:
                        yield event
                        if event.state in FINAL_STATES:
                            return
                        after_sequence, give_up_at = event.sequence, 0.0
                if self.get_job(job_id).state in FINAL_STATES:
                    return
            except grpc.RpcError as error:
                failure = ClientError.of(error, self.address)
                lost = failure.code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)
                give_up_at = give_up_at or time.monotonic() + reconnect_seconds
                if not lost or not after_sequence or time.monotonic() > give_up_at:
                    raise failure from None
            time.sleep(0.2)

    def wait(self, job_id: str, *, reconnect_seconds: float = 60.0) -> pb.Job:
        """Wait until a job has ended, well or not, and return it; its `state` and `error` say how."""
        for _ in self.watch(job_id, reconnect_seconds=reconnect_seconds):
            pass
        return self.get_job(job_id)

    def get_job(self, job_id: str) -> pb.Job:
        """One job."""
        return self._call(self._stub.GetJob, pb.GetJobRequest(job_id=job_id))

    def cancel_job(self, job_id: str) -> pb.Job:
        """Ask a job to stop. Checkpoints that it has finished are kept."""
        return self._call(self._stub.CancelJob, pb.CancelJobRequest(job_id=job_id))

    def list_jobs(self, *, model: str = "", filter: str = "", page_size: int = 0) -> Iterator[pb.Job]:
        """All jobs, newest first; pages are fetched as they are needed."""
        request = pb.ListJobsRequest(model=model, filter=filter, page_size=page_size)
        for page in self._pages(self._stub.ListJobs, request):
            yield from page.jobs

    def list_checkpoints(
        self, *, model: str = "", filter: str = "", order_by: str = "", page_size: int = 0
    ) -> Iterator[pb.Checkpoint]:
        """All checkpoints that match `filter`, in `order_by`; pages are fetched as they are needed."""
        request = pb.ListCheckpointsRequest(model=model, filter=filter, order_by=order_by, page_size=page_size)
        for page in self._pages(self._stub.ListCheckpoints, request):
            yield from page.checkpoints

    def list_models(self, *, page_size: int = 0) -> Iterator[pb.Model]:
        """All models, by name; pages are fetched as they are needed."""
        for page in self._pages(self._stub.ListModels, pb.ListModelsRequest(page_size=page_size)):
            yield from page.models

    def get_model(self, model: str) -> pb.Model:
        """One model, with its versions and aliases."""
        return self._call(self._stub.GetModel, pb.GetModelRequest(model=model))

    def get_report(self, model: str, *, version: int | None = None, alias: str | None = None) -> pb.Report:
        """How good a version is, as one HTML page; of the newest that has a report, unless one is named."""
        return self._call(self._stub.GetReport, to_report(model, version, alias))

    def upload_dataset(
        self, folder: str | os.PathLike[str], *, name: str = "", progress: Callable[[int, int], None] | None = None
    ) -> pb.Dataset:
        """Upload the images of a folder on this machine; the `id` of what is returned is a dataset for `fine_tune`.

        The folder has a folder a class, or train/ and val/ or test/ with a folder a class each, or a manifest. Images
        that the daemon has are not sent; where the connection breaks, this goes on. `progress(done_bytes, total_bytes)`
        is called as images reach the daemon, perhaps from another thread.
        """
        return upload(
            self._stub.UploadDataset,
            Path(folder),
            name=name,
            progress=progress,
            address=self.address,
            max_message_bytes=self._max_message_bytes,
        )

    def list_datasets(self, *, page_size: int = 0) -> Iterator[pb.Dataset]:
        """All uploaded datasets, newest first; pages are fetched as they are needed."""
        for page in self._pages(self._stub.ListDatasets, pb.ListDatasetsRequest(page_size=page_size)):
            yield from page.datasets

    def delete_dataset(self, dataset_id: str) -> None:
        """Delete an uploaded dataset, and the images that no other one holds."""
        self._call(self._stub.DeleteDataset, pb.DeleteDatasetRequest(dataset_id=dataset_id))

    def list_backbones(self) -> pb.ListBackbonesResponse:
        """The backbones that can be used, and the plugins that are broken."""
        return self._call(self._stub.ListBackbones, pb.ListBackbonesRequest())

    def set_alias(self, model: str, alias: str, version: int, *, expected_version: int | None = None) -> pb.Model:
        """Point `alias` to `version`; with `expected_version`, only if it points there now (0: nowhere)."""
        request = pb.SetAliasRequest(model=model, alias=alias, version=version, expected_version=expected_version)
        return self._call(self._stub.SetAlias, request)

    def delete_alias(self, model: str, alias: str, *, expected_version: int | None = None) -> pb.Model:
        """Remove `alias`; with `expected_version`, only if it points there now."""
        request = pb.DeleteAliasRequest(model=model, alias=alias, expected_version=expected_version)
        return self._call(self._stub.DeleteAlias, request)

    def set_version_policy(self, model: str, policy: str, *, version: int | None = None) -> pb.Model:
        """Choose how the version that serves is found: "latest", "best", "pinned", "manual",
        "promote_when_better" or "rollback_when_worse".

        "pinned", "manual" and "promote_when_better" take a `version`; without one they begin with what serves now.
        """
        request = to_policy(model, policy, version)
        return self._call(self._stub.SetVersionPolicy, request)

    def report_outcomes(self, labels: Mapping[str, str]) -> pb.ReportOutcomeResponse:
        """Tell the true labels of predictions, by their ids: any number, and hours later if need be."""
        told = pb.ReportOutcomeResponse()
        for request in to_outcomes(labels):
            answer: pb.ReportOutcomeResponse = self._call(self._stub.ReportOutcome, request)
            told.accepted += answer.accepted
            told.unknown_prediction_ids.extend(answer.unknown_prediction_ids)
        return told

    def roll_back(self, model: str, *, expected_version: int | None = None, reason: str = "") -> pb.Model:
        """Go back to the version that served before; with `expected_version`, only if that one serves now."""
        request = pb.RollBackRequest(model=model, expected_version=expected_version, reason=reason)
        return self._call(self._stub.RollBack, request)

    def set_traffic(self, model: str, weights: Mapping[str, int]) -> pb.Model:
        """Divide calls that name neither version nor alias between aliases, by weight; `{}`: not any more."""
        return self._call(self._stub.SetTraffic, pb.SetTrafficRequest(model=model, weights=weights))

    def delete_model_version(self, model: str, version: int) -> None:
        """Delete a version and its files, unless it is in use."""
        self._call(self._stub.DeleteModelVersion, pb.DeleteModelVersionRequest(model=model, version=version))

    def list_history(self, *, model: str = "", page_size: int = 0) -> Iterator[pb.Change]:
        """What served when, and who changed it, newest first; pages are fetched as they are needed."""
        request = pb.ListHistoryRequest(model=model, page_size=page_size)
        for page in self._pages(self._stub.ListHistory, request):
            yield from page.changes

    def _predict(
        self, request: pb.PredictRequest, images: Image | Iterable[Image], labels: Sequence[str]
    ) -> pb.PredictResponse:
        model = request.models[0].model if request.models else request.model  # the one that the call is counted for
        with self._throttle.call(model):
            request.images.extend(pb.Image(encoded=read(image, i)) for i, image in enumerate(several(images)))
            request.labels.extend(labels)
            return self._call(self._stub.Predict, request, for_model(model))

    def _call(self, method: Callable[..., _Reply], request: object, metadata: Sequence[tuple[str, str]] = ()) -> _Reply:
        try:
            return method(request, timeout=self._timeout_seconds, metadata=[*self._metadata, *metadata])
        except grpc.RpcError as error:
            raise ClientError.of(error, self.address) from None

    def _pages(self, method: Callable[..., _Reply], request: object) -> Iterator[_Reply]:
        while True:
            page = self._call(method, request)
            yield page
            token = page.next_page_token  # type: ignore[attr-defined]  # every List…Response has one
            if not token:
                return
            request.page_token = token  # type: ignore[attr-defined]  # and every List…Request
