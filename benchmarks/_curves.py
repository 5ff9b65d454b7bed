"""The training benchmark's picture: validation accuracy over wall time."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from benchmarks._bench import Found

_COLOURS = {"tutorial": "#8a6fb0", "good": "#d98032"}
_OURS = ("#3b6ea5", "#2f9e9e", "#5b9a68", "#1d4e79")


def plot(found: Found, environment: Mapping[str, Any], path: Path) -> None:
    """Draw each backbone's runs; nothing where there are none."""
    panels = {
        name: _curves(part) for name, part in found.measurements.items() if name.startswith(("speed", "accuracy"))
    }
    if not panels:
        return
    figure, axes = plt.subplots(1, len(panels), figsize=(4.6 * len(panels), 4.0), layout="constrained", squeeze=False)
    for axis, (name, curves) in zip(axes[0], panels.items(), strict=True):
        _draw(axis, name, curves)
    hardware = f"{environment['cores']} cores, {environment['cpu']}"
    figure.suptitle(f"{hardware}; {environment['precision']}, torch {environment['torch']}", fontsize=9, color="0.4")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _curves(part: Mapping[str, Any]) -> dict[str, list[dict[str, float]]]:
    """Epochs by who made them: of the first round, or of each way to train."""
    rounds = part.get("rounds")
    runs = {name: told[0] for name, told in rounds.items()} if rounds else dict(part)
    if rounds:
        runs["ours, again"] = runs["ours"]["second"]
    return {name: told["epochs"] for name, told in runs.items() if told["epochs"]}


def _draw(axis: Axes, name: str, curves: Mapping[str, list[dict[str, float]]]) -> None:
    ours = iter(_OURS)
    for who, epochs in curves.items():
        colour = _COLOURS.get(who) or next(ours)
        at, accuracy = ([e[key] for e in epochs] for key in ("seconds", "val_accuracy"))
        axis.plot(at, [100 * a for a in accuracy], marker="o", markersize=3, color=colour, label=who)
    axis.set(title=name.partition(" ")[2], xlabel="seconds", ylabel="validation accuracy, %", xscale="log")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=8, loc="lower right")
