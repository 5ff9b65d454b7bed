"""What training minimises, and what it is judged by."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from backboned.registry.task import Task

MAX_WEIGHT = 10.0


@dataclass(frozen=True)
class Objective:
    """The loss of a task, weighted so that rare classes count. Judging is unweighted: `Task.loss`.

    `weights` is `[classes]`: single label, the weight of each class's images, n / (classes · count); otherwise that of
    a positive label, negatives / positives. Both are held within 1/10…10.
    """

    task: Task
    weights: Tensor

    @classmethod
    def balanced(cls, task: Task, targets: Tensor, num_classes: int) -> "Objective":
        """The objective for training images with these `targets`, as of `Dataset.targets`; on their device."""
        n = len(targets)
        if task is Task.SINGLE_LABEL:
            weights = n / (num_classes * torch.bincount(targets, minlength=num_classes).float())
        else:
            positives = targets.float().view(n, -1).sum(dim=0)
            weights = (n - positives) / positives
        return cls(task, weights.clamp(1 / MAX_WEIGHT, MAX_WEIGHT))

    def __call__(self, logits: Tensor, target: Tensor, *, smoothing: float = 0.0) -> Tensor:
        """The weighted mean loss an image: `[n, outputs]` float logits, `[n]` or `[n, classes]` target → a scalar.

        With `smoothing`, a single-label target is drawn so far to the mean of the classes (Szegedy et al. 2015).
        """
        if self.task is Task.SINGLE_LABEL and smoothing:
            losses = F.cross_entropy(logits, target, reduction="none", label_smoothing=smoothing)
            # Over the number of images, not over the sum of weights: a batch without rare images isn't inflated.
            return (losses * self.weights[target]).mean()
        return self.losses(logits[None], target, weighted=True).mean()

    def losses(self, logits: Tensor, target: Tensor, *, weighted: bool = False) -> Tensor:
        """The loss of each image under many heads: `[heads, n, outputs]` float logits → `[heads, n]`."""
        if self.task is Task.SINGLE_LABEL:
            losses = -logits.log_softmax(-1).gather(-1, target.view(1, -1, 1).expand(len(logits), -1, 1))[..., 0]
            return losses * self.weights[target] if weighted else losses
        wanted = target.view(logits.shape[1:]).float().expand_as(logits)
        losses = F.binary_cross_entropy_with_logits(
            logits, wanted, reduction="none", pos_weight=self.weights if weighted else None
        )
        return losses.mean(-1)

    def rights(self, logits: Tensor, target: Tensor) -> Tensor:
        """How right each answer is: `[…, n, outputs]` → `[…, n]`, 0 or 1; multi-label: the part of right labels."""
        if self.task is Task.SINGLE_LABEL:
            return (logits.argmax(dim=-1) == target).float()
        return ((logits > 0) == (target.view(logits.shape[-2:]) > 0.5)).float().mean(-1)

    def accuracy(self, logits: Tensor, target: Tensor) -> Tensor:
        """The part of right decisions; multi-label: the mean over classes of those at probability 0.5."""
        return self.rights(logits, target).mean()
