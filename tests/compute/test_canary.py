"""A model that can't answer is found before anyone asks it."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from backboned.registry import Backbone, BackbonedError, ErrorKind, Stage
from backboned.registry.weights import StageWeights
from backboned.server.compute.canary import Canary
from backboned.server.compute.device import Device
from backboned.server.compute.stages import LoadedStage, StageStore

MakeNetwork = Callable[..., nn.Module]
StagesOf = Callable[[nn.Module], dict[str, StageWeights]]


@pytest.fixture
def load(
    digits: Backbone, cpu: Device, make_network: MakeNetwork, stages_of: StagesOf
) -> Callable[..., tuple[LoadedStage, ...]]:
    """Loads the path of a network, some of whose stages have other weights."""
    store = StageStore(cpu)

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


def refusal(canary: Canary, path: tuple[LoadedStage, ...], digits: Backbone, cpu: Device) -> str:
    with pytest.raises(BackbonedError) as caught:
        canary.check(path, digits.preprocessing, cpu)
    assert caught.value.kind is ErrorKind.DATA_LOSS
    return caught.value.message


def test_a_good_model_passes(load: Load, digits: Backbone, cpu: Device) -> None:
    canary = Canary()
    for seed in (0, 1, 0):
        canary.check(load(seed), digits.preprocessing, cpu)


def test_an_answer_that_is_not_finite_is_found(load: Load, digits: Backbone, cpu: Device) -> None:
    canary = Canary()
    assert "is not finite" in refusal(canary, load(head=overflowing), digits, cpu)
    canary.check(load(), digits.preprocessing, cpu)


def test_it_is_found_also_below_stages_that_are_known_to_be_good(load: Load, digits: Backbone, cpu: Device) -> None:
    canary = Canary()
    good = load()
    canary.check(good, digits.preprocessing, cpu)
    bad = load(stem=overflowing)
    assert bad[1:] == good[1:]  # all but the stem is shared
    assert "is not finite" in refusal(canary, bad, digits, cpu)
    canary.check(good, digits.preprocessing, cpu)  # and throws no shadow on the others
    canary.check(load(head=lambda t: t + 1), digits.preprocessing, cpu)


def test_a_stage_that_does_not_run_is_told_by_name(load: Load, digits: Backbone, cpu: Device) -> None:
    stem, layer1, _, *rest = load()
    message = refusal(Canary(), (stem, layer1, *rest), digits, cpu)  # layer3 reads what layer2 gives
    assert message.startswith("stage 'layer3' of digits doesn't run: ")


def test_what_models_share_runs_once_for_each_size(load: Load, digits: Backbone, cpu: Device) -> None:
    calls: list[Any] = []

    def counted(stage: LoadedStage) -> LoadedStage:
        def forward(model: nn.Module, x: Tensor) -> Tensor:
            calls.append(stage.key[1])
            return stage(x)

        return LoadedStage(stage.key, Stage(stage.key[1], (), forward), nn.Module())

    body = tuple(counted(stage) for stage in load()[:-1])
    heads = [counted(load(seed)[-1]) for seed in range(3)]
    canary = Canary()
    for head in heads:
        canary.check((*body, head), digits.preprocessing, cpu)
    assert sorted(calls) == sorted(["stem", "layer1", "layer2", "layer3", "pool", "head", "head", "head"])
    calls.clear()
    canary.check((*body, heads[0]), replace(digits.preprocessing, crop_size=32, resize_size=32), cpu)
    assert len(calls) == 6


def test_it_looks_at_the_device_in_its_precision(
    digits: Backbone, make_network: MakeNetwork, stages_of: StagesOf
) -> None:
    half = Device.choose("cpu", "bf16")
    Canary().check(StageStore(half).path(digits, stages_of(make_network())), digits.preprocessing, half)
    assert torch.get_default_dtype() == torch.float32
