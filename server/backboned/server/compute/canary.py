"""A first look at what a freshly loaded model answers, before anyone else sees it."""

import weakref
from collections.abc import Sequence

import torch
from torch import Tensor

from backboned.registry.backbone import Preprocessing
from backboned.registry.payload import refused
from backboned.server.compute.device import Device
from backboned.server.compute.stages import LoadedStage, StageKey

_Way = tuple[int, tuple[StageKey, ...]]
"""The size of the image, and the stages that it has passed through."""


class Canary:
    """Runs one image through new stages: warms them, and finds those that don't run or give nothing finite.

    What models share at the beginning of their paths runs once. For one thread at a time.
    """

    def __init__(self) -> None:
        self._outputs: weakref.WeakKeyDictionary[LoadedStage, tuple[_Way, Tensor]] = weakref.WeakKeyDictionary()

    def check(self, path: Sequence[LoadedStage], preprocessing: Preprocessing, device: Device) -> None:
        """Raise `BackbonedError` if the model at the end of `path` can't answer."""
        generator = torch.Generator().manual_seed(0)
        image = torch.rand(1, *preprocessing.input_shape, generator=generator)
        x = image.to(device.device, device.dtype)
        with torch.inference_mode():
            passed: tuple[StageKey, ...] = ()
            for stage in path:
                passed = (*passed, stage.key)
                way = preprocessing.crop_size, passed
                before, known = self._outputs.get(stage, (None, x))
                try:
                    x = known if before == way else stage(x)
                except Exception as error:  # whatever torch or a plugin's code raises
                    raise refused(f"stage {stage.key[1]!r} of {stage.key[0]} doesn't run: {error}") from error
                self._outputs[stage] = way, x
            if not torch.isfinite(x).all():
                raise refused("its answer to a test image is not finite: its weights are unusable")
