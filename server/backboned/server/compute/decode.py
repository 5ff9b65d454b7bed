"""Decoding: an image file's bytes, or raw pixels, to `[3, height, width]` uint8 RGB.

PIL decodes everything: what torchvision.io has for it is deprecated since torchvision 0.29, gives the same pixels for
JPEGs and kills the process (SIGSEGV) on a PNG with one damaged byte.

Every function here may be called from many threads at once and starts none: what touches pixels is PIL, which lets
other threads run meanwhile, or numpy; neither has OpenMP teams.
"""

import re
import struct
from collections.abc import Callable, Sequence
from io import BytesIO
from math import prod
from typing import NamedTuple

import numpy as np
import torch
from PIL import ExifTags, Image
from PIL.BmpImagePlugin import BmpImageFile
from PIL.GifImagePlugin import GifImageFile
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import TiffImageFile
from PIL.WebPImagePlugin import WebPImageFile
from torch import Tensor

from backboned.registry.errors import BackbonedError, invalid


class _Format(NamedTuple):
    name: str
    signature: re.Pattern[bytes]
    open: Callable[[BytesIO], ImageFile]


# PIL's plugins are opened directly, since `Image.open` has a pixel limit of its own, process-wide, that warns.
# `JpegImageFile` also reads MPO, as its first picture.
_FORMATS = (
    _Format("JPEG", re.compile(rb"\xff\xd8\xff"), JpegImageFile),
    _Format("PNG", re.compile(rb"\x89PNG\r\n\x1a\n"), PngImageFile),
    _Format("WebP", re.compile(rb"RIFF.{4}WEBP", re.DOTALL), WebPImageFile),
    _Format("GIF", re.compile(rb"GIF8[79]a"), GifImageFile),
    _Format("BMP", re.compile(rb"BM"), BmpImageFile),
    _Format("TIFF", re.compile(rb"II[*+]\0|MM\0[*+]"), TiffImageFile),
)
_LARGE_PIXELS = 2_000_000
_FORMAT_NAMES = ", ".join(f.name for f in _FORMATS)


_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What sets a picture upright, by its EXIF orientation."""

_ON_ITS_SIDE = {_TURNS[orientation] for orientation in (5, 6, 7, 8)}


def decode(data: bytes, *, max_pixels: int) -> Tensor:
    """The picture in an image file's bytes: `[3, height, width]` uint8 RGB, turned as its EXIF orientation says.

    JPEG, PNG, WebP, GIF and TIFF (their first frame) and BMP are read. Transparency is laid on white, 16-bit values
    lose their low byte, CMYK becomes RGB as PIL does it, colour profiles are left unapplied, as in torchvision.

    Raises `BackbonedError` `INVALID_ARGUMENT` for bytes that are no image, for one that is truncated or damaged, and
    for one of more than `max_pixels` pixels, which is told from the header, before any pixel is decoded. JPEG, GIF
    and WebP have no checksum: damage inside that leaves a valid stream can't be told from a picture.
    """
    return torch.from_numpy(np.array(decode_picture(data, max_pixels=max_pixels).image)).permute(2, 0, 1)


class Picture(NamedTuple):
    """A decoded picture in RGB, upright. `width` and `height` are those that the file tells, in whole pixels of it.

    A JPEG may have been decoded `reduced` times smaller, by 2, 4 or 8.
    """

    image: Image.Image
    width: int
    height: int
    reduced: int = 1


def decode_picture(data: bytes, *, max_pixels: int, short_side: int | None = None) -> Picture:
    """The same picture as `decode`, for PIL.

    Where a `short_side` is given, a JPEG of at least two megapixels is decoded at a half, a quarter or an eighth of its
    size, as long as its own short side is twice as long then. Raises as `decode` does.
    """
    if not data:
        raise invalid(f"an image is empty: it has 0 bytes; send the bytes of an image file ({_FORMAT_NAMES})")
    file_format = next((f for f in _FORMATS if f.signature.match(data)), None)
    if file_format is None:
        raise invalid(f"not an image that can be read: it begins with {data[:16]!r}, which is none of {_FORMAT_NAMES}")
    try:
        image = file_format.open(BytesIO(data))
        width, height = image.size
        _check_size(width, height, max_pixels)
        if file_format.name == "PNG":
            file_format.open(BytesIO(data)).verify()  # the CRCs: `load` doesn't look at those of pixels
        header_bytes = image.fp.tell() if image.fp else 0
        reduced = _reduce(image, short_side) if file_format.name == "JPEG" and short_side else 1
        image.load()
        picture = _in_rgb(image)
        if file_format.name == "JPEG" and _is_cut_short(
            data, header_bytes, picture, progressive="progression" in image.info
        ):
            raise OSError("truncated")
        turn = _TURNS.get(_orientation(image))
    except BackbonedError:
        raise
    except Exception as error:  # decoders raise whatever they like on foreign bytes
        raise invalid(f"not an image that can be read: {file_format.name} {_damage(error, len(data))}") from error
    if turn is None:
        return Picture(picture, width, height, reduced)
    if turn in _ON_ITS_SIDE:
        width, height = height, width
    return Picture(picture.transpose(turn), width, height, reduced)


def header_size(data: bytes) -> tuple[int, int]:
    """Width and height of the picture in an image file's bytes, in pixels as stored, as its header tells.

    Raises `BackbonedError` `INVALID_ARGUMENT` for what has no such header.
    """
    file_format = next((f for f in _FORMATS if f.signature.match(data)), None)
    try:
        if file_format is None:
            raise ValueError(f"it begins with {data[:16]!r}")
        width, height = file_format.open(BytesIO(data)).size
    except Exception as error:  # decoders raise whatever they like on foreign bytes
        raise invalid(f"not an image that can be read: {error}") from error
    return width, height


def from_pixels(data: bytes, shape: Sequence[int], *, max_pixels: int) -> Tensor:
    """Raw uint8 RGB pixels, row by row, of `shape` `[height, width, 3]`, as `[3, height, width]` uint8.

    Raises `BackbonedError` `INVALID_ARGUMENT` where `shape` is another, `data` doesn't fit it, or it has more than
    `max_pixels` pixels.
    """
    shape = tuple(shape)
    if len(shape) != 3 or shape[2] != 3:
        raise invalid(f"the shape of raw pixels must be [height, width, 3] (uint8 RGB), got {list(shape)}")
    height, width, _ = shape
    _check_size(width, height, max_pixels)
    if len(data) != prod(shape):
        raise invalid(f"raw pixels of shape {list(shape)} take {prod(shape)} bytes (uint8), got {len(data)}")
    return torch.frombuffer(bytearray(data), dtype=torch.uint8).view(shape).permute(2, 0, 1)


def _reduce(image: ImageFile, short_side: int) -> int:
    """Have a JPEG decoded smaller, if that still leaves twice the `short_side`; tells by how much."""
    before = image.width
    if before * image.height < _LARGE_PIXELS:
        return 1
    wanted = 2 * short_side
    image.draft(image.mode, (wanted, wanted))
    return round(before / image.width)


def _check_size(width: int, height: int, max_pixels: int) -> None:
    if width < 1 or height < 1:
        raise invalid(f"an image has no pixels: it is {width}x{height}")
    if width * height > max_pixels:
        raise invalid(
            f"an image is too large: {width}x{height} = {width * height / 1e6:g} megapixels; "
            f"the limit is {max_pixels / 1e6:g}"
        )


def _is_cut_short(data: bytes, header_bytes: int, picture: Image.Image, progressive: bool) -> bool:
    """Whether a JPEG that PIL could load lacks its end.

    libjpeg makes pixels of whatever follows, and flat grey once an end marker came too early. So the marker must be
    there, and a sequential picture that ends in that grey is decoded again with padding in the marker's place: then
    the decoder asks for more where data is missing, and stops at the last row where none is.
    """
    end = data.find(b"\xff\xd9", header_bytes)
    if end < 0:
        return True
    width, height = picture.size
    corner = picture.crop((max(width - 8, 0), height - 1, width, height))
    if progressive or any(extreme != (128, 128) for extreme in corner.getextrema()):
        return False
    try:
        JpegImageFile(BytesIO(data[:end] + bytes(16))).load()
    except OSError:
        return True
    return False


def _in_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and not image.has_transparency_data:
        return image
    if image.mode.startswith("I;16"):
        values = np.asarray(image)
        grey = (values >> 8).astype(np.uint8)  # as PIL does for 16-bit RGB; its `convert` would clip grey at 255
        grey[values == image.info.get("transparency", -1)] = 255
        return Image.fromarray(grey).convert("RGB")
    if image.mode in ("I", "F"):
        kind = "floating-point" if image.mode == "F" else "32-bit integer"
        raise invalid(f"{image.format} with {kind} pixels has no defined white; save it with 8 or 16 bits a channel")
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return image.convert("RGB")


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # broken EXIF says nothing about the pixels
        return 1


def _damage(error: Exception, size_bytes: int) -> str:
    if isinstance(error, Image.DecompressionBombError):  # PIL's own limit, which only WebP meets
        return f"is too large: {error}"
    reason = " ".join(str(error).split()) or type(error).__name__
    if reason == "not identified by this driver":
        reason = "its header gives no size, or a kind of pixels that isn't known"
    ended = isinstance(error.__cause__ or error, EOFError | IndexError | struct.error)
    if ended or "truncated" in reason.lower():
        return f"is truncated after {size_bytes} bytes"
    return f"is damaged: {reason}"
