import pytest
import torch
from torch import Tensor, nn

from backboned.registry import Catalogue
from backboned.registry.backbone import Backbone, Head
from backboned.server.compute.stages import Templates
from backboned.server.training.heads.stacked import StackedHeads

OUTPUTS, HEADS = 3, 4
READS_FIRST_AND_LINEAR = {
    "digits": (True, True),
    "resnet18": (True, True),
    "mobilenet_v2": (True, True),
    "mobilenet_v3_small": (True, True),
    "vgg11": (True, True),
    "squeezenet1_1": (True, False),  # a convolution, then a ReLU and the mean over positions
}


def backbone_of(name: str) -> Backbone:
    return Catalogue.installed().get(name)


def features_of(backbone: Backbone) -> Tensor:
    positions = (5, 5) if backbone.name.startswith("squeezenet") else ()
    return torch.randn(6, backbone.feature_size, *positions, generator=torch.Generator().manual_seed(0))


def tensors_of(backbone: Backbone, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    kernel = (1, 1) if backbone.name.startswith("squeezenet") else ()
    layer = backbone.head.layer
    return {
        f"{layer}.weight": torch.randn(OUTPUTS, backbone.feature_size, *kernel, generator=generator) / 10,
        f"{layer}.bias": torch.randn(OUTPUTS, generator=generator),
    }


def stacked_of(backbone: Backbone) -> StackedHeads:
    module = Templates().fill(backbone, backbone.head, tensors_of(backbone, 99))
    return StackedHeads(backbone.head, module, features_of(backbone))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", READS_FIRST_AND_LINEAR)
def test_heads_at_once_give_what_they_give_one_by_one(name: str, training: bool) -> None:
    backbone = backbone_of(name)
    features, each = features_of(backbone), [tensors_of(backbone, seed) for seed in range(HEADS)]
    stacked = {k: torch.stack([tensors[k] for tensors in each]) for k in each[0]}
    heads = stacked_of(backbone)
    torch.manual_seed(7)
    together = heads.logits(stacked, features, training=training)
    for tensors, logits in zip(each, together, strict=True):
        module = Templates().fill(backbone, backbone.head, tensors).train(training)
        torch.manual_seed(7)  # dropout: all heads drop the same
        torch.testing.assert_close(backbone.head.forward(module, features), logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", READS_FIRST_AND_LINEAR)
def test_it_is_seen_whether_features_may_be_scaled_and_whether_the_head_is_linear(name: str) -> None:
    backbone = backbone_of(name)
    heads = stacked_of(backbone)
    assert (heads.reads_first, heads.is_linear) == READS_FIRST_AND_LINEAR[name]


class ReluFirst(nn.Module):
    def __init__(self, channels: int, kernel: int | None) -> None:
        super().__init__()
        self.relu = nn.ReLU() if kernel is None else nn.Identity()
        self.fc = nn.Linear(channels, OUTPUTS) if kernel is None else nn.Conv2d(channels, OUTPUTS, kernel, padding=1)


@pytest.mark.parametrize(("kernel", "shape"), [(None, (4, 5)), (3, (4, 5, 6, 6))], ids=["a ReLU", "a padded kernel"])
def test_features_are_left_alone_below(kernel: int | None, shape: tuple[int, ...]) -> None:
    head = Head.at("fc", "relu", "fc")
    heads = StackedHeads(head, ReluFirst(5, kernel), torch.randn(shape))
    assert not heads.reads_first
    assert not heads.is_linear


def test_a_layer_behind_which_features_are_dropped_is_not_all_there_is() -> None:
    class DropsLast(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(5, OUTPUTS)
            self.drop = nn.Dropout(0.5)

    heads = StackedHeads(Head.at("fc", "fc", "drop"), DropsLast(), torch.randn(8, 5))
    assert heads.reads_first
    assert not heads.is_linear


def test_gradients_reach_every_head() -> None:
    backbone = backbone_of("resnet18")
    layer = backbone.head.layer
    each = [tensors_of(backbone, seed) for seed in range(HEADS)]
    stacked = {k: torch.stack([tensors[k] for tensors in each]).requires_grad_() for k in each[0]}
    features = features_of(backbone)
    logits = stacked_of(backbone).logits(stacked, features)
    (logits * torch.arange(HEADS)[:, None, None]).sum().backward()
    gradient = stacked[f"{layer}.weight"].grad
    assert gradient is not None
    for head in range(HEADS):
        torch.testing.assert_close(gradient[head], (head * features.sum(0)).expand(OUTPUTS, -1), atol=1e-4, rtol=1e-4)
