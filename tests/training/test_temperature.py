import pytest
import torch
from torch import Tensor

from backboned.registry.task import Task
from backboned.server.training.objective import Objective
from backboned.server.training.temperature import calibrated_losses

HEADS, IMAGES, CLASSES = 5, 60, 3


def case(task: Task) -> tuple[Objective, Tensor, Tensor]:
    """Heads from much too sure to much too unsure, and what is true."""
    generator = torch.Generator().manual_seed(2)
    outputs = task.outputs(CLASSES)
    logits = torch.randn(IMAGES, outputs, generator=generator)
    if task is Task.SINGLE_LABEL:
        target = (logits + torch.randn(logits.shape, generator=generator)).argmax(1)
    else:
        target = ((logits + torch.randn(logits.shape, generator=generator)) > 0).float()
        target = target[:, 0].long() if task is Task.BINARY else target
    return Objective(task, torch.ones(outputs)), torch.logspace(-1, 1, HEADS)[:, None, None] * logits, target


@pytest.mark.parametrize("task", list(Task))
def test_the_loss_is_that_at_the_best_temperature(task: Task) -> None:
    objective, logits, target = case(task)
    found = calibrated_losses(lambda x: objective.losses(x, target), logits)
    grid = torch.logspace(-1, 1, 1001)
    tried = torch.stack([objective.losses(logits / temperature, target).mean(1) for temperature in grid])
    torch.testing.assert_close(found, tried.amin(0), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("task", list(Task))
def test_it_is_never_worse_than_without_a_temperature(task: Task) -> None:
    objective, logits, target = case(task)
    found = calibrated_losses(lambda x: objective.losses(x, target), logits)
    assert (found <= objective.losses(logits, target).mean(1)).all()


def test_heads_that_differ_by_a_factor_lose_the_same() -> None:
    objective, logits, target = case(Task.SINGLE_LABEL)
    found = calibrated_losses(lambda x: objective.losses(x, target), logits[1:4])
    torch.testing.assert_close(found, found[:1].expand(3), rtol=1e-3, atol=0)


def test_a_head_that_is_not_finite_does_not_disturb_the_others() -> None:
    objective, logits, target = case(Task.SINGLE_LABEL)
    expected = calibrated_losses(lambda x: objective.losses(x, target), logits)
    logits[2] = torch.nan
    found = calibrated_losses(lambda x: objective.losses(x, target), logits)
    assert found[2].isnan()
    keep = [0, 1, 3, 4]
    assert torch.equal(found[keep], expected[keep])
