"""Putting a version on the device: its stages, those that are there already shared, and a first look at its answers."""

import logging
from collections.abc import Mapping, Sequence

import torch

from backboned.registry.catalogue import Catalogue
from backboned.registry.errors import BackbonedError
from backboned.registry.manifest import Manifest
from backboned.registry.version import VersionWeights
from backboned.server.compute.canary import Canary
from backboned.server.compute.stages import StageKey, StageStore
from backboned.server.serving.snapshot import LoadedModel
from backboned.server.serving.telemetry import ServingTelemetry

log = logging.getLogger(__name__)

QUICK_BYTES = 2**20


class Placer:
    """Places versions on one device. For one thread at a time."""

    def __init__(self, stages: StageStore, catalogue: Catalogue, telemetry: ServingTelemetry) -> None:
        self._stages = stages
        self._catalogue = catalogue
        self._telemetry = telemetry
        self._canary = Canary(stages)

    def place(self, version: VersionWeights) -> LoadedModel:
        """Put a version on the device, and see that it answers. Raises `BackbonedError` if it doesn't."""
        manifest, backbone, device = version.manifest, version.backbone, self._stages.device
        path = self._stages.path(backbone, version.stages)
        answers = None if version.answers is None else version.answers.to(device.device)
        if device.dtype == torch.float32:
            self._canary.check(path, manifest.preprocessing)
            return LoadedModel(manifest, path, version.shared, answers)
        temperature = 1.0 if answers is None else answers.temperature
        agreement = self._canary.compare(
            path, manifest.preprocessing, manifest.task, backbone, version.stages, temperature=temperature
        )
        name = f"{manifest.model} version {manifest.version}"
        log.info("%s in %s and in fp32: %s", name, device.precision, agreement)
        self._telemetry.precision_deviation(manifest.model, agreement.deviation)
        if not agreement.close:
            log.warning("%s runs in fp32: %s is too coarse for it", name, device.precision)
            path = self._stages.path(backbone, version.stages, torch.float32)
            self._canary.check(path, manifest.preprocessing)
        return LoadedModel(manifest, path, version.shared, answers)

    def footprint(self, manifest: Manifest) -> Mapping[StageKey, int]:
        """The stages of a version that isn't loaded, with the bytes that they would take; none if nobody knows."""
        try:
            backbone = self._catalogue.get(manifest.backbone)
            return self._stages.footprint(backbone, manifest.stages, manifest.task.outputs(len(manifest.classes)))
        except BackbonedError:
            return {}  # an unknown backbone: reading the version says so
        except Exception:  # a plugin's code
            log.exception("the size of %s version %d isn't known", manifest.model, manifest.version)
            return {}

    def missing_bytes(self, manifest: Manifest) -> int:
        """How much memory a version takes beyond what is there."""
        there = self._stages.keys()
        return sum(size for key, size in self.footprint(manifest).items() if key not in there)

    def are_quick(self, manifests: Sequence[Manifest]) -> bool:
        """Whether each of them is loaded in a moment, because nearly all that it stands on is there."""
        there = self._stages.keys()
        return all(
            sum(size for key, size in self.footprint(manifest).items() if key not in there) <= QUICK_BYTES
            for manifest in manifests
        )

    def held_bytes(self) -> int:
        """The memory of all stages on the device, also those that only batches under way still need."""
        return self._stages.held_bytes()
