"""What a person writes beside a dropped file: class names, and whatever its tensors can't tell."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from backboned.registry.backbone import Preprocessing
from backboned.registry.errors import BackbonedError
from backboned.registry.inside import read_inside
from backboned.registry.refusal import refused
from backboned.registry.task import Task

MAX_SIDECAR_BYTES = 4 * 2**20


@dataclass(frozen=True)
class Sidecar:
    """What stands beside a file; None for what doesn't."""

    classes: tuple[str, ...] | None = None
    backbone: str | None = None
    task: Task | None = None
    preprocessing: Preprocessing | None = None


def sidecar_paths(checkpoint: Path) -> list[Path]:
    """Where to look, first match first: `model.pt.json`, `model.json`, `model.txt`, `classes.json`, `classes.txt`."""
    folder, stem = checkpoint.parent, checkpoint.stem
    names = (f"{checkpoint.name}.json", f"{stem}.json", f"{stem}.txt", "classes.json", "classes.txt")
    return [folder / name for name in names]


def read_sidecar(checkpoint: Path) -> Sidecar:
    """What stands beside `checkpoint`. Raises `BackbonedError` if it can't be understood.

    A text file has a class name a line. A JSON file has a list of names, or `{"classes": …, "backbone": …, "task": …,
    "preprocessing": …}` with any of these, or names with their indices in either direction.
    """
    path = next((p for p in sidecar_paths(checkpoint) if os.path.isfile(p)), None)  # noqa: PTH113 - a name may be too long
    if path is None:
        return Sidecar()
    try:
        content = read_inside(path, checkpoint.parent.parent, most_bytes=MAX_SIDECAR_BYTES)
        text = content.decode("utf-8-sig")
        if path.suffix == ".txt":
            return Sidecar(classes=tuple(line.strip() for line in text.splitlines() if line.strip()))
        return _parse(json.loads(text))
    except (OSError, ValueError, RecursionError, BackbonedError) as error:
        raise refused(f"{path.name} beside it can't be used: {error}") from error


def _parse(content: Any) -> Sidecar:
    if isinstance(content, Mapping) and content.keys() & {
        "classes",
        "class_to_idx",
        "backbone",
        "task",
        "preprocessing",
    }:
        return told_by(content)
    return Sidecar(classes=parse_classes(content))


def told_by(content: Mapping[str, Any]) -> Sidecar:
    """What `content` tells under `classes` (or `class_to_idx`), `backbone`, `task` and `preprocessing`.

    Raises `ValueError` or `BackbonedError`.
    """
    classes = content.get("classes", content.get("class_to_idx"))
    backbone, task, preprocessing = (content.get(k) for k in ("backbone", "task", "preprocessing"))
    if not isinstance(backbone, str | None):
        raise ValueError(f"backbone must be a name, got {backbone!r}")
    return Sidecar(
        classes=None if classes is None else parse_classes(classes),
        backbone=backbone,
        task=None if task is None else Task(str(task).lower().removeprefix("task_")),
        preprocessing=None if preprocessing is None else Preprocessing.from_dict(preprocessing),
    )


def parse_classes(content: Any) -> tuple[str, ...]:
    """Class names in order, from a list, `{"daisy": 0, …}` or `{"0": "daisy", …}`. Raises `ValueError`."""
    if isinstance(content, list | tuple):
        if not all(isinstance(name, str) for name in content):
            raise ValueError("class names must be strings")
        return tuple(content)
    if isinstance(content, Mapping):
        if all(isinstance(v, int) for v in content.values()):
            by_index = {v: k for k, v in content.items()}
        else:
            by_index = {int(str(k)): v for k, v in content.items()}
        if sorted(by_index) != list(range(len(content))):
            raise ValueError(f"class indices must be 0…{len(content) - 1}, each once")
        return parse_classes([by_index[i] for i in range(len(content))])
    raise ValueError(f"expected class names, got a {type(content).__name__}")
