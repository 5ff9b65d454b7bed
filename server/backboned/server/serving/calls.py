"""What a Predict call asks and what it is answered, as plain values."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from backboned.registry.backbone import Preprocessing
from backboned.registry.errors import BackbonedError, ErrorKind


@dataclass(frozen=True)
class Pixels:
    """An image as raw uint8 RGB bytes, of `shape` [height, width, 3]."""

    data: bytes
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Prepared:
    """An image that a front end has prepared for models with this preprocessing: `[3, crop, crop]` uint8."""

    image: Tensor
    preprocessing: Preprocessing


@dataclass(frozen=True)
class Target:
    """A model, and which of its versions; neither a version nor an alias: the one that serves by default.

    Where traffic is split, calls with one `sticky_key` are answered alike; with none, by chance.
    """

    model: str
    version: int | None = None
    alias: str | None = None
    sticky_key: str = ""


@dataclass(frozen=True)
class Call:
    """What is asked; see PredictRequest. Each of `targets` (one or more) answers for each of `images`."""

    targets: tuple[Target, ...]
    images: Sequence[bytes | Pixels | Prepared]
    top_k: int = 0
    labels: Sequence[str] = ()
    embedding: bool = False
    embedding_stage: str = ""
    """The stage whose pooled output is the embedding; empty: the features that the head reads."""
    patience_seconds: float | None = None
    """How long the caller waits for the answer, if that is known."""


@dataclass(frozen=True)
class Prediction:
    """What one image shows: classes with probabilities, best first; and whether to doubt it, see the proto.

    `certainty` is as of `Task.certainty`, `distance` as of `Answers.distances`; None where the model can't tell.
    """

    id: str
    classes: tuple[tuple[str, float], ...]
    embedding: tuple[float, ...] = ()
    uncertain: bool = False
    unfamiliar: bool = False
    certainty: float | None = None
    distance: float | None = None


@dataclass(frozen=True)
class Result:
    """A target's predictions, one an image, and the version that made them."""

    model: str
    version: int
    predictions: tuple[Prediction, ...]


class StalePreprocessing(BackbonedError):
    """An image was prepared otherwise than the model that is asked reads them: prepare it again."""

    def __init__(self) -> None:
        super().__init__(
            ErrorKind.FAILED_PRECONDITION, "the image was prepared for another model", field="preprocessing"
        )
