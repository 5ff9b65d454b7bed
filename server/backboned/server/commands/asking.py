"""What a daemon says of many images, asked for in calls of a bounded size."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from backboned.client import Client, ClientError
from backboned.v1 import model_service_pb2 as pb

IMAGES_A_CALL = 32
BYTES_A_CALL = 24 * 2**20


@dataclass(frozen=True)
class Answer:
    """What the daemon said of one image: a prediction of a version, or why there is none."""

    image: Path
    label: str | None
    version: int = 0
    prediction: pb.Prediction | None = None
    error: str | None = None


@dataclass(frozen=True)
class Question:
    """What is asked of every image."""

    model: str
    version: int | None
    alias: str | None
    top_k: int
    return_embedding: bool


def ask(client: Client, question: Question, paths: Sequence[Path], labels: Sequence[str | None]) -> Iterator[Answer]:
    """Answers, in order, by calls of a bounded size. An image that can't be used spoils no other's answer."""
    for start, end in _calls(paths):
        yield from _ask_once(client, question, paths[start:end], labels[start:end])


def _calls(paths: Sequence[Path]) -> Iterator[tuple[int, int]]:
    start = held_bytes = 0
    for i, path in enumerate(paths):
        size_bytes = path.stat().st_size if path.is_file() else 0
        if i > start and (i - start == IMAGES_A_CALL or held_bytes + size_bytes > BYTES_A_CALL):
            yield start, i
            start, held_bytes = i, 0
        held_bytes += size_bytes
    yield start, len(paths)


def _ask_once(
    client: Client, question: Question, paths: Sequence[Path], labels: Sequence[str | None]
) -> Iterator[Answer]:
    try:
        reply = client.predict(
            question.model,
            paths,
            version=question.version,
            alias=question.alias,
            top_k=question.top_k,
            labels=[label for label in labels if label is not None],
            return_embedding=question.return_embedding,
        )
    except ClientError as error:
        if not (error.field or "").startswith("images["):
            raise
        if len(paths) == 1:
            yield Answer(paths[0], labels[0], error=error.message)
            return
        for path, label in zip(paths, labels, strict=True):
            yield from _ask_once(client, question, [path], [label])
        return
    for path, label, prediction in zip(paths, labels, reply.predictions, strict=True):
        yield Answer(path, label, reply.version, prediction)
