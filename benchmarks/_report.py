"""The benchmark's results for people: a table and a picture."""

from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from benchmarks._bench import Found, Row, median, median_ratio

_CALLERS = (1, 8, 32)
_PERCENTILES = ("p50", "p95", "p99")
_RATE = "images_per_second"
_COLOURS = ("#3b6ea5", "#d98032", "#5b9a68", "#8a6fb0")


def table(rows: Sequence[Row], *, of: str) -> str:
    """The rows of one backbone, group by group."""
    lines: list[str] = []
    for group, members in groupby((r for r in rows if r.group.partition(",")[0] == of), key=lambda r: r.group):
        lines += ["", f"{group:<34}{'':>20}{'ratio':>8}{'wanted':>9}"]
        for row in members:
            digits = 2 if row.unit == "s" else 1
            value = f"{row.value:.{digits}f} {row.unit}"
            ratio = "" if row.ratio is None else f"{row.ratio:.3f}"
            lines.append(f"  {row.name:<32}{value:>20}{ratio:>8}{row.wanted:>9}  {row.note}".rstrip())
    return "\n".join(lines)


def plot(found: Found, environment: Mapping[str, Any], path: Path) -> None:
    """Draw what was measured; nothing where no part of it was."""
    throughput = _of(found, "throughput")
    served = {name: rounds for name, rounds in throughput.items() if "32 callers" in rounds}
    compared = {name: rounds for name, rounds in served.items() if "limit" in rounds}
    heads = {name: told["rounds"] for name, told in _of(found, "heads").items()}
    panels = [
        (draw, of)
        for draw, of in ((_fractions, compared), (_costs, compared), (_latencies, served), (_heads, heads))
        if of
    ]
    if not panels:
        return
    figure, axes = plt.subplots(1, len(panels), figsize=(4.6 * len(panels), 4.0), layout="constrained", squeeze=False)
    for axis, (draw, of) in zip(axes[0], panels, strict=True):
        draw(axis, of)
        axis.spines[["top", "right"]].set_visible(False)
    hardware = environment["gpu"] or f"{environment['cores']} cores, {environment['cpu']}"
    figure.suptitle(f"{hardware}; {environment['precision']}, torch {environment['torch']}", fontsize=9, color="0.4")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _of(found: Found, part: str) -> dict[str, Any]:
    """The measurements of a part, by backbone."""
    return {k.removeprefix(f"{part} "): m for k, m in found.measurements.items() if k.startswith(f"{part} ")}


def _fractions(axis: Axes, throughput: Mapping[str, Any]) -> None:
    """Images a second as a part of the limit."""
    width = 0.8 / len(throughput)
    for i, (backbone, rounds) in enumerate(throughput.items()):
        ratios = [median_ratio(rounds[f"{c} callers"], rounds["limit"], _RATE) for c in _CALLERS]
        at = [j + (i - (len(throughput) - 1) / 2) * width for j in range(len(_CALLERS))]
        limit = median(rounds["limit"], _RATE)
        bars = axis.bar(at, ratios, width * 0.95, color=_COLOURS[i], label=f"{backbone} (limit {limit:.0f} images/s)")
        axis.bar_label(bars, [f"{r:.2f}" for r in ratios], fontsize=8, padding=2)
    axis.axhline(1.0, color="0.5", linewidth=0.8, linestyle="--")
    axis.set_xticks(range(len(_CALLERS)), [str(c) for c in _CALLERS])
    axis.set(title="Throughput, of the limit", xlabel="callers", ylim=(0, 1.25))
    axis.legend(frameon=False, fontsize=8, loc="upper left")


def _costs(axis: Axes, throughput: Mapping[str, Any]) -> None:
    """Where the CPU's time goes, for one image."""
    names: list[str] = []
    for backbone, rounds in throughput.items():
        busy = rounds["32 callers"]
        each = [1e3 / (r["images_per_second"] * r["seconds"]) for r in busy]
        daemon = median([{"ms": r["daemon_cpu_seconds"] * e} for r, e in zip(busy, each, strict=True)], "ms")
        callers = median([{"ms": r["callers_cpu_seconds"] * e} for r, e in zip(busy, each, strict=True)], "ms")
        row = len(names)
        axis.barh(row, median(rounds["limit"], "cpu_ms_per_image"), color="0.7", label="" if row else "limit")
        axis.barh(row + 1, daemon, color=_COLOURS[0], label="" if row else "daemon")
        axis.barh(row + 1, callers, left=daemon, color=_COLOURS[1], label="" if row else "callers")
        names += [f"{backbone}\nlimit", f"{backbone}\n32 callers"]
    axis.set_yticks(range(len(names)), names, fontsize=8)
    axis.invert_yaxis()
    axis.set(title="CPU time of an image", xlabel="ms")
    axis.legend(frameon=False, fontsize=8)


def _latencies(axis: Axes, throughput: Mapping[str, Any]) -> None:
    """How long callers wait."""
    for i, (backbone, rounds) in enumerate(throughput.items()):
        for percentile, style in zip(_PERCENTILES, ("-", "--", ":"), strict=True):
            waits = [
                median([{"ms": r["latency_ms"]["OK"][percentile]} for r in rounds[f"{c} callers"]], "ms")
                for c in _CALLERS
            ]
            axis.plot(
                _CALLERS, waits, style, marker="o", markersize=3, color=_COLOURS[i], label=f"{backbone} {percentile}"
            )
    axis.set(title="Latency", xlabel="callers", ylabel="ms", xscale="log", yscale="log")
    axis.set_xticks(_CALLERS, [str(c) for c in _CALLERS])
    axis.minorticks_off()
    axis.legend(frameon=False, fontsize=8)


def _heads(axis: Axes, heads: Mapping[str, Any]) -> None:
    """Whether more heads cost anything."""
    for i, (backbone, found) in enumerate(heads.items()):
        first = next(iter(found))
        counts = [int(name.split()[0]) for name in found]
        ratios = [median_ratio(rounds, found[first], _RATE) for rounds in found.values()]
        axis.plot(counts, ratios, marker="o", color=_COLOURS[i], label=backbone)
    axis.axhline(1.0, color="0.5", linewidth=0.8, linestyle="--")
    axis.set(title="Throughput, of one head's", xlabel="heads, 32 callers", xscale="log", ylim=(0, 1.25))
    axis.legend(frameon=False, fontsize=8)
