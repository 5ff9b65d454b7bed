"""Images for requests: read from disk, and cut into requests of a bounded size."""

import os
from collections.abc import Iterable, Iterator
from itertools import zip_longest
from pathlib import Path

import grpc

from backboned._client_status import ClientError

Image = bytes | str | os.PathLike[str]
"""A file's bytes, or the path of a file."""


def several(images: Image | Iterable[Image]) -> Iterable[Image]:
    """`images`, also where one alone was given."""
    return [images] if isinstance(images, bytes | str | os.PathLike) else images


def read(image: Image, index: int) -> bytes:
    """A file's bytes. Raises `ClientError` that names the file and the image's `index`."""
    if isinstance(image, bytes):
        return image
    try:
        return Path(image).read_bytes()
    except OSError as error:
        message = f"can't read image {os.fspath(image)}: {error.strerror}"
        raise ClientError(grpc.StatusCode.INVALID_ARGUMENT, message, f"images[{index}]") from None


def batches(
    images: Iterable[Image], labels: Iterable[str], size: int, max_bytes: int
) -> Iterator[tuple[list[bytes], list[str]]]:
    """Images, read, and their labels: at most `size` images and, unless one alone is larger, `max_bytes` together."""
    held: list[bytes] = []
    known: list[str] = []
    for index, (image, label) in enumerate(zip_longest(images, labels)):
        if image is None:
            raise ClientError(grpc.StatusCode.INVALID_ARGUMENT, f"only {index} images for more labels", "labels")
        data = read(image, index)
        if held and (len(held) >= size or sum(map(len, held)) + len(data) > max_bytes):
            yield held, known
            held, known = [], []
        held.append(data)
        known.extend([label] if label is not None else [])
    if held:
        yield held, known
