"""`backboned predict`: what images show."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from backboned.server.commands.options import DEFAULT_ADDRESS, Json, Server
from backboned.server.commands.output import as_dict, console, fail, notice, print_json, print_table

if TYPE_CHECKING:
    from backboned.server.commands.asking import Answer

app = typer.Typer(rich_markup_mode=None, add_completion=False)

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"})


@app.command()
def predict(
    *,
    images: Annotated[list[str], typer.Argument(metavar="IMAGE...", help="Images, folders or patterns.")],
    model: Annotated[str, typer.Option("--model", metavar="NAME", help="The model to ask.")],
    version: Annotated[int | None, typer.Option(help="This version, not the one that serves by default.")] = None,
    alias: Annotated[str | None, typer.Option(metavar="NAME", help="The version that this alias points to.")] = None,
    top_k: Annotated[int | None, typer.Option("--top-k", help="Classes to return for each image; 0: all.")] = None,
    labels: Annotated[
        list[str] | None,
        typer.Option(metavar="LABELS", help="The true classes, in the images' order, separated by commas; repeatable."),
    ] = None,
    label_by_folder: Annotated[
        bool, typer.Option("--label-by-folder", help="The true class of an image is the name of its folder.")
    ] = False,
    return_embedding: Annotated[
        bool, typer.Option("--return-embedding", help="Return the features too; seen with --json.")
    ] = False,
    server: Server = DEFAULT_ADDRESS,
    json: Json = False,
) -> None:
    """Classify images.

    True classes, where they are given, are compared here and feed the daemon's serving loss.
    """
    paths = find_images(images)
    truth = [path.absolute().parent.name for path in paths] if label_by_folder else _split(labels)
    if truth and len(truth) != len(paths):
        raise typer.BadParameter(f"{len(truth)} labels for {len(paths)} images", param_hint="--labels")
    if version is not None and alias is not None:
        raise typer.BadParameter("give a version or an alias, not both", param_hint="--alias")
    from backboned.client import Client  # gRPC takes its time, which `--help` needn't wait for
    from backboned.server.commands.asking import Question, ask

    question = Question(model, version, alias, top_k or 0, return_embedding)
    answers: list[Answer] = []
    with Client(server) as client:
        for answer in ask(client, question, paths, truth or [None] * len(paths)):
            answers.append(answer)
            if json:
                print_json(_as_json(model, answer))
    if not json:
        _show(answers, top_k)
    for answer in answers:
        if answer.error and not json:
            fail(f"{answer.image}: {answer.error}")
    if any(answer.error for answer in answers):
        raise typer.Exit(1)


def find_images(given: Sequence[str]) -> list[Path]:
    """The files that are meant: files, images below folders, and matches of patterns (`*`, `**`), in order of names."""
    found: list[Path] = []
    for name in given:
        path = Path(name)
        if path.is_dir():
            below = sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
            if not below:
                raise typer.BadParameter(f"no images in the folder {name}", param_hint="IMAGE")
            found += below
        elif not path.exists() and set(name) & set("*?["):
            matches = sorted(p for p in Path(path.anchor).glob(name.removeprefix(path.anchor)) if p.is_file())
            if not matches:
                raise typer.BadParameter(f"nothing matches {name}", param_hint="IMAGE")
            found += matches
        else:
            found.append(path)
    return found


def _split(labels: list[str] | None) -> list[str]:
    return [label.strip() for given in labels or [] for label in given.split(",")]


def _as_json(model: str, answer: "Answer") -> dict[str, object]:
    said = {"error": answer.error} if answer.prediction is None else {"prediction": as_dict(answer.prediction)}
    truth = {} if answer.label is None else {"label": answer.label}
    return {"image": str(answer.image), "model": model, "version": str(answer.version), **truth, **said}


def _show(answers: "Sequence[Answer]", top_k: int | None) -> None:
    told = [(a, a.prediction) for a in answers if a.prediction is not None]
    labelled = any(a.label is not None for a, _ in told)
    folder = os.path.commonpath([a.image.parent for a, _ in told]) if told else ""
    rows = []
    for answer, prediction in told:
        best, *others = prediction.classes
        row = [os.path.relpath(answer.image, folder or "."), best.label, f"{best.probability:.3f}"]
        row += [("yes" if best.label == answer.label else f"no: {answer.label}")] if labelled else []
        shown = others if top_k is not None else others[:2]
        rows.append([*row, ", ".join(f"{c.label} {c.probability:.3f}" for c in shown)])
    columns = ["image", "class", ">probability", *(["right"] if labelled else []), "then"]
    print_table(columns, rows, empty="no image was classified")
    if labelled:
        right = sum(p.classes[0].label == a.label for a, p in told)
        console().print(f"{right} of {len(told)} right: accuracy {right / len(told):.4f}")
    if versions := sorted({a.version for a, _ in told}):
        place = f"images in {folder}, " if folder else ""
        notice(f"{place}answered by version {', '.join(map(str, versions))}")
