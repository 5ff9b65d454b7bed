"""The manifest of a version: `manifest.json`, written last, so that a version with one is whole."""

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from backboned.registry.atomic import write_atomically
from backboned.registry.backbone import Preprocessing
from backboned.registry.errors import BackbonedError, ErrorKind, invalid
from backboned.registry.inside import read_inside
from backboned.registry.task import Task

MANIFEST_NAME = "manifest.json"
MAX_MANIFEST_BYTES = 8 * 2**20
MAX_EPOCH = 2**31 - 1
MAX_SIZE_BYTES = 2**63 - 1
MAX_CREATE_TIME = 253_402_300_799
"""The end of the year 9999."""

_FORMAT = 1
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")


def is_name(name: str) -> bool:
    """Whether `name` can be a model's or alias's name."""
    return _NAME.fullmatch(name) is not None


def check_name(name: str, what: str = "model", field: str = "model") -> str:
    """`name`, if it can be a model's or alias's name. Raises `BackbonedError` `INVALID_ARGUMENT` otherwise."""
    if not is_name(name):
        raise invalid(
            f"{what} name {name[:80]!r} can't be used: use 1 to 63 letters, digits, '.', '_' or '-', beginning with a "
            "letter or digit",
            field=field,
        )
    return name


@dataclass(frozen=True)
class EpochMetrics:
    """An epoch's figures: mean losses an image, accuracies 0…1; None where unknown."""

    train_loss: float | None = None
    train_accuracy: float | None = None
    val_loss: float | None = None
    val_accuracy: float | None = None


@dataclass(frozen=True)
class Epoch:
    """One checkpoint file of a version. `create_time` is in seconds since 1970."""

    epoch: int
    file: str
    sha256: str
    size_bytes: int
    create_time: float
    metrics: EpochMetrics = field(default_factory=EpochMetrics)


@dataclass(frozen=True)
class Manifest:
    """What a version is: its backbone, classes, stage digests (of its best epoch), epochs and where it came from.

    `complete` turns true when its job has ended well; a dropped file is complete from the start. `trained` names the
    stages whose tensors the best one holds. For a dropped file, `adopted_from` is its name and `adopted_key` what tells
    it from a changed one. `options`, `dataset` and `versions` are for people: how it was trained, on what, by which
    torch.
    """

    model: str
    version: int
    backbone: str
    task: Task
    classes: tuple[str, ...]
    stages: Mapping[str, str]
    preprocessing: Preprocessing
    epochs: tuple[Epoch, ...]
    best_epoch: int
    complete: bool
    trained: tuple[str, ...] = ()
    adopted_from: str = ""
    adopted_key: str = ""
    dataset: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)

    @property
    def best(self) -> Epoch:
        """The epoch that serves."""
        return next(e for e in self.epochs if e.epoch == self.best_epoch)

    def with_epoch(
        self, epoch: Epoch, *, best: bool, stages: Mapping[str, str], trained: tuple[str, ...] | None = None
    ) -> "Manifest":
        """This manifest with one more epoch, which if `best` becomes the best one, and lends its stages."""
        kept = tuple(e for e in self.epochs if e.epoch != epoch.epoch)
        if best or not kept:
            names = self.trained if trained is None else trained
            return replace(self, epochs=(*kept, epoch), best_epoch=epoch.epoch, stages=stages, trained=names)
        return replace(self, epochs=(*kept, epoch))

    def write(self, folder: Path) -> None:
        """Write `manifest.json` into the version's folder, atomically."""
        values = asdict(self) | {
            "format": _FORMAT,
            "task": self.task.value,
            "preprocessing": self.preprocessing.to_dict(),
        }
        text = json.dumps(values, indent=1, ensure_ascii=False) + "\n"
        write_atomically(folder / MANIFEST_NAME, lambda file: file.write(text.encode("utf-8")))

    @classmethod
    def read(cls, folder: Path) -> "Manifest":
        """The manifest of the version in `folder`. Raises `BackbonedError` `DATA_LOSS` if it can't be understood."""
        path = folder / MANIFEST_NAME
        try:
            content = read_inside(path, folder.parent.parent, most_bytes=MAX_MANIFEST_BYTES)
            values = json.loads(content.decode("utf-8"))
            if b"\\u" in content:
                json.dumps(values, ensure_ascii=False).encode("utf-8")  # `\ud800` is JSON, but no text
            return cls._parse(values, folder)
        except Exception as error:  # it may come from anywhere, and anything may be wrong with it
            reason = f"{type(error).__name__}: {error}"
            raise BackbonedError(ErrorKind.DATA_LOSS, f"unreadable {MANIFEST_NAME}: {reason}") from error

    @classmethod
    def _parse(cls, values: Mapping[str, Any], folder: Path) -> "Manifest":
        if values["format"] != _FORMAT:
            raise ValueError(f"format {values['format']!r}, this version of Backboned reads {_FORMAT}")
        epochs = tuple(
            Epoch(
                int(_within(e["epoch"], MAX_EPOCH)),
                _plain_name(e["file"]),
                str(e["sha256"]),
                int(_within(e["size_bytes"], MAX_SIZE_BYTES)),
                float(_within(e["create_time"], MAX_CREATE_TIME)),
                EpochMetrics(**{k: None if v is None else float(v) for k, v in e["metrics"].items()}),
            )
            for e in values["epochs"]
        )
        manifest = cls(
            model=str(values["model"]),
            version=int(values["version"]),
            backbone=str(values["backbone"]),
            task=Task(values["task"]),
            classes=_texts(values["classes"]),
            stages={str(k): str(v) for k, v in values["stages"].items()},
            preprocessing=Preprocessing.from_dict(values["preprocessing"]),
            epochs=epochs,
            best_epoch=int(values["best_epoch"]),
            complete=values["complete"] is True,
            trained=tuple(str(s) for s in values["trained"]),
            adopted_from=str(values["adopted_from"]),
            adopted_key=str(values["adopted_key"]),
            dataset=dict(values["dataset"]),
            options=dict(values["options"]),
            versions={str(k): str(v) for k, v in values["versions"].items()},
        )
        if (manifest.model, str(manifest.version)) != (folder.parent.name, folder.name):
            raise ValueError(f"it is of {manifest.model}/{manifest.version}, not of {folder.parent.name}/{folder.name}")
        if manifest.best_epoch not in {e.epoch for e in epochs}:
            raise ValueError(f"best epoch {manifest.best_epoch} is not among its epochs")
        return manifest


def _texts(values: Any) -> tuple[str, ...]:
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise ValueError(f"expected a list of names, got {str(values)[:80]}")
    return tuple(values)


def _plain_name(name: Any) -> str:
    if not isinstance(name, str) or not name or name != Path(name).name or name.startswith(".") or "\0" in name:
        raise ValueError(f"file name {name!r} must be a plain name")
    return name


def _within(number: Any, most: int) -> Any:
    if not 0 <= number <= most:
        raise ValueError(f"{number!r} is not in 0…{most}")
    return number
