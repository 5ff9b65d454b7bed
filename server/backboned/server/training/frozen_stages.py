"""The stages below the freezing boundary, by the code that serves."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from backboned.registry.backbone import Backbone, Preprocessing
from backboned.server.compute.artefacts import ArtefactStore
from backboned.server.compute.device import Device
from backboned.server.compute.preprocess import normalise
from backboned.server.compute.reuse import reuse
from backboned.server.compute.stages import LoadedStage, StageStore, run_path
from backboned.server.training.network import boundary
from backboned.server.training.options import TrainingOptions
from backboned.server.training.spec import TrainerSpec
from backboned.server.training.starting_point import StartingPoint

RECIPE = 2
"""Of rows: to be raised when decoding, cropping, augmenting or batching changes what a row is."""

BATCH = {"cpu": 8, "cuda": 64}
"""Rows that are computed at once, always: short batches are filled up, so that a row has the same bits in each."""


@dataclass(frozen=True)
class Frozen:
    """The stages below the boundary, by the digests of their weights; none if everything trains.

    `load` gives the stages themselves: it is called once, when rows are first computed, which may never be. May be used
    from any thread once `path` has been read.
    """

    backbone: Backbone
    digests: Mapping[str, str]
    load: Callable[[], Sequence[LoadedStage]]
    preprocessing: Preprocessing
    device: Device

    @cached_property
    def path(self) -> Sequence[LoadedStage]:
        """The stages, first to last."""
        return self.load()

    @property
    def batch(self) -> int:
        """How many rows are computed at once."""
        return BATCH[self.device.device.type]

    @cached_property
    def row_bytes(self) -> int:
        """What a row takes in the cache."""
        pixels = blank(self.preprocessing)
        return self._run(pixels, 1).nbytes if self.digests else pixels.nbytes

    def rows(self, pixels: Tensor) -> Tensor:
        """`[n, 3, crop, crop]` uint8 → what is cached, `[n, …]` on the CPU: activations, or the pixels themselves."""
        if not self.digests:
            return pixels
        return torch.cat([self._run(part, self.batch) for part in pixels.split(self.batch)])

    def inputs(self, rows: Tensor) -> Tensor:
        """Rows → `[n, …]` float32 on the device, ready for autograd."""
        if not self.digests:
            return normalise(rows.to(self.device.device), self.preprocessing)
        return rows.to(self.device.device).float().clone()  # a clone is no inference tensor

    def describe(self) -> dict[str, object]:
        """All that a row depends on besides its image, as JSON values."""
        stages = [list(item) for item in self.digests.items()]
        return {
            "recipe": RECIPE,
            "preprocessing": self.preprocessing.to_dict(),
            "backbone": self.backbone.name if stages else "",
            "stages": stages,
            "precision": self.device.precision if stages else "",
            "device": self.device.device.type if stages else "",
        }

    @torch.inference_mode()
    def _run(self, pixels: Tensor, batch: int) -> Tensor:
        count = len(pixels)
        full = torch.cat([pixels, pixels[-1:].expand(batch - count, -1, -1, -1)])
        x = normalise(full.to(self.device.device), self.preprocessing)
        x = x.to(self.device.dtype, memory_format=torch.channels_last)  # a quarter faster on the CPU
        return run_path(self.path, x)[:count].contiguous().cpu()


def frozen_stages(
    spec: TrainerSpec, device: Device, backbone: Backbone, options: TrainingOptions, start: StartingPoint
) -> Frozen:
    """What a job doesn't train; loaded once it is needed, and compiled as far as the daemon has compiled it.

    In fp32 stages run eagerly: then features are the same bits whenever a job goes on.
    """
    below = backbone.chain[: boundary(backbone, options.trainable_stages)]

    def load() -> Sequence[LoadedStage]:
        store = StageStore(device)
        path = tuple(store.get(backbone, stage, start.stages[stage.name]) for stage in below)
        if spec.compiled_dir is not None and path and device.precision != "fp32":
            with torch.inference_mode():  # stages learn the layout of what they are given
                run_path(path, normalise(blank(start.preprocessing).expand(2, -1, -1, -1), start.preprocessing))
            artefacts = ArtefactStore(spec.compiled_dir, limit_bytes=2**62)  # nothing is added
            reuse(path, artefacts, device, images=BATCH[device.device.type], concurrency=spec.threads)
        return path

    digests = {stage.name: start.stages[stage.name].digest for stage in below}
    return Frozen(backbone, digests, load, start.preprocessing, device)


def blank(preprocessing: Preprocessing) -> Tensor:
    """A black image, prepared: `[1, 3, crop, crop]` uint8."""
    return torch.zeros(1, *preprocessing.input_shape, dtype=torch.uint8)
