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
