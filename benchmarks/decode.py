"""From a JPEG to a network's input, against the plain PIL pipeline of a tutorial: `python benchmarks/decode.py`.

The pictures are made here, as like photos as smooth colours with grain can be. One thread; medians of wall-clock time.
"""

import io
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
from PIL import Image
from torchvision import transforms

from backboned.registry.backbone import Preprocessing
from backboned.server.compute.decode import decode
from backboned.server.compute.preprocess import normalise, read, stack

SETTINGS = Preprocessing()
TUTORIAL = transforms.Compose(
    [transforms.Resize(SETTINGS.resize_size), transforms.CenterCrop(SETTINGS.crop_size), transforms.PILToTensor()]
)


def photo_like(width: int, height: int) -> bytes:
    """A JPEG of some two bits a pixel: smooth colours and grain."""
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC))
    grainy = np.clip(smooth + rng.normal(0, 8, smooth.shape), 0, 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(grainy).save(buffer, "JPEG", quality=85)
    return buffer.getvalue()


def median_milliseconds(work: Callable[[], object], seconds: float = 2.0) -> float:
    """The median time of `work`, run again and again for `seconds`."""
    work()
    times: list[float] = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        begin = time.perf_counter()
        work()
        times.append(time.perf_counter() - begin)
    return statistics.median(times) * 1e3


def row(width: int, height: int) -> str:
    """What one size of picture takes."""
    data = photo_like(width, height)
    prepared = [read(data, SETTINGS, max_pixels=width * height)]
    columns = (
        median_milliseconds(lambda: decode(data, max_pixels=width * height)),
        median_milliseconds(lambda: read(data, SETTINGS, max_pixels=width * height)),
        median_milliseconds(lambda: normalise(stack(prepared), SETTINGS, torch.bfloat16)),
        median_milliseconds(lambda: TUTORIAL(Image.open(io.BytesIO(data)).convert("RGB"))),
    )
    size = f"{width}x{height}"
    return f"{size:>12} {len(data) // 1000:>6} " + " ".join(f"{c:>9.2f}" for c in columns)


def main() -> None:
    """Print a line for each size of picture.

    `decode` makes all pixels, as training needs them; `read` what serving needs: decoded, resized and cropped.
    """
    torch.set_num_threads(1)
    print(f"{'picture':>12} {'kB':>6} {'decode':>9} {'read':>9} {'normalise':>9} {'plain PIL':>9}  (ms)")
    for width, height in ((500, 375), (1024, 768), (4000, 3000)):
        print(row(width, height))


if __name__ == "__main__":
    main()
