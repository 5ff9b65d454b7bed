"""What a job can be told, in Python's terms."""

from collections.abc import Sequence
from typing import TypedDict


class TrainingOptions(TypedDict, total=False):
    """The fields of `backboned.v1.TrainingOptions`, which says what each means; an absent one takes its default."""

    task: str
    trainable_stages: Sequence[str]
    max_epochs: int
    batch_size: int
    learning_rate: float
    weight_decay: float
    patience: int
    validation_fraction: float
    seed: int
    views: int
    warm_start_version: int
    test_fraction: float
    label_smoothing: float
    ema_decay: float
    max_gradient_norm: float
