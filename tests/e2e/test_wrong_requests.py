"""Whatever is wrong with a request, its status and message tell the caller what to do."""

from collections.abc import Callable

import grpc
import pytest
from google.protobuf.message import Message
from grpc import StatusCode
from PIL import Image

from backboned.client import Client, ClientError
from backboned.v1 import model_service_pb2 as pb
from backboned.v1.model_service_pb2_grpc import ModelServiceStub

Refusal = Callable[[str, Message], ClientError]
STRANGE = "zzz"
BAD_NAMES = ("", "../x", "a/b", ".hidden", "two words", "é", "x" * 300, "a\nb", "a\0b")
GREY = pb.Image(tensor=pb.Tensor(shape=[4, 4, 3], data=bytes([128] * 48)))


def predict(**fields: object) -> pb.PredictRequest:
    """A good request, apart from `fields`."""
    return pb.PredictRequest(**{"model": "flowers", "images": [GREY], **fields})  # type: ignore[arg-type]


def test_the_request_that_the_others_are_made_from_is_a_good_one(stub: ModelServiceStub) -> None:
    assert stub.Predict(predict()).version == 3


@pytest.mark.parametrize(
    ("fields", "code", "field", "message"),
    [
        ({"model": "zebras"}, "NOT_FOUND", "model", "unknown model 'zebras'; known: flowers, "),
        ({"model": "flower"}, "NOT_FOUND", "model", "did you mean 'flowers'?"),
        ({"model": "Flowers"}, "NOT_FOUND", "model", "did you mean 'flowers'?"),
        ({"version": 9}, "NOT_FOUND", "version", "unknown version of flowers '9'; known: 1, 2, 3"),
        ({"version": 0}, "NOT_FOUND", "version", "unknown version of flowers '0'"),
        ({"version": -1}, "NOT_FOUND", "version", "unknown version of flowers '-1'"),
        ({"alias": "stabel"}, "NOT_FOUND", "alias", "unknown alias of flowers 'stabel'; did you mean 'stable'?"),
        ({"alias": ""}, "NOT_FOUND", "alias", "known: latest, stable"),
        ({"images": []}, "INVALID_ARGUMENT", "images", "at least one image"),
        ({"images": [GREY] * 257}, "INVALID_ARGUMENT", "images", "257 images in one request; send at most 256"),
        ({"top_k": 6}, "INVALID_ARGUMENT", "top_k", "top_k is 6; flowers has 5 classes"),
        ({"top_k": -1}, "INVALID_ARGUMENT", "top_k", "top_k is -1; flowers has 5 classes"),
        ({"labels": ["roses", "roses"]}, "INVALID_ARGUMENT", "labels", "2 labels for 1 images"),
        ({"labels": ["rose"]}, "INVALID_ARGUMENT", "labels[0]", "unknown label 'rose'; did you mean 'roses'?"),
        ({"labels": [""]}, "INVALID_ARGUMENT", "labels[0]", "known: daisy, dandelion, roses, sunflowers, tulips"),
    ],
)
def test_a_wrong_predict_request_names_the_field_and_what_would_do(
    refusal: Refusal, fields: dict[str, object], code: str, field: str, message: str
) -> None:
    error = refusal("Predict", predict(**fields))
    assert (error.code, error.field) == (StatusCode[code], field)
    assert message in error.message, error.message


def test_an_empty_request_is_told_what_it_lacks(refusal: Refusal) -> None:
    error = refusal("Predict", pb.PredictRequest())
    assert (error.code, error.field) == (StatusCode.INVALID_ARGUMENT, "model")
    assert "1 to 63 letters, digits" in error.message


@pytest.mark.parametrize("name", BAD_NAMES)
def test_a_name_that_no_model_can_have_is_refused_by_every_rpc(refusal: Refusal, name: str) -> None:
    for rpc, request in (
        ("Predict", predict(model=name)),
        ("FineTune", pb.FineTuneRequest(model=name, backbone="digits", dataset="squares")),
        ("SetAlias", pb.SetAliasRequest(model="flowers", alias=name, version=1)),
    ):
        error = refusal(rpc, request)
        assert error.code is StatusCode.INVALID_ARGUMENT and error.field in ("model", "alias")
        assert "beginning with a letter or digit" in error.message and len(error.message) < 300
    for rpc, lookup in (
        ("GetModel", pb.GetModelRequest(model=name)),
        ("SetAlias", pb.SetAliasRequest(model=name, alias="a", version=1)),
        ("DeleteAlias", pb.DeleteAliasRequest(model=name, alias="a")),
    ):
        error = refusal(rpc, lookup)
        assert (error.code, error.field) == (StatusCode.NOT_FOUND, "model")
        assert error.message.startswith("unknown model") and len(error.message) < 300


def test_checkpoints_of_a_path_are_not_looked_for(refusal: Refusal) -> None:
    error = refusal("ListCheckpoints", pb.ListCheckpointsRequest(model="../../../proc"))
    assert (error.code, error.field) == (StatusCode.INVALID_ARGUMENT, "model")
    error = refusal("ListCheckpoints", pb.ListCheckpointsRequest(model="flower"))
    assert error.code is StatusCode.NOT_FOUND and "did you mean 'flowers'?" in error.message


@pytest.mark.parametrize(
    ("rpc", "request_", "field", "message"),
    [
        ("ListJobs", pb.ListJobsRequest(page_token=STRANGE), "page_token", "send next_page_token of the page before"),
        ("ListJobs", pb.ListJobsRequest(page_size=-1), "page_size", "must be 1…1000, or 0 for 50, got -1"),
        ("ListJobs", pb.ListJobsRequest(page_size=1001), "page_size", "must be 1…1000"),
        ("ListJobs", pb.ListJobsRequest(filter="stat = RUNNING"), "filter", "did you mean 'state'?"),
        ("ListJobs", pb.ListJobsRequest(filter="state = DONE"), "filter", "one of QUEUED, RUNNING, SUCCEEDED"),
        ("ListModels", pb.ListModelsRequest(page_token=STRANGE), "page_token", "send next_page_token"),
        ("ListModels", pb.ListModelsRequest(page_size=1001), "page_size", "must be 1…1000"),
        ("ListCheckpoints", pb.ListCheckpointsRequest(page_token=STRANGE), "page_token", "send next_page_token"),
        ("ListCheckpoints", pb.ListCheckpointsRequest(page_size=-5), "page_size", "must be 1…1000"),
        ("ListCheckpoints", pb.ListCheckpointsRequest(filter="version ="), "filter", "at character 10: expected a val"),
        ("ListCheckpoints", pb.ListCheckpointsRequest(filter="x" * 3000), "filter", "at most 2048 characters"),
        ("ListCheckpoints", pb.ListCheckpointsRequest(filter="best < true"), "filter", "only by = !="),
        ("ListCheckpoints", pb.ListCheckpointsRequest(order_by="val_los"), "order_by", "did you mean 'val_loss'?"),
        ("ListCheckpoints", pb.ListCheckpointsRequest(order_by="epoch down"), "order_by", "expected asc, desc"),
    ],
)
def test_a_wrong_page_filter_or_order_is_told_where(
    refusal: Refusal, rpc: str, request_: Message, field: str, message: str
) -> None:
    error = refusal(rpc, request_)
    assert (error.code, error.field) == (StatusCode.INVALID_ARGUMENT, field)
    assert message in error.message, error.message


def test_pages_of_checkpoints_come_to_an_end_and_a_token_is_for_its_own_query(
    client: Client, stub: ModelServiceStub, refusal: Refusal
) -> None:
    pages = list(client.list_checkpoints(model="flowers", order_by="version", page_size=1))
    assert [c.version for c in pages if c.best][:3] == [1, 2, 3]
    token = stub.ListCheckpoints(pb.ListCheckpointsRequest(model="flowers", page_size=1)).next_page_token
    error = refusal("ListCheckpoints", pb.ListCheckpointsRequest(model="scenes", page_size=1, page_token=token))
    assert error.field == "page_token" and "made for another filter, order or model" in error.message


@pytest.mark.parametrize("rpc", ["GetJob", "CancelJob", "WatchJob"])
def test_an_unknown_job_is_not_found(refusal: Refusal, rpc: str) -> None:
    for job_id in ("", "deadbeef", "x" * 10_000):
        error = refusal(rpc, getattr(pb, f"{rpc}Request")(job_id=job_id))
        assert (error.code, error.field) == (StatusCode.NOT_FOUND, "job_id")
        assert "list the jobs to find it" in error.message and len(error.message) < 300


@pytest.mark.parametrize(
    ("request_", "code", "field", "message"),
    [
        ({"alias": "latest", "version": 1}, "INVALID_ARGUMENT", "alias", "always means the newest complete version"),
        ({"alias": "12", "version": 1}, "INVALID_ARGUMENT", "alias", "looks like a version"),
        ({"alias": "next", "version": 7}, "NOT_FOUND", "version", "known: 1, 2, 3"),
        ({"alias": "stable", "version": 2, "expected_version": 3}, "ABORTED", "expected_version", "to version 1, not"),
        ({"alias": "new", "version": 2, "expected_version": 3}, "ABORTED", "expected_version", "to no version, not"),
        ({"alias": "stable", "version": 2, "expected_version": 0}, "ABORTED", "expected_version", "read it again"),
    ],
)
def test_an_alias_that_cannot_be_set_is_told_why(
    refusal: Refusal, request_: dict[str, object], code: str, field: str, message: str
) -> None:
    error = refusal("SetAlias", pb.SetAliasRequest(model="flowers", **request_))  # type: ignore[arg-type]
    assert (error.code, error.field) == (StatusCode[code], field)
    assert message in error.message, error.message


def test_an_unknown_alias_cannot_be_deleted(refusal: Refusal) -> None:
    error = refusal("DeleteAlias", pb.DeleteAliasRequest(model="flowers", alias="stabel"))
    assert error.code is StatusCode.NOT_FOUND and "did you mean 'stable'?" in error.message


def test_an_empty_report_of_outcomes_is_refused(refusal: Refusal) -> None:
    error = refusal("ReportOutcome", pb.ReportOutcomeRequest())
    assert (error.code, error.field) == (StatusCode.INVALID_ARGUMENT, "outcomes")


@pytest.mark.parametrize("rpc", ["SetVersionPolicy", "RollBack", "SetTraffic", "DeleteModelVersion"])
def test_a_model_that_is_not_there_cannot_be_changed(refusal: Refusal, rpc: str) -> None:
    asked = {"policy": pb.VERSION_POLICY_BEST} if rpc == "SetVersionPolicy" else {}
    error = refusal(rpc, getattr(pb, f"{rpc}Request")(model="flower", **asked))
    assert (error.code, error.field) == (StatusCode.NOT_FOUND, "model") and "did you mean 'flowers'" in error.message


def test_a_policy_must_be_named(refusal: Refusal) -> None:
    error = refusal("SetVersionPolicy", pb.SetVersionPolicyRequest(model="flowers"))
    assert (error.code, error.field) == (StatusCode.INVALID_ARGUMENT, "policy")
    assert "VERSION_POLICY_LATEST" in error.message


def test_a_reason_has_a_length(refusal: Refusal) -> None:
    error = refusal("RollBack", pb.RollBackRequest(model="flowers", reason="r" * 1001))
    assert (error.code, error.field) == (StatusCode.INVALID_ARGUMENT, "reason")


def test_what_was_not_uploaded_is_not_found(refusal: Refusal) -> None:
    error = refusal("DeleteDataset", pb.DeleteDatasetRequest(dataset_id="ds-0123456789abcdef"))
    assert (error.code, error.field) == (StatusCode.NOT_FOUND, "dataset_id")
    error = refusal("Predict", predict(images=[pb.Image(dataset_image="ds-0123456789abcdef/1.jpg")]))
    assert (error.code, error.field) == (StatusCode.NOT_FOUND, "images[0]") and "none is known yet" in error.message
    error = refusal("Predict", predict(images=[pb.Image(dataset_image="d/1.jpg")]))
    assert (error.code, error.field) == (StatusCode.INVALID_ARGUMENT, "images[0]")


def test_a_message_over_the_limit_is_refused_and_the_connection_goes_on(
    stub: ModelServiceStub, png: Callable[[Image.Image], bytes]
) -> None:
    large = pb.PredictRequest(model="flowers", images=[pb.Image(encoded=bytes(65 * 2**20))])
    with pytest.raises(grpc.RpcError) as caught:
        stub.Predict(large)
    error = ClientError.of(caught.value, "")
    assert error.code is StatusCode.RESOURCE_EXHAUSTED and "67108864" in error.message  # gRPC's own words
    almost = png(Image.effect_noise((64, 64), 50).convert("RGB"))
    request = predict(images=[pb.Image(encoded=almost + bytes(60 * 2**20))])
    assert stub.Predict(request).version == 3  # 60 MiB, most of it behind the picture's end
