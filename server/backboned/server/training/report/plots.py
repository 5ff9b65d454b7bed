"""Plots as inline SVG, whose colours are the page's: no library, no script, nothing to fetch."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from backboned.server.training.judging import Bin
from backboned.server.training.report.markup import percent, text

_WIDTH, _HEIGHT = 460, 260
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 22, 14, 40


@dataclass(frozen=True)
class Series:
    """A curve: its name, its colour (`a` or `b`, as the page's style has them), and for each epoch a value or None."""

    name: str
    colour: str
    values: Sequence[float | None]


def curves(title: str, epochs: Sequence[int], series: Sequence[Series], *, best: int, unit: bool) -> str:
    """Values over epochs, with a line at the best one; `unit` for an axis 0…1 as per cent, else from 0 to the top."""
    known = [v for s in series for v in s.values if v is not None]
    if not known or not epochs:
        return ""
    low, high = (math.floor(min(known) * 10) / 10, 1.0) if unit else (0.0, max(known) * 1.05 or 1.0)
    if high - low < 1e-9:
        low = high - 1.0
    axes = _Axes(min(epochs), max(*epochs, min(epochs) + 1), low, high)
    marks = [axes.grid(_ticks(low, high), "{:.0%}" if unit else "{:.2g}"), axes.epochs(epochs)]
    x = axes.x(best)
    marks.append(f'<line class="best" x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP}" y2="{_HEIGHT - _BOTTOM}"/>')
    for each in series:
        points = [(axes.x(e), axes.y(v), e, v) for e, v in zip(epochs, each.values, strict=True) if v is not None]
        line = " ".join(f"{px:.1f},{py:.1f}" for px, py, _, _ in points)
        marks.append(f'<polyline class="line {each.colour}" points="{line}"/>')
        for px, py, epoch, value in points if len(points) <= 60 else ():
            told = f"{each.name}, epoch {epoch}: {percent(value) if unit else f'{value:.4f}'}"
            place = f'cx="{px:.1f}" cy="{py:.1f}" r="3"'
            marks.append(f'<circle class="dot {each.colour}" {place}><title>{text(told)}</title></circle>')
    legend = "".join(f'<span class="key {s.colour}">{text(s.name)}</span>' for s in series)
    ends = "; ".join(f"{s.name} ends at {v:.3g}" for s in series if (v := s.values[-1]) is not None)
    return _figure(
        title, f"{title} over {len(epochs)} epochs: {ends}", marks, f"{legend} · dashed: epoch {best}, the best"
    )


def reliability_diagram(bins: Sequence[Bin], error: float) -> str:
    """How often decisions are right, by the probability they were given; the bars would end on the diagonal."""
    axes = _Axes(0, 1, 0, 1)
    total, width = sum(b.count for b in bins), 1 / len(bins)
    marks = [axes.grid([0, 0.25, 0.5, 0.75, 1], "{:.0%}")]
    marks += [axes.below(v, f"{v:.0%}") for v in (0, 0.25, 0.5, 0.75, 1)]
    for i, each in enumerate(bins):
        if not each.count:
            continue
        x, top, base = axes.x(i * width) + 1, axes.y(each.accuracy), axes.y(0)
        share = 0.35 + 0.65 * math.sqrt(each.count / max(total, 1))
        told = f"{each.count} decisions at {percent(each.confidence)} on average: {percent(each.accuracy)} right"
        marks.append(
            f'<rect class="bar" x="{x:.1f}" y="{top:.1f}" width="{axes.x(width) - axes.x(0) - 2:.1f}" '
            f'height="{max(base - top, 1):.1f}" opacity="{share:.2f}"><title>{text(told)}</title></rect>'
            f'<line class="mean" x1="{x:.1f}" x2="{x + axes.x(width) - axes.x(0) - 2:.1f}" '
            f'y1="{axes.y(each.confidence):.1f}" y2="{axes.y(each.confidence):.1f}"/>'
        )
    marks.append(
        f'<line class="ideal" x1="{axes.x(0):.1f}" y1="{axes.y(0):.1f}" x2="{axes.x(1):.1f}" y2="{axes.y(1):.1f}"/>'
    )
    note = "bars: how often right (darker: more decisions) · short lines: the mean probability that was said"
    label = f"Reliability: expected calibration error {percent(error)} over {total} decisions"
    return _figure("right, by the probability said", label, marks, note)


class _Axes:
    """From values to places in the picture."""

    def __init__(self, left: float, right: float, low: float, high: float) -> None:
        self._left, self._right, self._low, self._high = left, right, low, high

    def x(self, value: float) -> float:
        return _LEFT + (value - self._left) / (self._right - self._left) * (_WIDTH - _LEFT - _RIGHT)

    def y(self, value: float) -> float:
        return _HEIGHT - _BOTTOM - (value - self._low) / (self._high - self._low) * (_HEIGHT - _TOP - _BOTTOM)

    def grid(self, ticks: Sequence[float], form: str) -> str:
        return "".join(
            f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{self.y(t):.1f}" y2="{self.y(t):.1f}"/>'
            f'<text class="tick" x="{_LEFT - 6}" y="{self.y(t) + 4:.1f}" text-anchor="end">{form.format(t)}</text>'
            for t in ticks
        )

    def epochs(self, epochs: Sequence[int]) -> str:
        step = max(1, math.ceil(len(epochs) / 12))
        return "".join(self.below(e, str(e)) for e in epochs[::step])

    def below(self, value: float, told: str) -> str:
        x, y = self.x(value), _HEIGHT - _BOTTOM + 18
        return f'<text class="tick" x="{x:.1f}" y="{y}" text-anchor="middle">{told}</text>'


def _ticks(low: float, high: float) -> list[float]:
    """Some four round values between two others."""
    rough = (high - low) / 4
    power = 10.0 ** math.floor(math.log10(rough))
    step = power * next(f for f in (1, 2, 2.5, 5, 10) if f * power >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, first + 12) if i * step <= high + 1e-9]


def _figure(title: str, label: str, marks: Sequence[str], note: str) -> str:
    return (
        f'<figure><figcaption>{text(title)}</figcaption><svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" '
        f'aria-label="{text(label)}">{"".join(marks)}</svg><p class="legend">{note}</p></figure>'
    )
