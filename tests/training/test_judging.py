"""Figures are those that one would compute by hand, and finite whatever is missing."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from backboned.registry.answers import Answers
from backboned.registry.task import Task
from backboned.server.training.events import from_json, to_json
from backboned.server.training.familiarity import Familiarity
from backboned.server.training.judging import (
    Outputs,
    answers_of,
    calibration_error,
    confusion,
    evaluate,
    judge,
    reliability,
    wilson,
)

NAMES = ("ant", "bee", "wasp")


def outputs(probabilities: list[list[float]], targets: list[int] | list[list[float]]) -> Outputs:
    """Of a single-label task, by the probabilities that are said."""
    return Outputs(torch.tensor(probabilities).log(), torch.tensor(targets), torch.randn(len(targets), 8))


def test_the_figures_of_four_images() -> None:
    said = outputs([[0.8, 0.1, 0.1], [0.6, 0.3, 0.1], [0.1, 0.9, 0.0001], [0.5, 0.4, 0.1]], [0, 1, 1, 0])
    judged = judge(Task.SINGLE_LABEL, NAMES, 1.0, said)
    assert (judged.images, judged.accuracy, judged.majority_accuracy) == (4, 0.75, 0.5)
    assert [(c.label, c.images) for c in judged.classes] == [("ant", 2), ("bee", 2), ("wasp", 0)]
    assert [c.precision for c in judged.classes] == pytest.approx([2 / 3, 1.0, 0.0])
    assert [c.recall for c in judged.classes] == pytest.approx([1.0, 0.5, 0.0])
    expected = -sum(math.log(p) for p in (0.8, 0.3, 0.9 / 1.0001, 0.5)) / 4
    assert judged.loss == pytest.approx(expected, rel=1e-4)
    # Each image is alone in its bin: gaps of 0.2, 0.6, 0.1 and 0.5.
    assert judged.calibration_error == pytest.approx((0.2 + 0.6 + 0.1 + 0.5) / 4, abs=1e-3)


def test_the_figures_of_a_binary_task() -> None:
    logits = torch.tensor([[2.0], [-1.0], [0.5], [-3.0]])
    judged = judge(Task.BINARY, ("no", "yes"), 2.0, Outputs(logits, torch.tensor([1, 1, 0, 0]), torch.randn(4, 8)))
    assert judged.accuracy == 0.5
    assert [(c.precision, c.recall) for c in judged.classes] == [(0.5, 0.5), (0.5, 0.5)]
    expected = sum(math.log(1 + math.exp(x)) for x in (-1.0, 0.5, 0.25, -1.5)) / 4
    assert judged.loss == pytest.approx(expected, rel=1e-5)


def test_the_figures_of_several_labels() -> None:
    logits = torch.tensor([[3.0, -3.0, 3.0], [3.0, 3.0, -3.0]])
    targets = torch.tensor([[1.0, 0.0, 0.0], [1.0, 1.0, 0.0]])
    judged = judge(Task.MULTI_LABEL, NAMES, 1.0, Outputs(logits, targets, torch.randn(2, 8)))
    assert judged.accuracy == pytest.approx(5 / 6)
    assert judged.majority_accuracy == pytest.approx((1 + 0.5 + 1) / 3)
    assert [(c.images, c.precision, c.recall) for c in judged.classes] == [(2, 1, 1), (1, 1, 1), (0, 0, 0)]
    said = 1 / (1 + math.exp(-3))
    assert judged.calibration_error == pytest.approx(abs(said - 5 / 6), abs=1e-6)


def test_the_interval_is_wilsons() -> None:
    # Newcombe 1998, table I: 81 of 263 is 0.2553 to 0.3662; 0 of 20 is 0 to 0.1611; 1 of 29 is 0.0061 to 0.1718.
    assert wilson(81 / 263, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson(0, 20) == pytest.approx((0, 0.1611), abs=5e-5)
    assert wilson(1 / 29, 29) == pytest.approx((0.0061, 0.1718), abs=5e-5)


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 2000).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n))))
def test_an_interval_holds_its_part_and_lies_within_bounds(counts: tuple[int, int]) -> None:
    n, k = counts
    low, high = wilson(k / n, n)
    assert 0 <= low <= k / n <= high <= 1 and low < high


def test_calibrated_answers_have_no_calibration_error() -> None:
    generator = torch.Generator().manual_seed(0)
    probabilities = Task.SINGLE_LABEL.probabilities(2 * torch.randn(40_000, 3, generator=generator))
    targets = torch.multinomial(probabilities, 1, generator=generator)[:, 0]
    bins = reliability(Task.SINGLE_LABEL, probabilities, targets)
    assert sum(b.count for b in bins) == 40_000 and calibration_error(bins) < 0.01
    assert all(b.count == 0 for b in bins[:4])  # the likeliest of three has a third at least


def test_rows_of_the_confusion_matrix_are_what_is_true() -> None:
    probabilities = torch.tensor([[0.9, 0.1, 0.0], [0.1, 0.9, 0.0], [0.2, 0.8, 0.0]])
    assert confusion(Task.SINGLE_LABEL, probabilities, torch.tensor([0, 1, 2])).tolist() == [
        [1, 0, 0],
        [0, 1, 0],
        [0, 1, 0],
    ]


@settings(deadline=None, max_examples=50)
@given(
    st.sampled_from(list(Task)),
    st.integers(1, 30),
    st.integers(0, 20),
    st.sampled_from([0.0, 1e-3, 1.0, 100.0, 1e6]),
    st.integers(0, 10**6),
)
def test_an_evaluation_is_an_event_whatever_was_judged(
    task: Task, n: int, tested: int, spread: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    classes = NAMES[:2] if task is Task.BINARY else NAMES

    def draw(count: int) -> Outputs:
        logits = spread * torch.randn(count, task.outputs(len(classes)), generator=generator)
        shape = (count, 3) if task is Task.MULTI_LABEL else (count,)
        targets = torch.randint(2, shape, generator=generator)  # never the third class, unless there are several labels
        return Outputs(logits, targets.float() if task is Task.MULTI_LABEL else targets, torch.randn(count, 5))

    validation, train = draw(n), draw(n + 2)
    answers = answers_of(task, validation, Familiarity.of(task, train.features, train.targets, len(classes)))
    found = evaluate(task, classes, answers, 3, validation=validation, test=draw(tested))
    assert from_json(to_json(found)) == found
    assert (found.test is None) == (tested == 0)
    for judged in filter(None, (found.validation, found.test)):
        assert judged.accuracy_low <= judged.accuracy <= judged.accuracy_high
        assert 0 <= judged.calibration_error <= 1 and judged.loss >= 0
    kept = Answers.from_payload(answers.to_payload(), classes=len(classes), feature_size=5)
    assert kept.unfamiliar_beyond == answers.unfamiliar_beyond
    assert kept.reference == answers.reference and kept.reference is not None
    assert kept.reference.certainty.total == kept.reference.distance.total == n
