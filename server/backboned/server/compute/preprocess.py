"""Preprocessing: from a decoded picture to what a backbone reads.

The resize is PIL's, so that a model answers just what the script that trained it would. torch's uint8 resize is five
times as fast, but its weights have 16 bits: it moved up to 0.35 % of the values of 162 photos by 1 or 2 (torch 2.15),
and so MobileNet V2's probabilities by up to 0.005. Nothing here opens OpenMP teams, apart from `normalise`; any thread
may call any function.
"""

import math
import random
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from PIL import Image, ImageEnhance
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as transforms

from backboned.registry.backbone import Preprocessing
from backboned.server.compute.decode import Picture, decode_picture, from_pixels

_RESAMPLING = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
}
_LONGEST_STRIP = 16
"""Times the short side. The ends of a longer picture are cut off before it is resized."""


def read(data: bytes, preprocessing: Preprocessing, *, max_pixels: int) -> Tensor:
    """An image file's bytes to `[3, crop, crop]` uint8, channels last: what `prepare` makes of what `decode` reads.

    A JPEG of two megapixels or more is decoded at reduced scale: its values then differ by less than 1 of 255 on
    average, and by at most 6 in 999 of 1,000. Raises as `decode` does.
    """
    picture = decode_picture(data, max_pixels=max_pixels, short_side=preprocessing.resize_size)
    return _cut(picture, preprocessing)


def read_pixels(data: bytes, shape: Sequence[int], preprocessing: Preprocessing, *, max_pixels: int) -> Tensor:
    """Raw pixels to `[3, crop, crop]` uint8, channels last. Raises as `from_pixels` does."""
    return prepare(from_pixels(data, shape, max_pixels=max_pixels), preprocessing)


def prepare(image: Tensor, preprocessing: Preprocessing) -> Tensor:
    """Resize the short side and crop the centre: `[3, height, width]` uint8 to `[3, crop, crop]` uint8, channels last.

    The same pixels as torchvision's `Resize` and `CenterCrop` on a PIL image; a picture smaller than the crop is
    padded with black. Of a strip longer than 16:1 only the middle is resized: the same picture within a pixel, without
    the gigabyte that the whole would take.
    """
    picture = _picture(image)
    return _cut(Picture(picture, *picture.size), preprocessing)


def stack(images: Sequence[Tensor]) -> Tensor:
    """Prepared images as a batch `[n, 3, crop, crop]` uint8, channels last."""
    return torch.stack([image.permute(1, 2, 0) for image in images]).permute(0, 3, 1, 2)


def normalise(batch: Tensor, preprocessing: Preprocessing, dtype: torch.dtype = torch.float32) -> Tensor:
    """`[n, 3, height, width]` uint8 to `dtype` on the same device: divided by 255, less the mean, over the deviation.

    The arithmetic of torchvision's `ToTensor` and `Normalize`, bit for bit on the CPU; rounded once where `dtype` isn't
    float32. A batch whose channels come last keeps them so.
    """
    if batch.device.type != "cpu" or not batch.is_contiguous(memory_format=torch.channels_last):
        mean, std = _constants(preprocessing, 1, batch.device)
        values = batch.to(torch.float32).div_(255).sub_(mean.view(3, 1, 1)).div_(std.view(3, 1, 1))
        return values.to(dtype)
    count, channels, height, width = batch.shape
    mean, std = _constants(preprocessing, width, batch.device)
    rows = batch.permute(0, 2, 3, 1).reshape(count, height, width * channels)
    normalised = torch.empty(rows.shape, dtype=dtype)
    for image, target in zip(rows, normalised, strict=True):  # one by one: an image stays in the cache, a batch doesn't
        target.copy_(image.to(torch.float32).div_(255).sub_(mean).div_(std))
    return normalised.view(count, height, width, channels).permute(0, 3, 1, 2)


def augment(image: Tensor, preprocessing: Preprocessing, seed: int) -> Tensor:
    """A random view for training: `[3, height, width]` uint8 to `[3, crop, crop]` uint8, contiguous.

    A crop of half to all of the area and of aspect 3:4 to 4:3, where the picture allows it, flipped half the time, with
    brightness, contrast and saturation changed by up to 20 %. A pure function of `image`, `preprocessing` and `seed`
    (0 or more).
    """
    rng = random.Random(seed)
    _, full_height, full_width = image.shape
    area = full_height * full_width * rng.uniform(0.5, 1.0)
    aspect = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
    height = min(max(round(math.sqrt(area / aspect)), 1), full_height)
    width = min(max(round(math.sqrt(area * aspect)), 1), full_width)
    top, left = rng.randint(0, full_height - height), rng.randint(0, full_width - width)
    side = [preprocessing.crop_size, preprocessing.crop_size]
    picture = _picture(image[:, top : top + height, left : left + width])
    picture = transforms.resize(picture, side, InterpolationMode(preprocessing.interpolation))
    if rng.random() < 0.5:
        picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    for enhance in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
        picture = enhance(picture).enhance(rng.uniform(0.8, 1.2))
    return _tensor(picture)


@lru_cache(64)
def _constants(preprocessing: Preprocessing, repeats: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The mean and the deviation of the channels, over and over: `[3 × repeats]`."""
    return (
        torch.tensor(preprocessing.mean * repeats, dtype=torch.float32, device=device),
        torch.tensor(preprocessing.std * repeats, dtype=torch.float32, device=device),
    )


def _picture(image: Tensor) -> Image.Image:
    return Image.fromarray(np.ascontiguousarray(image.permute(1, 2, 0).numpy()))


def _tensor(picture: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


def _cut(picture: Picture, preprocessing: Preprocessing) -> Tensor:
    """Resize the short side and crop the centre of a decoded picture."""
    image, width, height, reduced = _without_far_ends(picture, preprocessing)
    size, side = preprocessing.resize_size, preprocessing.crop_size
    short, long = sorted((width, height))
    long_size = int(size * long / short)
    wide, high = (size, long_size) if width <= height else (long_size, size)
    resample = _RESAMPLING[preprocessing.interpolation]
    if reduced > 1 or wide < side or resample is Image.Resampling.NEAREST:
        image = image.resize((wide, high), resample, (0, 0, width / reduced, height / reduced))
        return _tensor(transforms.center_crop(image, [side, side]))
    # PIL resizes rows first and columns then: what is cut off between the two needn't be resized twice.
    left = round((wide - side) / 2)
    image = image.resize((wide, height), resample).crop((left, 0, left + side, height))
    return _tensor(transforms.center_crop(image.resize((side, high), resample), [side, side]))


def _without_far_ends(picture: Picture, preprocessing: Preprocessing) -> Picture:
    """Cut both ends of a long strip alike, to the pixel, so that the centre stays where it is."""
    image, width, height, reduced = picture
    keep = _LONGEST_STRIP * min(width, height) * math.ceil(preprocessing.crop_size / preprocessing.resize_size)
    if max(width, height) <= keep or reduced != 1:  # what was reduced is small enough
        return picture
    left, top = max(width - keep, 0) // 2, max(height - keep, 0) // 2
    image = image.crop((left, top, width - left, height - top))
    return Picture(image, *image.size)
