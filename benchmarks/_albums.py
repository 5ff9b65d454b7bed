"""Datasets for the training benchmark: folders of photos by class, each time with bytes that nobody has seen."""

from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

CLASSES = ("bark", "brick", "cloth", "grass", "sand")
PARTS = ("train", "val")
MADE = {"train": 80, "val": 40}
"""How many photos of a class are made where none are given."""
_SIZE = (320, 240)
_SUFFIXES = (".jpg", ".jpeg", ".png")

Pixels = NDArray[np.uint8]


class Album:
    """Photos by part (`train`, `val`) and class, from which datasets are taken."""

    def __init__(self, folder: Path) -> None:
        """Read the names below `folder`. Raises `SystemExit` if there are no classes in `train/` and `val/`."""
        self.folder = folder
        self._photos: dict[str, dict[str, list[Path]]] = {part: _by_class(folder / part) for part in PARTS}
        if not self._photos["train"] or self._photos["train"].keys() != self._photos["val"].keys():
            raise SystemExit(f"{folder} needs train/ and val/ with the same folders of photos, one for each class")

    @classmethod
    def made(cls, folder: Path) -> "Album":
        """Coloured textures, of five classes that are not too easy to tell apart."""
        for label, name in enumerate(CLASSES):
            for part, count in MADE.items():
                (folder / part / name).mkdir(parents=True)
                for i in range(count):
                    pixels = _texture(label, np.random.default_rng((label, i, part == "val")))
                    (folder / part / name / f"{i:04}.jpg").write_bytes(_jpeg(pixels))
        return cls(folder)

    @property
    def counts(self) -> dict[str, int]:
        """How many photos each part has."""
        return {part: sum(map(len, photos.values())) for part, photos in self._photos.items()}

    def take(self, folder: Path, counts: Mapping[str, int], *, seed: int, grain: int = 0) -> Path:
        """Make the dataset `folder` with so many photos of each part, as many of each class, and return it.

        They are drawn by `seed`. Each pixel is moved by at most one step, by `seed` and `grain`, so that no cache knows
        the photos, whatever it goes by; those that are used again, because there are too few, are shifted too.
        """
        drawn, rng = np.random.default_rng(seed), np.random.default_rng((seed, grain))
        for part, count in counts.items():
            for label, (name, photos) in enumerate(self._photos[part].items()):
                (folder / part / name).mkdir(parents=True)
                share = count // len(self._photos[part]) + (label < count % len(self._photos[part]))
                order = drawn.permutation(len(photos))
                for i in range(share):
                    data = _jpeg(_moved(_pixels(photos[order[i % len(photos)]]), rng, shift=i >= len(photos)))
                    (folder / part / name / f"{i:05}.jpg").write_bytes(data)
        return folder


def labelled(part: Path) -> list[tuple[str, Path]]:
    """The photos of one part of a dataset, each with its class."""
    return [(name, path) for name, paths in _by_class(part).items() for path in paths]


def _by_class(part: Path) -> dict[str, list[Path]]:
    folders = sorted(p for p in part.iterdir() if p.is_dir()) if part.is_dir() else []
    found: dict[str, Sequence[Path]] = {
        f.name: sorted(p for p in f.iterdir() if p.suffix.lower() in _SUFFIXES) for f in folders
    }
    return {name: list(paths) for name, paths in found.items() if paths}


def _texture(label: int, rng: np.random.Generator) -> Pixels:
    """Waves of a class's direction and length, in colours about the class's own, with grain."""
    width, height = _SIZE
    angle = np.pi * label / len(CLASSES) + rng.normal(0, 0.25)
    length = 10 * 1.5**label * rng.uniform(0.7, 1.4)
    y, x = np.mgrid[:height, :width]
    wave = np.sin(2 * np.pi * (x * np.cos(angle) + y * np.sin(angle)) / length + rng.uniform(0, 6.3))
    hue = np.array([np.sin(label + k) for k in (0, 2, 4)]) * 40 + rng.normal(0, 25, 3)
    coarse = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)).resize(_SIZE, Image.Resampling.BICUBIC)
    picture = 64 + hue + np.asarray(coarse) * 0.5 + wave[..., None] * 35 + rng.normal(0, 10, (height, width, 3))
    return _bytes(picture)


def _moved(pixels: Pixels, rng: np.random.Generator, *, shift: bool) -> Pixels:
    if shift:
        pixels = np.roll(pixels, (int(rng.integers(pixels.shape[0])), int(rng.integers(pixels.shape[1]))), (0, 1))
    noise = rng.integers(-1, 2, pixels.shape, dtype=np.int16)
    return _bytes(pixels.astype(np.int16) + noise)


def _bytes(picture: NDArray[Any]) -> Pixels:
    pixels: Pixels = np.clip(picture, 0, 255).astype(np.uint8)
    return pixels


def _pixels(path: Path) -> Pixels:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def _jpeg(pixels: Pixels) -> bytes:
    file = BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=92)
    return file.getvalue()
