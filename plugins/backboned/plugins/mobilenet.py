"""MobileNet v2 (Sandler et al. 2018, arXiv:1801.04381) and v3 (Howard et al. 2019, arXiv:1905.02244), from torchvision.

The inverted residuals of one resolution or width make a stage.
"""

from collections.abc import Iterator

from backboned.plugins.torchvision_backbone import average_pool, flatten, numbered, torchvision_backbone
from backboned.registry import Backbone, Head, Stage, register

V2_LAYERS = ((1, 1), (2, 3), (4, 6), (7, 10), (11, 13), (14, 16), (17, 17))
V3_LAYERS = {
    "mobilenet_v3_small": (1024, ((1, 1), (2, 3), (4, 6), (7, 8), (9, 11))),
    "mobilenet_v3_large": (1280, ((1, 1), (2, 3), (4, 6), (7, 10), (11, 12), (13, 15))),
}


@register
def mobilenet_v2() -> Backbone:
    """MobileNet v2."""
    return torchvision_backbone(
        "mobilenet_v2",
        stages=(*_features(V2_LAYERS), Stage.of("pool", average_pool)),
        head=Head.at("classifier.1", "classifier.0", "classifier.1"),
        feature_size=1280,
    )


@register
def mobilenet_v3() -> Iterator[Backbone]:
    """MobileNet v3, small and large; `fc` is the hidden layer of its classifier."""
    for name, (feature_size, layers) in V3_LAYERS.items():
        yield torchvision_backbone(
            name,
            stages=(
                *_features(layers),
                Stage.of("pool", "avgpool", flatten),
                Stage.of("fc", "classifier.0", "classifier.1"),
            ),
            head=Head.at("classifier.3", "classifier.2", "classifier.3"),
            feature_size=feature_size,
        )


def _features(layers: tuple[tuple[int, int], ...]) -> Iterator[Stage]:
    """The stem, the `layers` as (first, last) index within `features`, and the convolution that follows them."""
    yield Stage.of("stem", "features.0")
    for number, (first, last) in enumerate(layers, 1):
        yield Stage.of(f"layer{number}", *numbered("features", first, last))
    yield Stage.of("conv", f"features.{layers[-1][1] + 1}")
