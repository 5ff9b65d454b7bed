"""Drift is that of the version that serves: of its own answers, and anew with each version."""

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from backboned.registry.answers import Answers
from backboned.registry.reference import Reference
from backboned.server.serving.drift import FEWEST, Drift
from backboned.server.serving.policy import Policy, VersionPolicy
from backboned.server.serving.rank import rank
from backboned.server.serving.recent import Recent
from backboned.server.serving.snapshot import KnownModel, KnownVersion, LoadedModel, Snapshot, State
from backboned.server.serving.tree import Answer

NEAR, FAR = torch.tensor(1.0), torch.tensor(9.0)
MIDDLING, UNSURE = torch.tensor([math.log(6), 0.0, 0.0]), torch.tensor([1.0, 1.0, 1.0])
"""Certainties of 0.75, and of a third."""

VALIDATED = Reference.of([0.5 + i / 200 for i in range(100)], [1.0] * 100)
ANSWERS = Answers(1.0, 0.5, 2.0, torch.zeros(1, 256).half(), torch.ones(256), VALIDATED)


class Desk:
    """What is recent of `flowers`, whose two versions are loaded and of which the first serves."""

    def __init__(self, *versions: LoadedModel) -> None:
        self.loaded = {model.manifest.version: model for model in versions}
        self.serve(1)
        self.recent = Recent(lambda: Snapshot(self.models))

    def serve(self, version: int) -> None:
        known = {v: KnownVersion(m.manifest, State.SERVING, loaded=m) for v, m in self.loaded.items()}
        self.model = KnownModel("flowers", known, Policy(VersionPolicy.PINNED, version))
        self.models = {"flowers": self.model}

    def answer(self, images: int, version: int = 1, logits: Tensor = MIDDLING, distance: Tensor | None = NEAR) -> None:
        model = self.loaded[version]
        self.recent.answered(model, rank(model, [Answer(logits, None, distance)] * images, 1))

    def drift(self) -> Drift:
        found = self.recent.drift(self.model)
        assert found is not None
        return found


@pytest.fixture
def desk(load: Callable[..., LoadedModel], make_network: Callable[..., nn.Module]) -> Desk:
    versions = [load(make_network(head=v), version=v) for v in (1, 2)]
    return Desk(*(replace(model, answers=ANSWERS) for model in versions))


def test_images_that_are_answered_count(desk: Desk) -> None:
    assert desk.drift() == Drift(0)
    desk.answer(FEWEST - 1)
    assert desk.drift() == Drift(FEWEST - 1)
    desk.answer(FEWEST + 1, logits=UNSURE, distance=FAR)
    found = desk.drift()
    assert (found.images, found.drifted) == (2 * FEWEST, True)
    assert (found.uncertain, found.unfamiliar) == pytest.approx((0.505, 0.505))
    assert found.confidence is not None and found.features is not None
    assert (found.confidence.distance, found.features.distance) == pytest.approx((0.505, 0.505), abs=0.05)
    kinds = {"confidence": found.confidence, "features": found.features}
    assert desk.recent.shifts() == {"flowers": {kind: (s.distance, s.by_chance) for kind, s in kinds.items()}}


def test_an_image_without_a_distance_does_not_count(desk: Desk) -> None:
    desk.answer(1, distance=None)
    assert desk.drift() == Drift(0)


def test_what_another_version_answers_does_not_count(desk: Desk) -> None:
    desk.answer(FEWEST, version=2)
    assert desk.drift() == Drift(0) and desk.recent.shifts() == {}


def test_each_version_begins_anew(desk: Desk) -> None:
    desk.answer(FEWEST)
    desk.serve(2)
    assert desk.drift() == Drift(0) and desk.recent.shifts() == {}, "the figures are of a version that serves no more"
    desk.answer(3, version=2)
    assert desk.drift().images == 3
    desk.serve(1)
    assert desk.drift() == Drift(0)


def test_a_checkpoint_that_is_loaded_again_goes_on(desk: Desk) -> None:
    desk.answer(3)
    desk.loaded[1] = replace(desk.loaded[1])
    desk.serve(1)
    desk.answer(4)
    assert desk.drift().images == 7


def test_a_better_epoch_of_the_same_version_begins_anew(desk: Desk) -> None:
    desk.answer(3)
    manifest = desk.loaded[1].manifest
    better = replace(manifest, epochs=(replace(manifest.best, sha256="b" * 64),))
    desk.loaded[1] = replace(desk.loaded[1], manifest=better)
    desk.serve(1)
    assert desk.drift() == Drift(0)
    desk.answer(4)
    assert desk.drift().images == 4


def test_a_model_that_is_gone_leaves_nothing(desk: Desk) -> None:
    desk.answer(FEWEST)
    desk.models = {}
    desk.answer(1)
    assert desk.recent.shifts() == {}
    desk.serve(2)
    desk.answer(1, version=2)
    assert desk.drift().images == 1


@pytest.mark.parametrize("answers", [None, replace(ANSWERS, reference=None)], ids=["none", "of before"])
def test_there_is_nothing_to_tell_without_a_reference(desk: Desk, answers: Answers | None) -> None:
    desk.loaded[1] = replace(desk.loaded[1], answers=answers)
    desk.serve(1)
    desk.answer(FEWEST)
    assert desk.recent.drift(desk.model) is None and desk.recent.shifts() == {}


def test_there_is_nothing_to_tell_while_nothing_serves(desk: Desk) -> None:
    assert desk.recent.drift(KnownModel("flowers", {})) is None
