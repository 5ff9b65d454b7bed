"""Datasets that were uploaded: folders of hard links to images that are kept once, each made in one step.

    images/ab/abcdef…              an image, under the SHA-256 of its bytes
    datasets/ds-0123…/red/1.jpg    the same image, as the dataset calls it
    datasets/ds-0123…/labels.jsonl what each image shows, and whether it trains, validates or tests
    datasets/ds-0123…/.dataset.json, .sha256   the dataset's name and figures, and the digests of its images

A daemon that is killed leaves whole datasets, and folders with a dot before their name, which the next start removes.
"""

import errno
import json
import re
import secrets
import shutil
import threading
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from backboned.registry.atomic import TEMPORARY_PREFIX, sync_path
from backboned.registry.errors import BackbonedError, ErrorKind, invalid, not_found, suggestion
from backboned.server.training.upload_declaration import SEPARATOR, Declaration, Part, check_path
from backboned.server.training.upload_images import ImageStore, disk

MANIFEST = "labels.jsonl"
DATASETS = "datasets"

_ID = re.compile(r"ds-[0-9a-f]{8,}")
_FIGURES = ".dataset.json"
_DIGESTS = ".sha256"
_DELETED_PREFIX = ".deleted-"
_NO_LINKS = (errno.EXDEV, errno.EMLINK, errno.EPERM, errno.EOPNOTSUPP)


@dataclass(frozen=True)
class UploadedDataset:
    """A dataset that is whole. `create_time` is in seconds since 1970."""

    id: str
    name: str
    images: int
    size_bytes: int
    create_time: float


class MissingImages(Exception):
    """The images of these digests haven't come, or have gone again."""

    def __init__(self, sha256: list[str]) -> None:
        super().__init__(f"{len(sha256)} images are missing")
        self.sha256 = sha256


def is_upload_id(name: str) -> bool:
    """Whether `name` looks like the id of an uploaded dataset, rather than a path."""
    return _ID.fullmatch(name) is not None


def find_upload(datasets: Path, dataset_id: str, *, field: str | None = None) -> Path:
    """The folder of an uploaded dataset, below `datasets`. Raises `BackbonedError` `NOT_FOUND` with the nearest ids."""
    folder = datasets / dataset_id
    if is_upload_id(dataset_id) and folder.is_dir():
        return folder
    raise not_found("uploaded dataset", dataset_id, _ids(datasets), field=field)


class UploadStore:
    """Uploaded datasets, in `folder`. Safe to use from several threads, once `open` has returned."""

    def __init__(self, folder: Path, quota_bytes: int) -> None:
        self._datasets = folder / DATASETS
        self.images = ImageStore(folder / "images", quota_bytes)
        self._changing = threading.Lock()
        self._closed = False

    @property
    def datasets_folder(self) -> Path:
        """The folder that has a folder for each dataset."""
        return self._datasets

    def open(self) -> None:
        """Make the folders, and remove what a killed daemon has left."""
        self._datasets.mkdir(parents=True, exist_ok=True)
        for folder in self._datasets.glob(".*"):
            shutil.rmtree(folder, ignore_errors=True)
        self.images.open()

    def list_datasets(self) -> list[UploadedDataset]:
        """All datasets, newest first."""
        found = [self._read(dataset_id) for dataset_id in _ids(self._datasets)]
        return sorted((d for d in found if d is not None), key=lambda d: (-d.create_time, d.id))

    def missing(self, declaration: Declaration) -> list[str]:
        """The digests of declared images that aren't here, in the order of the declaration; none if its dataset is."""
        if (self._datasets / declaration.dataset_id).is_dir():
            return []
        return [entry.sha256 for entry in declaration.images if not self.images.has(entry.sha256)]

    def make_room(self, declaration: Declaration) -> None:
        """See to it that what is missing of a declaration is within the quota.

        Raises `BackbonedError` `RESOURCE_EXHAUSTED`.
        """
        images = self.images
        missing = (entry for s in self.missing(declaration) if (entry := declaration.image(s)))
        images.make_room(sum(entry.size_bytes - images.received(entry.sha256) for entry in missing))

    def make(self, declaration: Declaration) -> UploadedDataset:
        """The dataset of a declaration: a new one, or the one that is equal to it.

        Raises `MissingImages`, and `BackbonedError` `RESOURCE_EXHAUSTED`.
        """
        if missing := self.missing(declaration):
            raise MissingImages(missing)
        made = UploadedDataset(
            declaration.dataset_id, declaration.name, len(declaration.entries), declaration.size_bytes, time.time()
        )
        with self._changing, disk():
            present = self._read(made.id)
            if present is not None:
                return present
            temporary = self._datasets / f"{TEMPORARY_PREFIX}{secrets.token_hex(8)}"
            try:
                self._fill(temporary, declaration, made)
                temporary.rename(self._datasets / made.id)
            except BaseException:
                shutil.rmtree(temporary, ignore_errors=True)
                raise
            sync_path(self._datasets)
        return made

    def detach(self, dataset_id: str) -> Path:
        """Make a dataset unknown in one step; what it was made of is at the path that is returned, for `purge`.

        Raises `BackbonedError` `NOT_FOUND` with the nearest ids.
        """
        with self._changing:
            folder = find_upload(self._datasets, dataset_id, field="dataset_id")
            detached = self._datasets / f"{_DELETED_PREFIX}{secrets.token_hex(8)}"
            folder.rename(detached)
            sync_path(self._datasets)
            return detached

    def purge(self, detached: Path) -> None:
        """Remove what `detach` left, and the images that no other dataset holds. Ends early after `close`.

        Giving back what an image took can take milliseconds: others may make datasets meanwhile.
        """
        digests = (detached / _DIGESTS).read_text(encoding="ascii").split()
        shutil.rmtree(detached)
        for sha256 in digests:
            if self._closed:
                return  # a later start finds the images that nobody holds
            with self._changing:
                self.images.drop(sha256)

    def close(self) -> None:
        """Let a deletion that is under way end soon."""
        self._closed = True

    def image(self, name: str) -> Path:
        """The file of an image that is called "DATASET_ID/path". Raises `BackbonedError`."""
        dataset_id, slash, path = name.partition("/")
        if not slash or not is_upload_id(dataset_id):
            raise invalid(f"{name[:200]!r} names no image of an uploaded dataset; expected DATASET_ID/path")
        if problem := check_path(path):
            raise invalid(f"image {path!r} {problem}")
        file = find_upload(self._datasets, dataset_id) / path
        if not file.is_file():
            known = [p.name for _, p in zip(range(1000), file.parent.glob("[!.]*"), strict=False)]
            raise BackbonedError(
                ErrorKind.NOT_FOUND, f"dataset {dataset_id} has no image {path!r}{suggestion(file.name, known)}"
            )
        return file

    def _read(self, dataset_id: str) -> UploadedDataset | None:
        try:
            return UploadedDataset(**json.loads((self._datasets / dataset_id / _FIGURES).read_bytes()))
        except FileNotFoundError:  # deleted just now
            return None

    def _fill(self, folder: Path, declaration: Declaration, made: UploadedDataset) -> None:
        folder.mkdir()
        folders = {folder}
        for entry in declaration.entries:
            path = folder / entry.path
            if path.parent not in folders:
                path.parent.mkdir(parents=True, exist_ok=True)
                folders.update(p for p in path.parents if p.is_relative_to(folder))
            try:
                _link(self.images.path(entry.sha256), path)
            except FileNotFoundError:  # another dataset that held it was deleted just now
                raise MissingImages([entry.sha256]) from None
            except FileExistsError:
                raise invalid(f"image {entry.path!r} is declared twice, in another case", field="declaration") from None
        _write_lines(folder / MANIFEST, _manifest(declaration))
        _write_lines(folder / _DIGESTS, (entry.sha256 for entry in declaration.entries))
        _write_lines(folder / _FIGURES, [json.dumps(asdict(made))])
        for each in folders:
            sync_path(each)


def _manifest(declaration: Declaration) -> Iterable[str]:
    """A JSON object an image. Where none validates or tests, what to split off is left to the job."""
    parted = any(entry.part is not Part.TRAIN for entry in declaration.entries)
    for entry in declaration.entries:
        line = {"file": entry.path, "labels": SEPARATOR.join(entry.labels)}
        yield json.dumps(line | ({"split": entry.part.value} if parted else {}), ensure_ascii=False)


def _write_lines(path: Path, lines: Iterable[str]) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.writelines(f"{line}\n" for line in lines)
    sync_path(path)


def _link(source: Path, target: Path) -> None:
    """A hard link, or a copy where the file system has none, or no further one."""
    try:
        target.hardlink_to(source)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        shutil.copyfile(source, target)


def _ids(datasets: Path) -> list[str]:
    return [p.name for p in datasets.iterdir() if is_upload_id(p.name)] if datasets.is_dir() else []
