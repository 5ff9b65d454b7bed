"""Part `accuracy`: how good FineTune gets on all photos, beside the tutorial's loop for as many epochs."""

from dataclasses import asdict
from typing import Any

import grpc

from backboned.client import ClientError
from benchmarks._finetuned import fine_tuned
from benchmarks._plan import Course
from benchmarks._speed import rival

WANTED = {"mobilenet_v2": {"head": 90.5, "stages": 92.5}, "squeezenet1_1": {"head": 86.0}}
"""Accuracies on the flower photos, in per cent; `stages` is the better of the last stages and `auto`."""
WAYS = ("head", "stages", "auto", "tutorial")
LONGEST_SECONDS = 600


def accuracy(course: Course, backbone: str) -> None:
    """The head alone, the last stages too, and as many as the daemon finds best."""
    plan, bench = course.plan, course.bench
    dataset = course.album.folder
    if bench.settings.quick:
        counts = {"train": plan.train_images, "val": plan.validation_images}
        dataset = course.album.take(bench.work / f"{backbone}-few", counts, seed=0)
    asked: dict[str, dict[str, Any]] = {"head": {}} if "head" in plan.ways else {}
    if "stages" in plan.ways and (stages := plan.stages.get(backbone)):
        asked[f"head and {', '.join(stages)}"] = {"trainable_stages": stages}
    if "auto" in plan.ways:
        asked["auto"] = {"trainable_stages": ["auto"]}
    found: dict[str, dict[str, Any]] = {}
    with course.new_daemon(f"{backbone}-accuracy", backbone, dataset) as (daemon, client):
        for name, options in asked.items():
            model, judge = name.replace(" ", "-").replace(",", ""), dataset / "val"
            try:
                told = fine_tuned(client, model, backbone, dataset, judge=judge, max_epochs=plan.epochs, **options)
            except ClientError as error:
                if name != "auto" or error.code is not grpc.StatusCode.INVALID_ARGUMENT:
                    raise
                course.skip(f"{backbone}, trainable_stages auto", f"this daemon doesn't take it: {error.message}")
                continue
            found[name] = asdict(told)
            print(f"  {backbone}, {name}: {100 * found[name]['judged']:.1f} % in {told.seconds:.0f} s", flush=True)
            course.compiled(daemon, backbone)
            daemon.check()
    if "tutorial" in plan.ways:
        found["tutorial"] = rival(course, "tutorial", backbone, dataset, epochs=plan.epochs, seconds=0)
    bench.found.measurements[f"accuracy {backbone}"] = found
    _tell(course, backbone, found)


def _tell(course: Course, backbone: str, found: dict[str, dict[str, Any]]) -> None:
    add, wanted = course.bench.found.add, WANTED.get(backbone, {})
    photos = course.plan.train_images if course.bench.settings.quick else course.album.counts["train"]
    group = f"{backbone}, {photos} photos, {course.plan.epochs} epochs at most"
    deep = [name for name in found if name not in ("head", "tutorial")]
    best = max(deep, key=lambda name: found[name]["judged"], default="")
    for name, told in found.items():
        value = 100 * (max(e["val_accuracy"] for e in told["epochs"]) if name == "tutorial" else told["judged"])
        least = wanted.get("head") if name == "head" else wanted.get("stages") if name == best else None
        note = f"{told['seconds']:.0f} s, {len(told['epochs'])} epochs"
        if name != "tutorial":
            note += f"; as predicted over gRPC, {100 * told['val_accuracy']:.1f} % by the job"
        add(group, name, value, "%", wanted=f"≥ {least}" if least else "", note=note)
    if best:
        limit = f"≤ {LONGEST_SECONDS}" if "stages" in wanted else ""
        add(group, f"{best}, time", found[best]["seconds"], "s", wanted=limit)
