"""scikit-learn's handwritten digits as image files, and as the tensors that a backbone reads."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_digits
from torch import Tensor

from backboned.registry import Preprocessing
from backboned.server.compute.decode import decode
from backboned.server.compute.preprocess import normalise, prepare

PRETRAINING_DIGITS = (0, 1, 2, 3, 4)
NEW_DIGITS = (5, 6, 7, 8, 9)
SIDE_PIXELS = 64


@dataclass(frozen=True)
class Images:
    """Labelled images: normalised `pixels` `[n, 3, height, width]` and `labels` `[n]`, which count classes from 0."""

    pixels: Tensor
    labels: Tensor


def write_images(folder: Path, images_a_class: int, seed: int) -> None:
    """Write every digit as a PNG, in a folder for its class.

    `pretraining/` has all of 0-4; of 5-9, `labelled/train/` and `labelled/val/` have `images_a_class` each, and
    `held-out/` has the rest.
    """
    digits = load_digits()
    order = np.random.default_rng(seed).permutation(len(digits.target))
    seen = dict.fromkeys(NEW_DIGITS, 0)
    for index in order:
        digit = int(digits.target[index])
        place = "pretraining"
        if digit in seen:
            place = ("labelled/train", "labelled/val", "held-out")[min(seen[digit] // images_a_class, 2)]
            seen[digit] += 1
        file = folder / place / str(digit) / f"{index:04}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        grey = Image.fromarray((digits.images[index] * (255 / 16)).astype(np.uint8))
        grey.resize((SIDE_PIXELS, SIDE_PIXELS), Image.Resampling.BICUBIC).save(file)


def image_files(folder: Path) -> list[Path]:
    """The images below `folder`, class by class."""
    return sorted(folder.glob("*/*.png"))


def load(files: Sequence[Path], preprocessing: Preprocessing) -> Images:
    """Files as a backbone reads them, prepared by the code that the daemon serves and trains with."""
    prepared = [prepare(decode(file.read_bytes(), max_pixels=10**6), preprocessing) for file in files]
    classes = sorted({file.parent.name for file in files})
    labels = [classes.index(file.parent.name) for file in files]
    return Images(normalise(torch.stack(prepared), preprocessing), torch.tensor(labels))
