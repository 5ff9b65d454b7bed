"""Image folders: a folder a class, with or without `train/`, `val/` and `test/` above."""

from collections.abc import Sequence

from backboned.server.training.datasets.samples import PARTS, Found, Sample, not_an_image, unusable
from backboned.server.training.datasets.sources import Listing
from backboned.server.training.events import SkippedFile

TRAIN = "train"
TEST = "test"
VALIDATION = tuple(name for name, part in PARTS.items() if part == "val")


def scan_folders(where: str, listing: Listing) -> Found:
    """The images of a listing by class, sorted. Folders in a class's folder belong to it.

    Raises `BackbonedError` `INVALID_ARGUMENT` for a layout that can't be used.
    """
    return _Scan(where, listing).found()


class _Scan:
    def __init__(self, where: str, listing: Listing) -> None:
        self._where = where
        self._listing = listing
        self._skipped = list(listing.skipped)

    def found(self) -> Found:
        names = self._listing.within("")
        given = [n for n in VALIDATION if n in names]
        if TRAIN not in names and given:
            raise unusable(self._where, f"it has {given[0]}/ and no {TRAIN}/: name the folder of the others {TRAIN}")
        if len(given) > 1:
            raise unusable(self._where, f"it has both {given[0]}/ and {given[1]}/: keep one")
        # A class may be called "train": vehicles.
        parted = TRAIN in names and bool(given or self._listing.within(TRAIN))
        # Pictures without labels are often in a folder test/.
        tests = parted and TEST in names and bool(self._listing.within(TEST))
        if parted:
            self._leave_out({TRAIN, *given} | ({TEST} if tests else set()))
        training = self._classes(TRAIN if parted else "")
        classes = tuple(training)
        return Found(
            classes=classes,
            train=_samples(training, classes),
            validation=self._part(given[0], classes) if given else None,
            test=self._part(TEST, classes) if tests else None,
            skipped=self._skipped,
            kind="class folder",
        )

    def _part(self, folder: str, classes: Sequence[str]) -> list[Sample]:
        images = self._classes(folder)
        strange = [n for n in images if n not in classes]
        if strange:
            raise unusable(self._where, f"{folder}/ has the class {strange[0]!r}, which {TRAIN}/ hasn't: add it there")
        return _samples(images, classes)

    def _classes(self, source: str) -> dict[str, list[str]]:
        """Paths of images by class, of the folders in `source`."""
        prefix = f"{source}/" if source else ""
        images: dict[str, list[str]] = {name: [] for name in self._listing.within(source)}
        direct = 0
        for path in self._listing.files:
            if not path.startswith(prefix):
                continue
            name, inside, _ = path[len(prefix) :].partition("/")
            reason = not_an_image(path)
            if inside and reason:
                self._skip(path, reason)
            elif inside:
                images[name].append(path)
            elif source or "/" not in path:
                direct += not reason
                self._skip(path, reason or "in no class's folder")
        where = f" in {source}/" if source else ""
        if not images:
            lying = f"{direct} images lie there directly: " if direct else ""
            raise unusable(self._where, f"no class folders{where}; {lying}make a folder of images for each class")
        empty = [name for name, paths in images.items() if not paths]
        if empty:
            raise unusable(
                self._where, f"the class folder {empty[0]!r}{where} has no images: add some, or remove the folder"
            )
        return images

    def _leave_out(self, used: set[str]) -> None:
        """Skip what lies beside the parts."""
        tops = {path.partition("/")[0] for path in self._listing.files} | set(self._listing.within(""))
        for name in sorted(tops - used):
            self._skip(name, f"neither {TRAIN}/ nor val/ nor test/ with class folders")

    def _skip(self, path: str, reason: str) -> None:
        self._skipped.append(SkippedFile(path, reason))


def _samples(images: dict[str, list[str]], classes: Sequence[str]) -> list[Sample]:
    return [Sample(p, (i,)) for i, name in enumerate(classes) for p in images.get(name, ())]
