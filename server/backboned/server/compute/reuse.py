"""Code that was compiled earlier, for who runs batches of one size and compiles nothing."""

import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from backboned.registry.errors import BackbonedError
from backboned.server.compute.artefacts import ArtefactKey, ArtefactStore, platform_of
from backboned.server.compute.compiled import CompiledBatch, CompiledStage, pieces
from backboned.server.compute.compiler import worth_compiling
from backboned.server.compute.device import Device
from backboned.server.compute.stages import LoadedStage

log = logging.getLogger(__name__)


def reuse(
    path: Sequence[LoadedStage], artefacts: ArtefactStore, device: Device, *, images: int, concurrency: int
) -> None:
    """Let the stages of `path` run batches of `images` by what is compiled of them on disk, as far as anything is.

    Only the sizes in which such a batch is computed soonest are read and loaded: each has a copy of the weights. Up to
    `concurrency` threads can run a stage at once.
    """
    platform = platform_of(device)

    def load(stage: LoadedStage) -> None:
        assert stage.layout is not None  # worth_compiling saw to it
        keys = {size: ArtefactKey.of(stage, size, platform) for size in range(1, images + 1)}
        seconds = {size: told for size, key in keys.items() if (told := artefacts.seconds(key)) is not None}
        wanted = set(pieces(tuple(sorted(seconds.items())), images)) if seconds else set()
        batches = {}
        for size in wanted:
            if (found := artefacts.find(keys[size])) is None:
                return
            try:
                batches[size] = CompiledBatch(found.library, device.device, concurrency=concurrency)
            except BackbonedError as error:
                log.warning("%s of %s runs uncompiled: %s", stage.key.stage, stage.key.backbone, error.message)
                return
        if batches:
            stage.use(CompiledStage(stage.layout, batches, seconds))

    with ThreadPoolExecutor(concurrency) as pool:
        list(pool.map(load, worth_compiling([path])))
