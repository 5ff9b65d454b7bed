import math
from dataclasses import replace

import pytest

from backboned.registry import BackbonedError, Catalogue, ErrorKind
from backboned.registry.task import Task
from backboned.server.training.options import STAGES_LEARNING_RATE, STAGES_WEIGHT_DECAY, TrainingOptions


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("max_epochs", 0, "1…10000"),
        ("max_epochs", 10_001, "1…10000"),
        ("batch_size", 0, "1…4096"),
        ("learning_rate", 0.0, "above 0 and at most 10"),
        ("learning_rate", 10.5, "above 0 and at most 10"),
        ("learning_rate", math.nan, "above 0 and at most 10"),
        ("weight_decay", -0.1, "0…1"),
        ("weight_decay", math.nan, "0…1"),
        ("patience", -1, "0…10000"),
        ("validation_fraction", 0.95, "0.01…0.9"),
        ("seed", -1, "0…2^63-1"),
        ("views", 65, "1…64"),
        ("warm_start_version", 0, "1 or more"),
        ("test_fraction", 0.6, "0…0.5"),
        ("label_smoothing", -0.1, "0…0.5"),
        ("label_smoothing", math.nan, "0…0.5"),
        ("max_gradient_norm", math.inf, "0…1000"),
        ("ema_decay", 1.0, "0…0.9999"),
        ("ema_decay", math.nan, "0…0.9999"),
    ],
)
def test_a_value_out_of_range_is_refused_with_field_value_and_range(
    catalogue: Catalogue, name: str, value: float, expected: str
) -> None:
    options = replace(TrainingOptions(), **{name: value})  # type: ignore[arg-type]
    with pytest.raises(BackbonedError) as caught:
        options.validated(catalogue.get("digits"))
    assert caught.value.kind is ErrorKind.INVALID_ARGUMENT
    assert caught.value.field == f"options.{name}"
    for part in (f"options.{name}", str(value), expected):
        assert part in caught.value.message


def test_a_head_alone_leaves_rate_and_decay_open_and_stages_have_their_own(catalogue: Catalogue) -> None:
    digits = catalogue.get("digits")
    for stages in ((), ("head",)):
        options = TrainingOptions(trainable_stages=stages).validated(digits)
        assert (options.learning_rate, options.weight_decay) == (None, None)
    for stages in (("layer3",), ("auto",)):
        options = TrainingOptions(trainable_stages=stages).validated(digits)
        assert (options.learning_rate, options.weight_decay) == (STAGES_LEARNING_RATE, STAGES_WEIGHT_DECAY)
    given = TrainingOptions(trainable_stages=("layer3",), learning_rate=0.5, weight_decay=0.0).validated(digits)
    assert (given.learning_rate, given.weight_decay) == (0.5, 0.0)


def test_auto_stays_auto_and_stands_alone(catalogue: Catalogue) -> None:
    digits = catalogue.get("digits")
    assert TrainingOptions(trainable_stages=("auto",)).validated(digits).trainable_stages == ("auto",)
    with pytest.raises(BackbonedError, match="give auto alone") as caught:
        TrainingOptions(trainable_stages=("auto", "layer3")).validated(digits)
    assert caught.value.field == "options.trainable_stages"


def test_stages_come_in_the_order_of_the_backbone(catalogue: Catalogue) -> None:
    digits = catalogue.get("digits")
    assert TrainingOptions(trainable_stages=("layer3", "head", "layer2")).validated(digits).trainable_stages == (
        "layer2",
        "layer3",
    )
    assert TrainingOptions(trainable_stages=("all",)).validated(digits).trainable_stages == digits.stage_names


def test_an_unknown_stage_is_refused_with_the_nearest_names(catalogue: Catalogue) -> None:
    with pytest.raises(BackbonedError, match=r"no stage 'layr3'; did you mean 'layer3'") as caught:
        TrainingOptions(trainable_stages=("layr3",)).validated(catalogue.get("digits"))
    assert caught.value.field == "options.trainable_stages"


def test_options_survive_as_plain_values() -> None:
    options = TrainingOptions(Task.MULTI_LABEL, ("layer3",), ema_decay=0.5, seed=2**62, warm_start_version=3)
    assert TrainingOptions.from_dict(options.to_dict()) == options
