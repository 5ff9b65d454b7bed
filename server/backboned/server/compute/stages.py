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
        self.size_bytes: int = sum(t.nbytes for t in module.state_dict().values())
        """Memory of its tensors."""
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
    def held_bytes(self) -> int:
        """Memory of its tensors, and of the copies of them that compiled code has."""
        return self.size_bytes + (0 if self._compiled is None else self._compiled.size_bytes)

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


class Templates:
    """Modules without memory, one for each stage of each backbone, to be copied and filled. Thread-safe."""

    def __init__(self) -> None:
        self._whole: dict[str, nn.Module] = {}
        self._pruned: dict[tuple[str, str, int | None], nn.Module] = {}
        self._sizes: dict[tuple[str, str, torch.dtype, int | None], int] = {}
        self._lock = threading.Lock()

    def fill(self, backbone: Backbone, stage: Stage, tensors: Mapping[str, Tensor]) -> nn.Module:
        """A new module that runs under `stage.forward`, and whose state_dict is made of `tensors` themselves.

        A head takes as many outputs as its tensors have. Raises `BackbonedError` if tensors are missing.
        """
        outputs = len(tensors[stage.layer + ".weight"]) if isinstance(stage, Head) else None
        with self._lock:
            module = copy.deepcopy(self._template(backbone, stage, outputs))
        counters = {k: torch.zeros((), dtype=torch.long) for k in module.state_dict() if k.endswith(IGNORED_SUFFIX)}
        result = module.load_state_dict(counters | dict(tensors), strict=False, assign=True)
        if result.missing_keys or result.unexpected_keys:
            raise BackbonedError(
                ErrorKind.INTERNAL,
                f"stage {stage.name!r} of {backbone.name} lacks {result.missing_keys[:3]} or has "
                f"{result.unexpected_keys[:3]} too many",
            )
        return module

    def size_bytes(self, backbone: Backbone, stage: Stage, dtype: torch.dtype, outputs: int | None) -> int:
        """What `fill` makes of such a stage takes in memory, its floating values in `dtype`."""
        key = backbone.name, stage.name, dtype, outputs
        if key not in self._sizes:
            with self._lock:
                tensors = self._template(backbone, stage, outputs).state_dict().values()
            self._sizes[key] = sum(
                t.numel() * (dtype.itemsize if t.is_floating_point() else t.element_size()) for t in tensors
            )
        return self._sizes[key]

    def _template(self, backbone: Backbone, stage: Stage, outputs: int | None) -> nn.Module:
        key = backbone.name, stage.name, outputs
        template = self._pruned.get(key)
        if template is None:
            if backbone.name not in self._whole:
                self._whole[backbone.name] = _without_memory(backbone)
            template = self._pruned[key] = prune(copy.deepcopy(self._whole[backbone.name]), stage)
            if isinstance(stage, Head) and outputs is not None:
                with torch.device("meta"):
                    replace_layer(template, stage.layer, outputs)
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

    def footprint(self, backbone: Backbone, digests: Mapping[str, str], outputs: int) -> dict[StageKey, int]:
        """The stages of a model with such digests, by their names, and the bytes that each takes once it is loaded.

        For a model that runs in the device's own precision; nothing is loaded for it. Raises whatever the backbone's
        `build` does.
        """
        sizes: dict[StageKey, int] = {}
        for stage in backbone.chain:
            head = isinstance(stage, Head)
            dtype = torch.float32 if head else self.device.dtype
            key = StageKey(backbone.name, stage.name, digests.get(stage.name, ""), dtype)
            sizes[key] = self._templates.size_bytes(backbone, stage, dtype, outputs if head else None)
        return sizes

    def path(
        self, backbone: Backbone, stages: Mapping[str, StageWeights], dtype: torch.dtype | None = None
    ) -> tuple[LoadedStage, ...]:
        """The whole chain of a model, the head last."""
        return tuple(self.get(backbone, stage, stages[stage.name], dtype) for stage in backbone.chain)

    def loaded(self) -> tuple[int, int]:
        """How many stages are loaded, and their memory in bytes."""
        stages = self._stages()
        return len(stages), sum(s.size_bytes for s in stages)

    def held_bytes(self) -> int:
        """The memory of all stages that are loaded, compiled code included."""
        return sum(s.held_bytes for s in self._stages())

    def keys(self) -> set[StageKey]:
        """Of all stages that are loaded."""
        return {s.key for s in self._stages()}

    def _stages(self) -> list[LoadedStage]:
        # A list of references is made in one go; the stages themselves may come and go meanwhile.
        return [s for reference in self._loaded.valuerefs() if (s := reference()) is not None]

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
