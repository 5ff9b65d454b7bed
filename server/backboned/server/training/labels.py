"""`labels.csv`: images with any number of labels."""

import csv
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath

from backboned.server.training.data_roots import within
from backboned.server.training.events import SkippedFile
from backboned.server.training.samples import Found, Sample, not_an_image, unusable

NAME = "labels.csv"
SEPARATOR = "|"
_PARTS = {"train": "train", "val": "val", "valid": "val", "validation": "val"}
_SHOWN = 3


def read_labels(folder: Path, roots: Sequence[Path]) -> Found:
    """The images that `labels.csv` names: columns `file`, `labels` (separated by `|`, or empty) and perhaps `split`.

    `split` is train or val in every line. Raises `BackbonedError` `INVALID_ARGUMENT` naming lines that can't be used.
    """
    path = folder / NAME
    if not path.is_file():
        raise unusable(folder, f"a multi-label task needs a file {NAME} in it, with columns 'file' and 'labels' "
                               f"(separated by '{SEPARATOR}')")  # fmt: skip
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            columns = reader.fieldnames or ()
            if "file" not in columns or "labels" not in columns:
                raise unusable(folder, f"{NAME} needs the columns 'file' and 'labels' in its first line, it has "
                                       f"{', '.join(columns) or 'none'}")  # fmt: skip
            rows = [(reader.line_num, row) for row in reader]
    except (UnicodeDecodeError, csv.Error) as error:
        raise unusable(folder, f"{NAME} is no CSV in UTF-8: {error}") from error
    return _Rows(folder, [r.resolve() for r in roots]).found(rows, "split" in columns)


class _Rows:
    def __init__(self, folder: Path, real_roots: Sequence[Path]) -> None:
        self._folder = folder
        self._real_roots = real_roots
        self._skipped: list[SkippedFile] = []
        self._errors: list[str] = []
        self._lines: dict[str, int] = {}

    def found(self, rows: Sequence[tuple[int, Mapping[str, str | None]]], has_split: bool) -> Found:
        parsed = [item for line, row in rows for item in self._parse(line, row, has_split)]
        if self._errors:
            more = len(self._errors) - _SHOWN
            raise unusable(
                self._folder,
                f"{NAME}: {'; '.join(self._errors[:_SHOWN])}" + (f"; and {more} lines more" if more > 0 else ""),
            )
        names = tuple(sorted({n for _, labels, _ in parsed for n in labels}))
        if not names:
            raise unusable(self._folder, f"{NAME} names no label in any line: there is nothing to learn")
        index = {name: i for i, name in enumerate(names)}
        parts: dict[str, list[Sample]] = {"train": [], "val": []}
        for path, labels, part in sorted(parsed):
            parts[part].append(Sample(path, tuple(sorted(index[n] for n in labels))))
        return Found(self._folder, names, parts["train"], parts["val"] if has_split else None, self._skipped)

    def _parse(
        self, line: int, row: Mapping[str, str | None], has_split: bool
    ) -> Iterator[tuple[str, tuple[str, ...], str]]:
        name, labels, part = ((row.get(k) or "").strip() for k in ("file", "labels", "split"))
        problem = self._problem(name, part, has_split) or ("too many cells" if None in row else "")
        path = PurePosixPath(name).as_posix()
        if not problem and path in self._lines:
            problem = f"{name!r} stands in line {self._lines[path]} already"
        if problem:
            self._errors.append(f"line {line}: {problem}")
            return
        self._lines[path] = line
        if not within(self._folder / name, self._real_roots):
            self._skipped.append(SkippedFile(path, "a link that leads out of the data roots"))
            return
        distinct = tuple(dict.fromkeys(label.strip() for label in labels.split(SEPARATOR) if label.strip()))
        yield path, distinct, _PARTS[part.lower()] if has_split else "train"

    def _problem(self, name: str, part: str, has_split: bool) -> str:
        if not name or "\0" in name:
            return "no file is named"
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            return f"{name!r} must be a path within the dataset"
        if reason := not_an_image(name):
            return f"{name!r} is {reason}"
        if not (self._folder / name).is_file():
            return f"there is no file {name!r}"
        if has_split and part.lower() not in _PARTS:
            return f"split is {part!r}, expected train or val"
        return ""
