"""The backbones that we ship, found by entry point as the daemon finds them."""

from dataclasses import replace

import pytest
import torch
import torchvision
from torch import nn

from backboned.plugins.digits import digits
from backboned.registry import Backbone, Catalogue, Preprocessing, check_backbone

CATALOGUE = Catalogue.from_entry_points()
NAMES = [name for name in CATALOGUE.names() if CATALOGUE.origin(name).startswith("backboned ")]
SMALL_IMAGES = Preprocessing(64, 64)

FAMILIES = {
    "vgg": [f"vgg{depth}{bn}" for depth in (11, 13, 16, 19) for bn in ("", "_bn")],
    "resnet": [
        *(f"resnet{depth}" for depth in (18, 34, 50, 101, 152)),
        *("wide_resnet50_2", "wide_resnet101_2", "resnext50_32x4d", "resnext101_32x8d", "resnext101_64x4d"),
    ],
    "mobilenet": ["mobilenet_v2", "mobilenet_v3_small", "mobilenet_v3_large"],
    "squeezenet": ["squeezenet1_0", "squeezenet1_1"],
    "efficientnet": [*(f"efficientnet_b{i}" for i in range(8)), *(f"efficientnet_v2_{size}" for size in "sml")],
    "convnext": [f"convnext_{size}" for size in ("tiny", "small", "base", "large")],
    "vit": ["vit_b_16"],
    "digits": ["digits"],
}


def test_every_plugin_is_found_and_none_is_broken() -> None:
    assert [b for b in CATALOGUE.broken if b.origin.startswith("backboned ")] == []
    assert sorted(NAMES) == sorted(name for family in FAMILIES.values() for name in family)
    assert "timm/" in [family.prefix for family in CATALOGUE.families]


@pytest.mark.parametrize("name", ["digits", "mobilenet_v2", "squeezenet1_1", "vit_b_16"])
def test_a_backbone_conforms_on_images_of_its_size(name: str) -> None:
    report = check_backbone(CATALOGUE.get(name))
    assert report.passed, str(report)


@pytest.mark.parametrize(
    "name",
    [
        *("vgg11_bn", "vgg19", "resnet18", "resnet50", "resnext50_32x4d", "mobilenet_v3_small", "mobilenet_v3_large"),
        *("squeezenet1_0", "efficientnet_b0", "efficientnet_v2_s", "convnext_tiny"),
    ],
)
def test_a_larger_backbone_conforms_on_small_images(name: str) -> None:
    report = check_backbone(replace(CATALOGUE.get(name), preprocessing=SMALL_IMAGES))
    assert report.passed, str(report)


@pytest.mark.parametrize("name", NAMES)
def test_each_key_of_a_backbone_has_one_stage_and_the_head_reads_the_features(name: str) -> None:
    backbone = CATALOGUE.get(name)
    model = backbone.module(device="meta")
    for key in model.state_dict():
        assert sum(stage.has(key) for stage in backbone.chain) == 1, key
    layer = model.get_submodule(backbone.head.layer)
    assert isinstance(layer, nn.Linear | nn.Conv2d)
    outputs, inputs = layer.weight.shape[:2]
    assert inputs == backbone.feature_size
    assert len(backbone.known_classes) in (0, outputs)


@pytest.mark.parametrize("name", NAMES)
def test_the_stages_of_a_backbone_call_every_layer_that_has_weights(name: str) -> None:
    backbone = CATALOGUE.get(name)
    model = backbone.module(device="meta").eval()
    layers = {path: m for path, m in model.named_modules() if m._parameters and not any(True for _ in m.children())}
    called: set[nn.Module] = set()
    for module in layers.values():
        module.register_forward_hook(lambda module, _args, _output: called.add(module))
    with torch.no_grad():
        x = torch.empty(2, *backbone.preprocessing.input_shape, device="meta")
        logits = backbone.forward(model, x)
    assert logits.shape == (2, len(backbone.known_classes) or 10)
    idle = [path for path, module in layers.items() if module not in called]
    assert [p for p in idle if not p.endswith("self_attention.out_proj")] == []  # attention reads its weights itself


def imagenet_backbones() -> list[Backbone]:
    return [CATALOGUE.get(name) for name in NAMES if name != "digits"]


def test_pretrained_backbones_know_their_weights_and_the_thousand_classes_of_imagenet() -> None:
    for backbone in imagenet_backbones():
        assert isinstance(backbone.weights, torchvision.models.WeightsEnum)
        assert len(backbone.known_classes) == 1000
        assert backbone.known_classes[207] == "golden retriever"


def test_preprocessing_is_that_of_the_weights() -> None:
    assert CATALOGUE.get("resnet50").preprocessing == Preprocessing(256, 224)
    b1 = CATALOGUE.get("efficientnet_b1").preprocessing
    assert (b1.resize_size, b1.crop_size, b1.interpolation) == (256, 240, "bicubic")
    assert CATALOGUE.get("efficientnet_v2_l").preprocessing.mean == (0.5, 0.5, 0.5)


def test_a_plain_torchvision_state_dict_is_that_of_the_backbone() -> None:
    ours = CATALOGUE.get("resnet18").module(device="meta").state_dict()
    with torch.device("meta"):
        theirs = torchvision.models.resnet18().state_dict()
    assert list(ours) == list(theirs)


def test_dropout_before_the_head_works_on_features_that_were_kept() -> None:
    for name in ("vgg11", "mobilenet_v2", "mobilenet_v3_small", "efficientnet_b0"):
        backbone = CATALOGUE.get(name)
        head = backbone.module(3, device="meta").to_empty(device="cpu").train()
        nn.init.ones_(head.get_parameter(f"{backbone.head.layer}.weight"))
        nn.init.zeros_(head.get_parameter(f"{backbone.head.layer}.bias"))
        features = torch.ones(4, backbone.feature_size)
        first, second = (backbone.head.forward(head, features) for _ in range(2))
        assert not torch.equal(first, second)
        assert torch.equal(features, torch.ones(4, backbone.feature_size)), "the kept features have changed"


def test_the_digits_backbone_is_very_small_and_comes_without_weights() -> None:
    backbone = digits()
    assert 50_000 < sum(p.numel() for p in backbone.module().parameters()) < 200_000
    assert backbone.weights is None
    assert any(isinstance(m, nn.BatchNorm2d) for m in backbone.module().modules())
