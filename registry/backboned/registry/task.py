"""What a classifier tells apart, and what that makes of its logits."""

from collections import Counter
from collections.abc import Sequence
from enum import Enum

import torch
from torch import Tensor
from torch.nn import functional as F

from backboned.registry.errors import invalid

MAX_CLASS_CHARACTERS = 1000
"""They come back in every listing of checkpoints."""


class Task(Enum):
    """The three kinds of classification. The values are what checkpoint metadata holds."""

    SINGLE_LABEL = "single_label"
    BINARY = "binary"
    MULTI_LABEL = "multi_label"

    def outputs(self, num_classes: int) -> int:
        """How many logits the head gives for `num_classes` classes."""
        return 1 if self is Task.BINARY else num_classes

    def probabilities(self, logits: Tensor) -> Tensor:
        """`[batch, outputs]` logits → `[batch, classes]` float32 probabilities.

        Single label: softmax. Binary: `[1 - p, p]` for negative and positive. Multi-label: a sigmoid a class.
        """
        logits = logits.float()
        if self is Task.SINGLE_LABEL:
            return logits.softmax(dim=1)
        if self is Task.BINARY:
            return torch.cat([torch.sigmoid(-logits), torch.sigmoid(logits)], dim=1)
        return torch.sigmoid(logits)

    def certainty(self, probabilities: Tensor) -> Tensor:
        """How sure an answer is: `[batch, classes]` probabilities → `[batch]`.

        The highest probability; multi-label: that of the decision about the label that it is least sure of.
        """
        if self is Task.MULTI_LABEL:
            return torch.maximum(probabilities, 1 - probabilities).amin(dim=1)
        return probabilities.amax(dim=1)

    def loss(self, logits: Tensor, target: Tensor) -> Tensor:
        """The mean loss an image, unweighted.

        `target` is `[batch]` class indices (single label: cross-entropy; binary: 0 or 1), or `[batch, classes]` of 0
        and 1 (multi-label). The last two are binary cross-entropy, for multi-label the mean over classes.
        """
        return self.loss_of(logits.float(), target)

    def loss_of(self, logits: Tensor, target: Tensor) -> Tensor:
        """`loss` in the precision that the logits have."""
        if self is Task.SINGLE_LABEL:
            return F.cross_entropy(logits, target)
        if self is Task.BINARY:
            return F.binary_cross_entropy_with_logits(logits[:, 0], target.to(logits.dtype))
        return F.binary_cross_entropy_with_logits(logits, target.to(logits.dtype))


def class_names(names: Sequence[str] | None, outputs: int, task: Task | None = None) -> tuple[Task, tuple[str, ...]]:
    """The task and class names of a head with `outputs` logits, given what is known of them.

    One logit means a binary task; a single name is that of its positive class. Without names they are `class_0`,
    `class_1`, … Raises `BackbonedError` when they don't fit.
    """
    if task is None:
        task = Task.BINARY if outputs == 1 else Task.SINGLE_LABEL
    if task is Task.BINARY and outputs != 1:
        raise invalid(f"a binary classifier has one output, this one has {outputs}")
    if task is Task.SINGLE_LABEL and outputs == 1:
        raise invalid("a single-label classifier needs two or more outputs, this one has 1")
    expected = 2 if task is Task.BINARY else outputs
    if names is None:
        return task, tuple(f"class_{i}" for i in range(expected))
    if task is Task.BINARY and len(names) == 1:
        names = [f"not {names[0]}", names[0]]
    if len(names) != expected:
        raise invalid(f"{len(names)} class names for a head with {outputs} outputs: give {expected}, one a line")
    if len(set(names)) != len(names):
        twice = sorted(name for name, count in Counter(names).items() if count > 1)
        raise invalid(f"class names must differ; twice: {', '.join(map(repr, twice[:5]))}")
    if bad := [n for n in names if not n.strip() or n != n.encode("utf-8", "replace").decode()]:
        raise invalid(f"class names must be text, and not empty, got {bad[0][:80]!r}")
    if len(longest := max(names, key=len)) > MAX_CLASS_CHARACTERS:
        raise invalid(
            f"class names have at most {MAX_CLASS_CHARACTERS} characters, {longest[:40]!r}… has {len(longest)}"
        )
    return task, tuple(names)
