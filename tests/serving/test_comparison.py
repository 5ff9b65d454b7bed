"""What outcomes say of two versions: figures with intervals, and a verdict that may be asked for at any time."""

import random

import pytest

from backboned.server.serving.comparison import FEWEST, Score, Tally, Verdict


def tally(count: int, gain: float, seed: int, spread: float = 1.0) -> Tally:
    """Outcomes of a shadow whose loss is lower by `gain`, on average."""
    chance, found = random.Random(seed), Tally()
    for _ in range(count):
        loss = abs(chance.gauss(1.0, spread))
        found = found.plus(Score(loss + gain, chance.random() < 0.5), Score(loss + chance.gauss(0, spread), True))
    return found


def test_figures_are_those_of_the_scores() -> None:
    found = Tally()
    for loss, right in ((0.5, True), (1.5, False), (1.0, True), (1.0, True)):
        found = found.plus(Score(loss, right), Score(loss - 0.25, right=True))
    assert (found.serving.loss.value, found.shadow.loss.value, found.gain.value) == (1.0, 0.75, 0.25)
    assert (found.serving.accuracy.value, found.shadow.accuracy.value) == (0.75, 1.0)
    assert found.serving.accuracy.low == pytest.approx(0.3006, abs=1e-3)  # Wilson's, from a table
    assert found.serving.accuracy.high == pytest.approx(0.9544, abs=1e-3)
    assert found.serving.loss.low < 1.0 < found.serving.loss.high
    assert found.verdict is Verdict.OPEN, "four say nothing, however equal they are"


def test_an_outcome_of_one_version_alone_compares_nothing() -> None:
    found = Tally().plus(Score(1.0, right=True), None)
    assert (found.serving.count, found.shadow.count, found.verdict) == (1, 0, Verdict.OPEN)


@pytest.mark.parametrize(("gain", "verdict"), [(1.0, Verdict.BETTER), (-1.0, Verdict.WORSE)])
def test_a_clear_difference_is_seen_soon(gain: float, verdict: Verdict) -> None:
    assert tally(FEWEST - 1, gain, seed=1).verdict is Verdict.OPEN
    assert tally(2 * FEWEST, gain, seed=1).verdict is verdict


def test_a_small_difference_is_seen_in_time() -> None:
    assert tally(100, 0.1, seed=2).verdict is Verdict.OPEN
    assert tally(5000, 0.1, seed=2).verdict is Verdict.BETTER


def test_whoever_looks_after_each_outcome_is_seldom_misled() -> None:
    """Of equal versions, at most one in twenty may ever look different; looks at 95 % intervals mislead most."""
    misled = 0
    for seed in range(100):
        chance, found = random.Random(seed), Tally()
        for _ in range(600):
            loss = abs(chance.gauss(1, 1))
            found = found.plus(Score(loss, right=True), Score(loss + chance.gauss(0, 1), right=True))
            if found.verdict is not Verdict.OPEN:
                misled += 1
                break
    assert misled <= 5
