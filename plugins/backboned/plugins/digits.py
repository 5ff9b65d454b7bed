"""A very small residual network for very small images, such as scikit-learn's 8×8 handwritten digits.

It comes without weights: pretrain it on what you have. An epoch over 1,000 images takes half a second on one core.
"""

from torch import Tensor, nn

from backboned.registry import Backbone, Head, Preprocessing, Stage, register

WIDTHS = (16, 32, 64)
INPUT_SIZE = 16
POOLED_SIZE = 2
"""Features keep a 2×2 grid: where a stroke is tells digits apart, so new digits need fewer images."""


@register
def digits() -> Backbone:
    """The residual network `DigitsNet`, seen as 16×16 RGB."""
    return Backbone(
        name="digits",
        build=DigitsNet,
        stages=tuple(Stage.of(name, name) for name in ("stem", "layer1", "layer2", "layer3", "pool")),
        head=Head.at("fc"),
        feature_size=WIDTHS[-1] * POOLED_SIZE**2,
        preprocessing=Preprocessing(INPUT_SIZE, INPUT_SIZE, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)),
        description="a residual network of 80 thousand parameters for very small images; pretrain it yourself",
    )


class DigitsNet(nn.Module):
    """`[batch, 3, 16, 16]` → `[batch, num_classes]`, by three residual blocks."""

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        first, second, third = WIDTHS
        self.stem = nn.Sequential(_convolution(3, first, 3), nn.ReLU())
        self.layer1 = ResidualBlock(first, first)
        self.layer2 = ResidualBlock(first, second, stride=2)
        self.layer3 = ResidualBlock(second, third, stride=2)
        self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(POOLED_SIZE), nn.Flatten())
        self.fc = nn.Linear(third * POOLED_SIZE**2, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Images to logits."""
        features = self.pool(self.layer3(self.layer2(self.layer1(self.stem(x)))))
        logits: Tensor = self.fc(features)
        return logits


class ResidualBlock(nn.Module):
    """Two 3×3 convolutions beside a shortcut (He et al. 2015, arXiv:1512.03385)."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.body = nn.Sequential(
            _convolution(inputs, outputs, 3, stride), nn.ReLU(), _convolution(outputs, outputs, 3)
        )
        same = inputs == outputs and stride == 1
        self.shortcut = nn.Identity() if same else _convolution(inputs, outputs, 1, stride)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """`[batch, inputs, h, w]` → `[batch, outputs, h / stride, w / stride]`."""
        y: Tensor = self.relu(self.body(x) + self.shortcut(x))
        return y


def _convolution(inputs: int, outputs: int, size: int, stride: int = 1) -> nn.Sequential:
    convolution = nn.Conv2d(inputs, outputs, size, stride, padding=size // 2, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs))
