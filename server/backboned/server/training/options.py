"""How to train: the options of a job, their defaults and their ranges."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from backboned.registry.backbone import Backbone
from backboned.registry.errors import invalid, suggestion
from backboned.registry.task import Task

ALL_STAGES = "all"
AUTO_STAGES = "auto"
STAGES_LEARNING_RATE = 3e-4
STAGES_WEIGHT_DECAY = 1e-2

_RANGES: Mapping[str, tuple[float, float]] = {
    "max_epochs": (1, 10_000),
    "batch_size": (1, 4096),
    "patience": (0, 10_000),
    "validation_fraction": (0.01, 0.9),
    "seed": (0, 2**63 - 1),
    "views": (1, 64),
    "test_fraction": (0, 0.5),
    "label_smoothing": (0, 0.5),
    "max_gradient_norm": (0, 1000),
}


@dataclass(frozen=True)
class TrainingOptions:
    """How to train a version. The defaults are the documented ones; `validated` checks the ranges.

    `trainable_stages` train besides the head: names, `all`, or `auto`. `learning_rate` and `weight_decay` None mean
    that several are tried for a head alone, and a default where stages train too. `patience` is in epochs, and 0 never
    stops early. `views` is how many views of each image train: the first as it is served, the others fixed random
    crops. `warm_start_version` is a version of the same model to begin from. `test_fraction` of the images is held back
    from every choice. `label_smoothing`, `ema_decay` (of the weights' moving average, a step; None: by the number of
    steps) and `max_gradient_norm` (0: none) count where stages train.
    """

    task: Task = Task.SINGLE_LABEL
    trainable_stages: tuple[str, ...] = ()
    max_epochs: int = 20
    batch_size: int = 32
    learning_rate: float | None = None
    weight_decay: float | None = None
    patience: int = 5
    validation_fraction: float = 0.2
    seed: int = 0
    views: int = 2
    warm_start_version: int | None = None
    test_fraction: float = 0.0
    label_smoothing: float = 0.1
    ema_decay: float | None = None
    max_gradient_norm: float = 1.0

    def validated(self, backbone: Backbone) -> "TrainingOptions":
        """These options with what is left open filled in: stages by name, in order, without the head, and the rate.

        Raises `BackbonedError` `INVALID_ARGUMENT`, naming the field, the value and the range.
        """
        for name, (low, high) in _RANGES.items():
            value = getattr(self, name)
            if not low <= value <= high:  # also for NaN
                raise _out_of_range(name, value, f"{low:g}…{high:g}" if high < 2**53 else "0…2^63-1")
        rate, decay, average = self.learning_rate, self.weight_decay, self.ema_decay
        if rate is not None and not 0 < rate <= 10:
            raise _out_of_range("learning_rate", rate, "above 0 and at most 10")
        if decay is not None and not 0 <= decay <= 1:
            raise _out_of_range("weight_decay", decay, "0…1")
        if average is not None and not 0 <= average <= 0.9999:
            raise _out_of_range("ema_decay", average, "0…0.9999")
        if self.warm_start_version is not None and self.warm_start_version < 1:
            raise _out_of_range("warm_start_version", self.warm_start_version, "1 or more, a version of the model")
        stages = self._stages(backbone)
        if stages:
            rate = STAGES_LEARNING_RATE if rate is None else rate
            decay = STAGES_WEIGHT_DECAY if decay is None else decay
        return replace(self, trainable_stages=stages, learning_rate=rate, weight_decay=decay)

    def _stages(self, backbone: Backbone) -> tuple[str, ...]:
        known = (*(s.name for s in backbone.chain), ALL_STAGES, AUTO_STAGES)
        for name in self.trainable_stages:
            if name not in known:
                raise invalid(
                    f"options.trainable_stages: {backbone.name} has no stage {name!r}{suggestion(name, known)}",
                    field="options.trainable_stages",
                )
        if AUTO_STAGES in self.trainable_stages:
            if set(self.trainable_stages) != {AUTO_STAGES}:
                raise invalid("options.trainable_stages: give auto alone, or names", field="options.trainable_stages")
            return (AUTO_STAGES,)
        if ALL_STAGES in self.trainable_stages:
            return backbone.stage_names
        return tuple(n for n in backbone.stage_names if n in self.trainable_stages)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as kept in job rows and manifests."""
        return asdict(self) | {"task": self.task.value, "trainable_stages": list(self.trainable_stages)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "TrainingOptions":
        """The inverse of `to_dict`."""
        stages = tuple(values["trainable_stages"])
        return cls(**{**values, "task": Task(values["task"]), "trainable_stages": stages})


def _out_of_range(name: str, value: float, expected: str) -> Exception:
    return invalid(f"options.{name} is {value}, which is out of range: {expected}", field=f"options.{name}")
