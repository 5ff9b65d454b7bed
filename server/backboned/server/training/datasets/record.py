"""What is kept of an image that was seen: enough to tell copies, near copies, and what is odd."""

import hashlib
import struct
from dataclasses import dataclass

import numpy as np
from PIL import Image
from torch import Tensor

from backboned.server.compute.decode import header_size

THUMBNAIL_SIDE = 16
_FORM = struct.Struct(f">32sIIB{THUMBNAIL_SIDE**2}s")
_BLANK_RANGE = 8
_FIRST_SIDE = 32

RECORD_BYTES = _FORM.size
"""How long a record is as bytes."""


@dataclass(frozen=True)
class Record:
    """An image: the SHA-256 of its bytes in hex, its size in pixels, a grey thumbnail, and whether it has one colour.

    `thumbnail` is 16×16 bytes, row by row, of the picture as it is served.
    """

    digest: str
    width: int
    height: int
    thumbnail: bytes
    blank: bool

    def to_bytes(self) -> bytes:
        """`RECORD_BYTES` bytes."""
        return _FORM.pack(bytes.fromhex(self.digest), self.width, self.height, self.blank, self.thumbnail)

    @classmethod
    def from_bytes(cls, content: bytes) -> "Record":
        """The inverse of `to_bytes`. Raises `ValueError` for anything of another length."""
        if len(content) != _FORM.size:
            raise ValueError(f"a record has {_FORM.size} bytes, not {len(content)}")
        digest, width, height, blank, thumbnail = _FORM.unpack(content)
        return cls(digest.hex(), width, height, thumbnail, bool(blank))


def inspect(data: bytes, pixels: Tensor, *, digest: str = "", size: tuple[int, int] | None = None) -> Record:
    """The record of an image whose file is `data`, decoded to `pixels`: `[3, height, width]` uint8, any strides.

    `digest` is the SHA-256 of `data` in hex and `size` the picture's width and height, where these are known already.
    """
    width, height = size or header_size(data)
    picture = Image.fromarray(np.ascontiguousarray(pixels.permute(1, 2, 0).numpy()))
    picture = picture.reduce(max(1, min(picture.size) // _FIRST_SIDE))
    blank = bool((np.ptp(np.asarray(picture), axis=(0, 1)) <= _BLANK_RANGE).all())
    side = (THUMBNAIL_SIDE, THUMBNAIL_SIDE)
    thumbnail = picture.convert("L").resize(side, Image.Resampling.BOX).tobytes()
    return Record(digest or hashlib.sha256(data).hexdigest(), width, height, thumbnail, blank)
