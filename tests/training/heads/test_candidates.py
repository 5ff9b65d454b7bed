import pytest
import torch

from backboned.server.training.heads.candidates import (
    DECAYS,
    FEW_IMAGES,
    FOLDS,
    PENALTIES,
    RATES,
    RATES_OF_DEEPER_HEADS,
    Grid,
    folds,
    spread,
)
from backboned.server.training.options import TrainingOptions


def test_what_is_left_open_is_tried() -> None:
    grid = Grid.of(TrainingOptions(), probe=True, most=100)
    assert sorted(grid.rates) == sorted((rate, decay) for rate in RATES for decay in DECAYS)
    assert grid.penalties == PENALTIES
    assert len(grid) == len(RATES) * len(DECAYS) + len(PENALTIES)


def test_given_options_are_kept_to() -> None:
    both = Grid.of(TrainingOptions(learning_rate=0.02, weight_decay=0.3), probe=True, most=100)
    assert (both.rates, both.penalties) == (((0.02, 0.3),), ())
    rate = Grid.of(TrainingOptions(learning_rate=0.02), probe=True, most=100)
    assert rate.rates == tuple((0.02, decay) for decay in DECAYS)
    decay = Grid.of(TrainingOptions(weight_decay=0.0), probe=False, most=100)
    assert decay.rates == tuple((rate, 0.0) for rate in RATES_OF_DEEPER_HEADS)
    assert decay.penalties == ()


@pytest.mark.parametrize("most", [1, 2, 5, 9])
def test_so_many_are_tried_at_most_those_of_the_middle_rate_first(most: int) -> None:
    rates = Grid.of(TrainingOptions(), probe=True, most=most).rates
    assert len(rates) == most
    assert len(set(rates)) == most
    assert {rate for rate, _ in rates[:3]} <= {RATES[len(RATES) // 2]} or most == 9


def test_every_candidate_has_a_name_of_its_own() -> None:
    grid = Grid.of(TrainingOptions(), probe=True, most=100)
    assert len({grid.name(index) for index in range(len(grid))}) == len(grid)
    assert grid.name(0) == "AdamW with learning_rate 0.0003 and weight_decay 0.0001"
    assert grid.name(len(grid) - 1) == "L-BFGS with an L2 penalty of 1"


def test_every_class_is_spread_evenly_over_the_folds() -> None:
    targets = torch.tensor([0] * 52 + [1] * 23 + [2] * 10)[torch.randperm(85)]
    fold = folds(targets, seed=1)
    assert fold is not None
    for label in range(3):
        counts = torch.bincount(fold[targets == label], minlength=FOLDS)
        assert counts.max() - counts.min() <= 1
        assert counts.min() >= 2


def test_labels_are_spread_over_the_folds_too() -> None:
    targets = torch.zeros(90, 3)
    targets[:45, 0] = targets[30:60, 1] = targets[60:75, 2] = 1
    fold = folds(targets, seed=0)
    assert fold is not None
    for label in range(3):
        assert all(targets[fold != number, label].sum() > 0 for number in range(FOLDS))
        assert all(targets[fold == number, label].sum() > 0 for number in range(FOLDS))


def test_equal_seeds_give_equal_folds_and_others_others() -> None:
    targets = torch.arange(60) % 3
    first, second, other = (folds(targets, seed) for seed in (4, 4, 5))
    assert first is not None
    assert second is not None
    assert other is not None
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


@pytest.mark.parametrize(
    "targets",
    [torch.arange(FEW_IMAGES) % 2, torch.tensor([0] * 40 + [1] * 9)],
    ids=["many images", "few of a class"],
)
def test_there_is_no_cross_validation_with(targets: torch.Tensor) -> None:
    assert folds(targets, seed=0) is None


def test_values_are_spread_over_the_copies() -> None:
    assert spread([1.0, 2.0], 3, torch.zeros(1)).tolist() == [1, 2, 1, 2, 1, 2]
