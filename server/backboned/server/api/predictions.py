"""Predict's messages and the predictor's values."""

from backboned.registry.errors import BackbonedError, ErrorKind, invalid
from backboned.server.serving.predictor import Call, Pixels, Result
from backboned.v1 import model_service_pb2 as pb


def to_call(request: pb.PredictRequest) -> Call:
    """What a request asks. Raises `BackbonedError` for images that carry nothing, or can't be had here."""
    target = request.WhichOneof("target")
    return Call(
        model=request.model,
        images=[_image(image, index) for index, image in enumerate(request.images)],
        version=request.version if target == "version" else None,
        alias=request.alias if target == "alias" else None,
        top_k=request.top_k,
        labels=tuple(request.labels),
        embedding=request.return_embedding,
    )


def to_response(result: Result) -> pb.PredictResponse:
    """What is answered."""
    return pb.PredictResponse(
        model=result.model,
        version=result.version,
        predictions=[
            pb.Prediction(
                id=p.id,
                classes=[pb.ClassProbability(label=label, probability=value) for label, value in p.classes],
                embedding=p.embedding,
            )
            for p in result.predictions
        ],
    )


def _image(image: pb.Image, index: int) -> bytes | Pixels:
    source = image.WhichOneof("source")
    if source == "encoded":
        return image.encoded
    if source == "tensor":
        return Pixels(image.tensor.data, tuple(image.tensor.shape))
    field = f"images[{index}]"
    if source == "dataset_image":
        raise BackbonedError(
            ErrorKind.UNIMPLEMENTED, f"image {index}: uploaded datasets don't exist yet; send `encoded`", field=field
        )
    raise invalid(f"image {index} is empty: set `encoded` or `tensor`", field=field)
