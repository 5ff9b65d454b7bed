"""What a head's logits mean."""

import math

import pytest
import torch
from torch import Tensor

from backboned.registry.errors import BackbonedError, ErrorKind
from backboned.registry.task import Task, class_names

LOGITS = torch.tensor([[1.0, 2.0, 3.0], [0.0, 0.0, 0.0]])


def test_single_label_probabilities_are_a_softmax() -> None:
    found = Task.SINGLE_LABEL.probabilities(LOGITS)
    assert found[0].tolist() == pytest.approx([math.exp(i) / sum(map(math.exp, (1, 2, 3))) for i in (1, 2, 3)])
    assert found[1].tolist() == pytest.approx([1 / 3] * 3)


def test_binary_probabilities_are_of_the_negative_and_the_positive_class() -> None:
    found = Task.BINARY.probabilities(torch.tensor([[0.0], [math.log(3)], [60.0]]))
    assert found[:2].tolist() == [pytest.approx([0.5, 0.5]), pytest.approx([0.25, 0.75])]
    assert 0 < found[2, 0] < 1e-25  # 1 - p would be 0


def test_multi_label_probabilities_are_independent() -> None:
    assert Task.MULTI_LABEL.probabilities(LOGITS)[1].tolist() == pytest.approx([0.5] * 3)


def test_probabilities_of_half_precision_logits_are_float32() -> None:
    assert all(task.probabilities(LOGITS[:, :1].to(torch.bfloat16)).dtype == torch.float32 for task in Task)


@pytest.mark.parametrize(
    ("task", "logits", "target", "expected"),
    [
        (Task.SINGLE_LABEL, LOGITS[1:], torch.tensor([2]), math.log(3)),
        (Task.BINARY, torch.tensor([[0.0], [math.log(3)]]), torch.tensor([1, 0]), (math.log(2) + math.log(4)) / 2),
        (Task.MULTI_LABEL, LOGITS[1:], torch.tensor([[1, 0, 1]]), math.log(2)),
    ],
)
def test_the_loss_is_the_mean_over_images(task: Task, logits: Tensor, target: Tensor, expected: float) -> None:
    assert task.loss(logits, target).item() == pytest.approx(expected)


def test_only_a_binary_head_has_one_output() -> None:
    assert [task.outputs(2) for task in (Task.SINGLE_LABEL, Task.BINARY, Task.MULTI_LABEL)] == [2, 1, 2]


@pytest.mark.parametrize(
    ("names", "outputs", "task", "expected"),
    [
        (None, 3, None, (Task.SINGLE_LABEL, ("class_0", "class_1", "class_2"))),
        (None, 1, None, (Task.BINARY, ("class_0", "class_1"))),
        (["ant", "bee"], 1, None, (Task.BINARY, ("ant", "bee"))),
        (["bee"], 1, None, (Task.BINARY, ("not bee", "bee"))),
        (["ant", "bee"], 2, Task.MULTI_LABEL, (Task.MULTI_LABEL, ("ant", "bee"))),
        (["bee"], 1, Task.MULTI_LABEL, (Task.MULTI_LABEL, ("bee",))),
    ],
)
def test_a_head_gets_the_task_and_the_names_that_fit_it(
    names: list[str] | None, outputs: int, task: Task | None, expected: tuple[Task, tuple[str, ...]]
) -> None:
    assert class_names(names, outputs, task) == expected


@pytest.mark.parametrize(
    ("names", "outputs", "task", "message"),
    [
        (None, 2, Task.BINARY, "a binary classifier has one output, this one has 2"),
        (None, 1, Task.SINGLE_LABEL, "needs two or more outputs, this one has 1"),
        (["ant"], 3, None, "1 class names for a head with 3 outputs: give 3, one a line"),
        ([], 3, None, "0 class names for a head with 3 outputs"),
        (["ant", "bee", "ant"], 3, None, "class names must differ; twice: 'ant'"),
        (["ant", "  "], 2, None, "must be text, and not empty, got '  '"),
        (["ant", "\ud800"], 2, None, "must be text"),
        (["ant", "b" * 1001], 2, None, "have at most 1000 characters, 'bbbb"),
        (["ant"] * 300_000, 300_000, None, "class names must differ; twice: 'ant'"),
    ],
)
def test_names_that_do_not_fit_are_refused(names: list[str], outputs: int, task: Task, message: str) -> None:
    with pytest.raises(BackbonedError) as caught:
        class_names(names, outputs, task)
    assert message in caught.value.message
    assert caught.value.kind is ErrorKind.INVALID_ARGUMENT
