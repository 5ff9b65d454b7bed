"""What tests of the compute room share."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import nn

from backboned.plugins.digits import digits as make_digits_backbone
from backboned.registry import Backbone
from backboned.registry.weights import StageWeights
from backboned.server.compute.device import Device

MakeStages = Callable[..., dict[str, StageWeights]]


@pytest.fixture(scope="package", autouse=True)
def one_thread() -> Iterator[None]:
    """Small layers gain nothing from threads, and on a machine that is busy they wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def digits() -> Backbone:
    """The smallest backbone."""
    return make_digits_backbone()


@pytest.fixture(scope="session")
def cpu() -> Device:
    return Device.choose("cpu", "fp32")


@pytest.fixture(scope="session")
def make_network(digits: Backbone) -> Callable[..., nn.Module]:
    """Makes a `digits` network with weights drawn from a seed."""

    def make(classes: int = 3, seed: int = 0) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return digits.module(classes).eval()

    return make


@pytest.fixture(scope="session")
def stages_of(digits: Backbone) -> MakeStages:
    """The weights of a network by stage."""

    def split(network: nn.Module) -> dict[str, StageWeights]:
        return {name: StageWeights.of(tensors) for name, tensors in digits.split(network.state_dict()).items()}

    return split
