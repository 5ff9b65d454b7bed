"""Every image classifier of timm whose structure is a chain, as `timm/NAME`: needs the extra `timm`.

timm's networks don't say what they run in which order, so the adapter looks: it runs the network once on the meta
device, where nothing is computed, and follows the tensor from module to module (`timm_chain`). What timm lists as
feature blocks becomes stages, under timm's own names: `layer1`, `blocks.3`, `stages.0`.
"""

import importlib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from backboned.plugins.timm_chain import NotAChain, chain
from backboned.registry import Backbone, BackbonedError, BackboneFamily, ErrorKind, Preprocessing, register
from backboned.registry.backbone import Interpolation
from backboned.registry.errors import invalid, not_found

PREFIX = "timm/"


@register
def timm_family() -> BackboneFamily:
    """The classifiers of timm, made on demand; timm is imported on first use."""
    return BackboneFamily(PREFIX, make, names)


def names() -> Iterable[str]:
    """The names of all of timm's architectures, whether they are a chain or not; none without timm."""
    try:
        return [PREFIX + name for name in _timm().list_models()]
    except BackbonedError:
        return []


def make(name: str) -> Backbone:
    """The backbone over timm's classifier `name`, which may have a tag: `resnet50.a1_in1k`.

    Raises `BackbonedError`: `FAILED_PRECONDITION` without timm, `NOT_FOUND` for a name that timm doesn't have,
    `INVALID_ARGUMENT` for a network that can't be used, with what is in the way.
    """
    timm = _timm()
    if not timm.is_model(name):
        raise not_found("timm model", name, timm.list_models(), field="backbone")
    build = partial(timm.create_model, name)
    try:
        with torch.device("meta"):
            model = build()
        preprocessing = _preprocessing(timm.data.resolve_model_data_config(model))
        stages, head = chain(model, preprocessing.input_shape)
        layer = model.get_submodule(head.layer)
    except NotAChain as error:
        raise invalid(f"{PREFIX}{name} can't be used as a chain of stages: {error}", field="backbone") from error
    except Exception as error:  # one of a thousand networks: whatever it raises on the meta device, it can't be used
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise invalid(f"{PREFIX}{name} can't be used: {reason}", field="backbone") from error
    return Backbone(
        name=PREFIX + name,
        build=build,
        stages=stages,
        head=head,
        feature_size=layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels,
        preprocessing=preprocessing,
        weights=TimmWeights(name) if model.pretrained_cfg.get("hf_hub_id") or model.pretrained_cfg.get("url") else None,
        description=f"timm's {name}: {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters",
    )


@dataclass(frozen=True)
class TimmWeights:
    """The pretrained weights that timm knows for a name, downloaded or from its cache."""

    name: str

    def get_state_dict(self, *_args: Any, **_kwargs: Any) -> Mapping[str, Any]:
        """The whole `state_dict`; the arguments are those of torchvision's weights and change nothing."""
        state: Mapping[str, Any] = _timm().create_model(self.name, pretrained=True).state_dict()
        return state


def _timm() -> Any:
    try:
        return importlib.import_module("timm")
    except ImportError as error:
        raise BackbonedError(
            ErrorKind.FAILED_PRECONDITION,
            f"backbones under {PREFIX} need timm, which isn't installed here: pip install 'backboned[timm]'",
            field="backbone",
        ) from error


def _preprocessing(config: Mapping[str, Any]) -> Preprocessing:
    """The evaluation transform of timm, for square RGB input; its `squash` and `border` crops become a centre crop."""
    channels, height, width = config["input_size"]
    if channels != 3 or height != width:
        raise NotAChain(f"it takes input {config['input_size']}, and only square RGB images are prepared")
    interpolation: Interpolation = "bilinear" if config["interpolation"] == "bilinear" else "bicubic"
    resize = math.floor(height / config["crop_pct"])
    return Preprocessing(resize, height, tuple(config["mean"]), tuple(config["std"]), interpolation)
