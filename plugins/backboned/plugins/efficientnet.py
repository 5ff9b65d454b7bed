"""EfficientNet (Tan and Le 2019, arXiv:1905.11946) and EfficientNetV2 (2021, arXiv:2104.00298) from torchvision."""

from collections.abc import Iterator

from backboned.plugins.torchvision_backbone import flatten, torchvision_backbone
from backboned.registry import Backbone, Head, Stage, register

SIZES = {
    "efficientnet_b0": (7, 1280),
    "efficientnet_b1": (7, 1280),
    "efficientnet_b2": (7, 1408),
    "efficientnet_b3": (7, 1536),
    "efficientnet_b4": (7, 1792),
    "efficientnet_b5": (7, 2048),
    "efficientnet_b6": (7, 2304),
    "efficientnet_b7": (7, 2560),
    "efficientnet_v2_s": (6, 1280),
    "efficientnet_v2_m": (7, 1280),
    "efficientnet_v2_l": (7, 1280),
}
"""The number of layers and the feature size of each."""


@register
def efficientnet() -> Iterator[Backbone]:
    """EfficientNet B0–B7 and V2 S, M, L."""
    for name, (layers, feature_size) in SIZES.items():
        yield torchvision_backbone(
            name,
            stages=(
                Stage.of("stem", "features.0"),
                *(Stage.of(f"layer{n}", f"features.{n}") for n in range(1, layers + 1)),
                Stage.of("conv", f"features.{layers + 1}"),
                Stage.of("pool", "avgpool", flatten),
            ),
            head=Head.at("classifier.1", "classifier.0", "classifier.1"),
            feature_size=feature_size,
        )
