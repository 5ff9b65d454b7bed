"""Which backbone a state_dict is of, told from its keys and shapes alone."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from backboned.registry.backbone import Backbone
from backboned.registry.catalogue import Catalogue
from backboned.registry.digest import IGNORED_SUFFIX
from backboned.registry.errors import BackbonedError
from backboned.registry.payload import Payload
from backboned.registry.refusal import refused

_WRAPPERS = ("module.", "_orig_mod.")
"""Prefixes that `DataParallel` and `torch.compile` put before every key."""


@dataclass(frozen=True)
class Recognised:
    """A state_dict as stages of a backbone.

    `stages` has the tensors of those stages that the file holds whole, the head always among them; the `missing` ones
    stand on the backbone's own weights. `outputs` is the number of logits.
    """

    backbone: Backbone
    stages: Mapping[str, Mapping[str, Tensor]]
    missing: tuple[str, ...]
    outputs: int


class Recogniser:
    """Recognises state_dicts as one of a catalogue's backbones. For one thread at a time."""

    def __init__(self, catalogue: Catalogue) -> None:
        self._catalogue = catalogue
        self._blueprints: dict[str, Blueprint] = {}

    def blueprint(self, backbone: Backbone) -> "Blueprint":
        """The keys and shapes of a backbone, built once on the meta device."""
        found = self._blueprints.get(backbone.name)
        if found is None:
            found = self._blueprints[backbone.name] = Blueprint(backbone)
        return found

    def recognise(self, payload: Payload, backbone: str | None = None) -> Recognised:
        """The stages in `payload`, of the backbone called `backbone`, or that the payload names, or that fits.

        Raises `BackbonedError` `DATA_LOSS` saying what doesn't fit; `NOT_FOUND` for an unknown backbone's name.
        """
        state = _strip(payload.tensors)
        name = payload.backbone if backbone is None else backbone
        if name is not None:
            return self.blueprint(self._catalogue.get(name)).read(state, partial=True)
        fits: list[Recognised] = []
        misfits: list[tuple[float, str]] = []
        for candidate in self._catalogue:
            if not any(_mostly_owned(candidate, s) for s in _views(state)):
                continue
            try:
                fits.append(self.blueprint(candidate).read(state, partial=False))
            except BackbonedError as error:
                misfits.append((self.blueprint(candidate).likeness(state), error.message))
        if len(fits) == 1:
            return fits[0]
        if fits:
            names = ", ".join(f.backbone.name for f in fits)
            raise refused(f"it fits several backbones: {names}; name one in a JSON file beside it: {_EXAMPLE}")
        likeness, reason = max(misfits, default=(0.0, ""))
        if likeness > _LIKE:
            raise refused(reason)
        keys = ", ".join(key[:60] for key in list(state)[:3])
        raise refused(
            f"its keys ({keys}, …) and shapes fit no backbone that is known here ({len(self._catalogue)} are); a part "
            f"of a state_dict needs the backbone's name, in the dict or in a JSON file beside it: {_EXAMPLE}"
        )


_LIKE = 0.7
"""A state_dict that shares more of a backbone's keys and shapes than this is meant to be one of it."""

_EXAMPLE = '{"backbone": "resnet18"}'


class Blueprint:
    """A backbone's keys and shapes, and how a state_dict is read by them."""

    def __init__(self, backbone: Backbone) -> None:
        self.backbone = backbone
        state = backbone.module(device="meta").state_dict()
        self.shapes: dict[str, tuple[int, ...]] = {k: tuple(t.shape) for k, t in state.items() if not _ignored(k)}
        self._floating = {k: t.is_floating_point() for k, t in state.items()}

    @property
    def weight_key(self) -> str:
        """The key whose first dimension is the number of outputs."""
        return self.backbone.head.layer + ".weight"

    @property
    def bias_key(self) -> str:
        """The key of the head layer's bias."""
        return self.backbone.head.layer + ".bias"

    @cached_property
    def body(self) -> frozenset[str]:
        """All keys but those of the layer that fine-tuning replaces."""
        return frozenset(self.shapes) - {self.weight_key, self.bias_key}

    @cached_property
    def _needed(self) -> dict[str, frozenset[str]]:
        """The keys of each stage."""
        return {stage.name: frozenset(stage.keys(list(self.shapes))) for stage in self.backbone.chain}

    def likeness(self, state: Mapping[str, Tensor]) -> float:
        """How much of the backbone is in `state`, 0…1: the keys whose shapes agree, among all keys of both."""
        views = [
            state,
            *({k.removeprefix(p): t for k, t in state.items() if k.startswith(p)} for p in _prefixes(state)),
        ]
        return max(
            sum(self.shapes.get(k) == tuple(t.shape) for k, t in view.items()) / len(self.shapes.keys() | view.keys())
            for view in views
        )

    def read(self, state: Mapping[str, Tensor], *, partial: bool) -> Recognised:
        """`state` as stages; whole stages may be missing if `partial`. Raises `BackbonedError` `DATA_LOSS`."""
        for candidate in (state, *self._unwrapped(state)):
            try:
                return self._read(candidate, partial=partial)
            except BackbonedError as error:
                misfit = error  # the last one is of what is nearest to a bare state_dict
        raise misfit

    def _read(self, state: Mapping[str, Tensor], *, partial: bool) -> Recognised:
        name = self.backbone.name
        state = {k: t for k, t in state.items() if not _ignored(k)}
        if stray := sorted(k for k in state if k not in self.shapes):
            raise refused(f"not a state_dict of {name}: it has {stray[0]!r}, which {name} has not")
        for key, tensor in state.items():
            found, expected = tuple(tensor.shape), self.shapes[key]
            if key in (self.weight_key, self.bias_key):
                found, expected = found[1:], expected[1:]
            if found != expected or tensor.dim() != len(self.shapes[key]):
                raise refused(f"{key!r} has shape {list(tensor.shape)}, {name} needs {list(self.shapes[key])}")
            if tensor.is_floating_point() != self._floating[key]:
                raise refused(f"{key!r} has type {tensor.dtype}, which {name} can't compute with")
        if self.weight_key not in state:
            raise refused(f"it lacks {self.weight_key!r}, the head of {name}: save the head too")
        outputs = len(state[self.weight_key])
        if outputs < 1 or (self.bias_key in state and len(state[self.bias_key]) != outputs):
            raise refused(f"the head's weight and bias don't agree on the number of classes ({outputs})")
        stages, missing = self._stages(state)
        if missing and not partial:
            lacking = next(k for k in self.shapes if k not in state)
            raise refused(f"it lacks {lacking!r} of {name}; for a part of a state_dict name the backbone: {_EXAMPLE}")
        return Recognised(self.backbone, stages, missing, outputs)

    def _stages(self, state: Mapping[str, Tensor]) -> tuple[dict[str, dict[str, Tensor]], tuple[str, ...]]:
        stages: dict[str, dict[str, Tensor]] = {}
        missing: list[str] = []
        for stage in self.backbone.chain:
            needed = self._needed[stage.name]
            found = {key: tensor for key, tensor in state.items() if key in needed}
            if needed and not found:
                missing.append(stage.name)
            elif lacking := sorted(needed - found.keys()):
                raise refused(f"stage {stage.name!r} is there in part only: it lacks {lacking[0]!r}")
            else:
                stages[stage.name] = found
        return stages, tuple(missing)

    def _unwrapped(self, state: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
        """`state` without an attribute's prefix, and with a linear layer beside it made the head."""
        for prefix in _prefixes(state):
            inner = {k.removeprefix(prefix): t for k, t in state.items() if k.startswith(prefix)}
            outer = {k: t for k, t in state.items() if not k.startswith(prefix)}
            if not inner.keys() & self.body and self.body:
                continue
            if not outer:
                yield inner
                continue
            linear = _linear(outer)
            if linear is None:
                continue
            if self.weight_key in inner:
                yield inner | self._folded(inner, *linear)
            else:
                yield inner | self._as_head(*linear)

    def _folded(self, inner: Mapping[str, Tensor], weight: Tensor, bias: Tensor | None) -> dict[str, Tensor]:
        """The head and a linear layer that reads its logits, as one layer: W₂(W₁x + b₁) + b₂, in float64."""
        first, name = inner[self.weight_key], self.backbone.name
        if first.dim() != 2:
            raise refused(f"the head of {name} isn't linear, so a layer on its logits can't be folded into it: replace "
                          f"{self.backbone.head.layer!r} instead")  # fmt: skip
        if weight.shape[1] != first.shape[0]:
            raise refused(f"the added layer reads {weight.shape[1]} values, {name} gives {first.shape[0]}")
        wide = weight.double()
        folded = {self.weight_key: (wide @ first.double()).float()}
        offset = torch.zeros(len(weight), dtype=torch.float64) if bias is None else bias.double()
        if self.bias_key in inner:
            offset = offset + wide @ inner[self.bias_key].double()
        return folded | {self.bias_key: offset.float()}

    def _as_head(self, weight: Tensor, bias: Tensor | None) -> dict[str, Tensor]:
        """A linear layer that reads the features, in the place of the head."""
        shape = (len(weight), *self.shapes[self.weight_key][1:])
        if weight.numel() != torch.Size(shape).numel():
            raise refused(f"the added layer reads {weight.shape[1]} values, {self.backbone.name} gives {shape[1]}")
        offset = torch.zeros(len(weight)) if bias is None else bias
        return {self.weight_key: weight.reshape(shape), self.bias_key: offset}


def _linear(state: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None] | None:
    """The weight and bias of the only linear layer in `state`; None if there is something else."""
    weights = [k for k, t in state.items() if k.rpartition(".")[2] == "weight" and t.dim() == 2]
    if len(weights) != 1:
        return None
    bias = weights[0].removesuffix("weight") + "bias"
    if set(state) - {weights[0], bias}:
        return None
    return state[weights[0]], state.get(bias)


def _ignored(key: str) -> bool:
    return key.endswith(IGNORED_SUFFIX)


def _strip(state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    for wrapper in _WRAPPERS * 2:
        if state and all(k.startswith(wrapper) for k in state):
            state = {k.removeprefix(wrapper): t for k, t in state.items()}
    return state


def _prefixes(state: Mapping[str, Tensor]) -> list[str]:
    """Those that a wrapper's attribute may be: the others aren't before half of the keys."""
    counted = Counter(k.partition(".")[0] + "." for k in state if "." in k)
    return sorted(prefix for prefix, count in counted.items() if 2 * count >= len(state))


def _views(state: Mapping[str, Tensor]) -> Iterator[Sequence[str]]:
    yield list(state)
    for prefix in _prefixes(state):
        yield [k.removeprefix(prefix) for k in state if k.startswith(prefix)]


def _mostly_owned(backbone: Backbone, keys: Sequence[str]) -> bool:
    """Whether it is worth building the blueprint: a look at some of the names, without building anything."""
    prefixes = {prefix for stage in backbone.chain for prefix in stage.owns}
    sample = keys[:: max(1, len(keys) // 40)]
    owned = sum(any(k[:end] in prefixes for end in _ends(k)) for k in sample)
    return owned > 0 and owned >= 0.9 * len(sample)


def _ends(key: str) -> list[int]:
    """Where the key's dotted prefixes end, the whole key's end among them."""
    return [i for i, letter in enumerate(key) if letter == "."] + [len(key)]
