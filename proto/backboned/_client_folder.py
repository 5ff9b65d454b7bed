"""What a folder on this machine holds as a dataset: the layouts that the daemon reads from its own disk."""

import csv
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import grpc

from backboned._client_status import ClientError

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
MANIFESTS = ("labels.jsonl", "labels.csv")
SEPARATOR = "|"

_PARTS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}


@dataclass(frozen=True)
class Photo:
    """An image file, its path within the dataset, its labels, and what it is for: train, val or test."""

    file: Path
    path: str
    labels: tuple[str, ...]
    part: str = "train"


def photos(folder: Path) -> list[Photo]:
    """The images of a folder, sorted by path.

    It has a manifest, `labels.jsonl` or `labels.csv` (`file`, `labels` separated by `|`, and perhaps `split`); or a
    folder a class; or train/ and val/ or test/ with a folder a class each. What is hidden, empty or no image is left
    out. Raises `ClientError` for one that can't be used.
    """
    try:
        if not folder.is_dir():
            raise _unusable(folder, "there is no such folder")
        manifest = next((folder / name for name in MANIFESTS if (folder / name).is_file()), None)
        found = sorted(_listed(folder, manifest) if manifest else _in_folders(folder), key=lambda p: p.path)
    except OSError as error:
        raise _unusable(folder, f"{error.filename} can't be read: {error.strerror}") from None
    for photo in found:
        if any("\ud800" <= c <= "\udfff" for c in photo.path):
            raise _unusable(folder, f"the name of {photo.path!r} is no UTF-8")
    if not found:
        raise _unusable(folder, "it has no images: make a folder of images for each class")
    return found


def _in_folders(folder: Path) -> Iterator[Photo]:
    names = {p.name for p in _folders(folder)}
    others = [n for n in names if n != "train" and n in _PARTS]
    # A class may be called "train": vehicles.
    parted = "train" in names and bool(others or _folders(folder / "train"))
    for part in ("train", *sorted(others)) if parted else ("",):
        for of_class in _folders(folder / part):
            for file in _images(of_class, {of_class.resolve()}):
                path = file.relative_to(folder).as_posix()
                yield Photo(file, path, (of_class.name,), _PARTS[part] if parted else "train")


def _folders(folder: Path) -> list[Path]:
    return [p for p in sorted(folder.iterdir()) if p.is_dir() and not p.name.startswith(".")]


def _images(folder: Path, above: set[Path]) -> Iterator[Path]:
    """The images in a class's folder and in those within, but not where a link leads back to one of those above."""
    for path in folder.iterdir():
        if path.name.startswith("."):
            continue
        if path.is_dir():
            if (real := path.resolve()) not in above:
                yield from _images(path, above | {real})
        elif _usable(path):
            yield path


def _usable(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES and path.is_file() and path.stat().st_size > 0


def _listed(folder: Path, manifest: Path) -> Iterator[Photo]:
    try:
        for number, row in _rows(manifest):
            name, labels, part = (str(row.get(key) or "").strip() for key in ("file", "labels", "split"))
            path = PurePosixPath(name)
            if not name or path.is_absolute() or ".." in path.parts:
                raise _unusable(folder, f"{manifest.name} line {number}: {name!r} is no path within the folder")
            if part and part.lower() not in _PARTS:
                raise _unusable(
                    folder, f"{manifest.name} line {number}: split is {part!r}, expected train, val or test"
                )
            if not (folder / path).is_file():
                raise _unusable(folder, f"{manifest.name} line {number}: there is no file {name!r}")
            distinct = dict.fromkeys(label.strip() for label in labels.split(SEPARATOR) if label.strip())
            if _usable(folder / path):
                yield Photo(folder / path, path.as_posix(), tuple(distinct), _PARTS[part.lower() or "train"])
    except (ValueError, csv.Error) as error:
        raise _unusable(folder, f"{manifest.name} can't be read: {error}") from None


def _rows(manifest: Path) -> Iterable[tuple[int, dict[str, Any]]]:
    with manifest.open(encoding="utf-8-sig", newline="") as file:
        if manifest.suffix == ".csv":
            reader = csv.DictReader(file, strict=True)
            if not {"file", "labels"} <= set(reader.fieldnames or ()):
                raise ValueError("it needs the columns 'file' and 'labels' in its first line")
            yield from ((reader.line_num, row) for row in reader)
            return
        for number, line in enumerate(file, start=1):
            if line.strip():
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise ValueError(f"line {number} is no JSON object")
                yield number, row


def _unusable(folder: Path, reason: str) -> ClientError:
    return ClientError(grpc.StatusCode.INVALID_ARGUMENT, f"folder {folder} can't be uploaded: {reason}", "folder")
