"""WebDataset: tar archives in which the files of one name, up to the first dot, are a sample.

The image has the ending of an image. Its label is in `.cls` (a class's name or number), in `.json` (`label` or
`labels`) or in `.txt` (a name). `classes.txt` names the classes by number, a line each.
"""

import json
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from backboned.registry.errors import BackbonedError
from backboned.registry.task import Task
from backboned.server.training.datasets.samples import PARTS, Found, Sample, not_an_image, unusable
from backboned.server.training.datasets.sources import Listing, Source, is_text
from backboned.server.training.events import SkippedFile

CLASSES = "classes.txt"
_LABEL_ENDINGS = ("cls", "json", "txt")
_SAMPLES_BETWEEN_CHECKS = 1000
_SHOWN = 3


def holds_samples(listing: Listing) -> bool:
    """Whether an archive is a shard rather than a packed folder: by its names.

    A file `.cls` tells. Files `.json` or `.txt` beside images may be mere notes where there are folders.
    """
    endings = {_ending(name) for name in listing.files}
    if "cls" in endings:
        return True
    return not listing.folders and bool(endings & {"json", "txt"}) and len(_samples(listing.files)) > 1


def read_shards(  # noqa: PLR0917 - where from, and what to
    where: str, source: Source, listing: Listing, task: Task, names: Sequence[str], check: Callable[[], None]
) -> Found:
    """The images of the shards in `source`. `names` are those of the classes by number, if they are known.

    Where the names of shards begin with train and val (or test), such as `train-000.tar`, these are the parts. `check`
    is called now and then. Raises `BackbonedError` `INVALID_ARGUMENT` naming samples that can't be used, and `OSError`.
    """
    return _Reader(where, source, task, names).found(listing, check)


def class_names(where: str, content: bytes) -> tuple[str, ...]:
    """The lines of `classes.txt`. Raises `BackbonedError` `INVALID_ARGUMENT`."""
    try:
        names = tuple(line.strip() for line in content.decode("utf-8-sig").splitlines() if line.strip())
    except UnicodeDecodeError as error:
        raise unusable(where, f"{CLASSES} is no text in UTF-8: {error}") from error
    if len(set(names)) < len(names):
        twice = next(n for n in names if names.count(n) > 1)
        raise unusable(where, f"{CLASSES} has {twice!r} twice: each class has one line")
    return names


class _Reader:
    def __init__(self, where: str, source: Source, task: Task, names: Sequence[str]) -> None:
        self._where = where
        self._source = source
        self._task = task
        self._names = names
        self._skipped: list[SkippedFile] = []
        self._errors: list[str] = []

    def found(self, listing: Listing, check: Callable[[], None]) -> Found:
        self._skipped += listing.skipped
        labelled: dict[str, tuple[str, ...]] = {}
        for number, (key, members) in enumerate(_samples(listing.files).items()):
            if number % _SAMPLES_BETWEEN_CHECKS == 0:
                check()
            if (image := self._image(members)) and (labels := self._labels(key, members)) is not None:
                labelled[image] = labels
        if self._errors:
            more = len(self._errors) - _SHOWN
            raise unusable(
                self._where, "; ".join(self._errors[:_SHOWN]) + (f"; and {more} samples more" if more > 0 else "")
            )
        if not labelled:
            raise unusable(self._where, "no sample in it has an image and a label: expected files such as 000.jpg and "
                                        "000.cls")  # fmt: skip
        classes = self._classes({label for labels in labelled.values() for label in labels})
        index = {name: i for i, name in enumerate(classes)}
        samples = [Sample(path, tuple(sorted(index[n] for n in labels))) for path, labels in labelled.items()]
        return self._parted(classes, samples)

    def _parted(self, classes: tuple[str, ...], samples: list[Sample]) -> Found:
        parts: dict[str, list[Sample]] = defaultdict(list)
        for sample in samples:
            parts[_part(sample.path)].append(sample)
        whole = "" in parts or "train" not in parts  # not all shards are named for a part
        train, validation, test = (samples, None, None) if whole else (parts["train"], parts["val"], parts["test"])
        return Found(classes, train, validation or None, test or None, self._skipped, tuple(self._unused(classes)))

    def _unused(self, classes: Sequence[str]) -> Iterator[str]:
        if unused := len(self._names) - len(classes):
            yield f"{CLASSES} names {unused} classes that no image is of: they are left out"

    def _image(self, members: Mapping[str, str]) -> str | None:
        """The sample's image. A plain ending goes before one such as `.small.jpg`."""
        images = [members[ending] for ending in sorted(members, key=lambda e: (e.count("."), e)) if _is_image(ending)]
        self._skipped += [SkippedFile(other, "a second image of its sample") for other in images[1:]]
        self._skipped += [
            SkippedFile(name, "not an image or a label")
            for ending, name in members.items()
            if not _is_image(ending) and ending not in _LABEL_ENDINGS
        ]
        if not images:
            labels = [name for ending, name in members.items() if ending in _LABEL_ENDINGS]
            self._skipped += [SkippedFile(name, "its sample has no image") for name in labels]
        return images[0] if images else None

    def _labels(self, key: str, members: Mapping[str, str]) -> tuple[str, ...] | None:
        """The sample's labels; None, with an error noted, if it has none that can be used."""
        ending = next((e for e in _LABEL_ENDINGS if e in members), None)
        if ending is None:
            self._errors.append(f"{key!r} has no label: expected {key}.cls, .json or .txt beside the image")
            return None
        name = members[ending]
        try:
            labels = _read_labels(ending, self._source.read(name).decode("utf-8-sig"))
            named = tuple(dict.fromkeys(self._named(label) for label in labels))
            if self._task is not Task.MULTI_LABEL and len(named) != 1:
                raise ValueError(f"{len(named)} labels, expected 1: several are for a multi-label task")
        except (ValueError, RecursionError) as error:
            self._errors.append(f"{name!r}: {error}")
            return None
        except BackbonedError as error:
            self._errors.append(error.message)
            return None
        return named

    def _named(self, label: str | int) -> str:
        number = int(label) if isinstance(label, int) or label.isdecimal() else None
        if number is None or (isinstance(label, str) and label in self._names):
            name = str(label)
        elif self._names:
            if number >= len(self._names):
                raise ValueError(f"class {number}, but {CLASSES} names {len(self._names)}, counted from 0")
            name = self._names[number]
        else:
            name = str(number)
        if self._names and name not in self._names:
            raise ValueError(f"class {name!r} isn't in {CLASSES}")
        if not name or not is_text(name):
            raise ValueError("the label is empty")
        return name

    def _classes(self, used: set[str]) -> tuple[str, ...]:
        """Those that images are of: in the order of `classes.txt`, else sorted, as numbers if all are."""
        if self._names:
            return tuple(name for name in self._names if name in used)
        if all(name.isdecimal() for name in used):
            return tuple(sorted(used, key=int))
        return tuple(sorted(used))


def _read_labels(ending: str, text: str) -> Sequence[str | int]:
    """Raises `ValueError`."""
    if ending != "json":
        return [text.strip()]
    values: Any = json.loads(text)
    labels = values.get("labels", values.get("label")) if isinstance(values, dict) else None
    labels = labels if isinstance(labels, list) else [labels]
    if not all((isinstance(v, str) and v.strip()) or (type(v) is int and v >= 0) for v in labels):
        raise ValueError("expected an object with 'label' (a name or a number) or 'labels' (a list of them)")
    return [v.strip() if isinstance(v, str) else v for v in labels]


def _samples(files: Sequence[str]) -> dict[str, dict[str, str]]:
    """Files by sample and by ending, without `classes.txt`."""
    samples: dict[str, dict[str, str]] = defaultdict(dict)
    for name in files:
        folder, slash, base = name.rpartition("/")
        key, _, ending = base.partition(".")
        if base != CLASSES:
            samples[f"{folder}{slash}{key}"][ending.lower()] = name
    return samples


def _ending(name: str) -> str:
    return name.rpartition("/")[2].partition(".")[2].lower()


def _is_image(ending: str) -> bool:
    return not not_an_image(f".{ending}" if "." in ending else f"x.{ending}")


def _part(path: str) -> str:
    """The part that a shard is named for, as in `train-000.tar/…`; empty if it isn't."""
    shard = path.partition("/")[0].lower()
    if not shard.endswith((".tar", ".gz", ".tgz", ".bz2", ".xz")):
        return ""
    word = next((i for i, letter in enumerate(shard) if not letter.isalpha()), len(shard))
    return PARTS.get(shard[:word], "")
