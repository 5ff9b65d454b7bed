"""The stages below the freezing boundary, by the code that serves."""

from backboned.registry.backbone import Backbone
from backboned.server.compute.artefacts import ArtefactStore
from backboned.server.compute.compiler import StageCompiler
from backboned.server.compute.device import Device
from backboned.server.compute.stages import StageStore
from backboned.server.training.features import Frozen, blank
from backboned.server.training.network import boundary
from backboned.server.training.options import TrainingOptions
from backboned.server.training.spec import TrainerSpec
from backboned.server.training.starting_point import StartingPoint


def frozen_stages(
    spec: TrainerSpec, device: Device, backbone: Backbone, options: TrainingOptions, start: StartingPoint
) -> Frozen:
    """What a job doesn't train, loaded; compiled as far as the daemon has compiled it.

    In fp32 stages run eagerly: then features are the same bits whenever a job goes on.
    """
    store = StageStore(device)
    below = backbone.chain[: boundary(backbone, options.trainable_stages)]
    path = tuple(store.get(backbone, stage, start.stages[stage.name]) for stage in below)
    frozen = Frozen(backbone, path, start.preprocessing, device)
    if spec.compiled_dir is not None and path and device.precision != "fp32":
        frozen.rows(blank(start.preprocessing))  # stages learn the layout of what they are given
        compiler = StageCompiler(
            device,
            ArtefactStore(spec.compiled_dir, limit_bytes=2**62),  # nothing is added
            plugins=spec.plugin_modules,
            concurrency=spec.threads,
            largest_batch=frozen.batch,
        )
        compiler.consider([path])
    return frozen
