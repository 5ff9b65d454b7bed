"""Image folders: a folder a class, with or without `train/` and `val/` above."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from backboned.server.training.data_roots import within
from backboned.server.training.events import SkippedFile
from backboned.server.training.samples import Found, Sample, not_an_image, unusable

TRAIN = "train"
VALIDATION = ("val", "valid", "validation")
_LEADS_OUT = "a link that leads out of the data roots"


def scan_folders(folder: Path, roots: Sequence[Path]) -> Found:
    """The images of `folder` by class, sorted. Hidden files are passed over; folders in a class's folder belong to it.

    Raises `BackbonedError` `INVALID_ARGUMENT` for a layout that can't be used.
    """
    return _Scan(folder, roots).found()


class _Scan:
    def __init__(self, folder: Path, roots: Sequence[Path]) -> None:
        self._folder = folder
        self._real_roots = [r.resolve() for r in roots]
        self._skipped: list[SkippedFile] = []

    def found(self) -> Found:
        names = {p.name for p in self._folders(self._folder)}
        given = [n for n in VALIDATION if n in names]
        if TRAIN not in names and given:
            raise unusable(self._folder, f"it has {given[0]}/ and no {TRAIN}/: name the folder of the others {TRAIN}")
        if len(given) > 1:
            raise unusable(self._folder, f"it has both {given[0]}/ and {given[1]}/: keep one")
        # A class may be called "train": vehicles.
        parted = TRAIN in names and bool(given or self._folders(self._folder / TRAIN))
        training = self._classes(self._folder / TRAIN if parted else self._folder)
        classes = tuple(training)
        if parted:
            self._leave_out({TRAIN, *given})
        train = [Sample(p, (i,)) for i, name in enumerate(classes) for p in training[name]]
        validation = None if not given else self._validation(self._folder / given[0], classes)
        return Found(self._folder, classes, train, validation, self._skipped)

    def _validation(self, source: Path, classes: Sequence[str]) -> list[Sample]:
        images = self._classes(source)
        strange = [n for n in images if n not in classes]
        if strange:
            raise unusable(
                self._folder, f"{source.name}/ has the class {strange[0]!r}, which {TRAIN}/ hasn't: add it there"
            )
        return [Sample(p, (i,)) for i, name in enumerate(classes) for p in images.get(name, ())]

    def _classes(self, source: Path) -> dict[str, list[str]]:
        """Paths of images by class."""
        images = {p.name: list(self._images(p, {p.resolve()})) for p in self._folders(source)}
        direct = 0
        for path in _entries(source):
            if path.is_symlink() and not within(path, self._real_roots):
                self._skip(path, _LEADS_OUT)
            elif not path.is_dir():
                direct += not not_an_image(path.name)
                self._skip(path, not_an_image(path.name) or "in no class's folder")
        where = "" if source == self._folder else f" in {source.name}/"
        if not images:
            lying = f"{direct} images lie there directly: " if direct else ""
            raise unusable(self._folder, f"no class folders{where}; {lying}make a folder of images for each class")
        empty = [name for name, paths in images.items() if not paths]
        if empty:
            raise unusable(
                self._folder, f"the class folder {empty[0]!r}{where} has no images: add some, or remove the folder"
            )
        return images

    def _images(self, folder: Path, above: set[Path]) -> Iterator[str]:
        for path in _entries(folder):
            if path.is_symlink() and not within(path, self._real_roots):
                self._skip(path, _LEADS_OUT)
            elif path.is_dir():
                real = path.resolve()
                if real in above:
                    self._skip(path, "a link to a folder that it is in")
                else:
                    yield from self._images(path, above | {real})
            elif reason := not_an_image(path.name):
                self._skip(path, reason)
            elif not path.is_file():
                self._skip(path, "a link to nothing" if path.is_symlink() else "not a file")
            else:
                yield path.relative_to(self._folder).as_posix()

    def _folders(self, source: Path) -> list[Path]:
        """The folders in `source`, without links that lead out of the roots."""
        return [p for p in _entries(source) if p.is_dir() and within(p, self._real_roots)]

    def _leave_out(self, used: set[str]) -> None:
        for path in _entries(self._folder):
            if path.name not in used:
                self._skip(path, f"neither {TRAIN}/ nor val/")

    def _skip(self, path: Path, reason: str) -> None:
        self._skipped.append(SkippedFile(path.relative_to(self._folder).as_posix(), reason))


def _entries(folder: Path) -> list[Path]:
    """What a folder holds, sorted by name, without what is hidden."""
    return sorted(p for p in folder.iterdir() if not p.name.startswith("."))
