import pytest
import torch
from torch import Tensor

from backboned.registry.task import Task
from backboned.server.training.calibration import fit_temperature
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
def test_the_loss_is_that_at_the_temperature_that_will_serve(task: Task) -> None:
    objective, logits, target = case(task)
    found = calibrated_losses(objective, logits, target)
    expected = [task.loss(head / fit_temperature(task, head, target), target) for head in logits]
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-4, atol=0)


@pytest.mark.parametrize("images", [3, IMAGES])
def test_a_head_without_a_mistake_is_not_taken_to_be_surer_than_it_says(images: int) -> None:
    objective, logits, _ = case(Task.SINGLE_LABEL)
    target = logits[0, :images].argmax(1)
    found = calibrated_losses(objective, logits[:1, :images], target)
    torch.testing.assert_close(found, objective.losses(logits[:1, :images], target).mean(1))


@pytest.mark.parametrize("task", list(Task))
def test_it_is_never_worse_than_without_a_temperature(task: Task) -> None:
    objective, logits, target = case(task)
    found = calibrated_losses(objective, logits, target)
    assert (found <= objective.losses(logits, target).mean(1)).all()


def test_a_head_that_is_not_finite_does_not_disturb_the_others() -> None:
    objective, logits, target = case(Task.SINGLE_LABEL)
    expected = calibrated_losses(objective, logits, target)
    logits[2] = torch.nan
    found = calibrated_losses(objective, logits, target)
    assert found[2].isnan()
    keep = [0, 1, 3, 4]
    assert torch.equal(found[keep], expected[keep])
