"""The RPCs that change what serves, and the one that tells who changed it."""

from typing import Any

import grpc
from google.protobuf.empty_pb2 import Empty

from backboned.registry.directory import CheckpointDirectory
from backboned.registry.errors import invalid, not_found
from backboned.registry.manifest import check_name
from backboned.registry.query import paginate
from backboned.server.api.checkpoints import model_message, timestamp
from backboned.server.api.comparisons import comparison_message, drift_message
from backboned.server.serving.history import Entry
from backboned.server.serving.outcomes import Outcomes
from backboned.server.serving.policy import VersionPolicy
from backboned.server.serving.records import Records
from backboned.server.serving.snapshot import KnownModel
from backboned.server.serving.versions import Versions
from backboned.v1 import model_service_pb2 as pb
from backboned.v1 import model_service_pb2_grpc as pb_grpc

Context = grpc.aio.ServicerContext[Any, Any]

ACTOR_KEY = "backboned-actor"
"""Metadata of a call: who makes it, for the history."""

MAX_REASON_LENGTH = 1000
_MAX_ACTOR_LENGTH = 200


class VersionService(pb_grpc.ModelServiceServicer):
    """The part of the service that is about versions and aliases. For one event loop."""

    def __init__(
        self, versions: Versions, records: Records, directory: CheckpointDirectory, outcomes: Outcomes
    ) -> None:
        self._versions = versions
        self._outcomes = outcomes
        self._records = records
        self._directory = directory

    async def GetModel(self, request: pb.GetModelRequest, context: Context) -> pb.Model:
        """One model."""
        return self.message(await self._versions.model(request.model))

    async def SetVersionPolicy(self, request: pb.SetVersionPolicyRequest, context: Context) -> pb.Model:
        """Choose how the version that serves is chosen."""
        if request.policy not in _POLICIES:
            names = ", ".join(pb.VersionPolicy.Name(number) for number in _POLICIES)
            raise invalid(f"policy must be one of {names}", field="policy")
        version = request.version if request.HasField("version") else None
        kind = _POLICIES[request.policy]
        return self.message(await self._versions.choose(request.model, kind, version, actor_of(context)))

    async def RollBack(self, request: pb.RollBackRequest, context: Context) -> pb.Model:
        """Go back to the version before."""
        if len(request.reason) > MAX_REASON_LENGTH:
            raise invalid(f"reason is longer than {MAX_REASON_LENGTH} characters", field="reason")
        expected = request.expected_version if request.HasField("expected_version") else None
        model = await self._versions.roll_back(request.model, expected, request.reason, actor_of(context))
        return self.message(model)

    async def SetTraffic(self, request: pb.SetTrafficRequest, context: Context) -> pb.Model:
        """Divide traffic."""
        return self.message(await self._versions.divide(request.model, dict(request.weights), actor_of(context)))

    async def SetAlias(self, request: pb.SetAliasRequest, context: Context) -> pb.Model:
        """Point an alias."""
        expected = request.expected_version if request.HasField("expected_version") else None
        model = await self._versions.set_alias(
            request.model, request.alias, request.version, expected, actor_of(context)
        )
        return self.message(model)

    async def DeleteAlias(self, request: pb.DeleteAliasRequest, context: Context) -> pb.Model:
        """Remove an alias."""
        expected = request.expected_version if request.HasField("expected_version") else None
        return self.message(
            await self._versions.delete_alias(request.model, request.alias, expected, actor_of(context))
        )

    async def DeleteModelVersion(self, request: pb.DeleteModelVersionRequest, context: Context) -> Empty:
        """Delete a version."""
        await self._versions.delete(request.model, request.version, actor_of(context))
        return Empty()

    async def ReportOutcome(self, request: pb.ReportOutcomeRequest, context: Context) -> pb.ReportOutcomeResponse:
        """Score answers by their true labels."""
        if not request.outcomes:
            raise invalid("a report needs at least one outcome", field="outcomes")
        accepted, unknown = await self._outcomes.report({o.prediction_id: o.label for o in request.outcomes})
        return pb.ReportOutcomeResponse(accepted=accepted, unknown_prediction_ids=unknown)

    async def ListHistory(self, request: pb.ListHistoryRequest, context: Context) -> pb.ListHistoryResponse:
        """Changes, newest first."""
        entries = await self._entries(request.model)
        page = paginate(
            entries,
            request.page_size,
            request.page_token,
            identity=lambda e: str(e.number),
            query=(request.model,),
        )
        return pb.ListHistoryResponse(changes=map(_change, page.items), next_page_token=page.next_page_token)

    def message(self, model: KnownModel) -> pb.Model:
        """A model as a message."""
        name, shadow = model.name, 0 if model.shadow is None else model.shadow.manifest.version
        message = model_message(
            model, self._directory, self._records.aliases.of(name), self._records.decisions.split(name)
        )
        message.shadow_version = shadow
        message.comparison.CopyFrom(comparison_message(self._outcomes.tally(model)))
        if (drift := self._outcomes.recent.drift(model)) is not None:
            message.drift.CopyFrom(drift_message(drift))
        return message

    async def _entries(self, name: str) -> list[Entry]:
        entries = await self._versions.history(check_name(name) if name else None)
        if name and not entries and name not in (known := self._versions.known()):
            raise not_found("model", name, known, field="model")
        return entries


def actor_of(context: Context) -> str:
    """Who makes a call, as it says and as its connection does."""
    told = next((value for key, value in context.invocation_metadata() or () if key == ACTOR_KEY), "")
    said = str(told)[:_MAX_ACTOR_LENGTH]
    return f"{said} ({context.peer()})" if said else str(context.peer())


_POLICIES = {pb.VersionPolicy.Value(f"VERSION_POLICY_{kind.value}"): kind for kind in VersionPolicy}


def _change(entry: Entry) -> pb.Change:
    return pb.Change(
        number=entry.number,
        time=timestamp(entry.time),
        model=entry.model,
        kind=pb.ChangeKind.Value(f"CHANGE_KIND_{entry.change.value}"),
        version=entry.version,
        previous_version=entry.previous_version,
        subject=entry.subject,
        actor=entry.actor,
        reason=entry.reason,
    )
