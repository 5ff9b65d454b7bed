"""What is asked of which models: requests, those of Predict without images yet."""

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypedDict, Unpack

import grpc

from backboned._client_status import ClientError
from backboned.v1 import model_service_pb2 as pb

_OUTCOMES_AT_ONCE = 5000
_POLICY_PREFIX = "VERSION_POLICY_"
_VERSION = re.compile(r"[0-9]{1,18}")  # fits in 64 bits; no alias is a number


class Asked(TypedDict):
    """The fields of `PredictRequest` that hold for every image and model."""

    top_k: int
    return_embedding: bool
    embedding_stage: str


def to_one(model: str, version: int | None, alias: str | None, **asked: Unpack[Asked]) -> pb.PredictRequest:
    """A request for one model. Raises `ClientError` if it is told both a version and an alias."""
    return pb.PredictRequest(model=model, **_which(version, alias), **asked)


def to_report(model: str, version: int | None, alias: str | None) -> pb.GetReportRequest:
    """A request for a report. Raises `ClientError` if it is told both a version and an alias."""
    return pb.GetReportRequest(model=model, **_which(version, alias))


def to_several(models: str | Iterable[str], **asked: Unpack[Asked]) -> pb.PredictRequest:
    """A request for models named as `target` takes them. Raises `ClientError` if there is none."""
    targets = [target(name) for name in ([models] if isinstance(models, str) else models)]
    if not targets:
        raise ClientError(grpc.StatusCode.INVALID_ARGUMENT, "name at least one model", "models")
    return pb.PredictRequest(models=targets, **asked)


def to_policy(model: str, policy: str, version: int | None) -> pb.SetVersionPolicyRequest:
    """A request for a policy, by its short name or that of the enum. Raises `ClientError` for another."""
    full = policy.upper() if policy.upper().startswith(_POLICY_PREFIX) else _POLICY_PREFIX + policy.upper()
    names = list(pb.VersionPolicy.keys())
    if full not in names:
        known = ", ".join(n.removeprefix(_POLICY_PREFIX).lower() for n in names[1:])
        raise ClientError(grpc.StatusCode.INVALID_ARGUMENT, f"no policy {policy!r}; choose from {known}", "policy")
    return pb.SetVersionPolicyRequest(model=model, policy=pb.VersionPolicy.Value(full), version=version)


def to_outcomes(labels: Mapping[str, str]) -> Iterator[pb.ReportOutcomeRequest]:
    """Requests that tell true labels by the ids of predictions, so many in each."""
    outcomes = [pb.Outcome(prediction_id=each, label=label) for each, label in labels.items()]
    for begin in range(0, len(outcomes), _OUTCOMES_AT_ONCE):
        yield pb.ReportOutcomeRequest(outcomes=outcomes[begin : begin + _OUTCOMES_AT_ONCE])


def target(name: str) -> pb.ModelTarget:
    """The model that `NAME`, `NAME@VERSION` or `NAME@ALIAS` means."""
    model, at, which = name.partition("@")
    if _VERSION.fullmatch(which):
        return pb.ModelTarget(model=model, version=int(which))
    return pb.ModelTarget(model=model, alias=which) if at else pb.ModelTarget(model=model)


def _which(version: int | None, alias: str | None) -> dict[str, Any]:
    if version is not None and alias is not None:
        raise ClientError(grpc.StatusCode.INVALID_ARGUMENT, "give a version or an alias, not both", "version")
    return {"version": version} if version is not None else {"alias": alias}
