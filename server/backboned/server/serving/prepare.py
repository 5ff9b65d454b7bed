"""From what a call carries to an image that can ride in a batch."""

from torch import Tensor

from backboned.registry.backbone import Preprocessing
from backboned.server.compute.preprocess import read, read_pixels
from backboned.server.serving.calls import Pixels, Prepared, StalePreprocessing


def prepare(source: bytes | Pixels | Prepared, preprocessing: Preprocessing, *, max_pixels: int) -> Tensor:
    """`[3, crop, crop]` uint8, channels last.

    Raises `BackbonedError`: `INVALID_ARGUMENT` for an image that can't be read or has more than `max_pixels` pixels,
    and `StalePreprocessing` for one that was prepared otherwise.
    """
    if isinstance(source, bytes):
        return read(source, preprocessing, max_pixels=max_pixels)
    if isinstance(source, Pixels):
        return read_pixels(source.data, source.shape, preprocessing, max_pixels=max_pixels)
    if source.preprocessing != preprocessing:
        raise StalePreprocessing
    return source.image
