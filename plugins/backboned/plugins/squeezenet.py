"""SqueezeNet (Iandola et al. 2016, arXiv:1602.07360) from torchvision; its head is a convolution."""

from collections.abc import Iterator

from backboned.plugins.torchvision_backbone import flatten, numbered, torchvision_backbone
from backboned.registry import Backbone, Head, Stage, register

LAYERS = {"squeezenet1_0": ((3, 6), (7, 11), (12, 12)), "squeezenet1_1": ((3, 5), (6, 8), (9, 12))}
"""The fire modules of one resolution, with the max pooling after them, as (first, last) index within `features`."""


@register
def squeezenet() -> Iterator[Backbone]:
    """SqueezeNet 1.0 and 1.1."""
    for name, layers in LAYERS.items():
        yield torchvision_backbone(
            name,
            stages=(
                Stage.of("stem", *numbered("features", 0, 2)),
                *(Stage.of(f"layer{n}", *numbered("features", *span)) for n, span in enumerate(layers, 1)),
            ),
            head=Head.at("classifier.1", *numbered("classifier", 0, 3), flatten),
            feature_size=512,
        )
