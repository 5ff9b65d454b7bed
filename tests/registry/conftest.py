"""What tests of the registry share: the installed backbones, and small networks."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import nn

from backboned.registry import Backbone, Catalogue
from backboned.registry.recognise import Recogniser
from backboned.registry.weights import seeded_state

MakeDigits = Callable[..., nn.Module]


@pytest.fixture(scope="package", autouse=True)
def one_thread() -> Iterator[None]:
    """Small layers gain nothing from threads, and on a machine that is busy they wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def catalogue() -> Catalogue:
    """All installed backbones."""
    return Catalogue.from_entry_points()


@pytest.fixture(scope="session")
def recogniser(catalogue: Catalogue) -> Recogniser:
    """One for all tests: it keeps what it has built."""
    return Recogniser(catalogue)


@pytest.fixture(scope="session")
def digits(catalogue: Catalogue) -> Backbone:
    """The smallest backbone."""
    return catalogue.get("digits")


@pytest.fixture(scope="session")
def make_digits(digits: Backbone) -> MakeDigits:
    """Makes a `digits` network: its body from one seed, its head, of so many classes, from another."""

    def make(classes: int = 10, *, body: int = 0, head: int = 0) -> nn.Module:
        network = digits.module(classes)
        state = {k: t for k, t in seeded_state(digits, body).items() if not k.startswith("fc.")}
        network.load_state_dict(state, strict=False)
        generator = torch.Generator().manual_seed(head)
        with torch.no_grad():
            for parameter in network.get_submodule("fc").parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
        return network.eval()

    return make
