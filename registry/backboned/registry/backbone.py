"""What a backbone is: an ordered chain of named stages over an ordinary `torch.nn.Module`, then a head.

A plugin describes a backbone; it never copies or rewrites the network. A stage names the submodules that it runs,
so `state_dict` keys stay those of the module that the plugin builds (torchvision's, timm's, its own).
"""

import math
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from backboned.registry.errors import invalid

Step = str | Callable[[Tensor], Tensor]
"""One step of a stage: the dotted path of a submodule to call, or a function without weights."""

Interpolation = Literal["nearest", "bilinear", "bicubic"]


@dataclass(frozen=True)
class Preprocessing:
    """How an image becomes a backbone's input: resize the short side, crop the centre, scale to 0…1, normalise.

    `resize_size` is the length of the short side and `crop_size` the side of the square that is cut out, in pixels;
    `mean` and `std` are per RGB channel, for values in 0…1.
    """

    resize_size: int = 256
    crop_size: int = 224
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    interpolation: Interpolation = "bilinear"

    def __post_init__(self) -> None:
        if not 1 <= self.crop_size <= 2048 or not 1 <= self.resize_size <= 4096:
            raise invalid(f"preprocessing sizes must be 1…2048 (crop) and 1…4096 (resize), got {self}")
        if not all(0 < s < math.inf for s in self.std) or not all(map(math.isfinite, self.mean)):
            raise invalid(f"preprocessing needs a finite mean and a positive std, got {self.mean} and {self.std}")

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """`[channels, height, width]` of one prepared image."""
        return (3, self.crop_size, self.crop_size)

    @classmethod
    def from_torchvision(cls, transforms: Any) -> "Preprocessing":
        """The same settings as torchvision's `ImageClassification` preset (`Weights.transforms()`)."""
        (resize,) = transforms.resize_size
        (crop,) = transforms.crop_size
        mean, std = tuple(transforms.mean), tuple(transforms.std)
        return cls(resize, crop, mean, std, transforms.interpolation.value)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as kept in checkpoint metadata."""
        return {
            "resize_size": self.resize_size,
            "crop_size": self.crop_size,
            "mean": list(self.mean),
            "std": list(self.std),
            "interpolation": self.interpolation,
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Preprocessing":
        """The inverse of `to_dict`. Raises `BackbonedError` on unknown or malformed values."""
        try:
            mean, std = (tuple(float(v) for v in values[k]) for k in ("mean", "std"))
            if len(mean) != 3 or len(std) != 3:
                raise ValueError("mean and std need three values")
            interpolation = values["interpolation"]
            if interpolation not in ("nearest", "bilinear", "bicubic"):
                raise ValueError(f"unknown interpolation {interpolation!r}")
            return cls(int(values["resize_size"]), int(values["crop_size"]), mean, std, interpolation)
        except (LookupError, TypeError, ValueError, OverflowError, RuntimeError) as error:
            raise invalid(
                f"malformed preprocessing {str(values)[:300]}: resize_size and crop_size must be whole numbers, mean "
                "and std three numbers each, interpolation nearest, bilinear or bicubic"
            ) from error


@dataclass(frozen=True)
class Stage:
    """A named piece of a backbone: what it runs and which `state_dict` keys it owns.

    The usual stage runs submodules one after another (`Stage.of`). A stage that needs more than that (a class token,
    a residual around two modules) gives `forward(model, x)` and says in `owns` which submodules or bare parameters it
    uses, as dotted prefixes of `state_dict` keys.
    """

    name: str
    owns: tuple[str, ...]
    forward: Callable[[nn.Module, Tensor], Tensor]

    @classmethod
    def of(cls, name: str, *steps: Step) -> "Stage":
        """A stage that runs `steps` in order: paths of submodules, or functions without weights."""
        return cls(name, tuple(s for s in steps if isinstance(s, str)), _Chain(steps))

    def keys(self, keys: Sequence[str]) -> list[str]:
        """Those of the `keys` that belong to this stage, in their order."""
        return [k for k in keys if self.has(k)]

    def has(self, key: str) -> bool:
        """Whether a `state_dict` key belongs to this stage."""
        return any(key == prefix or key.startswith(prefix + ".") for prefix in self.owns)


@dataclass(frozen=True)
class Head(Stage):
    """The last stage: it owns the layer that fine-tuning replaces.

    `layer` is the dotted path of that `nn.Linear` or `nn.Conv2d`; its outputs are the classes.
    """

    layer: str = ""

    @classmethod
    def at(cls, layer: str, *steps: Step) -> "Head":
        """A head around `layer`; `steps` (default: the layer alone) are what runs from features to logits."""
        steps = steps or (layer,)
        return cls("head", tuple(s for s in steps if isinstance(s, str)), _Chain(steps), layer)


@dataclass(frozen=True)
class _Chain:
    """Calls submodules and functions one after another."""

    steps: tuple[Step, ...]

    def __call__(self, model: nn.Module, x: Tensor) -> Tensor:
        for step in self.steps:
            x = model.get_submodule(step)(x) if isinstance(step, str) else step(x)
        return x


class Weights(Protocol):
    """A set of pretrained weights that a plugin knows: torchvision's `WeightsEnum` members are such."""

    def get_state_dict(self, *args: Any, **kwargs: Any) -> Mapping[str, Any]:
        """The weights, downloaded or from the local cache."""


@dataclass(frozen=True)
class Backbone:
    """A description of a network for transfer learning. Cheap to make: nothing is built until `build` is called.

    `build` makes the module with its pretrained number of classes and no weights loaded. `stages` run in order and
    end in features of `feature_size` values an image (`[batch, feature_size]`, or `[batch, feature_size, h, w]` where
    the head is a convolution); `head` turns them into logits `[batch, classes]`. `weights`, if any, is what the plugin
    can fetch by itself. `known_classes` are the labels of the pretrained head, if they have names.
    """

    name: str
    build: Callable[[], nn.Module]
    stages: tuple[Stage, ...]
    head: Head
    feature_size: int
    preprocessing: Preprocessing = field(default_factory=Preprocessing)
    weights: Weights | None = None
    description: str = ""
    known_classes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        names = [s.name for s in self.chain]
        if not self.name or not self.stages or len(set(names)) != len(names):
            raise invalid(f"backbone {self.name!r} needs a name and stages with distinct names, got {names}")
        if "all" in names:
            raise invalid(f"backbone {self.name!r}: a stage can't be named 'all', which means every stage")

    @property
    def chain(self) -> tuple[Stage, ...]:
        """The stages, then the head."""
        return (*self.stages, self.head)

    @property
    def stage_names(self) -> tuple[str, ...]:
        """Names of the stages below the head, in order."""
        return tuple(s.name for s in self.stages)

    def module(self, num_classes: int | None = None, *, device: str | torch.device = "cpu") -> nn.Module:
        """The whole module, with its head replaced when `num_classes` is given. No weights are loaded.

        On `device="meta"` it takes no memory and no time for initialisation. A module that opens a stage never works
        in place, whatever the plugin built: the stage's input may be cached, or shared with other models.
        """
        meta = torch.device(device).type == "meta"
        with torch.device(device), _WithoutInitialisation() if meta else nullcontext():
            model = self.build()
            if num_classes is not None:
                replace_layer(model, self.head.layer, num_classes)
        for stage in self.chain:
            for step in stage.forward.steps[:1] if isinstance(stage.forward, _Chain) else ():
                opening: Any = model.get_submodule(step) if isinstance(step, str) else None
                if hasattr(opening, "inplace"):
                    opening.inplace = False
        return model

    def forward(self, model: nn.Module, x: Tensor) -> Tensor:
        """All stages and the head of `model`, one after another: `[batch, 3, h, w]` → `[batch, classes]`."""
        for stage in self.chain:
            x = stage.forward(model, x)
        return x

    def split(self, state: Mapping[str, Tensor]) -> "OrderedDict[str, dict[str, Tensor]]":
        """`state` by stage name, in the chain's order. Raises `BackbonedError` for keys that no stage owns."""
        parts: OrderedDict[str, dict[str, Tensor]] = OrderedDict((s.name, {}) for s in self.chain)
        stray = []
        for key, tensor in state.items():
            owner = next((s.name for s in self.chain if s.has(key)), None)
            if owner is None:
                stray.append(key)
            else:
                parts[owner][key] = tensor
        if stray:
            raise invalid(f"keys that no stage of {self.name} owns: {', '.join(stray[:5])}")
        return parts


class _WithoutInitialisation(TorchFunctionMode):
    """Leaves out the drawing of initial weights: on the meta device most of the time, and for nothing."""

    _INITIALISERS = frozenset({"normal_", "uniform_", "trunc_normal_", "fill_", "zero_", "erfinv_", "clamp_"})

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Pass on every call but those that fill a tensor in place."""
        kwargs = kwargs or {}
        filled = args[0] if args else kwargs.get("tensor")  # as `torch.nn.init` calls it
        if func.__name__ in self._INITIALISERS and isinstance(filled, Tensor) and filled.is_meta:
            return filled
        return func(*args, **kwargs)


def replace_layer(model: nn.Module, path: str, num_classes: int) -> None:
    """Put a fresh `Linear` or 1×1-like `Conv2d` with `num_classes` outputs where `path` is, on the current device."""
    old = model.get_submodule(path)
    new: nn.Module
    if isinstance(old, nn.Linear):
        new = nn.Linear(old.in_features, num_classes, bias=old.bias is not None)
    elif isinstance(old, nn.Conv2d):
        new = nn.Conv2d(
            old.in_channels,
            num_classes,
            kernel_size=old.kernel_size,  # type: ignore[arg-type]  # a tuple is what Conv2d itself stores
            stride=old.stride,  # type: ignore[arg-type]
            padding=old.padding,  # type: ignore[arg-type]
            bias=old.bias is not None,
        )
    else:
        raise invalid(f"the head layer {path!r} must be a Linear or a Conv2d, got {type(old).__name__}")
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, new)


def prune(model: nn.Module, stage: Stage) -> nn.Module:
    """Drop from `model`, in place, every submodule and tensor that `stage` doesn't own; return it.

    What is left runs under `stage.forward`, and its `state_dict` has exactly the stage's keys.
    """
    for path, module in list(_walk(model)):
        for name in [n for n in module._modules if not _related(stage, path + n)]:
            del module._modules[name]
        for tensors in (module._parameters, module._buffers):
            for name in [n for n in tensors if not stage.has(path + n)]:
                del tensors[name]
    return model


def _walk(model: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Module]]:
    yield path, model
    for name, child in list(model.named_children()):
        yield from _walk(child, f"{path}{name}.")


def _related(stage: Stage, path: str) -> bool:
    return stage.has(path) or any(prefix.startswith(path + ".") for prefix in stage.owns)
