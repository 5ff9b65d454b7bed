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
    from backboned.v1 import model_service_pb2 as pb

app = typer.Typer(rich_markup_mode=None, add_completion=False)

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"})


@app.command()
def predict(
    *,
    images: Annotated[list[str], typer.Argument(metavar="IMAGE...", help="Images, folders or patterns.")],
    models: Annotated[
        list[str],
        typer.Option(
            "--model", metavar="NAME", help="The model to ask, or one of several: NAME, NAME@VERSION or NAME@ALIAS."
        ),
    ],
    version: Annotated[
        int | None, typer.Option(min=1, help="This version, not the one that serves by default.")
    ] = None,
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
    embedding_stage: Annotated[
        str, typer.Option(metavar="STAGE", help="Return this stage's output instead, averaged over positions.")
    ] = "",
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
    targets = _targets(models, version, alias)
    from backboned.client import Client  # gRPC takes its time, which `--help` needn't wait for
    from backboned.server.commands.asking import Question, ask

    question = Question(targets, top_k or 0, return_embedding, embedding_stage)
    answers: list[Answer] = []
    with Client(server) as client:
        for answer in ask(client, question, paths, truth or [None] * len(paths)):
            answers.append(answer)
            if json:
                for line in _as_json(answer):
                    print_json(line)
    if not json:
        _show(answers, targets, top_k)
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


def _targets(models: Sequence[str], version: int | None, alias: str | None) -> list[str]:
    """Who is asked, as the client takes it: `NAME`, `NAME@VERSION` or `NAME@ALIAS`."""
    chosen = [str(each) for each in (version, alias) if each is not None]
    if len(chosen) > 1:
        raise typer.BadParameter("give a version or an alias, not both", param_hint="--alias")
    if chosen and (len(models) > 1 or "@" in models[0]):
        raise typer.BadParameter(
            f"write it behind the model's name: --model {models[0].partition('@')[0]}@{chosen[0]}",
            param_hint="--alias" if version is None else "--version",
        )
    return ["@".join([*models, *chosen])] if chosen else list(models)


def _split(labels: list[str] | None) -> list[str]:
    return [label.strip() for given in labels or [] for label in given.split(",")]


def _as_json(answer: "Answer") -> list[dict[str, object]]:
    """An object for each model; one alone for an image that can't be used."""
    image = {"image": str(answer.image)}
    truth = {} if answer.label is None else {"label": answer.label}
    if answer.error is not None:
        return [{**image, **truth, "error": answer.error}]
    return [
        {**image, "model": s.model, "version": str(s.version), **truth, "prediction": as_dict(s.prediction)}
        for s in answer.said
    ]


def _show(answers: "Sequence[Answer]", targets: Sequence[str], top_k: int | None) -> None:
    told = [answer for answer in answers if answer.error is None]
    several, labelled = len(targets) > 1, any(answer.label is not None for answer in told)
    folder = os.path.commonpath([answer.image.parent for answer in told]) if told else ""
    rows = []
    for answer in told:
        for said in answer.said:
            best, *others = said.prediction.classes
            row = [os.path.relpath(answer.image, folder or ".")]
            row += [f"{said.model}@{said.version}"] if several else []
            row += [best.label + _doubt(said.prediction), f"{best.probability:.3f}"]
            row += [("yes" if best.label == answer.label else f"no: {answer.label}")] if labelled else []
            shown = others if top_k is not None else others[:2]
            rows.append([*row, ", ".join(f"{c.label} {c.probability:.3f}" for c in shown)])
    columns = ["image", *(["model"] if several else []), "class", ">probability", *(["right"] if labelled else [])]
    print_table([*columns, "then"], rows, empty="no image was classified")
    for i, target in enumerate(targets if labelled else ()):
        right = sum(answer.said[i].prediction.classes[0].label == answer.label for answer in told)
        name = f"{target}: " if several else ""
        console().print(f"{name}{right} of {len(told)} right: accuracy {right / len(told):.4f}")
    if versions := sorted({(said.model, said.version) for answer in told for said in answer.said}):
        place = f"images in {folder}, " if folder else ""
        names = [f"{model}@{version}" if several else str(version) for model, version in versions]
        notice(f"{place}answered by {'' if several else 'version '}{', '.join(names)}")


def _doubt(prediction: "pb.Prediction") -> str:
    return " (unfamiliar)" if prediction.unfamiliar else " (uncertain)" if prediction.uncertain else ""
