"""What makes a model's answers worth trusting: calibrated probabilities, and a doubt where there is reason for one."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from backboned.registry.plain import check_tensor
from backboned.registry.reference import Reference
from backboned.registry.refusal import refused

TEMPERATURES = (0.05, 20.0)
"""The range of temperatures."""


@dataclass(frozen=True, eq=False)
class Answers:
    """What validation has taught about a version's answers; it lies in the checkpoint.

    Logits are divided by `temperature` (Guo et al. 2017, arXiv:1706.04599). An answer is uncertain if its certainty, as
    of `Task.certainty`, is below `uncertain_below`, or if its image is unfamiliar: further than `unfamiliar_beyond`
    from all `centres`.

    `centres` `[k, d]` float16 are the means of the training features of each class (with several labels, also of the
    images without any; never of a class without images, so that k is at most the number of classes and one), of
    features brought to length 1 and multiplied by `scale` `[d]` float32, one over their deviation from the centres.

    `reference` tells where the images lie that validated; None in a checkpoint of before there was one.
    """

    temperature: float
    uncertain_below: float
    unfamiliar_beyond: float
    centres: Tensor
    scale: Tensor
    reference: Reference | None = None

    def distances(self, features: Tensor) -> Tensor:
        """How far features `[n, d]` float32 lie from the nearest centre: `[n]`, in standard deviations a value.

        The Mahalanobis distance (Lee et al. 2018, arXiv:1807.03888), with a diagonal covariance that all classes share,
        of features of length 1: docs/trust.md has what was measured. One matrix product.
        """
        return self.distances_of(F.normalize(features))

    def distances_of(self, unit: Tensor) -> Tensor:
        """The same for features `[n, d]` that were brought to length 1 already."""
        x, centres = unit * self.scale, self.centres.float()
        squared = torch.addmm(centres.square().sum(dim=1), x, centres.T, alpha=-2).amin(dim=1)
        return (squared + x.square().sum(dim=1)).clamp(min=0).div(len(self.scale)).sqrt()

    def to(self, device: torch.device) -> "Answers":
        """The same, its tensors on `device`."""
        return replace(self, centres=self.centres.to(device), scale=self.scale.to(device))

    @property
    def size_bytes(self) -> int:
        """Memory of its tensors."""
        return self.centres.nbytes + self.scale.nbytes

    def to_payload(self) -> dict[str, Any]:
        """Plain values and tensors, as they lie in the checkpoint."""
        beside = {} if self.reference is None else {"validation": self.reference.to_payload()}
        return {
            **beside,
            "temperature": self.temperature,
            "uncertain_below": self.uncertain_below,
            "unfamiliar_beyond": self.unfamiliar_beyond,
            "centres": self.centres.detach().cpu().half().clone(),
            "scale": self.scale.detach().cpu().float().clone(),
        }

    @classmethod
    def from_payload(cls, values: object, *, classes: int, feature_size: int) -> "Answers":
        """The inverse of `to_payload`, for a model of so many classes whose head reads `feature_size` values.

        Raises `BackbonedError` `DATA_LOSS` for whatever it can't have written.
        """
        if not isinstance(values, Mapping):
            raise refused(f"its `answers` are a {type(values).__name__}, not the values that a FineTune writes")
        centres = _tensor(values, "centres", 2).half()
        scale = _tensor(values, "scale", 1).float()
        if not 1 <= len(centres) <= classes + 1 or centres.shape[1] != feature_size or len(scale) != feature_size:
            raise refused(
                f"its `answers` have centres {list(centres.shape)} and scale {list(scale.shape)}, for {classes} "
                f"classes and {feature_size} features"
            )
        if not centres.isfinite().all() or not (scale > 0).all():
            raise refused("its `answers` have centres that float16 can't hold, or a scale that isn't above 0")
        return cls(
            temperature=_number(values, "temperature", *TEMPERATURES),
            uncertain_below=_number(values, "uncertain_below", 0, 1),
            unfamiliar_beyond=_number(values, "unfamiliar_beyond", 0, 1e30),
            centres=centres.clone(),
            scale=scale.clone(),
            reference=Reference.from_payload(values["validation"]) if "validation" in values else None,
        )


def _number(values: Mapping[Any, Any], name: str, low: float, high: float) -> float:
    value = values.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise refused(f"its `answers` have {name} {str(value)[:80]}, which is no number in {low:g}…{high:g}")
    return float(value)


def _tensor(values: Mapping[Any, Any], name: str, dimensions: int) -> Tensor:
    value = values.get(name)
    if not isinstance(value, Tensor) or not value.is_floating_point() or value.dim() != dimensions:
        raise refused(f"its `answers` have no {name}: a tensor of {dimensions} dimensions is expected")
    check_tensor(f"answers.{name}", value)
    return value.detach()
