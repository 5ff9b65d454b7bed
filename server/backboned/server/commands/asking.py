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
    """What was said of one image: by each model that was asked, in their order; or why nothing was."""

    image: Path
    label: str | None
    said: tuple["Said", ...] = ()
    error: str | None = None


@dataclass(frozen=True)
class Said:
    """A version's prediction."""

    model: str
    version: int
    prediction: pb.Prediction


@dataclass(frozen=True)
class Question:
    """What is asked of every image; `models` are named as `Client.predict_models` takes them."""

    models: Sequence[str]
    top_k: int
    return_embedding: bool
    embedding_stage: str


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
        results = client.predict_models(
            question.models,
            paths,
            top_k=question.top_k,
            labels=[label for label in labels if label is not None],
            return_embedding=question.return_embedding,
            embedding_stage=question.embedding_stage,
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
    for i, (path, label) in enumerate(zip(paths, labels, strict=True)):
        yield Answer(path, label, tuple(Said(r.model, r.version, r.predictions[i]) for r in results))
