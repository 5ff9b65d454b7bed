"""ShuffleNet v2 (Ma et al. 2018, arXiv:1807.11164) as a backbone."""

from torch import Tensor
from torchvision.models import ShuffleNet_V2_X1_0_Weights, shufflenet_v2_x1_0

from backboned.registry import Backbone, Head, Preprocessing, Stage, register


@register
def shufflenet() -> Backbone:
    """A description of torchvision's own module: which of its parts run in which order, and which one is the head."""
    weights = ShuffleNet_V2_X1_0_Weights.IMAGENET1K_V1
    return Backbone(
        name="shufflenet_v2_x1_0",
        build=shufflenet_v2_x1_0,
        stages=(
            Stage.of("stem", "conv1", "maxpool"),
            Stage.of("stage2", "stage2"),
            Stage.of("stage3", "stage3"),
            Stage.of("stage4", "stage4"),
            Stage.of("pool", "conv5", global_average),
        ),
        head=Head.at("fc"),
        feature_size=1024,
        preprocessing=Preprocessing.from_torchvision(weights.transforms()),
        weights=weights,
        description="ShuffleNet v2, 2.3 M parameters",
        known_classes=tuple(weights.meta["categories"]),
    )


def global_average(x: Tensor) -> Tensor:
    """`[batch, channels, height, width]` → `[batch, channels]`: a step without weights may be any function."""
    return x.mean([2, 3])
