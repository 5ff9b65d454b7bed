"""Part `speed`: the tutorial's loop, a good one, and FineTune, on the same photos for as many epochs."""

import shutil
import statistics
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from backboned.client import Client
from benchmarks._bench import median, median_ratio
from benchmarks._finetuned import fine_tuned
from benchmarks._plan import Course
from benchmarks._processes import Worker
from benchmarks._throughput import in_rounds

LOOPS = {"tutorial": "≥ 40", "good": "≥ 8"}
"""The loops, and how many times as long as FineTune they should take."""

HEAVY = "vgg19"
"""The backbone of which that is wanted: what is saved is its passes over images."""

SECOND_RATE = 3e-3
ONE_VIEW = "ours, 1 view"
_POINTS = 0.005

_Found = dict[str, list[dict[str, Any]]]


def speed(course: Course, backbone: str) -> None:
    """Rounds in which each of the three trains on photos that are new to all."""
    bench, plan, photos = course.bench, course.plan, course.bench.work / f"{backbone}-photos"
    counts = {"train": plan.train_images, "val": plan.validation_images}
    judged = course.real and backbone in plan.weights and not bench.settings.quick
    judge = course.album.folder / "val" if judged else None
    album = course.album
    photos.mkdir()
    with course.new_daemon(f"{backbone}-speed", backbone, photos) as (daemon, client):
        first = album.take(photos / "first", counts, seed=0)
        new = asdict(fine_tuned(client, "flowers", backbone, first, max_epochs=plan.epochs, patience=0))
        _say(backbone, "ours, new daemon", new)
        compiling = course.compiled(daemon, backbone)
        found: _Found = {}
        for number in range(1, bench.settings.rounds + 1):
            dataset = album.take(photos / str(number), counts, seed=number)
            whole = plan.whole or (number == 1 and backbone in plan.weights)
            limit = 0.0 if whole else plan.loop_seconds
            steps: dict[str, Callable[[], dict[str, Any]]] = {
                kind: partial(_rival, course, kind, backbone, dataset, limit=limit, judge=judge if whole else None)
                for kind in LOOPS
                if kind in plan.loops
            }
            steps["ours"] = partial(_ours, course, client, backbone, dataset, judge)
            single = album.take(photos / f"{number}-single", counts, seed=number, grain=1)
            steps[ONE_VIEW] = partial(_one_view, course, client, backbone, single, judge)
            if not number % 2:
                steps = dict(reversed(steps.items()))
            for name, rounds in in_rounds(1, steps).items():
                found.setdefault(name, []).extend(rounds)
                _say(backbone, name, rounds[0])
            daemon.check()
            shutil.rmtree(dataset)
            shutil.rmtree(single)
    bench.found.measurements[f"speed {backbone}"] = {"new daemon": new, "compiling_seconds": compiling, "rounds": found}
    _tell(course, backbone, found, new)


def rival(course: Course, kind: str, backbone: str, dataset: Path, **question: Any) -> dict[str, Any]:
    """One of the loops on a dataset, in a process of its own."""
    log = course.bench.settings.out / "loops.log"
    with Worker("benchmarks._rivals", log=log) as worker:
        asked = {"kind": kind, "backbone": backbone, "dataset": str(dataset), "weights": str(course.weights(backbone))}
        return worker.ask(**asked, **question)


def _rival(
    course: Course, kind: str, backbone: str, dataset: Path, *, limit: float, judge: Path | None
) -> dict[str, Any]:
    told = str(judge) if judge else None
    return rival(course, kind, backbone, dataset, epochs=course.plan.epochs, seconds=limit, judge=told)


def _ours(course: Course, client: Client, backbone: str, dataset: Path, judge: Path | None) -> dict[str, Any]:
    """FineTune with nothing of these photos cached, and once more with another rate."""
    train = partial(fine_tuned, client, "flowers", backbone, dataset, max_epochs=course.plan.epochs, patience=0)
    first = asdict(train(judge=judge))
    second = asdict(train(learning_rate=SECOND_RATE))
    return {**first, "second": second}


def _one_view(course: Course, client: Client, backbone: str, dataset: Path, judge: Path | None) -> dict[str, Any]:
    """FineTune on the same photos, whose pixels it doesn't know either, each only as it is served: no augmentation."""
    options = {"max_epochs": course.plan.epochs, "patience": 0, "views": 1}
    return asdict(fine_tuned(client, "flowers", backbone, dataset, judge=judge, **options))


def _say(backbone: str, name: str, told: dict[str, Any]) -> None:
    again = f", again {told['second']['seconds']:.1f} s" if "second" in told else ""
    print(f"  {backbone}, {name}: {told['seconds']:.1f} s{again}", flush=True)


def _tell(course: Course, backbone: str, found: _Found, new: dict[str, Any]) -> None:
    plan, add, ours = course.plan, course.bench.found.add, found["ours"]
    weights = "" if backbone in plan.weights else ", random weights"
    group = f"{backbone}, {plan.train_images} photos, {plan.epochs} epochs{weights}"
    for kind in plan.loops:
        wanted = LOOPS[kind] if backbone == HEAVY else ""
        rounds = found[kind]
        ratio = median_ratio(rounds, ours, "seconds")
        add(group, f"{kind} loop", median(rounds, "seconds"), "s", ratio=ratio, wanted=wanted, note=_extent(rounds))
        ratio = median_ratio(rounds, found[ONE_VIEW], "seconds")
        add(group, f"{kind} loop to {ONE_VIEW}", median(rounds, "seconds"), "s", ratio=ratio, wanted=wanted)
    compiled = "code compiled before, if any, is kept" if plan.compiles else "--compile off"
    note = f"the first FineTune of a daemon; {compiled}; {_phases([new])}"
    add(group, "ours, new daemon", new["seconds"], "s", note=note)
    add(group, "ours, new photos", median(ours, "seconds"), "s", note=_phases(ours))
    add(group, f"{ONE_VIEW}, new photos", median(found[ONE_VIEW], "seconds"), "s", note=_phases(found[ONE_VIEW]))
    seconds = [r["second"] for r in ours]
    note = f"another rate; {_phases(seconds)}"
    add(group, "ours, same photos again", median(seconds, "seconds"), "s", wanted="< 5", note=note)
    if weights:
        course.skip(f"{backbone}'s accuracy", f"its weights are random; give --weights {backbone}=FILE")
        return
    _tell_accuracy(course, group, found)


def _tell_accuracy(course: Course, group: str, found: _Found) -> None:
    """Accuracies, differences to those loops that ran whole on the same photos, and the time to what all reached."""
    add = course.bench.found.add
    whole = {name: [r for r in rounds if r["epochs"] and r.get("whole", True)] for name, rounds in found.items()}
    whole = {name: rounds for name, rounds in whole.items() if rounds}
    best = {name: statistics.median(_best(r) for r in rounds) for name, rounds in whole.items()}
    for name, rounds in whole.items():
        values = [_judged(r) for r in rounds]
        note = f"best of its {course.plan.validation_images} validation photos {100 * best[name]:.1f} %"
        spread = f"{len(values)} rounds, {100 * min(values):.1f} to {100 * max(values):.1f} %; " if values[1:] else ""
        add(group, f"{name}, accuracy", 100 * statistics.median(values), "%", note=spread + note)
    for loop in (name for name in whole if name in LOOPS):
        for ours in ("ours", ONE_VIEW):
            pairs = [(a, b) for a, b in zip(found[ours], found[loop], strict=True) if b["whole"]]
            gains = [100 * (_judged(a) - _judged(b)) for a, b in pairs]
            note = f"of {len(gains)} rounds on the same photos; mean {statistics.mean(gains):+.1f}"
            add(group, f"{ours} − {loop}", statistics.median(gains), "points", wanted="≥ −0.5", note=note)
    # What all of them reached in a round: each round has photos of its own, easy ones or hard ones.
    targets = [min(map(_best, together)) - _POINTS for together in zip(*whole.values(), strict=False)]
    reached = {
        name: statistics.median(_seconds_to(r, target) for r, target in zip(rounds, targets, strict=False))
        for name, rounds in whole.items()
    }
    for name, seconds in reached.items():
        note = "the whole job" if name.startswith("ours") else ""
        add(group, f"{name}, to what all reached", seconds, "s", ratio=seconds / reached["ours"], note=note)


def _judged(told: dict[str, Any]) -> float:
    """The accuracy on all of `val/`; that on its own validation photos, where it wasn't judged."""
    return _best(told) if told.get("judged") is None else float(told["judged"])


def _best(told: dict[str, Any]) -> float:
    return float(told.get("val_accuracy") or max(e["val_accuracy"] for e in told["epochs"]))


def _seconds_to(told: dict[str, Any], target: float) -> float:
    """When a loop's epoch first reached an accuracy; ours counts only once its version answers."""
    if "version" in told:
        return float(told["seconds"])
    return float(next(e["seconds"] for e in told["epochs"] if e["val_accuracy"] >= target))


def _extent(rounds: list[dict[str, Any]]) -> str:
    parts = [r for r in rounds if not r["whole"]]
    if not parts:
        return "run whole"
    images = min(r["images"] for r in parts)
    whole = f"; {len(rounds) - len(parts)} run whole" if len(parts) < len(rounds) else ""
    return f"SCALED: worked out from {images} of {parts[0]['all_images']} images a round{whole}"


def _phases(rounds: list[dict[str, Any]]) -> str:
    features, succeeded = median(rounds, "features_seconds"), median(rounds, "succeeded_seconds")
    computed, cached = median(rounds, "computed"), median(rounds, "cached")
    return (
        f"features by {features:.1f} s ({computed:.0f} computed, {cached:.0f} cached), succeeded by {succeeded:.1f} s"
    )
