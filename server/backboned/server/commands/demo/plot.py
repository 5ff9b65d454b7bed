"""The picture of the comparison."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from backboned.server.commands.demo.plain_training import Curve

TRANSFER = "#0072B2"
SCRATCH = "#D55E00"
GREY = "#666666"


def save_plot(
    transfer: Sequence[Curve], scratch: Sequence[Curve], images_a_class: int, held_out: int, file: Path
) -> None:
    """Validation curves beside the accuracy on held-out images, each seed a dot; as a PNG."""
    figure = Figure(figsize=(9.6, 4.2), dpi=150, layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    figure.suptitle(
        f"Digits 5-9 from {images_a_class} labelled images a class: pretrained and frozen, or from scratch",
        fontsize=11,
        fontweight="bold",
    )
    for curves, colour, name in (
        (transfer, TRANSFER, "frozen backbone, new head"),
        (scratch, SCRATCH, "same network from scratch"),
    ):
        _draw_curves(left, curves, colour, name)
    left.set(xlabel="epoch", ylabel="validation accuracy", ylim=(0, 1))
    left.legend(loc="lower right", frameon=False, fontsize=9)
    left.set_title(f"mean and range of {len(transfer)} seeds", fontsize=9, color=GREY)
    for place, (curves, colour) in enumerate(((transfer, TRANSFER), (scratch, SCRATCH))):
        _draw_dots(right, curves, colour, place)
    right.set(xlim=(-0.5, 1.75), ylim=(0, 1), ylabel="accuracy on held-out images")
    right.set_xticks([0, 1], ["frozen backbone,\nnew head", "same network\nfrom scratch"])
    right.set_title(f"{held_out} images, each seed a dot", fontsize=9, color=GREY)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#dddddd", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.axhline(0.2, color=GREY, linewidth=0.8, linestyle=":")
    right.annotate("guessing", (-0.45, 0.2), xytext=(0, 3), textcoords="offset points", fontsize=8, color=GREY)
    figure.savefig(file)


def _draw_curves(axes: Axes, curves: Sequence[Curve], colour: str, name: str) -> None:
    values = np.array([curve.val_accuracy for curve in curves])
    epochs = np.arange(1, values.shape[1] + 1)
    axes.fill_between(epochs, values.min(0), values.max(0), color=colour, alpha=0.15, linewidth=0)
    axes.plot(epochs, values.mean(0), color=colour, linewidth=2, label=name)
    axes.set_xticks(epochs[:: max(1, len(epochs) // 6)])


def _draw_dots(axes: Axes, curves: Sequence[Curve], colour: str, place: int) -> None:
    values = [curve.held_out_accuracy for curve in curves]
    mean = sum(values) / len(values)
    axes.plot([place - 0.18, place + 0.18], [mean, mean], color=colour, linewidth=2)
    axes.plot(np.linspace(place - 0.08, place + 0.08, len(values)), values, "o", color=colour, markersize=6, alpha=0.8)
    axes.annotate(
        f"{mean:.3f}",
        (place + 0.2, mean),
        va="center",
        xytext=(4, 0),
        textcoords="offset points",
        color=colour,
        fontweight="bold",
    )
