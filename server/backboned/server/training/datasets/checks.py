"""What makes a dataset unusable, and what a person should know of it."""

from collections import Counter
from collections.abc import Sequence

from backboned.registry.task import Task
from backboned.server.training.datasets.samples import Found, Sample, unusable

FEW_IMAGES = 5
STRONG_IMBALANCE = 10


def check_classes(where: str, found: Found, task: Task, *, tests: bool) -> None:
    """Raise `BackbonedError` `INVALID_ARGUMENT` for classes that the task can't have, or that can't be split.

    `tests` tells whether a part is to be held back besides.
    """
    names = ", ".join(found.classes[:8]) + (", …" if len(found.classes) > 8 else "")
    if task is Task.BINARY and len(found.classes) != 2:
        raise unusable(
            where, f"a binary task needs exactly two {found.kind}s, negative and positive, and it has "
            f"{len(found.classes)} ({names})"
        )  # fmt: skip
    if task is Task.SINGLE_LABEL and len(found.classes) == 1:
        raise unusable(where, f"it has one class only ({names}): add images of something else, as another {found.kind}")
    if found.validation is None and task is not Task.MULTI_LABEL:
        counts = count_labels(found.train)
        lonely = [name for i, name in enumerate(found.classes) if counts[i] == 1]
        if lonely:
            raise unusable(where, f"class {lonely[0]!r} has 1 image, and one must train and another validate: add more")
    if tests and found.test is None and len(found.train) < 3:
        raise unusable(where, "it has fewer than three images: one each must train, validate and test")


def check_parts(
    where: str, classes: Sequence[str], train: Sequence[Sample], validation: Sequence[Sample], task: Task
) -> None:
    """Raise `BackbonedError` `INVALID_ARGUMENT` if nothing trains or validates, or a class has nothing to train on."""
    if not train or not validation:
        part = "validation" if train else "training"
        raise unusable(where, f"it has no {part} images: at least two images are needed, one for each")
    counts = count_labels(train)
    for i, name in enumerate(classes):
        if not counts[i]:
            label = "has the label" if task is Task.MULTI_LABEL else "is of the class"
            raise unusable(where, f"no training image {label} {name!r}: add one, or remove the label")


def warnings(
    classes: Sequence[str], train: Sequence[Sample], validation: Sequence[Sample], test: Sequence[Sample]
) -> list[str]:
    """What a person should know, as far as names and counts tell."""
    counts, validating, testing = count_labels(train), count_labels(validation), count_labels(test)
    by_count = sorted(range(len(classes)), key=lambda i: counts[i])
    fewest, most = by_count[0], by_count[-1]
    said = []
    if counts[most] > STRONG_IMBALANCE * counts[fewest]:
        said.append(
            f"strong imbalance: {counts[most]} training images of {classes[most]!r}, {counts[fewest]} of "
            f"{classes[fewest]!r}; the loss is weighted for it"
        )
    few = [f"{classes[i]!r} ({counts[i]})" for i in by_count if counts[i] < FEW_IMAGES]
    if few:
        said.append(f"fewer than {FEW_IMAGES} training images of {_listed(few)}")
    for part, part_counts in (("validation", validating), ("test", testing if test else None)):
        unseen = [repr(name) for i, name in enumerate(classes) if part_counts is not None and not part_counts[i]]
        if unseen:
            said.append(f"no {part} images of {_listed(unseen)}")
    folded = Counter(name.casefold() for name in classes)
    twins = [repr(name) for name in classes if folded[name.casefold()] > 1]
    if twins:
        said.append(f"classes that differ by case only: {_listed(twins)}")
    return said


def count_labels(samples: Sequence[Sample]) -> Counter[int]:
    """How many samples have each label."""
    return Counter(label for s in samples for label in s.labels)


def _listed(items: Sequence[str]) -> str:
    return ", ".join(items[:5]) + (f" and {len(items) - 5} more classes" if len(items) > 5 else "")
