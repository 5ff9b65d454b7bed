"""Temperatures make probabilities as often right as they say; a threshold parts wrong answers from right ones."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from backboned.registry.task import Task
from backboned.server.training.calibration import DOUBTED_BELOW, doubt_below, fit_temperature, right


def drawn(task: Task, n: int, spread: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Logits `[n, 3]` (or `[n, 1]`) and targets drawn by just the probabilities that the logits mean."""
    generator = torch.Generator().manual_seed(seed)
    logits = spread * torch.randn(n, 1 if task is Task.BINARY else 3, generator=generator)
    probabilities = task.probabilities(logits)
    if task is Task.MULTI_LABEL:
        return logits, (torch.rand(probabilities.shape, generator=generator) < probabilities).float()
    return logits, torch.multinomial(probabilities, 1, generator=generator)[:, 0]


@pytest.mark.parametrize("task", list(Task))
@pytest.mark.parametrize("factor", [0.4, 1.0, 3.0])
def test_the_factor_by_which_logits_are_too_large_is_found(task: Task, factor: float) -> None:
    logits, targets = drawn(task, 4000, 2.0)
    assert fit_temperature(task, logits * factor, targets) == pytest.approx(factor, rel=0.1)


def test_it_is_the_minimum_of_the_loss_that_can_be_computed_by_hand() -> None:
    # 80 of 100 answers with logit 4 are right: sigmoid(4 / T) = 0.8 where T = 4 / ln 4.
    logits = torch.full((10000, 1), 4.0)
    targets = (torch.arange(10000) % 10 < 8).long()
    assert fit_temperature(Task.BINARY, logits, targets) == pytest.approx(4 / math.log(4), rel=1e-3)


@settings(deadline=None, max_examples=50)
@given(st.sampled_from(list(Task)), st.integers(0, 60), st.floats(0.01, 50), st.integers(0, 10**6))
def test_it_never_makes_the_loss_larger_and_stays_in_its_range(task: Task, n: int, spread: float, seed: int) -> None:
    logits, _ = drawn(task, n, spread, seed)
    _, targets = drawn(task, n, 1.0, seed + 1)
    temperature = fit_temperature(task, logits, targets)
    assert 0.05 <= temperature <= 20
    if n:
        assert task.loss(logits / temperature, targets) <= task.loss(logits, targets) + 1e-5


@pytest.mark.parametrize("task", list(Task))
def test_few_images_and_images_without_a_wrong_answer_make_nothing_surer(task: Task) -> None:
    logits = torch.full((9, 1), 0.3) if task is Task.BINARY else torch.eye(3).repeat(3, 1) - 0.5
    targets = {
        Task.SINGLE_LABEL: torch.arange(3).repeat(3),
        Task.BINARY: torch.ones(9, dtype=torch.long),
        Task.MULTI_LABEL: torch.eye(3).repeat(3, 1),
    }[task]
    assert fit_temperature(task, logits, targets) == 1.0
    many = (logits.repeat(20, 1), targets.repeat(20, *[1] * (targets.dim() - 1)))
    assert fit_temperature(task, *many) == pytest.approx(1.0, abs=1e-3)


def two_classes(certainties: list[float]) -> Tensor:
    return torch.tensor([[c, 1 - c] for c in certainties])


def test_the_threshold_parts_wrong_answers_from_right_ones() -> None:
    probabilities = two_classes([0.55, 0.6, 0.62, 0.65, 0.7, 0.8, 0.85, 0.9, 0.95, 0.99])
    targets = torch.tensor([1, 1, 1, 1, 1, 0, 0, 0, 0, 0])
    assert doubt_below(Task.SINGLE_LABEL, probabilities, targets) == pytest.approx(0.75)


def test_one_wrong_answer_that_is_sure_does_not_rule() -> None:
    probabilities = two_classes([0.55, 0.6, 0.62, 0.65, 0.7, 0.999] + [0.8 + i / 200 for i in range(30)])
    targets = torch.tensor([1] * 6 + [0] * 30)
    assert doubt_below(Task.SINGLE_LABEL, probabilities, targets) == pytest.approx(0.75)


def test_without_wrong_answers_the_least_certain_are_doubted_but_no_certain_one() -> None:
    targets = torch.zeros(100, dtype=torch.long)
    spread = two_classes([0.5 + i / 200 for i in range(100)])
    below = doubt_below(Task.SINGLE_LABEL, spread, targets)
    assert (Task.SINGLE_LABEL.certainty(spread) < below).sum() == 5
    assert doubt_below(Task.SINGLE_LABEL, two_classes([0.99] * 100), targets) == DOUBTED_BELOW


def test_where_certainty_tells_nothing_nothing_is_doubted() -> None:
    assert doubt_below(Task.SINGLE_LABEL, two_classes([0.7] * 20), torch.arange(20) % 2) == 0.0


def test_several_labels_are_as_certain_as_the_least_certain_one() -> None:
    probabilities = torch.tensor([[0.99, 0.6, 0.02], [0.01, 0.02, 0.03]])
    assert Task.MULTI_LABEL.certainty(probabilities).tolist() == pytest.approx([0.6, 0.97])
    targets = torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    assert right(Task.MULTI_LABEL, probabilities, targets).tolist() == [True, False]


@settings(deadline=None, max_examples=50)
@given(st.lists(st.tuples(st.floats(0.5, 1), st.booleans()), min_size=1, max_size=60))
def test_the_threshold_is_a_probability_that_flags_wrong_answers_at_least_as_often(
    answers: list[tuple[float, bool]],
) -> None:
    probabilities = two_classes([c for c, _ in answers])
    targets = torch.tensor([int(not ok) for _, ok in answers])
    below = doubt_below(Task.SINGLE_LABEL, probabilities, targets)
    assert 0 <= below <= 1
    is_right = right(Task.SINGLE_LABEL, probabilities, targets)
    doubted = Task.SINGLE_LABEL.certainty(probabilities).double() < below
    if 5 <= (~is_right).sum() < len(answers):
        assert doubted[~is_right].double().mean() >= doubted[is_right].double().mean()
