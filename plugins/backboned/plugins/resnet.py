"""ResNet (He et al. 2015, arXiv:1512.03385), Wide ResNet and ResNeXt from torchvision."""

from collections.abc import Iterator

from backboned.plugins.torchvision_backbone import flatten, torchvision_backbone
from backboned.registry import Backbone, Head, Stage, register

FEATURE_SIZES = {
    "resnet18": 512,
    "resnet34": 512,
    "resnet50": 2048,
    "resnet101": 2048,
    "resnet152": 2048,
    "wide_resnet50_2": 2048,
    "wide_resnet101_2": 2048,
    "resnext50_32x4d": 2048,
    "resnext101_32x8d": 2048,
    "resnext101_64x4d": 2048,
}


@register
def resnet() -> Iterator[Backbone]:
    """All of torchvision's residual networks: one chain, different blocks."""
    for name, feature_size in FEATURE_SIZES.items():
        yield torchvision_backbone(
            name,
            stages=(
                Stage.of("stem", "conv1", "bn1", "relu", "maxpool"),
                *(Stage.of(layer, layer) for layer in ("layer1", "layer2", "layer3", "layer4")),
                Stage.of("pool", "avgpool", flatten),
            ),
            head=Head.at("fc"),
            feature_size=feature_size,
        )
