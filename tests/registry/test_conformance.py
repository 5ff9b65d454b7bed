"""Each way in which a plugin can be wrong is found by the check that is named for it, and by no exception."""

from collections.abc import Callable
from dataclasses import replace
from typing import NoReturn

import pytest
import torch
from torch import Tensor, nn

from backboned.registry import Backbone, Head, Preprocessing, Stage, assert_conformant, check_backbone


class Net(nn.Module):
    """A small network whose parts a test may replace."""

    def __init__(self, **parts: nn.Module) -> None:
        super().__init__()
        self.stem = parts.get("stem", nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()))
        self.layer = parts.get("layer", nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU()))
        self.pool = parts.get("pool", nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()))
        self.fc = parts.get("fc", nn.Linear(8, 10))

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.fc(self.pool(self.layer(self.stem(x))))
        return logits


GOOD = Backbone(
    name="good",
    build=Net,
    stages=(Stage.of("stem", "stem"), Stage.of("layer", "layer"), Stage.of("pool", "pool")),
    head=Head.at("fc"),
    feature_size=8,
    preprocessing=Preprocessing(16, 16),
)


def failures(backbone: Backbone) -> dict[str, str]:
    return {check.name: check.detail for check in check_backbone(backbone).checks if not check.passed}


def with_stage(name: str, forward: Callable[[nn.Module, Tensor], Tensor]) -> Backbone:
    return replace(GOOD, stages=tuple(replace(s, forward=forward) if s.name == name else s for s in GOOD.stages))


def part(model: nn.Module, path: str) -> nn.Module:
    return model.get_submodule(path)


class Apply(nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[[Tensor], object]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> object:
        return self.function(x)


class Offset(nn.Module):
    """Adds a buffer that its state_dict leaves out."""

    offset: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("offset", torch.ones(1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.offset


class Counting(nn.Module):
    """Counts what it saw in a buffer, in eval mode too."""

    seen: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        self.seen += len(x)
        return x


def broken_build() -> NoReturn:
    raise RuntimeError("no such layer")


def unused_parameter() -> nn.Module:
    net = Net()
    net.layer.register_parameter("spare", nn.Parameter(torch.zeros(3)))
    return net


def tied_head() -> nn.Module:
    net = Net(layer=nn.Sequential(nn.Conv2d(8, 8, 1), Apply(lambda x: x)))
    net.pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 8, bias=False))
    net.fc = nn.Linear(8, 8)
    net.fc.weight = net.pool[2].weight  # type: ignore[assignment]  # a Sequential's items have no type
    return net


def test_a_good_backbone_passes_every_check() -> None:
    report = check_backbone(GOOD)
    assert report.passed
    assert len(report.checks) == 11
    assert all(check.detail for check in report.checks)
    assert "'good' conforms" in str(report)


def test_the_same_seed_gives_the_same_report_and_torch_keeps_its_random_state() -> None:
    before = torch.random.get_rng_state()
    assert check_backbone(GOOD, seed=5) == check_backbone(GOOD, seed=5)
    assert torch.equal(torch.random.get_rng_state(), before)


WRONG = [
    (replace(GOOD, build=broken_build), "builds", "RuntimeError: no such layer"),
    (replace(GOOD, stages=(Stage.of("stem", "steam"), *GOOD.stages[1:])), "builds", "steam"),
    (replace(GOOD, stages=GOOD.stages[1:]), "keys", "stem.0.weight must belong to exactly one stage"),
    (replace(GOOD, head=Head("head", ("fc", "layer"), GOOD.head.forward, "fc")), "keys", "['layer', 'head']"),
    (replace(GOOD, build=lambda: Net(layer=Offset())), "buffers", "layer.offset"),
    (replace(GOOD, preprocessing=Preprocessing(2, 2)), "preprocessing", "RuntimeError"),
    (replace(GOOD, known_classes=("cat", "dog")), "preprocessing", "2 names for 10 logits"),
    (replace(GOOD, build=lambda: Net(fc=Apply(lambda x: x / 0))), "preprocessing", "not finite"),
    (replace(GOOD, build=lambda: Net(fc=Apply(lambda x: (x, x)))), "preprocessing", "got tuple"),
    (with_stage("layer", lambda _, x: x), "composition", "differ by up to"),
    (with_stage("layer", lambda m, x: part(m, "layer")(x.mul_(2))), "composition", "stage layer changes its input"),
    (replace(GOOD, stages=(*GOOD.stages[:2], Stage.of("pool"))), "composition", "Error"),
    (replace(GOOD, feature_size=9), "features", "must get features [2, 9], gets [2, 8]"),
    (with_stage("pool", lambda m, x: part(m, "pool")(x)[:1]), "batch sizes", "for one image"),
    (replace(GOOD, build=lambda: Net(fc=nn.Bilinear(8, 8, 10))), "head", "must be a Linear or a Conv2d"),
    (replace(GOOD, head=Head("head", ("fc",), lambda m, x: part(m, "fc")(x)[:, :2], "fc")), "head", "[2, 2]"),
    (with_stage("layer", lambda m, x: part(m, "layer")(part(m, "stem.2")(x))), "pruned stages", "stem"),
    (replace(GOOD, build=lambda: Net(layer=Counting())), "frozen stages", "changed the frozen stage layer"),
    (replace(GOOD, build=tied_head), "frozen stages", "changed the frozen stage pool: ['pool.2.weight']"),
    (with_stage("layer", lambda m, x: part(m, "layer")(x.detach())), "trainable stages", "no gradient reaches"),
    (replace(GOOD, build=unused_parameter), "trainable stages", "layer.spare"),
]


@pytest.mark.parametrize(("backbone", "check", "detail"), WRONG)
def test_what_is_wrong_is_reported_by_its_check(backbone: Backbone, check: str, detail: str) -> None:
    assert detail in failures(backbone)[check]


def test_a_stage_that_works_in_place_only_in_train_mode_is_reported() -> None:
    net = with_stage("layer", lambda m, x: m.get_submodule("layer")(x.mul_(2) if m.training else x))
    assert set(failures(net)) == {"trainable stages"}


def test_a_zero_initialised_branch_hides_no_missing_stage() -> None:
    class Branch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gain = nn.Parameter(torch.zeros(1))

        def forward(self, x: Tensor) -> Tensor:
            return x + self.gain * x

    skipped = replace(with_stage("layer", lambda _, x: x), build=lambda: Net(layer=Branch()))
    assert "composition" in failures(skipped)


def test_a_backbone_that_does_not_build_is_checked_no_further() -> None:
    assert len(check_backbone(replace(GOOD, build=broken_build)).checks) == 1


def test_a_plugins_own_test_fails_with_a_line_for_each_check() -> None:
    assert_conformant(GOOD)
    with pytest.raises(AssertionError, match=r"(?s)'good' does not conform\n.*\nFAILED  features: ") as caught:
        assert_conformant(replace(GOOD, feature_size=9))
    assert "ok      keys: " in str(caught.value)
