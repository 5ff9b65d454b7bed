"""VGG (Simonyan and Zisserman 2014, arXiv:1409.1556), with and without batch normalisation, from torchvision."""

from collections.abc import Iterator

from backboned.plugins.torchvision_backbone import flatten, numbered, torchvision_backbone
from backboned.registry import Backbone, Head, Stage, register

CONVOLUTIONS = {11: (1, 1, 2, 2, 2), 13: (2, 2, 2, 2, 2), 16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}
"""How many convolutions each of the five blocks has, by depth."""


@register
def vgg() -> Iterator[Backbone]:
    """VGG-11, 13, 16 and 19; a dropout opens the stage after it, so that it works on cached features too."""
    for depth, convolutions in CONVOLUTIONS.items():
        for suffix, layers in (("", 2), ("_bn", 3)):  # convolution, (batch normalisation,) ReLU
            yield torchvision_backbone(
                f"vgg{depth}{suffix}",
                stages=(
                    *_blocks([n * layers + 1 for n in convolutions]),  # and a max pooling
                    Stage.of("pool", "avgpool", flatten),
                    Stage.of("fc1", "classifier.0", "classifier.1"),
                    Stage.of("fc2", "classifier.2", "classifier.3", "classifier.4"),
                ),
                head=Head.at("classifier.6", "classifier.5", "classifier.6"),
                feature_size=4096,
            )


def _blocks(sizes: list[int]) -> Iterator[Stage]:
    first = 0
    for number, size in enumerate(sizes, 1):
        yield Stage.of(f"block{number}", *numbered("features", first, first + size - 1))
        first += size
