"""A model that can't answer is found before anyone asks it."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from backboned.registry import Backbone, BackbonedError, ErrorKind, Stage
from backboned.registry.task import Task
from backboned.registry.weights import StageWeights
from backboned.server.compute.canary import PHOTOS, Agreement, Canary, photos
from backboned.server.compute.device import Device
from backboned.server.compute.stages import LoadedStage, StageStore

MakeNetwork = Callable[..., nn.Module]
StagesOf = Callable[[nn.Module], dict[str, StageWeights]]


@pytest.fixture
def store(cpu: Device) -> StageStore:
    return StageStore(cpu)


@pytest.fixture
def canary(store: StageStore) -> Canary:
    return Canary(store)


@pytest.fixture
def load(
    digits: Backbone, store: StageStore, make_network: MakeNetwork, stages_of: StagesOf
) -> Callable[..., tuple[LoadedStage, ...]]:
    """Loads the path of a network, some of whose stages have other weights."""

    def load_path(seed: int = 0, **changes: Callable[[Tensor], Tensor]) -> tuple[LoadedStage, ...]:
        weights: dict[str, StageWeights] = stages_of(make_network(seed=seed))
        for name, change in changes.items():
            tensors: Mapping[str, Tensor] = weights[name].tensors
            weights[name] = StageWeights.of({k: change(t) if t.is_floating_point() else t for k, t in tensors.items()})
        return store.path(digits, weights)

    return load_path


Load = Callable[..., tuple[LoadedStage, ...]]


def overflowing(tensor: Tensor) -> Tensor:
    """Finite, and too large to compute with."""
    return torch.full_like(tensor, 3e38)


def refusal(canary: Canary, path: tuple[LoadedStage, ...], digits: Backbone) -> str:
    with pytest.raises(BackbonedError) as caught:
        canary.check(path, digits.preprocessing)
    assert caught.value.kind is ErrorKind.DATA_LOSS
    return caught.value.message


def test_a_good_model_passes(load: Load, digits: Backbone, canary: Canary) -> None:
    for seed in (0, 1, 0):
        canary.check(load(seed), digits.preprocessing)


def test_an_answer_that_is_not_finite_is_found(load: Load, digits: Backbone, canary: Canary) -> None:
    assert "is not finite" in refusal(canary, load(head=overflowing), digits)
    canary.check(load(), digits.preprocessing)


def test_a_model_that_says_the_same_of_every_image_is_found(load: Load, digits: Backbone, canary: Canary) -> None:
    assert "answers 4 test images alike" in refusal(canary, load(head=torch.zeros_like), digits)
    canary.check(load(head=lambda t: t * 1e-5), digits.preprocessing)  # small weights do look at them


def test_it_is_found_also_below_stages_that_are_known_to_be_good(load: Load, digits: Backbone, canary: Canary) -> None:
    good = load()
    canary.check(good, digits.preprocessing)
    bad = load(stem=overflowing)
    assert bad[1:] == good[1:]  # all but the stem is shared
    assert "is not finite" in refusal(canary, bad, digits)
    canary.check(good, digits.preprocessing)  # and throws no shadow on the others
    canary.check(load(head=lambda t: t + 1), digits.preprocessing)


def test_a_stage_that_does_not_run_is_told_by_name(load: Load, digits: Backbone, canary: Canary) -> None:
    stem, layer1, _, *rest = load()
    message = refusal(canary, (stem, layer1, *rest), digits)  # layer3 reads what layer2 gives
    assert message.startswith("stage 'layer3' of digits doesn't run: ")


def test_what_models_share_runs_once_for_each_size(load: Load, digits: Backbone, canary: Canary) -> None:
    calls: list[Any] = []

    def counted(stage: LoadedStage) -> LoadedStage:
        def forward(model: nn.Module, x: Tensor) -> Tensor:
            calls.append(stage.key[1])
            return stage(x)

        return LoadedStage(stage.key, Stage(stage.key[1], (), forward), nn.Module())

    body = tuple(counted(stage) for stage in load()[:-1])
    heads = [counted(load(seed)[-1]) for seed in range(3)]
    for head in heads:
        canary.check((*body, head), digits.preprocessing)
    assert sorted(calls) == sorted(["stem", "layer1", "layer2", "layer3", "pool", "head", "head", "head"])
    calls.clear()
    canary.check((*body, heads[0]), replace(digits.preprocessing, crop_size=32, resize_size=32))
    assert len(calls) == 6


Compare = Callable[..., Agreement]


@pytest.fixture
def compare(digits: Backbone, make_network: MakeNetwork, stages_of: StagesOf) -> Compare:
    """Holds a network, some of whose stages have other weights, against itself in float32."""

    def agreement(precision: str, **changes: Callable[[Tensor], Tensor]) -> Agreement:
        weights: dict[str, StageWeights] = stages_of(make_network())
        for name, change in changes.items():
            tensors: Mapping[str, Tensor] = weights[name].tensors
            weights[name] = StageWeights.of({k: change(t) if t.is_floating_point() else t for k, t in tensors.items()})
        store = StageStore(Device.choose("cpu", precision))
        path = store.path(digits, weights)
        return Canary(store).compare(path, digits.preprocessing, Task.SINGLE_LABEL, digits, weights)

    return agreement


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_in_reduced_precision_photos_are_answered_alike(compare: Compare, precision: str) -> None:
    agreement = compare(precision)
    assert (agreement.photos, agreement.same) == (PHOTOS, PHOTOS)
    assert 0 < agreement.deviation < 0.05 and agreement.close
    assert str(agreement).startswith("4 of 4 photos alike, probabilities within ")


def test_in_fp32_nothing_differs(compare: Compare) -> None:
    assert compare("fp32") == Agreement()


def test_what_overflows_in_reduced_precision_alone_is_not_close(compare: Compare) -> None:
    agreement = compare("fp16", stem=lambda tensor: tensor * 1e7)
    assert agreement.deviation == 1.0 and not agreement.close


def test_what_overflows_in_fp32_too_is_refused(compare: Compare) -> None:
    with pytest.raises(BackbonedError, match="is not finite"):
        compare("bf16", stem=overflowing)


def test_the_photos_are_real_and_always_the_same(digits: Backbone) -> None:
    views = photos(digits.preprocessing)
    assert views.shape == (PHOTOS, *digits.preprocessing.input_shape) and views.dtype == torch.uint8
    assert len({bytes(view.contiguous().numpy()) for view in views}) == PHOTOS
    neighbours = views.float().diff(dim=-1).abs().mean()
    assert neighbours < 40  # of noise it is 85
    photos.cache_clear()
    assert photos(digits.preprocessing).equal(views)
