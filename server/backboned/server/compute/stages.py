"""Stages on a device, held once for each content."""

import copy
import logging
import threading
import weakref
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from backboned.registry.backbone import Backbone, Head, Stage, prune, replace_layer
from backboned.registry.digest import IGNORED_SUFFIX
from backboned.registry.errors import BackbonedError, ErrorKind
from backboned.registry.weights import StageWeights
from backboned.server.compute.compiled import CompiledStage, Layout
from backboned.server.compute.device import Device

log = logging.getLogger(__name__)


class StageKey(NamedTuple):
    """A stage's identity on a device."""

    backbone: str
    stage: str
    digest: str
    dtype: torch.dtype


class LoadedStage:
    """A stage's module on a device, frozen and in eval mode. May be called from any thread."""

    def __init__(self, key: StageKey, stage: Stage, module: nn.Module) -> None:
        self.key = key
        self.is_head = isinstance(stage, Head)
        self._forward = stage.forward
        self._module = module.eval().requires_grad_(False)
        self._compiled: CompiledStage | None = None
        self._layout: Layout | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """`[batch, …]` → `[batch, …]`, under the caller's `inference_mode`; by compiled code where there is some."""
        x = x.to(self.key.dtype)
        compiled = self._compiled
        if compiled is not None and compiled.layout.matches(x):
            try:
                return compiled(x)
            except BackbonedError as error:
                log.error("%s of %s runs uncompiled from now on: %s", self.key.stage, self.key.backbone, error.message)
                self._compiled = None
        if self._layout is None:
            self._layout = Layout.of(x)
        return self._forward(self._module, x)

    @property
    def layout(self) -> Layout | None:
        """What it was first called with; None if it hasn't been called."""
        return self._layout

    @property
    def compiled(self) -> CompiledStage | None:
        """The compiled code that it runs by, if any."""
        return self._compiled

    def pieces(self, images: int) -> tuple[int, ...]:
        """The sizes in which a batch of so many images is computed soonest; they make up the batch."""
        return (images,) if self._compiled is None else self._compiled.parts(images)

    def use(self, compiled: CompiledStage) -> None:
        """Run by `compiled` from now on, wherever the input has its layout."""
        self._compiled = compiled

    def tensors(self) -> dict[str, Tensor]:
        """Its `state_dict`."""
        return self._module.state_dict()

    @property
    def size_bytes(self) -> int:
        """Memory of its tensors."""
        return sum(t.nbytes for t in self._module.state_dict().values())


class Templates:
    """Modules without memory, one for each stage of each backbone, to be copied and filled. Thread-safe."""

    def __init__(self) -> None:
        self._whole: dict[str, nn.Module] = {}
        self._pruned: dict[tuple[str, str], nn.Module] = {}
        self._lock = threading.Lock()

    def fill(self, backbone: Backbone, stage: Stage, tensors: Mapping[str, Tensor]) -> nn.Module:
        """A new module that runs under `stage.forward`, and whose state_dict is made of `tensors` themselves.

        A head takes as many outputs as its tensors have. Raises `BackbonedError` if tensors are missing.
        """
        with self._lock:
            module = copy.deepcopy(self._template(backbone, stage))
        if isinstance(stage, Head):
            with torch.device("meta"):
                replace_layer(module, stage.layer, len(tensors[stage.layer + ".weight"]))
        counters = {k: torch.zeros((), dtype=torch.long) for k in module.state_dict() if k.endswith(IGNORED_SUFFIX)}
        result = module.load_state_dict(counters | dict(tensors), strict=False, assign=True)
        if result.missing_keys or result.unexpected_keys:
            raise BackbonedError(
                ErrorKind.INTERNAL,
                f"stage {stage.name!r} of {backbone.name} lacks {result.missing_keys[:3]} or has "
                f"{result.unexpected_keys[:3]} too many",
            )
        return module

    def _template(self, backbone: Backbone, stage: Stage) -> nn.Module:
        template = self._pruned.get((backbone.name, stage.name))
        if template is None:
            if backbone.name not in self._whole:
                self._whole[backbone.name] = _without_memory(backbone)
            template = prune(copy.deepcopy(self._whole[backbone.name]), stage)
            self._pruned[backbone.name, stage.name] = template
        return template


def _without_memory(backbone: Backbone) -> nn.Module:
    whole = backbone.module(device="meta")
    computed = {name for name, _ in whole.named_buffers()} - set(whole.state_dict())
    if computed:  # buffers that no state_dict holds: only a real module has their values
        real = dict(backbone.module().named_buffers())
        for name in computed:
            parent, _, leaf = name.rpartition(".")
            whole.get_submodule(parent)._buffers[leaf] = real[name]
    return whole


class StageStore:
    """The stages that are loaded on one device. Equal stages are one object, freed with its last holder.

    Thread-safe. It holds no stage itself: whoever serves does.
    """

    def __init__(self, device: Device) -> None:
        self.device = device
        self._templates = Templates()
        self._loaded: weakref.WeakValueDictionary[StageKey, LoadedStage] = weakref.WeakValueDictionary()
        self._lock = threading.Lock()

    def get(
        self, backbone: Backbone, stage: Stage, weights: StageWeights, dtype: torch.dtype | None = None
    ) -> LoadedStage:
        """The stage with these weights, loaded now if it isn't yet. On the CPU in fp32 it shares their memory.

        `dtype` is the device's own unless given; a head computes in float32 always.
        """
        dtype = torch.float32 if isinstance(stage, Head) else dtype or self.device.dtype
        key = StageKey(backbone.name, stage.name, weights.digest, dtype)
        with self._lock:
            found = self._loaded.get(key)
            if found is None:
                placed = {k: self._place(t, dtype) for k, t in weights.tensors.items()}
                found = LoadedStage(key, stage, self._templates.fill(backbone, stage, placed))
                self._loaded[key] = found
            return found

    def path(
        self, backbone: Backbone, stages: Mapping[str, StageWeights], dtype: torch.dtype | None = None
    ) -> tuple[LoadedStage, ...]:
        """The whole chain of a model, the head last."""
        return tuple(self.get(backbone, stage, stages[stage.name], dtype) for stage in backbone.chain)

    def loaded(self) -> tuple[int, int]:
        """How many stages are loaded, and their memory in bytes."""
        # A list of references is made in one go; the stages themselves may come and go meanwhile.
        stages = [s for reference in self._loaded.valuerefs() if (s := reference()) is not None]
        return len(stages), sum(s.size_bytes for s in stages)

    def _place(self, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        placed = tensor.to(self.device.device, dtype if tensor.is_floating_point() else tensor.dtype)
        if placed is tensor or placed.dim() != 4:
            return placed
        return placed.contiguous(memory_format=torch.channels_last)  # a copy in any case: then as kernels want it


def run_path(path: Sequence[LoadedStage], x: Tensor) -> Tensor:
    """`x` `[batch, …]` through the stages of `path`, one after another.

    Stages that are fastest in the same pieces of the batch run piece by piece: what one of them leaves in the cache,
    the next one reads.
    """
    start = 0
    while start < len(path):
        sizes = path[start].pieces(len(x))
        end = start + 1
        while end < len(path) and path[end].pieces(len(x)) == sizes:
            end += 1
        x = (
            torch.cat([_run(path[start:end], part) for part in x.split(sizes)])
            if len(sizes) > 1
            else (_run(path[start:end], x))
        )
        start = end
    return x


def _run(stages: Sequence[LoadedStage], x: Tensor) -> Tensor:
    for stage in stages:
        x = stage(x)
    return x
