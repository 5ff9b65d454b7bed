"""ConvNeXt (Liu et al. 2022, arXiv:2201.03545) from torchvision."""

from collections.abc import Iterator

from backboned.plugins.torchvision_backbone import numbered, torchvision_backbone
from backboned.registry import Backbone, Head, Stage, register

FEATURE_SIZES = {"convnext_tiny": 768, "convnext_small": 768, "convnext_base": 1024, "convnext_large": 1536}


@register
def convnext() -> Iterator[Backbone]:
    """ConvNeXt tiny, small, base and large; a downsampling belongs to the layer that it opens."""
    for name, feature_size in FEATURE_SIZES.items():
        yield torchvision_backbone(
            name,
            stages=(
                Stage.of("stem", "features.0"),
                Stage.of("layer1", "features.1"),
                *(Stage.of(f"layer{n}", *numbered("features", 2 * n - 2, 2 * n - 1)) for n in (2, 3, 4)),
                Stage.of("pool", "avgpool", "classifier.0", "classifier.1"),  # pool, layer norm, flatten
            ),
            head=Head.at("classifier.2"),
            feature_size=feature_size,
        )
