"""A first look at what a freshly loaded model answers, before anyone else sees it.

A few photos run through it: stages are warmed, those that don't run, give nothing finite or say the same of every photo
are found, and in reduced precision its answers are held against those in float32.
"""

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

from backboned.registry.backbone import Backbone, Preprocessing
from backboned.registry.refusal import refused
from backboned.registry.task import Task
from backboned.registry.weights import StageWeights
from backboned.server.compute.decode import decode
from backboned.server.compute.preprocess import augment, normalise, stack
from backboned.server.compute.stages import LoadedStage, StageKey, StageStore

PHOTOS = 4
LARGEST_DEVIATION = 0.1
ROUNDING = 1e-6
"""Logits that differ by no more than this share of the largest are the same."""

_Way = tuple[Preprocessing, tuple[StageKey, ...]]
"""How the photos were prepared, and the stages that they have passed through."""


@dataclass(frozen=True)
class Agreement:
    """How a model's answers in reduced precision compare with those in float32, over a few photos.

    `same` of `photos` have the same likeliest class; `deviation` is the largest difference of a probability. In
    float32 all are the same.
    """

    photos: int = PHOTOS
    same: int = PHOTOS
    deviation: float = 0.0

    @property
    def close(self) -> bool:
        """Whether reduced precision can serve: no probability is off by `LARGEST_DEVIATION`."""
        return self.deviation < LARGEST_DEVIATION

    def __str__(self) -> str:
        return f"{self.same} of {self.photos} photos alike, probabilities within {self.deviation:.2g}"


class Canary:
    """Looks at models. What they share at the beginning of their paths runs once. For one thread at a time."""

    def __init__(self, stages: StageStore) -> None:
        self._stages = stages
        self._outputs: weakref.WeakKeyDictionary[LoadedStage, tuple[_Way, Tensor]] = weakref.WeakKeyDictionary()
        self._exact: weakref.WeakKeyDictionary[LoadedStage, tuple[_Way, Tensor]] = weakref.WeakKeyDictionary()
        self._seen: tuple[Preprocessing, Tensor] | None = None

    def check(self, path: Sequence[LoadedStage], preprocessing: Preprocessing) -> Tensor:
        """The logits `[photos, outputs]`. Raises `BackbonedError` if the model at the end of `path` can't answer."""
        return _usable(self._through(path, preprocessing, self._outputs, lambda stage: stage))

    def compare(
        self,
        path: Sequence[LoadedStage],
        preprocessing: Preprocessing,
        task: Task,
        backbone: Backbone,
        weights: Mapping[str, StageWeights],
        *,
        temperature: float = 1.0,
    ) -> Agreement:
        """Hold the model at the end of `path` against the same `weights` in float32; raises as `check` does.

        Logits are divided by `temperature`, as they are when it serves.
        """
        chain = {stage.name: stage for stage in backbone.chain}

        def in_fp32(stage: LoadedStage) -> LoadedStage:
            name = stage.key.stage
            return self._stages.get(backbone, chain[name], weights[name], torch.float32)

        exact = _usable(self._through(path, preprocessing, self._exact, in_fp32))
        expected = task.probabilities(exact / temperature)
        found = task.probabilities(self._through(path, preprocessing, self._outputs, lambda stage: stage) / temperature)
        deviation = torch.nan_to_num((found - expected).abs(), nan=1.0).max().item()
        same = int((found.argmax(dim=1) == expected.argmax(dim=1)).sum())
        return Agreement(len(expected), same, deviation)

    @torch.inference_mode()
    def _through(
        self,
        path: Sequence[LoadedStage],
        preprocessing: Preprocessing,
        outputs: weakref.WeakKeyDictionary[LoadedStage, tuple[_Way, Tensor]],
        runs: Callable[[LoadedStage], LoadedStage],
    ) -> Tensor:
        if self._seen is None or self._seen[0] != preprocessing:
            x = normalise(photos(preprocessing).to(self._stages.device.device), preprocessing)
            self._seen = preprocessing, x.contiguous(memory_format=torch.channels_last)
        _, x = self._seen
        passed: tuple[StageKey, ...] = ()
        for stage in path:
            passed = (*passed, stage.key)
            way = preprocessing, passed
            before, known = outputs.get(stage, (None, x))
            try:
                x = known if before == way else runs(stage)(x)
            except Exception as error:  # whatever torch or a plugin's code raises
                raise refused(f"stage {stage.key.stage!r} of {stage.key.backbone} doesn't run: {error}") from error
            if not stage.is_head:
                outputs[stage] = way, x
        return x.float().cpu()


def _usable(logits: Tensor) -> Tensor:
    """`logits` `[photos, outputs]`, if they are those of a model that can tell photos apart."""
    if not torch.isfinite(logits).all():
        raise refused("its answer to a test image is not finite: its weights are unusable")
    if (logits - logits[0]).abs().max() <= ROUNDING * logits.abs().max():
        raise refused(f"it answers {len(logits)} test images alike: it doesn't look at them, its weights are unusable")
    return logits


@lru_cache(8)
def photos(preprocessing: Preprocessing) -> Tensor:
    """`[PHOTOS, 3, crop, crop]` uint8: views of the two photos that scikit-learn comes with, or noise without them."""
    found = find_spec("sklearn")
    folder = Path(found.origin or "").parent / "datasets" / "images" if found else Path()
    files = [folder / name for name in ("china.jpg", "flower.jpg") if (folder / name).is_file()]
    if not files:
        generator = torch.Generator().manual_seed(0)
        return torch.randint(0, 256, (PHOTOS, *preprocessing.input_shape), generator=generator, dtype=torch.uint8)
    pictures = [decode(file.read_bytes(), max_pixels=10**7) for file in files]
    return stack([augment(pictures[i % len(pictures)], preprocessing, seed=i) for i in range(PHOTOS)])
