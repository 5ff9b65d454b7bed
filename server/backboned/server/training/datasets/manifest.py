"""`labels.csv` and `labels.jsonl`: a line an image, with its labels and perhaps its part."""

import csv
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from io import StringIO
from pathlib import PurePosixPath
from typing import Any

from backboned.registry.task import Task
from backboned.server.training.datasets.samples import PARTS, Found, Sample, not_an_image, unusable
from backboned.server.training.datasets.sources import Presence, Source, is_text
from backboned.server.training.events import SkippedFile

NAMES = ("labels.csv", "labels.jsonl")
ENDINGS = (".csv", ".jsonl")
SEPARATOR = "|"
_SHOWN = 3


@dataclass(frozen=True)
class Row:
    """A line, as it stands. `split` is None where there is no such column; `problem` is what is wrong with its form."""

    line: int
    file: str = ""
    labels: tuple[str, ...] = ()
    split: str | None = None
    problem: str = ""


def read_manifest(where: str, source: Source, name: str, task: Task) -> Found:
    """The images that the manifest `name` tells: `file`, `labels` (separated by `|`, or empty) and perhaps `split`.

    `split` is train, val or test in every line, or in none. Unless the task is multi-label each line has one label.
    Raises `BackbonedError` `INVALID_ARGUMENT` naming lines that can't be used, and `OSError`.
    """
    try:
        text = source.read(name).decode("utf-8-sig")
        rows = _json_rows(text) if name.endswith(".jsonl") else _csv_rows(where, name, text)
    except (UnicodeDecodeError, csv.Error) as error:
        kind = "JSON lines" if name.endswith(".jsonl") else "CSV"
        raise unusable(where, f"{name} is no {kind} in UTF-8: {error}") from error
    return _Rows(where, source, name, task).found(rows)


def _csv_rows(where: str, name: str, text: str) -> list[Row]:
    reader = csv.DictReader(StringIO(text, newline=""), strict=True)
    columns = reader.fieldnames or ()
    if "file" not in columns or "labels" not in columns:
        raise unusable(where, f"{name} needs the columns 'file' and 'labels' in its first line, it has "
                              f"{', '.join(columns) or 'none'}")  # fmt: skip
    return [
        Row(
            reader.line_num,
            (row["file"] or "").strip(),
            _labels((row["labels"] or "").split(SEPARATOR)),
            (row["split"] or "").strip() if "split" in columns else None,
            "too many cells" if None in row else "",
        )
        for row in reader
    ]


def _json_rows(text: str) -> list[Row]:
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    return [_json_row(number, line) for number, line in lines]


def _json_row(number: int, line: str) -> Row:
    try:
        values = json.loads(line)
    except (ValueError, RecursionError) as error:
        return Row(number, problem=f"no JSON ({error})")
    if not isinstance(values, dict):
        return Row(number, problem='no object: expected one such as {"file": "a.jpg", "labels": ["cat"]}')
    labels: Any = values.get("labels")
    labels = labels.split(SEPARATOR) if isinstance(labels, str) else labels
    if not isinstance(labels, list) or not all(isinstance(label, str) for label in labels):
        return Row(number, problem="'labels' must be a list of strings, or a string")
    if not all(isinstance(values.get(key, ""), str) for key in ("file", "split")):
        return Row(number, problem="'file' and 'split' must be strings")
    return Row(number, values.get("file", "").strip(), _labels(labels), values.get("split"))


def _labels(labels: Sequence[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(label.strip() for label in labels if label.strip()))


class _Rows:
    def __init__(self, where: str, source: Source, name: str, task: Task) -> None:
        self._where = where
        self._source = source
        self._name = name
        self._task = task
        self._skipped: list[SkippedFile] = []
        self._errors: list[str] = []
        self._lines: dict[str, int] = {}

    def found(self, rows: Sequence[Row]) -> Found:
        has_split = any(row.split is not None for row in rows)
        parsed = [item for row in rows for item in self._parse(row, has_split)]
        if self._errors:
            more = len(self._errors) - _SHOWN
            raise unusable(
                self._where,
                f"{self._name}: {'; '.join(self._errors[:_SHOWN])}" + (f"; and {more} lines more" if more > 0 else ""),
            )
        names = tuple(sorted({n for _, labels, _ in parsed for n in labels}))
        if not names:
            raise unusable(self._where, f"{self._name} names no label in any line: there is nothing to learn")
        index = {name: i for i, name in enumerate(names)}
        parts: dict[str, list[Sample]] = {"train": [], "val": [], "test": []}
        for path, labels, part in sorted(parsed):
            parts[part].append(Sample(path, tuple(sorted(index[n] for n in labels))))
        return Found(
            classes=names,
            train=parts["train"],
            # Lines that tell apart training and test alone leave it to us what validates.
            validation=parts["val"] if has_split and not (parts["test"] and not parts["val"]) else None,
            test=parts["test"] or None,
            skipped=self._skipped,
        )

    def _parse(self, row: Row, has_split: bool) -> Iterator[tuple[str, tuple[str, ...], str]]:
        path = PurePosixPath(row.file).as_posix()
        problem = row.problem or self._problem(row, has_split)
        if not problem and path in self._lines:
            problem = f"{row.file!r} stands in line {self._lines[path]} already"
        presence = Presence.THERE if problem else self._source.find(path)
        if presence is Presence.ABSENT:
            problem = f"there is no file {row.file!r}"
        if problem:
            self._errors.append(f"line {row.line}: {problem}")
            return
        self._lines[path] = row.line
        if presence is Presence.OUTSIDE:
            self._skipped.append(SkippedFile(path, presence.value))
            return
        yield path, row.labels, PARTS[(row.split or "").lower()] if has_split else "train"

    def _problem(self, row: Row, has_split: bool) -> str:
        path = PurePosixPath(row.file)
        if not row.file or "\0" in row.file or not is_text(row.file):
            return "no file is named"
        if path.is_absolute() or ".." in path.parts:
            return f"{row.file!r} must be a path within the dataset"
        if reason := not_an_image(row.file):
            return f"{row.file!r} is {reason}"
        if has_split and (row.split or "").lower() not in PARTS:
            return f"split is {row.split or ''!r}, expected train, val or test"
        return self._label_problem(row.labels)

    def _label_problem(self, labels: Sequence[str]) -> str:
        if not all(map(is_text, labels)):
            return "its labels are no text"
        if self._task is not Task.MULTI_LABEL and len(labels) != 1:
            return f"{len(labels)} labels, expected 1: several are for a multi-label task"
        return ""
