"""Writing a version's report beside its checkpoints."""

from pathlib import Path

from backboned.registry.answers import Answers
from backboned.registry.atomic import write_atomically
from backboned.registry.manifest import Manifest
from backboned.registry.reports import EVALUATION_NAME, REPORT_NAME
from backboned.server.training.events import DatasetReport, Evaluation, to_json
from backboned.server.training.report.contents import Contents
from backboned.server.training.report.page import page
from backboned.server.training.report.photos import Judged, Read, mistakes, pictures


def write_report(
    folder: Path,
    *,
    manifest: Manifest,
    answers: Answers,
    evaluation: Evaluation,
    validation: Judged,
    test: Judged | None,
    dataset: DatasetReport | None,
    read: Read,
    max_image_pixels: int,
) -> None:
    """Write `evaluation.json` (`evaluation`, as `events.to_json` puts it) and `report.html` into a version's folder.

    `manifest` is that of the version with all its epochs; `read` gives an image's bytes by its path, and a photo
    that it can't give is left out. Each file is whole or not there. Raises `OSError`.
    """
    found = [
        mistake
        for part, judged in (("test", test), ("validation", validation))
        if judged is not None
        for mistake in mistakes(manifest.task, manifest.classes, answers.temperature, part, judged)
    ]
    contents = Contents(
        manifest=manifest,
        answers=answers,
        evaluation=evaluation,
        validation=validation,
        test=test,
        dataset=dataset,
        mistakes=len(found),
        photos=tuple(pictures(found, read, max_pixels=max_image_pixels)),
    )
    content = page(contents).encode()
    write_atomically(
        folder / EVALUATION_NAME, lambda file: file.write(f"{to_json(evaluation)}\n".encode("utf-8", "replace"))
    )
    write_atomically(folder / REPORT_NAME, lambda file: file.write(content))
