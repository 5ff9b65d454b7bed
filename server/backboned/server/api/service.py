"""The servicer: each RPC asks one thing of the rooms below, and translates."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from typing import Any

import grpc

from backboned.registry.backbone import Backbone
from backboned.registry.catalogue import Catalogue
from backboned.registry.directory import CheckpointDirectory
from backboned.registry.errors import invalid, not_found
from backboned.registry.manifest import check_name
from backboned.registry.query import paginate, parse_filter, parse_order
from backboned.registry.reports import read_report
from backboned.registry.weights import WeightStore
from backboned.server.api.checkpoints import checkpoint_fields, checkpoint_message
from backboned.server.api.jobs import MAX_REQUEST_ID_LENGTH, event_message, job_fields, job_message, to_options
from backboned.server.api.predictions import to_call, to_response
from backboned.server.api.streams import in_order
from backboned.server.api.uploads import Uploads
from backboned.server.api.versions import VersionService
from backboned.server.serving.aliases import LATEST
from backboned.server.serving.listing import CheckpointRow, checkpoint_rows
from backboned.server.serving.loader import Loader
from backboned.server.serving.outcomes import Outcomes
from backboned.server.serving.predictor import Predictor
from backboned.server.serving.records import Records
from backboned.server.serving.snapshot import KnownModel
from backboned.server.serving.versions import Versions
from backboned.server.training.supervisor import JobSupervisor
from backboned.server.training.uploads import UploadStore
from backboned.v1 import model_service_pb2 as pb

Context = grpc.aio.ServicerContext[Any, Any]

MODEL_KEY = "backboned-model"
_LOOK_SECONDS = 5.0
_STREAM_WINDOW = 8


@dataclass(frozen=True)
class Rooms:
    """What the servicer asks."""

    catalogue: Catalogue
    weights: WeightStore
    directory: CheckpointDirectory
    loader: Loader
    records: Records
    versions: Versions
    predictor: Predictor
    outcomes: Outcomes
    jobs: JobSupervisor
    uploads: UploadStore


class ModelService(Uploads, VersionService):
    """`backboned.v1.ModelService`."""

    def __init__(self, rooms: Rooms, *, max_message_bytes: int) -> None:
        Uploads.__init__(self, rooms.uploads, rooms.jobs, max_message_bytes)
        VersionService.__init__(self, rooms.versions, rooms.records, rooms.directory, rooms.outcomes)
        self._rooms = rooms

    async def FineTune(self, request: pb.FineTuneRequest, context: Context) -> pb.Job:
        """Start a job."""
        if len(request.request_id) > MAX_REQUEST_ID_LENGTH:
            raise invalid(f"request_id is longer than {MAX_REQUEST_ID_LENGTH} characters", field="request_id")
        job = await self._rooms.jobs.submit(
            model=request.model,
            backbone=request.backbone,
            dataset=request.dataset,
            options=to_options(request.options),
            request_id=request.request_id,
        )
        return job_message(job, self._rooms.loader.snapshot, self._rooms.directory)

    async def GetJob(self, request: pb.GetJobRequest, context: Context) -> pb.Job:
        """One job."""
        job = await self._rooms.jobs.get(request.job_id)
        return job_message(job, self._rooms.loader.snapshot, self._rooms.directory)

    async def ListJobs(self, request: pb.ListJobsRequest, context: Context) -> pb.ListJobsResponse:
        """Jobs, newest first."""
        matches = parse_filter(request.filter, job_fields())
        jobs = [j for j in await self._rooms.jobs.list_jobs(request.model or None) if matches(j)]
        page = paginate(
            jobs,
            request.page_size,
            request.page_token,
            identity=lambda j: j.id,
            query=(request.model, request.filter),
            default=50,
        )
        snapshot, directory = self._rooms.loader.snapshot, self._rooms.directory
        return pb.ListJobsResponse(
            jobs=[job_message(j, snapshot, directory) for j in page.items], next_page_token=page.next_page_token
        )

    async def WatchJob(self, request: pb.WatchJobRequest, context: Context) -> AsyncIterator[pb.JobEvent]:
        """A job's events until it ends."""
        job = await self._rooms.jobs.get(request.job_id)
        async for event in self._rooms.jobs.watch(request.job_id, request.after_sequence):
            yield event_message(event, job, self._rooms.directory)

    async def CancelJob(self, request: pb.CancelJobRequest, context: Context) -> pb.Job:
        """Stop a job."""
        job = await self._rooms.jobs.cancel(request.job_id)
        return job_message(job, self._rooms.loader.snapshot, self._rooms.directory)

    async def ListCheckpoints(self, request: pb.ListCheckpointsRequest, context: Context) -> pb.ListCheckpointsResponse:
        """Checkpoints, page by page."""
        fields = checkpoint_fields()
        matches = parse_filter(request.filter, fields)
        order = parse_order(request.order_by, fields, default="model, version desc, epoch desc")
        rows = await self._rows(request.model)
        page = paginate(
            order.sort(row for row in rows if matches(row)),
            request.page_size,
            request.page_token,
            identity=lambda row: str(row.path),
            query=(request.model, request.filter, request.order_by),
        )
        return pb.ListCheckpointsResponse(
            checkpoints=[checkpoint_message(row) for row in page.items],
            next_page_token=page.next_page_token,
            total_size=page.total,
        )

    def check_wait(self, context: Context) -> None:
        """Refuse a Predict call whose deadline is too near, before its message is read.

        Which model's queue it would wait in is told by its metadata, if by anything.
        """
        model = next((value for key, value in context.invocation_metadata() or () if key == MODEL_KEY), "")
        self._rooms.predictor.check_wait(str(model), context.time_remaining())

    async def Predict(self, request: pb.PredictRequest, context: Context) -> pb.PredictResponse:
        """Classify images."""
        return await self._predict(request, context.time_remaining())

    def PredictStream(
        self, requests: AsyncIterator[pb.PredictRequest], context: Context
    ) -> AsyncIterator[pb.PredictResponse]:
        """Classify images, request after request."""
        return in_order(requests, self._predict, window=_STREAM_WINDOW)

    async def ListBackbones(self, request: pb.ListBackbonesRequest, context: Context) -> pb.ListBackbonesResponse:
        """The backbones, and the broken plugins."""
        catalogue = self._rooms.catalogue
        return pb.ListBackbonesResponse(
            backbones=[self._backbone(b) for b in catalogue],
            broken=[pb.BrokenPlugin(name=b.name, origin=b.origin, reason=b.reason) for b in catalogue.broken],
            families=[f.prefix for f in catalogue.families],
        )

    async def ListModels(self, request: pb.ListModelsRequest, context: Context) -> pb.ListModelsResponse:
        """Models by name."""
        models = list(self._rooms.loader.snapshot.models.values())
        page = paginate(models, request.page_size, request.page_token, identity=lambda m: m.name)
        return pb.ListModelsResponse(models=[self.message(m) for m in page.items], next_page_token=page.next_page_token)

    async def GetReport(self, request: pb.GetReportRequest, context: Context) -> pb.Report:
        """The page of a version."""
        model = await self._rooms.versions.model(request.model)
        wanted = self._reported(request, model)
        version, html = await asyncio.to_thread(read_report, self._rooms.directory, model.name, wanted)
        return pb.Report(model=model.name, version=version, html=html)

    def _reported(self, request: pb.GetReportRequest, model: KnownModel) -> int | None:
        """The version whose report is asked for; None for the newest that has one."""
        target = request.WhichOneof("target")
        if target is None:
            return None
        number = request.version
        if target == "alias" and request.alias == LATEST:
            complete = [v for v, known in model.versions.items() if known.manifest.complete]
            number = max(complete or model.versions)
        elif target == "alias":
            aliases = self._rooms.records.aliases.of(model.name)
            if request.alias not in aliases:
                raise not_found(f"alias of {model.name}", request.alias, [*aliases, LATEST], field="alias")
            number = aliases[request.alias]
        if number not in model.versions:
            known_versions = [str(v) for v in model.versions]
            raise not_found(f"version of {model.name}", str(number), known_versions, field="version")
        return number

    async def _rows(self, model: str) -> list[CheckpointRow]:
        def read() -> list[CheckpointRow]:
            rooms = self._rooms
            return checkpoint_rows(rooms.loader.snapshot, rooms.directory, rooms.records.aliases.all(), model)

        rows = read()
        if model and not rows:
            await self._look(model)
            if not (rows := read()):
                known = self._rooms.loader.snapshot.models
                if model not in known and not self._rooms.directory.versions(check_name(model)):
                    raise not_found("model", model, known, field="model")
        return rows

    async def _look(self, model: str) -> None:
        future = asyncio.wrap_future(self._rooms.loader.refresh({model}))
        await asyncio.wait([future], timeout=_LOOK_SECONDS)
        future.cancel()

    async def _predict(self, request: pb.PredictRequest, patience_seconds: float | None = None) -> pb.PredictResponse:
        request = await self.with_dataset_images(request)
        call = replace(to_call(request), patience_seconds=patience_seconds)
        return to_response(request, await self._rooms.predictor.predict(call))

    def _backbone(self, backbone: Backbone) -> pb.Backbone:
        return pb.Backbone(
            name=backbone.name,
            description=backbone.description,
            stages=backbone.stage_names,
            feature_size=backbone.feature_size,
            input_size=backbone.preprocessing.crop_size,
            origin=self._rooms.catalogue.origin(backbone.name),
            weights=self._rooms.weights.source(backbone.name),
        )
