"""Equal stages are one object, on a device, as long as somebody holds it."""

import gc
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from backboned.registry import Backbone, BackbonedError, Head, Stage
from backboned.registry.weights import StageWeights
from backboned.server.compute.device import Device
from backboned.server.compute.stages import LoadedStage, StageStore, Templates, run_path

MakeNetwork = Callable[..., nn.Module]
StagesOf = Callable[[nn.Module], dict[str, StageWeights]]

IMAGES = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def run(path: tuple[LoadedStage, ...], x: Tensor = IMAGES) -> Tensor:
    with torch.inference_mode():
        return run_path(path, x)


def answers(network: nn.Module) -> Tensor:
    with torch.inference_mode():
        return torch.as_tensor(network(IMAGES))


@pytest.mark.parametrize("classes", [1, 3, 10])
def test_a_path_answers_as_the_whole_network(
    digits: Backbone, cpu: Device, make_network: MakeNetwork, stages_of: StagesOf, classes: int
) -> None:
    network = make_network(classes)
    assert run(StageStore(cpu).path(digits, stages_of(network))).equal(answers(network))


@pytest.fixture
def without_collector() -> Iterator[None]:
    """What a daemon has made before it is ready is out of the collector's sight for ever."""
    gc.disable()
    yield
    gc.enable()


def test_equal_weights_are_one_object_and_others_are_not(
    digits: Backbone, cpu: Device, make_network: MakeNetwork, stages_of: StagesOf
) -> None:
    store = StageStore(cpu)
    first, again = (store.path(digits, stages_of(make_network(seed=0))) for _ in range(2))
    assert all(a is b for a, b in zip(first, again, strict=True))
    mixed = stages_of(make_network(seed=0)) | {"head": stages_of(make_network(seed=1))["head"]}
    other = store.path(digits, mixed)
    assert [a is b for a, b in zip(first, other, strict=True)] == [True] * 5 + [False]
    twin = store.path(replace(digits, name="twin"), stages_of(make_network(seed=0)))
    assert not any(a is b for a, b in zip(first, twin, strict=True))  # another backbone may run them otherwise


def test_a_stage_goes_with_its_last_holder_and_no_collector_is_wanted_for_that(
    digits: Backbone, cpu: Device, make_network: MakeNetwork, stages_of: StagesOf, without_collector: None
) -> None:
    store = StageStore(cpu)
    one = store.path(digits, stages_of(make_network(seed=0)))
    two = store.path(digits, stages_of(make_network(seed=0)) | {"head": stages_of(make_network(seed=1))["head"]})
    assert store.loaded() == (7, sum(s.size_bytes for s in {*one, *two}))
    del one
    assert store.loaded() == (6, sum(s.size_bytes for s in two))
    del two
    assert store.loaded() == (0, 0)


def test_on_the_cpu_in_fp32_the_weights_are_not_copied(
    digits: Backbone, cpu: Device, make_network: MakeNetwork, stages_of: StagesOf
) -> None:
    weights = stages_of(make_network())
    path = StageStore(cpu).path(digits, weights)
    before = run(path)
    weights["head"].tensors["fc.bias"].add_(1.0)
    torch.testing.assert_close(run(path), before + 1.0)
    assert path[0].size_bytes == sum(t.nbytes for t in weights["stem"].tensors.values())


def test_in_bf16_the_weights_take_half_the_memory_and_answer_nearly_the_same(
    digits: Backbone, make_network: MakeNetwork, stages_of: StagesOf
) -> None:
    network = make_network()
    path = StageStore(Device.choose("cpu", "bf16")).path(digits, stages_of(network))
    found = run(path, IMAGES.bfloat16())
    assert found.dtype == torch.float32  # of the head
    assert path[0](IMAGES).dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), answers(network), atol=0.05, rtol=0.05)
    exact = StageStore(Device.choose("cpu", "fp32")).path(digits, stages_of(network))
    assert all(
        half.size_bytes <= 0.6 * full.size_bytes
        for half, full in zip(path[:-1], exact, strict=False)
        if full.size_bytes
    )
    assert path[-1].size_bytes == 4 * (256 * 3 + 3)


def test_counters_of_batches_may_be_missing_or_there(
    digits: Backbone, cpu: Device, make_network: MakeNetwork, stages_of: StagesOf
) -> None:
    network = make_network()
    state = {k: t for k, t in network.state_dict().items() if not k.endswith("num_batches_tracked")}
    without = {n: StageWeights.of(t) for n, t in digits.split(state).items()}
    store = StageStore(cpu)
    assert run(store.path(digits, without)).equal(answers(network))
    assert store.path(digits, without)[0] is store.path(digits, stages_of(network))[0]


def test_it_is_frozen_and_in_eval_mode(
    digits: Backbone, cpu: Device, make_network: MakeNetwork, stages_of: StagesOf
) -> None:
    path = StageStore(cpu).path(digits, stages_of(make_network()))
    torch.manual_seed(0)
    x = torch.rand(4, 3, 16, 16)
    alone = torch.cat([run(path, row[None]) for row in x])
    torch.testing.assert_close(run(path, x), alone)  # BatchNorm that learns from its batch would tell the difference
    assert not run_path(path, x.requires_grad_(False)).requires_grad


def test_missing_tensors_are_told(digits: Backbone, make_network: MakeNetwork, stages_of: StagesOf) -> None:
    stem = dict(stages_of(make_network())["stem"].tensors)
    del stem["stem.0.0.weight"]
    with pytest.raises(BackbonedError, match=r"stage 'stem' of digits lacks \['stem.0.0.weight'\]"):
        Templates().fill(digits, digits.stages[0], stem)


class Windowed(nn.Module):
    """A network with a buffer that is in no state_dict, as some have for positions or windows."""

    def __init__(self, num_classes: int = 2) -> None:
        super().__init__()
        self.body = nn.Module()
        self.body.register_buffer("window", torch.tensor([1.0, 2.0, 3.0]), persistent=False)
        self.fc = nn.Linear(3, num_classes)


def windowed(model: nn.Module, x: Tensor) -> Tensor:
    return x.mean((2, 3)) * torch.as_tensor(model.get_submodule("body").window)


def test_a_buffer_that_no_state_dict_holds_has_its_value(cpu: Device) -> None:
    backbone = Backbone("windowed", Windowed, (Stage("body", ("body",), windowed),), Head.at("fc"), 3)
    network = Windowed()
    weights = {n: StageWeights.of(t) for n, t in backbone.split(network.state_dict()).items()}
    found = run(StageStore(cpu).path(backbone, weights))
    with torch.inference_mode():
        expected = network.fc(IMAGES.mean((2, 3)) * torch.tensor([1.0, 2.0, 3.0]))
    torch.testing.assert_close(found, expected)


def test_many_threads_load_and_count_at_once(
    digits: Backbone, cpu: Device, make_network: MakeNetwork, stages_of: StagesOf
) -> None:
    store = StageStore(cpu)
    body = stages_of(make_network())

    def load(i: int) -> tuple[LoadedStage, ...]:
        bias = torch.full((3,), float(i % 10))
        head: Mapping[str, Tensor] = {"fc.weight": body["head"].tensors["fc.weight"], "fc.bias": bias}
        store.loaded()
        return store.path(digits, body | {"head": StageWeights.of(head)})

    with ThreadPoolExecutor(8) as pool:
        paths = list(pool.map(load, range(80)))
    assert len({id(stage) for path in paths for stage in path}) == 5 + 10
    assert store.loaded()[0] == 15
