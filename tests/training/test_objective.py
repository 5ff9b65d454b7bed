import math

import pytest
import torch
from torch.nn import functional as F

from backboned.registry.task import Task
from backboned.server.training.objective import MAX_WEIGHT, Objective


def test_balanced_classes_weigh_one_and_the_loss_is_the_plain_one() -> None:
    targets = torch.tensor([0, 1, 2, 0, 1, 2])
    objective = Objective.balanced(Task.SINGLE_LABEL, targets, 3)
    logits = torch.randn(6, 3)
    assert objective.weights.tolist() == [1, 1, 1]
    assert torch.allclose(objective(logits, targets), F.cross_entropy(logits, targets))


def test_classes_weigh_in_total_the_same_however_many_images_they_have() -> None:
    targets = torch.tensor([0] * 6 + [1] * 2 + [2])
    weights = Objective.balanced(Task.SINGLE_LABEL, targets, 3).weights
    assert (weights * torch.bincount(targets)).tolist() == pytest.approx([3, 3, 3])


@pytest.mark.parametrize("task", list(Task))
def test_weights_are_bounded(task: Task) -> None:
    targets = torch.tensor([0] * 5000 + [1])
    if task is Task.MULTI_LABEL:
        targets = F.one_hot(targets, 2).float()
    weights = Objective.balanced(task, targets, 2).weights
    assert weights.max() == MAX_WEIGHT
    assert weights.min() >= 1 / MAX_WEIGHT


def test_a_positive_label_weighs_as_much_as_all_negatives_beside_it() -> None:
    binary = Objective.balanced(Task.BINARY, torch.tensor([0, 0, 0, 1]), 2)
    assert binary.weights.tolist() == [3]
    multi = Objective.balanced(Task.MULTI_LABEL, torch.tensor([[1.0, 0], [0, 1], [0, 1], [0, 1]]), 2)
    assert multi.weights.tolist() == pytest.approx([3, 1 / 3])


def test_accuracy_is_the_part_of_right_decisions() -> None:
    ones = torch.ones(2)
    single = Objective(Task.SINGLE_LABEL, ones)
    assert single.accuracy(torch.tensor([[2.0, 1], [2, 1]]), torch.tensor([0, 1])) == 0.5
    binary = Objective(Task.BINARY, ones[:1])
    assert binary.accuracy(torch.tensor([[2.0], [-1], [1], [3]]), torch.tensor([1, 0, 0, 1])) == 0.75
    multi = Objective(Task.MULTI_LABEL, ones)
    assert multi.accuracy(torch.tensor([[2.0, -1], [-1, 2]]), torch.tensor([[1.0, 0], [1, 1]])) == 0.75


@pytest.mark.parametrize("task", list(Task))
def test_many_heads_lose_what_each_of_them_loses(task: Task) -> None:
    outputs = task.outputs(3) if task is not Task.BINARY else 1
    targets = torch.tensor([0, 1, 1, 0, 1, 1])
    target = F.one_hot(targets, 3).float() if task is Task.MULTI_LABEL else targets
    logits = torch.randn(4, 6, outputs, generator=torch.Generator().manual_seed(0))
    objective = Objective(task, torch.tensor([0.5, 2.0, 3.0])[:outputs])
    for one, losses in zip(logits, objective.losses(logits, target), strict=True):
        torch.testing.assert_close(losses.mean(), task.loss(one, target))
    for one, losses in zip(logits, objective.losses(logits, target, weighted=True), strict=True):
        torch.testing.assert_close(losses.mean(), objective(one, target))


def test_a_batch_without_rare_images_is_not_inflated() -> None:
    objective = Objective(Task.SINGLE_LABEL, torch.tensor([0.5, 5.0]))
    logits, targets = torch.zeros(4, 2), torch.zeros(4, dtype=torch.int64)
    assert objective(logits, targets).item() == pytest.approx(0.5 * math.log(2))
    assert objective(logits, targets, smoothing=0.1).item() == pytest.approx(0.5 * math.log(2))


def test_smoothing_draws_single_labels_to_the_mean_of_the_classes_and_leaves_other_tasks_alone() -> None:
    logits, targets = torch.randn(5, 3, generator=torch.Generator().manual_seed(1)), torch.tensor([0, 1, 2, 2, 1])
    single = Objective(Task.SINGLE_LABEL, torch.ones(3))
    soft = 0.7 * F.one_hot(targets, 3) + 0.3 / 3
    torch.testing.assert_close(single(logits, targets, smoothing=0.3), -(soft * logits.log_softmax(1)).sum(1).mean())
    multi = Objective(Task.MULTI_LABEL, torch.ones(3))
    target = F.one_hot(targets, 3).float()
    assert multi(logits, target, smoothing=0.3) == multi(logits, target)
