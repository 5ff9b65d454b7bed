"""The stages below the freezing boundary, by the code that serves."""

from collections.abc import Sequence

import torch

from backboned.registry.backbone import Backbone
from backboned.server.compute.artefacts import ArtefactStore
from backboned.server.compute.device import Device
from backboned.server.compute.preprocess import normalise
from backboned.server.compute.reuse import reuse
from backboned.server.compute.stages import LoadedStage, StageStore, run_path
from backboned.server.training.features import BATCH, Frozen, blank
from backboned.server.training.network import boundary
from backboned.server.training.options import TrainingOptions
from backboned.server.training.spec import TrainerSpec
from backboned.server.training.starting_point import StartingPoint


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
