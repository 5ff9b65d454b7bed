"""A first look at what a freshly loaded model answers, before anyone else sees it."""

import weakref
from collections.abc import Sequence

import torch
from torch import Tensor

from backboned.registry.backbone import Preprocessing
from backboned.registry.payload import refused
from backboned.server.compute.device import Device
from backboned.server.compute.stages import LoadedStage


class Canary:
    """Runs one image through new stages: warms them, and finds those that don't run or give nothing finite.

    Each stage runs once, however many models share it. For one thread at a time.
    """

    def __init__(self) -> None:
        self._outputs: weakref.WeakKeyDictionary[LoadedStage, tuple[int, Tensor]] = weakref.WeakKeyDictionary()

    def check(self, path: Sequence[LoadedStage], preprocessing: Preprocessing, device: Device) -> None:
        """Raise `BackbonedError` if the model at the end of `path` can't answer."""
        generator = torch.Generator().manual_seed(0)
        image = torch.rand(1, *preprocessing.input_shape, generator=generator)
        x = image.to(device.device, device.dtype)
        with torch.inference_mode():
            for stage in path:
                size, known = self._outputs.get(stage, (0, x))
                try:
                    x = known if size == preprocessing.crop_size else stage(x)
                except Exception as error:  # whatever torch or a plugin's code raises
                    raise refused(f"stage {stage.key[1]!r} of {stage.key[0]} doesn't run: {error}") from error
                self._outputs[stage] = preprocessing.crop_size, x
            if not torch.isfinite(x).all():
                raise refused("its answer to a test image is not finite: its weights are unusable")
