"""The conformance check for plugin authors: does a backbone keep what training and serving rely on?

The checks run the backbone with random weights on random images, two at a time, and never raise: what a plugin does
wrong is in the report.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor, nn

from backboned.registry.backbone import Backbone, prune

BATCH_SIZE = 2
TRAINING_STEPS = 2


class Check(NamedTuple):
    """One thing that was checked; `detail` says what was found, or what is wrong and what to do."""

    name: str
    passed: bool
    detail: str


@dataclass(frozen=True)
class ConformanceReport:
    """What `check_backbone` found; as a string, a line a check."""

    backbone: str
    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        """Whether every check passed."""
        return all(check.passed for check in self.checks)

    def __str__(self) -> str:
        lines = [f"{'ok    ' if check.passed else 'FAILED'}  {check.name}: {check.detail}" for check in self.checks]
        return "\n".join([f"backbone {self.backbone!r} {'conforms' if self.passed else 'does not conform'}", *lines])


def check_backbone(backbone: Backbone, *, seed: int = 0) -> ConformanceReport:
    """Build `backbone` with random weights on the CPU and check what the rest of Backboned relies on.

    Takes seconds for the largest networks and leaves torch's random state as it was. Raises nothing.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        subject = _Subject(backbone)
        checks = [_run("builds", _builds, subject)]
        if checks[0].passed:  # else there is nothing to look at
            checks += [_run(name, check, subject) for name, check in _CHECKS]
    return ConformanceReport(backbone.name, tuple(checks))


def assert_conformant(backbone: Backbone, *, seed: int = 0) -> None:
    """For a plugin's own tests: raises `AssertionError`, with a line a check, unless `backbone` conforms."""
    report = check_backbone(backbone, seed=seed)
    if not report.passed:
        raise AssertionError(str(report))


class _Failure(Exception):
    """A check that did not pass, with its detail."""


def _require(condition: bool, detail: str) -> None:
    if not condition:
        raise _Failure(detail)


def _run(name: str, check: Callable[["_Subject"], str], subject: "_Subject") -> Check:
    try:
        return Check(name, True, check(subject))
    except _Failure as failure:
        return Check(name, False, str(failure))
    except Exception as error:  # a plugin is foreign code: whatever it raises belongs in the report
        return Check(name, False, " ".join(f"{type(error).__name__}: {error}".split()))


class _Subject:
    """A backbone with what the checks share, each made when it is first asked for."""

    def __init__(self, backbone: Backbone) -> None:
        self.backbone = backbone

    @cached_property
    def model(self) -> nn.Module:
        """The whole module in eval mode, with random weights.

        Tensors whose values are all equal get some noise: a class token of zeros, a residual branch scaled by zero or
        a zero head would hide a stage that is left out.
        """
        model = self.backbone.module().eval()
        for tensor in model.state_dict().values():
            if tensor.is_floating_point() and tensor.numel() and tensor.min() == tensor.max():
                tensor.add_(torch.rand_like(tensor), alpha=0.1)
        return model

    @cached_property
    def images(self) -> Tensor:
        """Random pixels, normalised as the backbone's preprocessing says: `[2, 3, crop, crop]`."""
        preprocessing = self.backbone.preprocessing
        pixels = torch.randint(0, 256, (BATCH_SIZE, *preprocessing.input_shape)) / 255
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in (preprocessing.mean, preprocessing.std))
        return (pixels - mean) / std

    @cached_property
    def logits(self) -> Tensor:
        """What the module's own `forward` gives in eval mode."""
        with torch.no_grad():
            logits = self.model(self.images)
        if not isinstance(logits, Tensor):
            raise _Failure(f"the module must return logits, got {type(logits).__name__}")
        return logits

    @cached_property
    def activations(self) -> list[Tensor]:
        """The output of each stage in eval mode, the head's last."""
        return self.walk(self.images, [self.model] * len(self.backbone.chain))

    @cached_property
    def pruned(self) -> list[nn.Module]:
        """For each stage a module that has nothing but the stage, as a loader makes it: its tensors are the model's."""
        parts = self.backbone.split(self.model.state_dict())
        skeleton = self.backbone.module(device="meta")
        modules = []
        for stage in self.backbone.chain:
            module = prune(copy.deepcopy(skeleton), stage)
            module.load_state_dict(parts[stage.name], assign=True)
            modules.append(module.eval())
        return modules

    def inputs(self) -> list[Tensor]:
        """The input of each stage in eval mode."""
        return [self.images, *self.activations[:-1]]

    @torch.no_grad()
    def walk(self, x: Tensor, modules: list[nn.Module]) -> list[Tensor]:
        """The output of each of the first stages for `x`, each stage run on its module."""
        outputs = []
        for stage, module in zip(self.backbone.chain, modules, strict=False):
            before = x.clone()
            y = stage.forward(module, x)
            _require(torch.equal(before, x), f"stage {stage.name} changes its input in place; other models share it")
            outputs.append(x := y)
        return outputs


def _builds(subject: _Subject) -> str:
    return f"{sum(p.numel() for p in subject.model.parameters()):,} parameters"


def _keys(subject: _Subject) -> str:
    keys = list(subject.model.state_dict())
    for key in keys:
        owners = [stage.name for stage in subject.backbone.chain if stage.has(key)]
        _require(len(owners) == 1, f"{key} must belong to exactly one stage, belongs to {owners or 'none'}")
    return f"{len(keys)} keys, each in one of {len(subject.backbone.chain)} stages"


def _buffers(subject: _Subject) -> str:
    hidden = sorted({name for name, _ in subject.model.named_buffers()} - set(subject.model.state_dict()))
    _require(not hidden, f"buffers that state_dict leaves out can't be loaded, make them persistent: {hidden[:5]}")
    return "none outside the state_dict"


def _preprocessing(subject: _Subject) -> str:
    logits = subject.logits
    _require(logits.ndim == 2 and len(logits) == BATCH_SIZE, f"logits must be [batch, classes], got {_shape(logits)}")
    _require(bool(logits.isfinite().all()), "logits of a random image are not finite")
    known = len(subject.backbone.known_classes)
    _require(known in (0, logits.shape[1]), f"known_classes has {known} names for {logits.shape[1]} logits")
    return f"{_shape(subject.images)} gives logits {_shape(logits)}"


def _composition(subject: _Subject) -> str:
    logits, composed = subject.logits, subject.activations[-1]
    _require(_shape(composed) == _shape(logits), f"stages give {_shape(composed)}, the module {_shape(logits)}")
    difference = (composed - logits).abs().max()
    _require(torch.equal(composed, logits), f"stages and the module's own forward differ by up to {difference:.3g}")
    return "stages give the module's own logits, bit for bit"


def _features(subject: _Subject) -> str:
    backbone, features = subject.backbone, subject.activations[-2]
    convolution = isinstance(subject.model.get_submodule(backbone.head.layer), nn.Conv2d)
    expected = f"[{BATCH_SIZE}, {backbone.feature_size}{', height, width' if convolution else ''}]"
    right = features.ndim == (4 if convolution else 2) and features.shape[1] == backbone.feature_size
    _require(right, f"the head must get features {expected}, gets {_shape(features)}")
    return _shape(features)


def _batch_sizes(subject: _Subject) -> str:
    ones = subject.walk(subject.images[:1], [subject.model] * len(subject.backbone.chain))
    for stage, one, two in zip(subject.backbone.chain, ones, subject.activations, strict=True):
        same = one.shape[1:] == two.shape[1:] and len(one) == 1 and len(two) == BATCH_SIZE
        _require(same, f"stage {stage.name} gives {_shape(one)} for one image and {_shape(two)} for {BATCH_SIZE}")
    return f"shapes for 1 and {BATCH_SIZE} images agree"


def _head(subject: _Subject) -> str:
    head = subject.backbone.head
    for num_classes in (3, 1):
        module = prune(subject.backbone.module(num_classes, device="meta"), head).to_empty(device="cpu")
        for tensor in module.state_dict().values():
            tensor.zero_()
        with torch.no_grad():
            logits = head.forward(module.eval(), subject.activations[-2])
        right = _shape(logits) == f"[{BATCH_SIZE}, {num_classes}]"
        _require(right, f"with {head.layer} for {num_classes} classes the head gives {_shape(logits)}")
    return f"{head.layer} can be replaced for 3 classes and for 1"


def _pruned(subject: _Subject) -> str:
    stages = zip(subject.backbone.chain, subject.pruned, subject.inputs(), subject.activations, strict=True)
    keys = list(subject.model.state_dict())
    for stage, module, x, expected in stages:
        differ = set(module.state_dict()) ^ set(stage.keys(keys))
        _require(not differ, f"stage {stage.name} on its own has other keys: {sorted(differ)[:5]}")
        left = [n for n, t in [*module.named_parameters(), *module.named_buffers()] if t.is_meta]
        _require(not left, f"stage {stage.name} on its own has tensors without values: {left[:5]}")
        with torch.no_grad():
            same = torch.equal(stage.forward(module, x), expected)
        _require(same, f"stage {stage.name} gives another answer on its own than within the module")
    return "each stage gives the same on its own, bit for bit"


def _frozen(subject: _Subject) -> str:
    *frozen, head = subject.pruned
    before = [{k: v.clone() for k, v in module.state_dict().items()} for module in frozen]
    head_before = [p.detach().clone() for p in head.parameters()]
    optimizer = torch.optim.AdamW(head.train().parameters(), lr=1e-2)
    labels = torch.randint(0, subject.logits.shape[1], (BATCH_SIZE,))
    for _ in range(TRAINING_STEPS):
        features = subject.walk(subject.images, frozen)[-1] if frozen else subject.images
        optimizer.zero_grad()
        nn.functional.cross_entropy(subject.backbone.head.forward(head, features), labels).backward()
        optimizer.step()
    for stage, module, tensors in zip(subject.backbone.stages, frozen, before, strict=True):
        changed = [k for k, v in module.state_dict().items() if not torch.equal(v, tensors[k])]
        _require(not changed, f"training the head changed the frozen stage {stage.name}: {changed[:5]}")
    learnt = any(not torch.equal(p, q) for p, q in zip(head.parameters(), head_before, strict=True))
    _require(learnt, "training the head changed nothing in it")
    return f"bit-identical after {TRAINING_STEPS} steps of training the head"


def _trainable(subject: _Subject) -> str:
    model = subject.model.train()
    x = subject.images
    for stage in subject.backbone.chain:
        leaf = x.clone().requires_grad_()
        given = leaf * 1  # not a leaf, so that a change in place is seen here, not refused by autograd
        y = stage.forward(model, given)
        _require(torch.equal(given, leaf), f"stage {stage.name} changes its input in place in train mode")
        y.sum().backward()
        _require(leaf.grad is not None, f"no gradient reaches the input of stage {stage.name}")
        idle = [n for n, p in model.named_parameters() if stage.has(n) and p.requires_grad and p.grad is None]
        _require(not idle, f"stage {stage.name} has parameters that get no gradient: {idle[:5]}")
        x = y.detach()
    return "every parameter of every stage gets a gradient"


def _shape(tensor: Tensor) -> str:
    return str(list(tensor.shape))


_CHECKS: tuple[tuple[str, Callable[[_Subject], str]], ...] = (
    ("keys", _keys),
    ("buffers", _buffers),
    ("preprocessing", _preprocessing),
    ("composition", _composition),
    ("features", _features),
    ("batch sizes", _batch_sizes),
    ("head", _head),
    ("pruned stages", _pruned),
    ("frozen stages", _frozen),
    ("trainable stages", _trainable),
)
