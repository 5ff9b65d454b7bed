"""The parts of the page that tell figures: the headline, curves, classes, confusion, and thresholds in words."""

import torch

from backboned.registry.task import Task
from backboned.server.training.calibration import right
from backboned.server.training.events import Judgement
from backboned.server.training.judging import confusion, reliability
from backboned.server.training.report.contents import Contents
from backboned.server.training.report.markup import SPACE, name, percent, section, table, text
from backboned.server.training.report.plots import Series, curves, reliability_diagram

DRAWN_CLASSES = 30
LISTED_PAIRS = 12
LISTED_CLASSES = 500
_SHORT_HEADINGS = 8


def headline(contents: Contents) -> str:
    """Tiles with the figures that matter most."""
    part, judged, _ = contents.shown
    tiles = [_accuracy_tile(f"accuracy on {judged.images} {part} images", judged, main=True)]
    if part == "test":
        validation = contents.evaluation.validation
        tiles.append(_accuracy_tile(f"accuracy on {validation.images} validation images", validation, main=False))
    tiles.append(_tile(percent(judged.majority_accuracy), "by always guessing", "the most frequent answer"))
    tiles.append(_tile(percent(judged.calibration_error), "calibration error", "how far probabilities are off"))
    return f'<div class="tiles">{"".join(tiles)}</div>'


def training_curves(contents: Contents) -> str:
    """Loss and accuracy over epochs, and the same as a table."""
    manifest = contents.manifest
    records = sorted(manifest.epochs, key=lambda e: e.epoch)
    epochs, metrics = [e.epoch for e in records], [e.metrics for e in records]
    plots = []
    for what, unit in (("loss", False), ("accuracy", True)):
        series = [
            Series(told, colour, [getattr(m, f"{kind}_{what}") for m in metrics])
            for told, kind, colour in (("training", "train", "a"), ("validation", "val", "b"))
        ]
        plots.append(curves(what, epochs, series, best=manifest.best_epoch, unit=unit))
    rows = [
        [
            str(e.epoch),
            *("" if v is None else f"{v:.4f}" for v in (m.train_loss, m.val_loss, m.train_accuracy, m.val_accuracy)),
        ]
        for e, m in zip(records, metrics, strict=True)
    ]
    columns = ["epoch", ">training loss", ">validation loss", ">training accuracy", ">validation accuracy"]
    values = table(columns, rows, caption="Losses are means an image; before calibration.")
    return section(
        "How it learnt",
        f'<div class="pair">{"".join(plots)}</div><details><summary>as a table</summary>{values}</details>',
        note=f"Epoch {manifest.best_epoch}, whose validation loss is the lowest, is the one that serves.",
    )


def trust(contents: Contents) -> str:
    """What probabilities are worth, and what the thresholds do."""
    part, judgement, judged = contents.shown
    answers, task = contents.answers, contents.task
    probabilities = contents.probabilities(judged)
    is_right = right(task, probabilities, judged.outputs.targets)
    far = answers.distances(judged.outputs.features) > answers.unfamiliar_beyond
    doubted = (task.certainty(probabilities) < answers.uncertain_below) | far
    kept = is_right[~doubted]
    certainty = "the certainty about its least certain label" if task is Task.MULTI_LABEL else "its highest probability"
    marked = (
        f"Of the {part} images {percent(_mean(doubted))} are so marked: {percent(_mean(doubted[~is_right]))} of the "
        f"wrong answers, {percent(_mean(doubted[is_right]))} of the right ones."
    )
    if task is Task.MULTI_LABEL:
        marked += " An answer is wrong here if it is wrong about any label."
    left = f" Of the answers that are left, {percent(_mean(kept))} are right." if len(kept) else ""
    words = [
        f"<p><b>Temperature {answers.temperature:.3f}.</b> Logits are divided by it, "
        f"{_tempered(answers.temperature)}</p>",
        f"<p><b>Uncertain below {percent(answers.uncertain_below)}.</b> An answer is marked <i>uncertain</i> if "
        f"{certainty} is below that, or if its image is unfamiliar. {marked}{left}</p>",
        f"<p><b>Unfamiliar beyond {answers.unfamiliar_beyond:.3f}.</b> An image is marked <i>unfamiliar</i> if its "
        "features lie further than that from those of every class, in standard deviations a value: it may show "
        f"something else altogether. Of the {part} images that is {percent(_mean(far))}.</p>",
    ]
    diagram = reliability_diagram(reliability(task, probabilities, judged.outputs.targets), judgement.calibration_error)
    return section(
        "What a probability is worth", f'<div class="pair"><div>{diagram}</div><div>{"".join(words)}</div></div>'
    )


def class_table(contents: Contents) -> str:
    """Precision and recall of each class."""
    part, judgement, _ = contents.shown
    classes = judgement.classes
    if len(classes) > DRAWN_CLASSES:  # the weakest first
        classes = tuple(sorted(classes, key=lambda c: c.precision + c.recall))
    rows = [[name(c.label), str(c.images), _meter(c.precision), _meter(c.recall)] for c in classes[:LISTED_CLASSES]]
    left = len(classes) - len(rows)
    return section(
        "Class by class",
        table(["class", ">images", "precision", "recall"], rows, caption=f"Of the {part} images.", kind="wide"),
        f"<p>The other {left} classes are in evaluation.json.</p>" if left > 0 else "",
        note="Precision: of those said to be of it, how many are. Recall: of those that are, how many were said to be.",
    )


def confusions(contents: Contents) -> str:
    """The confusion matrix, if it can be drawn, and the pairs that are confused most."""
    if contents.task is Task.MULTI_LABEL:
        return ""
    part, _, judged = contents.shown
    counts = confusion(contents.task, contents.probabilities(judged), judged.outputs.targets)
    classes = contents.manifest.classes
    drawn = _matrix(classes, counts.tolist(), part) if len(classes) <= DRAWN_CLASSES else ""
    wrong = counts.clone().fill_diagonal_(0).flatten()
    values, places = wrong.topk(min(LISTED_PAIRS, len(wrong)))
    pairs = [
        [name(classes[at // len(classes)]), name(classes[at % len(classes)]), str(count)]
        for count, at in zip(values.tolist(), places.tolist(), strict=True)
        if count
    ]
    listed = table(["is", "was said to be", ">images"], pairs, caption="Confused most often.") if pairs else ""
    nothing = "" if pairs else "<p>Nothing was confused.</p>"
    side_by_side = "pair" if drawn and len(classes) <= _SHORT_HEADINGS else "stack"
    return section("What is confused with what", f'<div class="{side_by_side}">{drawn}{listed}{nothing}</div>')


def _matrix(classes: tuple[str, ...], counts: list[list[int]], part: str) -> str:
    kind = ' class="long"' if len(classes) > _SHORT_HEADINGS or max(map(len, classes)) > _SHORT_HEADINGS + 4 else ""
    head = "".join(f'<th scope="col">{name(c)}</th>' for c in classes)
    rows = []
    for i, (label, row) in enumerate(zip(classes, counts, strict=True)):
        total = max(sum(row), 1)
        cells = "".join(_cell(count, count / total, i == k) for k, count in enumerate(row))
        rows.append(f'<tr><th scope="row">{name(label)}</th>{cells}</tr>')
    caption = f"Rows: what the {part} images are. Columns: what they were said to be."
    return (
        f'<div class="scroll whole" tabindex="0"><table class="matrix"><caption>{caption}</caption>'
        f"<thead><tr{kind}><td></td>{head}</tr>"
        f"</thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def _cell(count: int, share: float, hit: bool) -> str:
    kinds = " ".join(k for k, holds in (("hit", hit), ("full", share > 0.6)) if holds)
    return f'<td class="{kinds}" style="--share:{share:.2f}">{count or "·"}</td>'


def _accuracy_tile(told: str, judgement: Judgement, *, main: bool) -> str:
    interval = f"95{SPACE}% interval: {percent(judgement.accuracy_low)} to {percent(judgement.accuracy_high)}"
    return _tile(percent(judgement.accuracy), told, interval, kind="tile main" if main else "tile")


def _tile(value: str, told: str, small: str, kind: str = "tile") -> str:
    return f'<div class="{kind}"><b>{value}</b><span>{text(told)}</span><small>{text(small)}</small></div>'


def _tempered(temperature: float) -> str:
    if temperature > 1.02:
        return "since the version was too sure of itself: probabilities are drawn towards each other."
    if temperature < 0.98:
        return "since the version was less sure of itself than it could be: probabilities are drawn apart."
    return "which changes next to nothing: its probabilities were right as they were, or too few images tell."


def _meter(part: float) -> str:
    return f'<span class="meter"><i style="width:{100 * part:.0f}%"></i></span>{percent(part)}'


def _mean(flags: torch.Tensor) -> float:
    return flags.double().mean().item() if len(flags) else 0.0
