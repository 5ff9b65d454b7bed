"""Features near those of training are familiar, features of something else are not."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from backboned.registry.answers import Answers
from backboned.registry.task import Task
from backboned.server.training.familiarity import Familiarity, unfamiliar_beyond

D = 64


def images(classes: Tensor, seed: int) -> Tensor:
    """Features `[n, D]` of images of these classes: around a direction for each."""
    directions = F.normalize(torch.randn(6, D, generator=torch.Generator().manual_seed(1)))
    noise = torch.randn(len(classes), D, generator=torch.Generator().manual_seed(seed))
    return 9 * directions[classes] + 0.3 * noise


def answers(task: Task, features: Tensor, targets: Tensor, classes: int, validation: Tensor) -> Answers:
    found = Familiarity.of(task, features, targets, classes)
    made = Answers(1.0, 0.0, 0.0, found.centres, found.scale)
    return Answers(1.0, 0.0, unfamiliar_beyond(made, validation), found.centres, found.scale)


def test_centres_are_means_of_unit_features_in_deviations() -> None:
    features = torch.tensor([[2.0, 0.0], [0.0, 1.0], [0.0, 3.0]])
    found = Familiarity.of(Task.SINGLE_LABEL, features, torch.tensor([0, 1, 1]), 2)
    rows = (found.centres.float() / found.scale).tolist()
    assert rows == [pytest.approx([1, 0], abs=1e-3), pytest.approx([0, 1], abs=1e-3)]


def test_what_was_seen_is_familiar_and_a_new_class_is_not() -> None:
    classes = torch.arange(400) % 5
    known = answers(Task.SINGLE_LABEL, images(classes, 2), classes, 5, images(classes, 3))
    again, other = known.distances(images(classes, 4)), known.distances(images(torch.full((100,), 5), 5))
    assert (again > known.unfamiliar_beyond).double().mean() < 0.05
    assert (other > known.unfamiliar_beyond).all()
    assert again.mean() == pytest.approx(1.0, abs=0.15)  # a distance of 1 is what is usual


def test_a_class_without_images_has_no_centre() -> None:
    classes = torch.tensor([0, 2] * 20)
    assert len(Familiarity.of(Task.SINGLE_LABEL, images(classes, 2), classes, 4).centres) == 2


def test_with_several_labels_images_without_any_are_familiar_too() -> None:
    classes = torch.arange(300) % 3
    targets = F.one_hot(classes, 3)[:, :2].float()  # the third class has no label
    known = answers(Task.MULTI_LABEL, images(classes, 2), targets, 2, images(classes, 3))
    assert len(known.centres) == 3
    assert (known.distances(images(classes, 4)) > known.unfamiliar_beyond).double().mean() < 0.05
    every = Familiarity.of(Task.MULTI_LABEL, images(classes[:2], 2), targets[:2], 2)
    assert len(every.centres) == 2


@pytest.mark.parametrize("features", [torch.zeros(6, D), torch.full((6, D), 1e5), torch.ones(6, D)])
def test_features_that_do_not_vary_give_finite_values(features: Tensor) -> None:
    known = answers(Task.BINARY, features, torch.tensor([0, 1] * 3), 2, features)
    assert known.centres.isfinite().all() and known.scale.isfinite().all()
    assert known.distances(features).isfinite().all()
    assert not (known.distances(features) > known.unfamiliar_beyond).any()
