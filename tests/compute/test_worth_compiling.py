"""Which stages are compiled, and for which sizes of batch."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from backboned.registry import Backbone
from backboned.registry.weights import StageWeights
from backboned.server.compute.compiler import next_size, worth_compiling
from backboned.server.compute.device import Device
from backboned.server.compute.stages import LoadedStage, StageStore, run_path

MakeNetwork = Callable[..., nn.Module]
StagesOf = Callable[[nn.Module], dict[str, StageWeights]]


def run(path: Sequence[LoadedStage]) -> None:
    with torch.inference_mode():
        run_path(path, torch.rand(2, 3, 16, 16))


def test_of_each_stage_the_one_that_most_models_stand_on_is_worth_it(
    digits: Backbone, cpu: Device, make_network: MakeNetwork, stages_of: StagesOf
) -> None:
    store = StageStore(cpu)
    common, rare = stages_of(make_network(seed=0)), stages_of(make_network(seed=1))
    paths = [
        store.path(digits, common),
        store.path(digits, {**common, "layer3": rare["layer3"], "head": rare["head"]}),
        store.path(digits, rare),
    ]
    for path in paths:
        run(path)
    chosen = worth_compiling(paths)
    assert chosen[0] is paths[0][0]
    assert {s.key.stage: s for s in chosen}.keys() == {"stem", "layer1", "layer2", "layer3"}  # no pool, no head
    assert all(s is paths[0][place] for s, place in zip(chosen[:3], (0, 1, 2), strict=True))
    assert chosen[3] is paths[1][3]  # the one that two models have
    twin = store.path(replace(digits, name="twin"), rare)
    run(twin)
    assert [s.key.backbone for s in worth_compiling([*paths, twin])].count("twin") == 4
    assert worth_compiling([]) == []


def test_what_was_never_called_is_not_worth_it_yet(
    digits: Backbone, cpu: Device, make_network: MakeNetwork, stages_of: StagesOf
) -> None:
    path = StageStore(cpu).path(digits, stages_of(make_network()))
    assert worth_compiling([path]) == []
    run(path[:2])
    assert worth_compiling([path]) == [path[0], path[1]]


Speed = Callable[[int], float]


def no_gain(size: int) -> float:
    return float(size)


def great_gain(size: int) -> float:
    return 1.0 + 0.001 * size


def gain_up_to_8(size: int) -> float:
    return 1.0 + 0.1 * size if size <= 8 else 1.8 / 8 * size


def sizes_compiled(speed: Speed, largest: int, *, heavy: bool = False) -> list[int]:
    seconds: dict[int, float] = {}
    while (size := next_size(seconds, largest, heavy=heavy)) is not None:
        seconds[size] = speed(size)
    return list(seconds)


@pytest.mark.parametrize(
    ("speed", "largest", "heavy", "expected"),
    [
        (no_gain, 32, False, [1, 8]),
        (no_gain, 1, False, [1]),
        (no_gain, 5, False, [1, 5]),
        (great_gain, 1, False, [1]),
        (great_gain, 2, False, [1, 2]),
        (great_gain, 3, False, [1, 3, 2]),
        (great_gain, 8, False, [1, 8, 4, 2]),
        (great_gain, 32, False, [1, 8, 4, 2, 16, 32]),
        (great_gain, 100, False, [1, 8, 4, 2, 16, 32, 64]),
        (great_gain, 32, True, [1, 8]),
        (great_gain, 5, True, [1, 5]),
        (gain_up_to_8, 32, False, [1, 8, 4, 2, 16]),
    ],
)
def test_sizes_are_compiled_as_long_as_they_pay(speed: Speed, largest: int, heavy: bool, expected: list[int]) -> None:
    assert sizes_compiled(speed, largest, heavy=heavy) == expected


@settings(deadline=None)
@given(largest=st.integers(1, 1024), heavy=st.booleans(), costs=st.lists(st.floats(1e-5, 10.0), min_size=12))
def test_whatever_is_measured_sizes_come_once_and_to_an_end(largest: int, heavy: bool, costs: list[float]) -> None:
    remaining = iter(costs)  # of a machine that is busy with other things
    seconds: dict[int, float] = {}
    while (size := next_size(seconds, largest, heavy=heavy)) is not None:
        assert 1 <= size <= largest and size not in seconds
        seconds[size] = next(remaining)
    assert {1, min(8, largest)} <= seconds.keys()
