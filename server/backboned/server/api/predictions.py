"""Predict's messages and the predictor's values."""

from collections.abc import Sequence

from backboned.registry.errors import invalid
from backboned.server.serving.calls import Call, Pixels, Prediction, Result, Target
from backboned.v1 import model_service_pb2 as pb

MAX_MODELS = 64
MAX_STICKY_KEY_LENGTH = 256


def to_call(request: pb.PredictRequest) -> Call:
    """What a request asks.

    Raises `BackbonedError` for models that are named in both ways, or too many, and for images that carry nothing, or
    must be had from a dataset first: see `Uploads.with_dataset_images`.
    """
    return Call(
        targets=_targets(request),
        images=[_image(image, index) for index, image in enumerate(request.images)],
        top_k=request.top_k,
        labels=tuple(request.labels),
        embedding=request.return_embedding or bool(request.embedding_stage),
        embedding_stage=request.embedding_stage,
    )


def to_response(request: pb.PredictRequest, results: Sequence[Result]) -> pb.PredictResponse:
    """What is answered to a request: `results`, one for each of the call's targets."""
    if request.models:
        return pb.PredictResponse(
            results=[
                pb.ModelPredictions(model=r.model, version=r.version, predictions=map(_prediction, r.predictions))
                for r in results
            ]
        )
    (result,) = results
    return pb.PredictResponse(
        model=result.model, version=result.version, predictions=map(_prediction, result.predictions)
    )


def _targets(request: pb.PredictRequest) -> tuple[Target, ...]:
    if len(request.sticky_key) > MAX_STICKY_KEY_LENGTH:
        raise invalid(f"sticky_key is longer than {MAX_STICKY_KEY_LENGTH} characters", field="sticky_key")
    if not request.models:
        return (_target(request, request.sticky_key),)
    if request.model or request.WhichOneof("target"):
        raise invalid("give `model`, with its `version` or `alias`, or give `models`, not both", field="models")
    if len(request.models) > MAX_MODELS:
        raise invalid(f"{len(request.models)} models in one request; send at most {MAX_MODELS}", field="models")
    return tuple(_target(named, request.sticky_key) for named in request.models)


def _target(named: pb.PredictRequest | pb.ModelTarget, sticky_key: str) -> Target:
    target = named.WhichOneof("target")
    return Target(
        named.model,
        version=named.version if target == "version" else None,
        alias=named.alias if target == "alias" else None,
        sticky_key=sticky_key,
    )


def _prediction(prediction: Prediction) -> pb.Prediction:
    return pb.Prediction(
        id=prediction.id,
        classes=[pb.ClassProbability(label=label, probability=value) for label, value in prediction.classes],
        embedding=prediction.embedding,
        uncertain=prediction.uncertain,
        unfamiliar=prediction.unfamiliar,
    )


def _image(image: pb.Image, index: int) -> bytes | Pixels:
    source = image.WhichOneof("source")
    if source == "encoded":
        return image.encoded
    if source == "tensor":
        return Pixels(image.tensor.data, tuple(image.tensor.shape))
    raise invalid(f"image {index} is empty: set `encoded`, `dataset_image` or `tensor`", field=f"images[{index}]")
