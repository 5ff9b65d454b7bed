"""Two versions side by side on the same images: how well each did, and whether one is better. Pure functions.

Outcomes come one by one, and whoever looks after each of them looks very often: an interval for one look would soon
exclude the truth by chance. The one for the difference holds at all times at once.
"""

import math
from dataclasses import dataclass, replace
from enum import Enum

LARGEST_LOSS = 10.0
"""Nothing counts for more: one label that is wrong itself must not outweigh all others."""

FEWEST = 50
"""With fewer outcomes nothing is decided."""

_ALPHA = 0.05
_SHARPEST_AT = 200.0
_NORMAL = 1.96


class Verdict(Enum):
    """What the outcomes say of the shadow."""

    OPEN = "open"
    BETTER = "better"
    WORSE = "worse"


@dataclass(frozen=True)
class Score:
    """How one version did with an image: its loss, and whether it was right."""

    loss: float
    right: bool


@dataclass(frozen=True)
class Interval:
    """A figure and its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Sums:
    """Of the scores of one version: how many, their losses and squared losses, and how many were right."""

    count: int = 0
    losses: float = 0.0
    squares: float = 0.0
    right: int = 0

    def plus(self, score: Score) -> "Sums":
        """With one more."""
        return Sums(
            self.count + 1, self.losses + score.loss, self.squares + score.loss**2, self.right + int(score.right)
        )

    @property
    def loss(self) -> Interval:
        """Their mean loss."""
        mean, deviation = _moments(self.count, self.losses, self.squares)
        half = _NORMAL * deviation / math.sqrt(self.count)
        return Interval(mean, max(0.0, mean - half), mean + half)

    @property
    def accuracy(self) -> Interval:
        """How many were right; Wilson's interval (1927)."""
        share, z = self.right / self.count, _NORMAL**2 / self.count
        middle = (share + z / 2) / (1 + z)
        half = math.sqrt(z * (share * (1 - share) + z / 4)) / (1 + z)
        return Interval(share, max(0.0, middle - half), min(1.0, middle + half))


@dataclass(frozen=True)
class Tally:
    """All outcomes of a serving version and its shadow, if it has one, since they have been side by side.

    `gains` and `gain_squares` are sums of the serving version's loss minus the shadow's on the same image. `answers`
    counts what both answered, with or without a known truth, and `agreements` how often their first class was one.
    """

    serving: Sums = Sums()
    shadow: Sums = Sums()
    gains: float = 0.0
    gain_squares: float = 0.0
    answers: int = 0
    agreements: int = 0

    def plus(self, serving: Score, shadow: Score | None) -> "Tally":
        """With one more outcome."""
        more = replace(self, serving=self.serving.plus(serving))
        if shadow is None:
            return more
        gain = serving.loss - shadow.loss
        return replace(
            more,
            shadow=self.shadow.plus(shadow),
            gains=self.gains + gain,
            gain_squares=self.gain_squares + gain**2,
        )

    @property
    def gain(self) -> Interval:
        """How much lower the shadow's loss is. The interval covers the truth at all times at once.

        An asymptotic confidence sequence (Waudby-Smith et al. 2021, arXiv:2103.06476), narrowest at 200 outcomes.
        """
        count = self.shadow.count
        mean, deviation = _moments(count, self.gains, self.gain_squares)
        spread = -2 * math.log(_ALPHA)
        rho = (spread + math.log(spread + 1)) / _SHARPEST_AT
        grown = count * rho + 1
        half = deviation * math.sqrt(2 * grown / (count**2 * rho) * math.log(math.sqrt(grown) / _ALPHA))
        return Interval(mean, mean - half, mean + half)

    @property
    def verdict(self) -> Verdict:
        """What is certain by now."""
        if self.shadow.count < FEWEST:
            return Verdict.OPEN
        gain = self.gain
        return Verdict.BETTER if gain.low > 0 else Verdict.WORSE if gain.high < 0 else Verdict.OPEN


def _moments(count: int, total: float, squares: float) -> tuple[float, float]:
    """Mean and standard deviation."""
    mean = total / count
    return mean, math.sqrt(max(0.0, squares / count - mean**2) * count / max(1, count - 1))
