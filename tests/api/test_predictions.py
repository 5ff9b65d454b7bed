"""Predict's messages become a call, and its results a message again."""

import pytest

from backboned.registry.errors import BackbonedError, ErrorKind
from backboned.server.api.predictions import MAX_MODELS, to_call, to_response
from backboned.server.serving.calls import Pixels, Prediction, Result, Target
from backboned.v1 import model_service_pb2 as pb

IMAGE = pb.Image(encoded=b"x")
RESULTS = [
    Result("a", 3, (Prediction("id-1", (("cat", 0.75), ("dog", 0.25)), (1.0, 2.0)), Prediction("id-2", ()))),
    Result("b", 1, (Prediction("id-3", (("car", 1.0),)), Prediction("id-4", ()))),
]


def refused(request: pb.PredictRequest) -> BackbonedError:
    with pytest.raises(BackbonedError) as caught:
        to_call(request)
    return caught.value


def test_one_model_is_one_target() -> None:
    assert to_call(pb.PredictRequest(model="m", version=0)).targets == (Target("m", version=0),)
    assert to_call(pb.PredictRequest(model="m", alias="")).targets == (Target("m", alias=""),)
    assert to_call(pb.PredictRequest(model="m")).targets == (Target("m"),)


def test_several_models_are_targets_in_their_order_also_twice_the_same() -> None:
    models = [
        pb.ModelTarget(model="b", version=2),
        pb.ModelTarget(model="a", alias="stable"),
        pb.ModelTarget(model="a"),
    ]
    call = to_call(pb.PredictRequest(models=[*models, *models]))
    assert call.targets == (Target("b", version=2), Target("a", alias="stable"), Target("a")) * 2


def test_images_and_what_is_asked_of_them_are_carried_over() -> None:
    pixels = pb.Image(tensor=pb.Tensor(shape=[1, 1, 3], data=b"rgb"))
    call = to_call(pb.PredictRequest(model="m", images=[IMAGE, pixels], top_k=2, labels=["cat", "dog"]))
    assert (call.images, call.top_k, call.labels) == ([b"x", Pixels(b"rgb", (1, 1, 3))], 2, ("cat", "dog"))
    assert not call.embedding


def test_a_stage_asks_for_an_embedding_by_itself() -> None:
    features = to_call(pb.PredictRequest(model="m", return_embedding=True))
    stage = to_call(pb.PredictRequest(model="m", embedding_stage="layer3"))
    assert (features.embedding, features.embedding_stage) == (True, "")
    assert (stage.embedding, stage.embedding_stage) == (True, "layer3")


@pytest.mark.parametrize("single", [{"model": "m"}, {"version": 1}, {"alias": "stable"}, {"model": "m", "version": 1}])
def test_models_are_named_in_one_way_only(single: dict[str, object]) -> None:
    error = refused(pb.PredictRequest(models=[pb.ModelTarget(model="m")], **single))  # type: ignore[arg-type]
    assert (error.kind, error.field) == (ErrorKind.INVALID_ARGUMENT, "models")
    assert "not both" in error.message


def test_there_are_at_most_64_models() -> None:
    models = [pb.ModelTarget(model="m")] * MAX_MODELS
    assert len(to_call(pb.PredictRequest(models=models)).targets) == MAX_MODELS == 64
    error = refused(pb.PredictRequest(models=[*models, models[0]]))
    assert (error.kind, error.field) == (ErrorKind.INVALID_ARGUMENT, "models")
    assert error.message == "65 models in one request; send at most 64"


def test_one_model_answers_in_the_response_itself() -> None:
    response = to_response(pb.PredictRequest(model="a"), RESULTS[:1])
    assert (response.model, response.version, list(response.results)) == ("a", 3, [])
    first, second = response.predictions
    assert [(c.label, c.probability) for c in first.classes] == [("cat", 0.75), ("dog", 0.25)]
    assert (first.id, list(first.embedding), second.id) == ("id-1", [1.0, 2.0], "id-2")


def test_several_models_answer_each_for_itself() -> None:
    response = to_response(pb.PredictRequest(models=[pb.ModelTarget(model=name) for name in "ab"]), RESULTS)
    assert (response.model, response.version, list(response.predictions)) == ("", 0, [])
    assert [(r.model, r.version, [p.id for p in r.predictions]) for r in response.results] == [
        ("a", 3, ["id-1", "id-2"]),
        ("b", 1, ["id-3", "id-4"]),
    ]


def test_one_model_asked_as_several_is_answered_as_several() -> None:
    response = to_response(pb.PredictRequest(models=[pb.ModelTarget(model="a")]), RESULTS[:1])
    assert ([r.model for r in response.results], response.model) == (["a"], "")


def test_doubts_are_told() -> None:
    doubted = Prediction("id", (("cat", 0.5),), uncertain=True, unfamiliar=True)
    unsure = Prediction("id", (("cat", 0.5),), uncertain=True)
    response = to_response(pb.PredictRequest(model="a"), [Result("a", 3, (doubted, unsure, RESULTS[0].predictions[0]))])
    assert [(p.uncertain, p.unfamiliar) for p in response.predictions] == [(True, True), (True, False), (False, False)]
