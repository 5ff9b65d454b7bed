"""From a photo to a network's input, by the very functions that the daemon uses."""

from collections.abc import Sequence

import torch
from torch import Tensor

from backboned.registry.backbone import Preprocessing
from backboned.server.compute.decode import decode
from backboned.server.compute.device import Device
from backboned.server.compute.preprocess import normalise, prepare

MAX_PIXELS = 100_000_000


def prepared(photo: bytes, preprocessing: Preprocessing) -> Tensor:
    """A file's bytes to `[3, crop, crop]` uint8."""
    return prepare(decode(photo, max_pixels=MAX_PIXELS), preprocessing)


def stacked(images: Sequence[Tensor], preprocessing: Preprocessing, device: Device) -> Tensor:
    """Prepared images as a batch `[n, 3, crop, crop]` on the device, in its precision, channels last."""
    batch = torch.stack(list(images))
    if device.device.type == "cuda":
        batch = batch.pin_memory().to(device.device, non_blocking=True)
    x = normalise(batch, preprocessing).to(device.dtype)
    return x.contiguous(memory_format=torch.channels_last)
