"""The demo, told as it happens."""

import statistics
import time
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from backboned.client import Client
from backboned.registry import Backbone, Catalogue
from backboned.server.commands.demo.digits import Images, image_files, load, write_images
from backboned.server.commands.demo.fine_tuning import MODEL, FineTuned, fine_tune
from backboned.server.commands.demo.folder import fresh_folder
from backboned.server.commands.demo.plain_training import Budget, Curve, pretrain, train_from_scratch
from backboned.server.commands.demo.plot import save_plot
from backboned.server.commands.local_daemon import LocalDaemon
from backboned.server.commands.output import console, duration, show, table

IMAGES_A_CLASS = 3
PRETRAINING_EPOCHS = 12
BUDGET = Budget(epochs=12, batch_size=8)
SEEDS = (0, 1, 2)
SCRATCH_LEARNING_RATES = (3e-3, 1e-2, 3e-2)
SHOWN_METRICS = (
    "training_loss",
    "training_accuracy",
    "training_epoch",
    "training_feature_images_total",
    "serving_loss",
    "serving_outcomes_total",
    "serving_version",
    "predict_requests_total",
    "predict_batch_size_sum",
    "predict_batch_size_count",
    "checkpoint_loads_total",
    "stages_loaded",
    "stage_memory_bytes",
)


def tell(output: Path) -> dict[str, Any]:
    """Run the whole demo and leave its pictures, weights and checkpoints in `output`; returns the figures."""
    folder = fresh_folder(output)
    torch.set_num_threads(1)  # the network is so small that more would wait for each other
    backbone = Catalogue.from_entry_points().get("digits")

    _title("1. Pretrain a backbone on the digits 0-4")
    write_images(folder / "images", IMAGES_A_CLASS, seed=0)
    weights = _pretrain(backbone, folder)

    _title("2. Start the daemon, and fine-tune over gRPC for the digits 5-9, which the backbone has never seen")
    held_out = image_files(folder / "images" / "held-out")
    with LocalDaemon.start(_flags(folder, weights), folder / "state") as daemon:
        _say(f"daemon at {daemon.grpc}, metrics at {daemon.http}/metrics, log in {daemon.log}")
        tuned = _fine_tune(daemon.grpc, folder, held_out)
        metrics = _scrape(daemon.http)

    _title("3. The same network from scratch: same images, same epochs, same optimiser")
    scratch, learning_rate = _from_scratch(backbone, folder)

    _title("4. What transfer learning gave")
    _compare(tuned, scratch, learning_rate, len(held_out))
    picture = folder / "transfer-learning.png"
    save_plot([t.curve for t in tuned], scratch, IMAGES_A_CLASS, len(held_out), picture)
    _say(f"curves: {picture}")

    _title("5. What Prometheus saw")
    for line in metrics:
        _say(line)

    _title("6. How to go on")
    _go_on(folder, weights, held_out[0])
    return {
        "held_out_images": len(held_out),
        "images_a_class": IMAGES_A_CLASS,
        "frozen_pretrained": _result([t.curve for t in tuned]),
        "from_scratch": _result(scratch) | {"learning_rate": learning_rate},
        "picture": str(picture),
        "metrics": metrics,
    }


def _result(curves: Sequence[Curve]) -> dict[str, Any]:
    return {
        "held_out_accuracy": [curve.held_out_accuracy for curve in curves],
        "training_seconds": [curve.seconds for curve in curves],
    }


def _pretrain(backbone: Backbone, folder: Path) -> Path:
    images = load(image_files(folder / "images" / "pretraining"), backbone.preprocessing)
    start = time.perf_counter()
    state = pretrain(backbone, images, PRETRAINING_EPOCHS, seed=0)
    weights = folder / "digits.pth"
    torch.save(state, weights)
    took = duration(time.perf_counter() - start)
    _say(f"{len(images.labels)} images, {PRETRAINING_EPOCHS} epochs, {took}; a state_dict in {weights}")
    return weights


def _flags(folder: Path, weights: Path) -> list[str]:
    return [
        *_folders(folder, weights),
        f"--data-root={folder / 'images'}",
        "--device=cpu",
        "--compile=off",
        "--host=127.0.0.1",
        "--grpc-port=0",
        "--http-port=0",
    ]


def _folders(folder: Path, weights: Path) -> list[str]:
    return [
        f"--checkpoint-dir={folder / 'checkpoints'}",
        f"--state-dir={folder / 'state'}",
        f"--weights=digits={weights}",
    ]


def _fine_tune(address: str, folder: Path, held_out: Sequence[Path]) -> list[FineTuned]:
    tuned: list[FineTuned] = []
    labelled = folder / "images" / "labelled"
    with Client(address) as client:
        for seed in SEEDS:
            say = _say if seed == SEEDS[0] else _be_quiet
            made = fine_tune(client, labelled, held_out, BUDGET, seed=seed, say=say)
            _say(
                f"version {made.version} serves (seed {seed}, job of {duration(made.job_seconds)}): over gRPC it tells "
                f"{made.curve.held_out_accuracy:.1%} of {len(held_out)} held-out digits right"
            )
            tuned.append(made)
    return tuned


def _from_scratch(backbone: Backbone, folder: Path) -> tuple[list[Curve], float]:
    """The curves of every seed, with the learning rate that validates best: the baseline gets a tuned one."""
    train, val, held_out = (
        load(image_files(folder / "images" / part), backbone.preprocessing)
        for part in ("labelled/train", "labelled/val", "held-out")
    )
    tried = {rate: _seeds_from_scratch(backbone, train, val, held_out, rate) for rate in SCRATCH_LEARNING_RATES}
    for rate, curves in tried.items():
        accuracy = statistics.mean(curve.held_out_accuracy for curve in curves)
        _say(f"learning rate {rate:g}: validation loss {_loss(curves):.3f}, held-out accuracy {accuracy:.1%}")
    best = min(tried, key=lambda rate: _loss(tried[rate]))
    return tried[best], best


def _seeds_from_scratch(backbone: Backbone, train: Images, val: Images, held_out: Images, rate: float) -> list[Curve]:
    return [train_from_scratch(backbone, train, val, held_out, BUDGET, learning_rate=rate, seed=s) for s in SEEDS]


def _loss(curves: Sequence[Curve]) -> float:
    return statistics.mean(curve.best_val_loss for curve in curves)


def _compare(tuned: Sequence[FineTuned], scratch: Sequence[Curve], learning_rate: float, held_out: int) -> None:
    job_seconds = statistics.mean(t.job_seconds for t in tuned)
    rows = [
        ["frozen pretrained backbone, new head", *_figures([t.curve for t in tuned])],
        [f"same network from scratch (learning rate {learning_rate:g})", *_figures(scratch)],
    ]
    show(table(["", ">accuracy", ">range", ">training"], rows))
    _say(
        f"{held_out} held-out images, {len(SEEDS)} seeds, {IMAGES_A_CLASS} + {IMAGES_A_CLASS} images a class to train "
        f"and validate, {BUDGET.epochs} epochs; from scratch: the best of {len(SCRATCH_LEARNING_RATES)} learning rates"
    )
    _say(
        "training: features and epochs alone; a whole job, with its process, its data and a checkpoint for every "
        f"epoch, took {duration(job_seconds)}"
    )


def _figures(curves: Sequence[Curve]) -> list[str]:
    accuracies = [curve.held_out_accuracy for curve in curves]
    seconds = statistics.mean(curve.seconds for curve in curves)
    return [f"{statistics.mean(accuracies):.1%}", f"{min(accuracies):.1%} - {max(accuracies):.1%}", f"{seconds:.2f} s"]


def _scrape(http: str) -> list[str]:
    with urllib.request.urlopen(f"{http}/metrics", timeout=10) as reply:  # noqa: S310  # our own daemon
        lines = reply.read().decode().splitlines()
    wanted = tuple(f"backboned_{name}{end}" for name in SHOWN_METRICS for end in ("{", " ", "_sum{", "_count{"))
    return [line for line in lines if line.startswith(wanted)]


def _go_on(folder: Path, weights: Path, image: Path) -> None:
    _say(f"backboned serve {' '.join(_folders(folder, weights))}")
    _say(f"backboned predict {image} --model {MODEL}")
    _say(f"backboned models {MODEL}")
    _say("backboned finetune FOLDER --backbone resnet50      # your own photos, a folder a class")


def _title(text: str) -> None:
    console().print(f"\n{text}", style="bold")


def _say(text: str) -> None:
    console().print(f"   {text}", soft_wrap=True)


def _be_quiet(text: str) -> None:
    del text
