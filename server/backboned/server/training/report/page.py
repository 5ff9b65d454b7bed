"""The page: one HTML file with everything in it, no script, and nothing to fetch."""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from backboned.server.training.events import DatasetReport
from backboned.server.training.report import figures
from backboned.server.training.report.contents import Contents
from backboned.server.training.report.markup import name, percent, section, table, text
from backboned.server.training.report.photos import Mistake, Photo
from backboned.server.training.report.style import STYLE

LISTED_FILES = 20
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
_TASKS = {"single_label": "one of", "binary": "yes or no:", "multi_label": "any of"}


def page(contents: Contents) -> str:
    """The report as HTML."""
    manifest = contents.manifest
    title = f"{manifest.model} version {manifest.version}"
    body = [
        f"<h1>{text(title)}</h1>",
        f'<p class="note">{_subtitle(contents)}</p>',
        figures.headline(contents),
        _caveat(contents),
        figures.training_curves(contents),
        figures.trust(contents),
        figures.confusions(contents),
        figures.class_table(contents),
        _photos(contents),
        _dataset(contents.dataset),
        _options(contents),
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{text(title)}: how good it is</title><style>{STYLE}</style></head>\n<body><main>"
        + "\n".join(filter(None, body))
        + "\n</main></body></html>\n"
    )


def _subtitle(contents: Contents) -> str:
    manifest = contents.manifest
    classes = ", ".join(name(c) for c in manifest.classes[:8])
    more = f" and {len(manifest.classes) - 8} more" if len(manifest.classes) > 8 else ""
    made = datetime.fromtimestamp(manifest.best.create_time, UTC).strftime("%Y-%m-%d %H:%M UTC")
    return f"{text(manifest.backbone)} · tells {_TASKS[manifest.task.value]} {classes}{more} · {made}"


def _caveat(contents: Contents) -> str:
    if contents.evaluation.test is not None:
        return ""
    return (
        '<p class="note">The images that validate have chosen the epoch and the thresholds, so these figures are a '
        "little better than the truth. Hold some back to test (options.test_fraction, or a folder test/) to know."
        "</p>"
    )


def _photos(contents: Contents) -> str:
    if not contents.mistakes:
        return section("Where it is most wrong", "<p>No answer was wrong.</p>")
    count = len(contents.photos)
    of = f"The {count} worst of {contents.mistakes}" if count < contents.mistakes else f"All {count}"
    shown = f"{of} wrong answers." if count else f"{contents.mistakes} answers are wrong; no photo of them can be read."
    figures_ = "".join(map(_photo, contents.photos))
    return section("Where it is most wrong", f'<div class="photos">{figures_}</div>', note=shown)


def _photo(photo: Photo) -> str:
    mistake = photo.mistake
    said, true = _labels(mistake.said), _labels(mistake.true)
    alternative = f"Shows {_plain(mistake.true)}, was said to be {_plain(mistake.said)}"
    return (
        f'<figure><img src="{photo.uri}" alt="{text(alternative)}" loading="lazy"><figcaption>'
        f'said <span class="said">{said}</span><br>is <span class="true">{true}</span><br>'
        f'<span class="path">{_where(mistake)}</span></figcaption></figure>'
    )


def _labels(labels: Sequence[tuple[str, float]]) -> str:
    return ", ".join(f"{name(label)} {percent(p, 0)}" for label, p in labels) or "nothing"


def _plain(labels: Sequence[tuple[str, float]]) -> str:
    return ", ".join(label for label, _ in labels) or "nothing"


def _where(mistake: Mistake) -> str:
    return f"{name(mistake.path)} ({text(mistake.part)})"


def _dataset(report: DatasetReport | None) -> str:
    if report is None:
        return ""
    warnings = "".join(f"<li>{text(w)}</li>" for w in report.warnings)
    rows = [
        [name(c.label), str(c.train_images), str(c.validation_images), str(c.test_images)]
        for c in report.classes[: figures.LISTED_CLASSES]
    ]
    rows.append(["all", str(report.train_images), str(report.validation_images), str(report.test_images)])
    counts = table(["class", ">train", ">validation", ">test"], rows, caption="Images.")
    return section(
        "What it was trained on",
        f'<ul class="warnings">{warnings}</ul>' if warnings else "",
        counts,
        _files(
            "images that could not be read",
            report.unreadable_count,
            [f"{f.path}: {f.reason}" for f in report.unreadable],
        ),
        _files("files that were skipped", report.skipped_count, [f"{f.path}: {f.reason}" for f in report.skipped]),
        _files(
            "images that show the same",
            report.duplicates_count,
            [" = ".join(d.paths) + (" (labels differ)" if d.labels_differ else "") for d in report.duplicates],
        ),
    )


def _files(what: str, count: int, told: Sequence[str]) -> str:
    if not count:
        return ""
    items = "".join(f"<li>{text(t)}</li>" for t in told[:LISTED_FILES])
    more = f"<li>… {count - LISTED_FILES} more</li>" if count > LISTED_FILES else ""
    return f"<details><summary>{text(what)}: {count}</summary><ul>{items}{more}</ul></details>"


def _options(contents: Contents) -> str:
    manifest = contents.manifest
    told: dict[str, Any] = {"backbone": manifest.backbone, "stages in the checkpoint": ", ".join(manifest.trained)}
    told |= {f"dataset {k}".replace("_", " "): v for k, v in manifest.dataset.items()}
    told |= {k.replace("_", " "): v for k, v in manifest.options.items()}
    told |= {f"version of {k}": v for k, v in manifest.versions.items()}
    return section("How it was trained", _list(told))


def _list(values: Mapping[str, Any]) -> str:
    shown = {k: ", ".join(map(str, v)) if isinstance(v, list | tuple) else v for k, v in values.items()}
    items = "".join(f"<dt>{text(k)}</dt><dd>{text(v)}</dd>" for k, v in shown.items() if v not in (None, ""))
    return f"<dl>{items}</dl>"
