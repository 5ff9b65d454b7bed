"""Preprocessing: from a decoded picture to what a backbone reads.

The resize is PIL's, so that a model answers just what the script that trained it would. torch's uint8 resize is five
times as fast, but its weights have 16 bits: it moved up to 0.35 % of the values of 162 photos by 1 or 2 (torch 2.15),
and so MobileNet V2's probabilities by up to 0.005. Nothing here opens OpenMP teams, apart from `normalise`; any thread
may call any function.
"""

import math
import random

import numpy as np
import torch
from PIL import Image, ImageEnhance
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as transforms

from backboned.registry.backbone import Preprocessing

_LONGEST_STRIP = 16
"""Times the short side. The ends of a longer picture are cut off before it is resized."""


def prepare(image: Tensor, preprocessing: Preprocessing) -> Tensor:
    """Resize the short side and crop the centre: `[3, height, width]` uint8 to `[3, crop, crop]` uint8, contiguous.

    The same pixels as torchvision's `Resize` and `CenterCrop` on a PIL image; a picture smaller than the crop is
    padded with black. Of a strip longer than 16:1 only the middle is resized: the same picture within a pixel, without
    the gigabyte that the whole would take.
    """
    interpolation = InterpolationMode(preprocessing.interpolation)
    picture = _picture(_without_far_ends(image, preprocessing))
    picture = transforms.resize(picture, [preprocessing.resize_size], interpolation)
    return _tensor(transforms.center_crop(picture, [preprocessing.crop_size]))


def normalise(batch: Tensor, preprocessing: Preprocessing) -> Tensor:
    """`[n, 3, height, width]` uint8 to float32 on the same device: divided by 255, less the mean, over the deviation.

    The arithmetic of torchvision's `ToTensor` and `Normalize`, bit for bit on the CPU.
    """
    mean = torch.tensor(preprocessing.mean, dtype=torch.float32, device=batch.device).view(3, 1, 1)
    std = torch.tensor(preprocessing.std, dtype=torch.float32, device=batch.device).view(3, 1, 1)
    return batch.to(torch.float32).div_(255).sub_(mean).div_(std)


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


def _picture(image: Tensor) -> Image.Image:
    return Image.fromarray(np.ascontiguousarray(image.permute(1, 2, 0).numpy()))


def _tensor(picture: Image.Image) -> Tensor:
    return torch.from_numpy(np.asarray(picture).transpose(2, 0, 1).copy())


def _without_far_ends(image: Tensor, preprocessing: Preprocessing) -> Tensor:
    """Cut both ends of a long strip alike, to the pixel, so that the centre stays where it is."""
    _, height, width = image.shape
    keep = _LONGEST_STRIP * min(height, width) * math.ceil(preprocessing.crop_size / preprocessing.resize_size)
    top, left = max(height - keep, 0) // 2, max(width - keep, 0) // 2
    return image[:, top : height - top, left : width - left]
