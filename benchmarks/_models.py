"""Models for the benchmark, with random weights, written into a checkpoint directory as a trainer writes them."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from backboned.registry import Catalogue
from backboned.registry.digest import stage_digest
from backboned.registry.directory import CheckpointDirectory
from backboned.registry.manifest import EpochMetrics, Manifest
from backboned.registry.task import Task
from backboned.registry.version import VersionWriter
from backboned.registry.weights import seeded_state
from benchmarks._truth import Truth

CLASSES = ("daisy", "dandelion", "roses", "sunflowers", "tulips")
_MOVED = 0.02
"""How far training moves the weights of unfrozen stages, in their own size."""

Models = Mapping[str, Mapping[str, Tensor]]
"""What each model has of its own, by the model's name."""


class Maker:
    """Makes models on seeded weights of one backbone. For one thread."""

    def __init__(self, name: str, weights: Path, photos: Sequence[bytes]) -> None:
        """The backbone's weights are written to `weights`."""
        self.backbone = Catalogue.from_entry_points().get(name)
        self.weights = weights
        base = seeded_state(self.backbone, seed=0)
        torch.save(base, weights)
        self.truth = Truth(self.backbone, base, photos)
        self._stages = {name: tensors for name, tensors in self.backbone.split(base).items() if tensors}
        self._digests = {name: stage_digest(tensors) for name, tensors in self._stages.items()}
        self._head_scale = 2.0 / float(self.truth.features(0).norm())

    def heads(self, count: int) -> Models:
        """So many models that are nothing but a head."""
        return {f"head-{i:04}": self._model(i) for i in range(count)}

    def head(self, seed: int) -> Mapping[str, Tensor]:
        """What a model that is nothing but a head has of its own."""
        return self._model(seed)

    def mixed(self, heads: int, unfrozen: int, full: int) -> Models:
        """Models that are a head, models whose last stage was trained too, and models that were trained as a whole."""
        names = [name for name in self._stages if name != "head"]
        last = {f"last-{i:04}": self._model(10_000 + i, names[-1:]) for i in range(unfrozen)}
        return {**self.heads(heads), **last, **{f"full-{i:04}": self._model(20_000 + i, names) for i in range(full)}}

    def write(self, models: Models, root: Path) -> None:
        """Write version 1 of each below the checkpoint directory `root`."""
        root.mkdir(parents=True, exist_ok=True)
        directory = CheckpointDirectory(root)
        for name, state in models.items():
            trained = {stage: tensors for stage, tensors in self.backbone.split(state).items() if tensors}
            digests = self._digests | {stage: stage_digest(tensors) for stage, tensors in trained.items()}
            version = directory.reserve(name)
            manifest = Manifest(
                model=name,
                version=version,
                backbone=self.backbone.name,
                task=Task.SINGLE_LABEL,
                classes=CLASSES,
                stages=digests,
                preprocessing=self.backbone.preprocessing,
                epochs=(),
                best_epoch=1,
                complete=False,
                trained=tuple(trained),
            )
            writer = VersionWriter(directory.version(name, version), manifest)
            writer.write(1, state, stages=digests, optimizer_state={}, loss=0.0, metrics=EpochMetrics(), best=True)
            writer.complete()

    def _model(self, seed: int, trained: Sequence[str] = ()) -> Mapping[str, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        state = {k: _moved(t, generator) for stage in trained for k, t in self._stages[stage].items()}
        for key, tensor in self._stages["head"].items():
            shape = (len(CLASSES), *tensor.shape[1:])
            state[key] = torch.randn(shape, generator=generator) * (self._head_scale if tensor.dim() > 1 else 0.1)
        return state


def _moved(tensor: Tensor, generator: torch.Generator) -> Tensor:
    if not tensor.is_floating_point():
        return tensor
    return tensor * (1 + _MOVED * torch.randn(tensor.shape, generator=generator))
