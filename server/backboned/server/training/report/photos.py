"""The photos that a version gets most wrong, small enough to lie in the page."""

import base64
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from io import BytesIO

import torch
from PIL import Image
from torch.nn import functional as F

from backboned.registry.errors import BackbonedError
from backboned.registry.task import Task
from backboned.server.compute.decode import decode
from backboned.server.training.calibration import right
from backboned.server.training.judging import Outputs, decisions, truths

MOST = 24
SIDE = 200
QUALITY = 78

Read = Callable[[str], bytes]
"""An image file's bytes, by its path within the dataset. Raises `OSError`, or `BackbonedError`, where there is none."""


@dataclass(frozen=True)
class Judged:
    """Images that were judged: what came out, and the path of each within the dataset."""

    outputs: Outputs
    paths: Sequence[str]


@dataclass(frozen=True)
class Mistake:
    """A wrong answer: classes that are true and that were said, each with its probability; and its loss."""

    part: str
    path: str
    true: tuple[tuple[str, float], ...]
    said: tuple[tuple[str, float], ...]
    loss: float


@dataclass(frozen=True)
class Photo:
    """A mistake with its picture: a JPEG of `SIDE` pixels at most, as a `data:` URI."""

    mistake: Mistake
    uri: str


def mistakes(task: Task, classes: Sequence[str], temperature: float, part: str, judged: Judged) -> list[Mistake]:
    """All wrong answers, the most wrong ones first."""
    outputs = judged.outputs
    probabilities = task.probabilities(outputs.logits / temperature)
    said, true = decisions(task, probabilities), truths(task, outputs.targets, len(classes))
    losses = F.binary_cross_entropy(probabilities, true.float(), reduction="none").mean(dim=1)
    if task is not Task.MULTI_LABEL:
        losses = -probabilities.gather(1, outputs.targets[:, None])[:, 0].clamp(min=1e-30).log()
    wrong = torch.nonzero(~right(task, probabilities, outputs.targets))[:, 0]
    found = []
    for i in wrong[losses[wrong].argsort(descending=True)].tolist():
        given = probabilities[i].tolist()
        names = [[(classes[k], given[k]) for k in torch.nonzero(which[i])[:, 0].tolist()] for which in (true, said)]
        found.append(Mistake(part, judged.paths[i], tuple(names[0]), tuple(names[1]), losses[i].item()))
    return found


def pictures(found: Sequence[Mistake], read: Read, *, max_pixels: int) -> list[Photo]:
    """The worst mistakes whose photos can be read, `MOST` at most."""
    shown: list[Photo] = []
    for mistake in sorted(found, key=lambda m: -m.loss)[: 3 * MOST]:
        if len(shown) == MOST:
            break
        try:
            shown.append(Photo(mistake, thumbnail(read(mistake.path), max_pixels=max_pixels)))
        except (OSError, BackbonedError):
            continue
    return shown


def thumbnail(data: bytes, *, max_pixels: int) -> str:
    """An image file, small, as a JPEG in a `data:` URI. Raises `BackbonedError` if it can't be read."""
    image = Image.fromarray(decode(data, max_pixels=max_pixels).permute(1, 2, 0).contiguous().numpy())
    image.thumbnail((SIDE, SIDE))
    file = BytesIO()
    image.save(file, "JPEG", quality=QUALITY, optimize=True)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"
