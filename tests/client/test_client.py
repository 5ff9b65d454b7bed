"""What a client asks, and what it makes of the answers."""

from pathlib import Path

import pytest

from backboned.client import DEFAULT_ADDRESS, Client, ClientError
from backboned.server.commands import options
from backboned.v1 import model_service_pb2 as pb
from tests.client.answering import Service, answer


def test_predict_takes_bytes_and_paths(service: Service, client: Client, tmp_path: Path) -> None:
    service.replies["Predict"] = answer
    (tmp_path / "b.jpg").write_bytes(b"second")
    (tmp_path / "c.jpg").write_bytes(b"third")
    reply = client.predict("m", [b"first", tmp_path / "b.jpg", str(tmp_path / "c.jpg")])
    assert [p.classes[0].label for p in reply.predictions] == ["first", "second", "third"]
    assert reply.version == 7


def test_predict_takes_one_image_alone(service: Service, client: Client, tmp_path: Path) -> None:
    service.replies["Predict"] = answer
    (tmp_path / "a.jpg").write_bytes(b"only")
    assert len(client.predict("m", str(tmp_path / "a.jpg")).predictions) == 1


def test_predict_says_what_is_asked_and_of_whom(service: Service, client: Client) -> None:
    service.replies["Predict"] = answer
    client.predict("m", [b"x"], version=3, top_k=2, labels=["cat"], return_embedding=True)
    client.predict("m", [b"x"], alias="production")
    client.predict("m", [b"x"])
    by_version, by_alias, by_default = service.requests
    assert (by_version.version, by_version.top_k, list(by_version.labels)) == (3, 2, ["cat"])
    assert by_version.return_embedding
    assert by_alias.alias == "production"
    assert by_default.WhichOneof("target") is None


def test_a_version_and_an_alias_together_are_refused(client: Client) -> None:
    with pytest.raises(ClientError, match="not both"):
        client.predict("m", [b"x"], version=1, alias="production")


def each_answers(request: pb.PredictRequest) -> pb.PredictResponse:
    """A result for each model, numbered in their order."""
    return pb.PredictResponse(
        results=[
            pb.ModelPredictions(model=m.model, version=i, predictions=answer(request).predictions)
            for i, m in enumerate(request.models)
        ]
    )


def test_several_models_are_named_with_versions_and_aliases_and_answer_in_order(
    service: Service, client: Client
) -> None:
    service.replies["Predict"] = each_answers
    names = ["b@12", "a", "b@stable", "b@1_000", "b@", f"b@{2**70}"]
    results = client.predict_models(names, [b"x", b"y"], top_k=2, labels=["x", "y"])
    assert [(r.model, r.version) for r in results] == [("b", 0), ("a", 1), ("b", 2), ("b", 3), ("b", 4), ("b", 5)]
    assert [[p.classes[0].label for p in r.predictions] for r in results] == [["x", "y"]] * 6
    (request,) = service.requests
    assert [(m.WhichOneof("target"), m.version, m.alias) for m in request.models] == [
        ("version", 12, ""),
        (None, 0, ""),
        ("alias", 0, "stable"),
        ("alias", 0, "1_000"),
        ("alias", 0, ""),
        ("alias", 0, str(2**70)),
    ]
    assert (request.model, request.top_k, list(request.labels)) == ("", 2, ["x", "y"])


def test_one_model_alone_can_be_asked_like_several(service: Service, client: Client) -> None:
    service.replies["Predict"] = each_answers
    (result,) = client.predict_models("flowers@3", b"x")
    assert result.model == "flowers"


def test_no_model_at_all_is_refused(client: Client) -> None:
    with pytest.raises(ClientError, match="at least one model") as caught:
        client.predict_models([], [b"x"])
    assert caught.value.field == "models"


def test_the_stage_of_an_embedding_is_sent_by_every_way_to_predict(service: Service, client: Client) -> None:
    service.replies["Predict"] = answer
    client.predict("m", b"x", embedding_stage="layer3")
    client.predict_models(["m"], b"x", embedding_stage="layer3", return_embedding=True)
    list(client.predict_stream("m", [b"x"], embedding_stage="layer3"))
    assert [(r.embedding_stage, r.return_embedding) for r in service.requests] == [
        ("layer3", False),
        ("layer3", True),
        ("layer3", False),
    ]


def test_an_image_that_is_not_there_is_named_with_its_index(client: Client, tmp_path: Path) -> None:
    with pytest.raises(ClientError, match=r"nowhere\.jpg: No such file") as caught:
        client.predict("m", [b"x", tmp_path / "nowhere.jpg"])
    assert caught.value.field == "images[1]"


def test_predict_tells_in_its_metadata_which_model_it_is_for(service: Service, client: Client) -> None:
    service.replies["Predict"] = lambda request: each_answers(request) if request.models else answer(request)
    client.predict("flowers", [b"x"])
    assert service.metadata["backboned-model"] == "flowers"
    client.predict_models(["pets@3", "flowers"], [b"x"])
    assert service.metadata["backboned-model"] == "pets"
    for name in ("", "blümchen", "a\nb"):
        assert client.predict(name, [b"x"]).model == name
        assert service.metadata.get("backboned-model", "") == ""


def test_lists_go_through_all_pages(service: Service, client: Client) -> None:
    def page(request: pb.ListCheckpointsRequest) -> pb.ListCheckpointsResponse:
        number = int(request.page_token or 0)
        return pb.ListCheckpointsResponse(
            checkpoints=[pb.Checkpoint(epoch=2 * number + i) for i in range(2)],
            next_page_token=str(number + 1) if number < 2 else "",
        )

    service.replies["ListCheckpoints"] = page
    found = client.list_checkpoints(model="m", filter="epoch > 1", order_by="epoch", page_size=2)
    assert [checkpoint.epoch for checkpoint in found] == [0, 1, 2, 3, 4, 5]
    assert {(r.model, r.filter, r.order_by, r.page_size) for r in service.requests} == {("m", "epoch > 1", "epoch", 2)}


def test_a_page_is_fetched_only_when_it_is_needed(service: Service, client: Client) -> None:
    service.replies["ListJobs"] = lambda _: pb.ListJobsResponse(jobs=[pb.Job(id="a")], next_page_token="1")  # noqa: S106
    assert next(client.list_jobs()).id == "a"
    assert len(service.requests) == 1


def test_fine_tune_sends_its_options_and_leaves_out_the_rest(service: Service, client: Client) -> None:
    service.replies["FineTune"] = lambda r: pb.Job(id="j", request=r)
    request = client.fine_tune(
        "m", "resnet50", Path("/photos"), request_id="mine", task="TASK_BINARY", trainable_stages=["layer4"], patience=0
    ).request
    assert (request.dataset, request.request_id, request.options.task) == ("/photos", "mine", pb.TASK_BINARY)
    assert list(request.options.trainable_stages) == ["layer4"]
    assert request.options.HasField("patience")
    assert not request.options.HasField("max_epochs")


def test_an_unknown_training_option_is_named_with_those_that_there_are(client: Client) -> None:
    with pytest.raises(TypeError, match=r"epochs.*max_epochs"):
        client.fine_tune("m", "resnet50", "/photos", epochs=3)  # type: ignore[call-arg]


def test_the_command_line_has_the_clients_default_address() -> None:
    assert options.DEFAULT_ADDRESS == DEFAULT_ADDRESS
