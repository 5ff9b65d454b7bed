"""One Predict asks several models, versions and backbones; embeddings come from any stage."""

import re
from collections.abc import Callable, Mapping
from io import BytesIO

import pytest
import torch
from google.protobuf.message import Message
from grpc import StatusCode
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms.functional import center_crop, normalize, to_tensor

from backboned.client import Client, ClientError
from backboned.registry import Catalogue
from backboned.server.commands.local_daemon import LocalDaemon
from backboned.v1 import model_service_pb2 as pb
from backboned.v1.model_service_pb2_grpc import ModelServiceStub

Truth = Callable[[str, int, Image.Image], dict[str, float]]
Refusal = Callable[[str, Message], ClientError]
Png = Callable[[Image.Image], bytes]
GREY = pb.Image(tensor=pb.Tensor(shape=[4, 4, 3], data=bytes([128] * 48)))
FLOWERS, SCENES = pb.ModelTarget(model="flowers"), pb.ModelTarget(model="scenes")


@pytest.fixture(scope="module")
def networks_on_stages(networks: Mapping[tuple[str, int], nn.Module]) -> Callable[[str, Tensor], dict[str, Tensor]]:
    """What each stage of a model's newest version puts out for an input `[1, 3, h, w]`, found in this process."""
    catalogue = Catalogue.from_entry_points()

    def outputs(model: str, x: Tensor) -> dict[str, Tensor]:
        backbone = catalogue.get("digits" if model == "flowers" else "squeezenet1_1")
        network = networks[model, 3 if model == "flowers" else 1]
        found = {}
        with torch.inference_mode():
            for stage in backbone.chain:
                x = stage.forward(network, x)
                found[stage.name] = x[0]
        return found

    return outputs


@pytest.fixture(scope="module")
def pictures(photo: bytes) -> list[Image.Image]:
    """Three pictures of different sizes."""
    colour = Image.open(BytesIO(photo)).convert("RGB")
    return [colour, colour.resize((50, 70)).rotate(180), Image.new("RGB", (30, 20), (200, 40, 40))]


def test_versions_aliases_and_backbones_each_answer_for_each_image(
    client: Client, truth: Truth, pictures: list[Image.Image], png: Png
) -> None:
    names = ["flowers@2", "scenes", "flowers@stable", "flowers@latest", "flowers", "flowers@2"]
    meant = [("flowers", 2), ("scenes", 1), ("flowers", 1), ("flowers", 3), ("flowers", 3), ("flowers", 2)]
    results = client.predict_models(names, [png(picture) for picture in pictures])
    assert [(result.model, result.version) for result in results] == meant
    for result in results:
        for picture, prediction in zip(pictures, result.predictions, strict=True):
            found = {c.label: c.probability for c in prediction.classes}
            assert found == pytest.approx(truth(result.model, result.version, picture), abs=1e-4)


def test_every_prediction_has_an_id_of_its_own(client: Client, photo: bytes) -> None:
    results = client.predict_models(["flowers", "flowers", "scenes"], [photo, photo])
    assert len({prediction.id for result in results for prediction in result.predictions}) == 6


def test_the_response_holds_either_one_model_or_results(stub: ModelServiceStub) -> None:
    one = stub.Predict(pb.PredictRequest(model="flowers", images=[GREY]))
    as_several = stub.Predict(pb.PredictRequest(models=[FLOWERS], images=[GREY]))
    assert (one.version, len(one.predictions), len(one.results)) == (3, 1, 0)
    assert (as_several.model, as_several.version, len(as_several.predictions)) == ("", 0, 0)
    assert [c.label for c in as_several.results[0].predictions[0].classes] == [
        c.label for c in one.predictions[0].classes
    ]


def test_64_models_answer_at_once(stub: ModelServiceStub) -> None:
    response = stub.Predict(pb.PredictRequest(models=[FLOWERS, SCENES] * 32, images=[GREY, GREY]))
    assert [r.model for r in response.results] == ["flowers", "scenes"] * 32
    assert {len(r.predictions) for r in response.results} == {2}


def test_top_k_holds_for_each_model(client: Client, photo: bytes) -> None:
    results = client.predict_models(["flowers", "scenes"], photo, top_k=3)
    assert [len(r.predictions[0].classes) for r in results] == [3, 3]


def test_labels_count_for_each_model(
    client: Client, served: LocalDaemon, photo: bytes, fetch: Callable[[str], str]
) -> None:
    def counted() -> int:
        pattern = r'^backboned_serving_loss_count\{model="flowers",role="serving"\} (\d+)'
        found = re.search(pattern, fetch(f"{served.http}/metrics"), re.MULTILINE)
        return int(found[1]) if found else 0

    before = counted()
    client.predict_models(["flowers@1", "flowers@3"], [photo] * 3, labels=["daisy", "roses", "tulips"])
    assert counted() == before + 6


def test_streams_take_several_models_too(stub: ModelServiceStub) -> None:
    requests = [
        pb.PredictRequest(models=[FLOWERS, SCENES], images=[GREY]),
        pb.PredictRequest(model="scenes", images=[GREY]),
    ] * 5
    answers = list(stub.PredictStream(iter(requests)))
    assert [[r.model for r in a.results] or a.model for a in answers] == [["flowers", "scenes"], "scenes"] * 5


@pytest.mark.parametrize(
    ("fields", "code", "message"),
    [
        ({"models": [FLOWERS, pb.ModelTarget(model="zebras")]}, "NOT_FOUND", "unknown model 'zebras'"),
        ({"models": [FLOWERS, pb.ModelTarget()]}, "INVALID_ARGUMENT", "model name '' can't be used"),
        ({"models": [FLOWERS, pb.ModelTarget(model="flowers", version=9)]}, "NOT_FOUND", "known: 1, 2, 3"),
        ({"models": [SCENES, pb.ModelTarget(model="flowers", alias="stabel")]}, "NOT_FOUND", "did you mean 'stable'?"),
        ({"models": [FLOWERS] * 65}, "INVALID_ARGUMENT", "65 models in one request; send at most 64"),
        ({"models": [FLOWERS], "model": "flowers"}, "INVALID_ARGUMENT", "not both"),
        ({"models": [FLOWERS], "version": 1}, "INVALID_ARGUMENT", "not both"),
        ({"models": [FLOWERS, SCENES], "images": []}, "INVALID_ARGUMENT", "at least one image"),
        ({"models": [FLOWERS, SCENES], "top_k": 4}, "INVALID_ARGUMENT", "top_k is 4; scenes has 3 classes"),
        ({"models": [FLOWERS, SCENES], "labels": ["daisy"]}, "INVALID_ARGUMENT", "unknown label 'daisy'"),
        ({"models": [FLOWERS, SCENES], "labels": ["sea"]}, "INVALID_ARGUMENT", "unknown label 'sea'"),
        ({"models": [FLOWERS, SCENES], "labels": ["a", "b"]}, "INVALID_ARGUMENT", "2 labels for 1 images"),
        ({"models": [FLOWERS, SCENES], "images": [GREY, pb.Image(encoded=b"x")]}, "INVALID_ARGUMENT", "image 1: "),
        ({"models": [FLOWERS, SCENES], "embedding_stage": "pool"}, "INVALID_ARGUMENT", "stem, layer1, layer2, layer3"),
        ({"model": "flowers", "embedding_stage": "head"}, "INVALID_ARGUMENT", "stem, layer1, layer2, layer3, pool"),
        ({"model": "flowers", "embedding_stage": "layer9"}, "INVALID_ARGUMENT", "stem, layer1, layer2, layer3, pool"),
    ],
)
def test_what_is_wrong_for_one_model_is_told_and_nobody_answers(
    refusal: Refusal, fields: dict[str, object], code: str, message: str
) -> None:
    error = refusal("Predict", pb.PredictRequest(**{"images": [GREY], **fields}))  # type: ignore[arg-type]
    assert error.code is StatusCode[code]
    assert message in error.message, error.message


def test_the_daemon_names_the_field_of_an_unknown_stage(refusal: Refusal) -> None:
    error = refusal("Predict", pb.PredictRequest(model="flowers", images=[GREY], embedding_stage="layer9"))
    assert error.field == "embedding_stage"


def test_every_stage_of_a_backbone_can_be_embedded(
    client: Client,
    pictures: list[Image.Image],
    png: Png,
    networks_on_stages: Callable[[str, Tensor], dict[str, Tensor]],
) -> None:
    picture = pictures[0].resize((16, 16))  # as digits sees it: nothing is resized or cut
    outputs = networks_on_stages("flowers", normalize(to_tensor(picture), [0.5] * 3, [0.5] * 3)[None])
    sizes = {"stem": 16, "layer1": 16, "layer2": 32, "layer3": 64, "pool": 256}
    for stage, size in sizes.items():
        (prediction,) = client.predict("flowers", png(picture), embedding_stage=stage).predictions
        output = outputs[stage]
        expected = output.mean(dim=(1, 2)) if output.dim() == 3 else output
        assert len(prediction.embedding) == size
        assert list(prediction.embedding) == pytest.approx(expected.tolist(), rel=1e-3, abs=1e-4), stage
        assert len(prediction.classes) == 5


def test_a_stage_of_several_models_is_embedded_for_each(
    client: Client,
    pictures: list[Image.Image],
    png: Png,
    networks_on_stages: Callable[[str, Tensor], dict[str, Tensor]],
) -> None:
    picture = pictures[0].resize((256, 256))
    seen = normalize(center_crop(to_tensor(picture), [224, 224]), [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    expected = networks_on_stages("scenes", seen[None])["layer1"].mean(dim=(1, 2))
    of_flowers, of_scenes = client.predict_models(["flowers", "scenes"], png(picture), embedding_stage="layer1")
    assert len(of_flowers.predictions[0].embedding) == 16
    assert list(of_scenes.predictions[0].embedding) == pytest.approx(expected.tolist(), rel=1e-3, abs=1e-4)


def test_without_a_stage_the_embedding_is_what_the_head_reads(client: Client, photo: bytes) -> None:
    (features,) = client.predict("flowers", photo, return_embedding=True).predictions
    (pooled,) = client.predict("flowers", photo, embedding_stage="pool").predictions
    assert list(features.embedding) == pytest.approx(list(pooled.embedding), rel=1e-5)
    (nothing,) = client.predict("flowers", photo).predictions
    assert not nothing.embedding
