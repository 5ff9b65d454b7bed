import pytest
import torch
from torch import Tensor, nn

from backboned.registry import Backbone, BackbonedError, Head, Preprocessing, Stage
from backboned.registry.backbone import prune


class TinyNet(nn.Module):
    """A network with a bare parameter, a BatchNorm and a dropout that works in place."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((1,), 2.0))
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.classifier = nn.Sequential(nn.Dropout(0.5, inplace=True), nn.Linear(4, 10))

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.classifier(self.body(x * self.scale))
        return logits


def scale(model: nn.Module, x: Tensor) -> Tensor:
    return x * model.get_parameter("scale")


def tiny(**changes: object) -> Backbone:
    values: dict[str, object] = {
        "name": "tiny",
        "build": TinyNet,
        "stages": (Stage("scale", ("scale",), scale), Stage.of("body", "body.0", "body.1", "body.2", "body.3")),
        "head": Head.at("classifier.1", "classifier.0", "classifier.1"),
        "feature_size": 4,
        "preprocessing": Preprocessing(16, 16),
    }
    return Backbone(**(values | changes))  # type: ignore[arg-type]  # some are wrong on purpose


def test_stages_and_head_compose_to_the_module() -> None:
    backbone = tiny()
    model = backbone.module().eval()
    x = torch.randn(2, 3, 16, 16)
    assert torch.equal(backbone.forward(model, x), model(x))


def test_split_gives_every_key_to_one_stage_in_the_order_of_the_chain() -> None:
    state = tiny().module().state_dict()
    parts = tiny().split(state)
    assert list(parts) == ["scale", "body", "head"]
    assert list(parts["scale"]) == ["scale"]
    assert sorted(parts["head"]) == ["classifier.1.bias", "classifier.1.weight"]
    assert sum(len(tensors) for tensors in parts.values()) == len(state)


def test_split_names_a_key_that_no_stage_owns() -> None:
    with pytest.raises(BackbonedError, match=r"no stage of tiny owns: bodyguard\.0\.weight"):
        tiny().split({"bodyguard.0.weight": torch.zeros(1)})


def test_the_head_is_replaced_for_another_number_of_classes() -> None:
    model = tiny().module(3)
    assert model(torch.randn(2, 3, 16, 16)).shape == (2, 3)


def test_a_convolutional_head_is_replaced_with_its_geometry() -> None:
    backbone = tiny(build=lambda: nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 10, 3, padding=1, bias=False)),
                    stages=(Stage.of("stem", "0"),), head=Head.at("1"), feature_size=8)  # fmt: skip
    layer = backbone.module(5).get_submodule("1")
    assert isinstance(layer, nn.Conv2d)
    assert (layer.out_channels, layer.kernel_size, layer.padding, layer.bias) == (5, (3, 3), (1, 1), None)


def test_a_head_layer_of_another_kind_is_refused() -> None:
    with pytest.raises(BackbonedError, match=r"'body\.1' must be a Linear or a Conv2d, got BatchNorm2d"):
        tiny(head=Head.at("body.1")).module(3)


def test_on_the_meta_device_nothing_is_allocated() -> None:
    model = tiny().module(7, device="meta")
    assert all(t.is_meta for t in model.state_dict().values())


def test_the_module_that_opens_a_stage_never_works_in_place() -> None:
    backbone = tiny()
    model = backbone.module().train()
    features = torch.ones(8, 4)
    backbone.head.forward(model, features)
    assert torch.equal(features, torch.ones(8, 4))


def test_a_pruned_module_has_the_keys_of_its_stage_and_gives_the_same() -> None:
    backbone = tiny()
    model = backbone.module().eval()
    x = torch.randn(2, 3, 16, 16)
    for stage, tensors in zip(backbone.chain, backbone.split(model.state_dict()).values(), strict=True):
        alone = prune(backbone.module(device="meta"), stage).eval()
        alone.load_state_dict(tensors, assign=True)
        assert set(alone.state_dict()) == set(tensors)
        expected = stage.forward(model, x)
        assert torch.equal(stage.forward(alone, x), expected)
        x = expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": ""}, "needs a name"),
        ({"stages": ()}, "needs a name and stages"),
        ({"stages": (Stage.of("a", "body"), Stage.of("a", "scale"))}, "distinct names"),
        ({"stages": (Stage.of("head", "body"),)}, "distinct names"),
        ({"stages": (Stage.of("all", "body"),)}, "can't be named 'all'"),
    ],
)
def test_a_backbone_without_distinct_names_is_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(BackbonedError, match=message):
        tiny(**changes)


def test_a_stage_owns_what_lies_below_its_prefix_and_nothing_that_only_begins_alike() -> None:
    stage = Stage.of("layer1", "layer1")
    assert stage.keys(["layer1.0.weight", "layer10.weight", "layer1", "layer2.bias"]) == ["layer1.0.weight", "layer1"]


def test_preprocessing_survives_plain_values() -> None:
    preprocessing = Preprocessing(40, 32, (0.1, 0.2, 0.3), (1.0, 2.0, 3.0), "bicubic")
    assert Preprocessing.from_dict(preprocessing.to_dict()) == preprocessing


@pytest.mark.parametrize(
    "change",
    [{"mean": [0.5]}, {"interpolation": "magic"}, {"crop_size": 0}, {"std": [1, 0, 1]}, {"resize_size": None}],
)
def test_malformed_preprocessing_is_refused(change: dict[str, object]) -> None:
    with pytest.raises(BackbonedError, match="preprocessing"):
        Preprocessing.from_dict(Preprocessing().to_dict() | change)
