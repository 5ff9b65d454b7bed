"""Photos for the benchmark, as like photos as smooth colours with grain can be."""

import shutil
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image

COUNT = 48
WIDTH, HEIGHT = 500, 375


def make_photos(folder: Path, given: Path | None) -> list[bytes]:
    """Fill `folder` with JPEG files, those `given` or new ones, and return what is in them. Raises `SystemExit`."""
    folder.mkdir()
    if given is None:
        for seed in range(COUNT):
            (folder / f"{seed:03}.jpg").write_bytes(_photo_like(seed))
    else:
        found = sorted(p for p in given.rglob("*") if p.suffix.lower() in (".jpg", ".jpeg"))
        if not found:
            raise SystemExit(f"no .jpg or .jpeg files in {given}")
        for i, path in enumerate(found[:: max(1, len(found) // COUNT)][:COUNT]):
            shutil.copyfile(path, folder / f"{i:03}.jpg")
    return [path.read_bytes() for path in sorted(folder.iterdir())]


def _photo_like(seed: int) -> bytes:
    """A JPEG of some 60 kB."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC))
    grainy = np.clip(smooth + rng.normal(0, 8, smooth.shape), 0, 255).astype(np.uint8)
    file = BytesIO()
    Image.fromarray(grainy).save(file, "JPEG", quality=90)
    return file.getvalue()
