"""Part `swaps`: new versions of a model, one after another, while it is asked; and how soon each of them answers."""

import base64
import random
import statistics
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from backboned.client import Client
from backboned.registry.digest import stage_digest
from backboned.registry.directory import CheckpointDirectory
from backboned.registry.manifest import EpochMetrics, Manifest
from backboned.registry.version import VersionWriter
from backboned.v1 import model_service_pb2 as pb
from benchmarks._bench import LARGEST_ERROR, Bench, median, median_ratio
from benchmarks._daemon import Daemon
from benchmarks._models import CLASSES, Maker
from benchmarks._processes import cpu_seconds
from benchmarks._throughput import in_rounds

_CALLERS = 32
_MODEL = "head-0000"
_PAUSE_SECONDS = 0.2
_WRITE_SECONDS = 0.03
"""At most, on a machine that is busy."""

_SWAPS, _TURNS = 20, 5
"""So many swaps a turn, and so many turns a round."""

_WARM_UP_SECONDS = 0.5
_RESAMPLES = 2000

_ALONE = 40

Head = Mapping[str, Tensor]


class Swapper:
    """Writes versions of one model as a trainer writes them. For one thread."""

    def __init__(self, maker: Maker, checkpoints: Path) -> None:
        self._maker = maker
        self._directory = CheckpointDirectory(checkpoints)
        self._first = Manifest.read(self._directory.version(_MODEL, 1))
        self.heads: dict[int, Head] = {1: maker.heads(1)[_MODEL]}
        self.completed: dict[int, float] = {}

    def swap(self) -> int:
        """Write one more version; returns its number. It is complete at the moment that `completed` tells."""
        version = self._directory.reserve(_MODEL)
        head = self.heads[version] = self._maker.head(100_000 + version)
        digests = {**self._first.stages, "head": stage_digest(head)}
        manifest = replace(self._first, version=version, stages=digests, epochs=(), complete=False)
        writer = VersionWriter(self._directory.version(_MODEL, version), manifest)
        metrics = EpochMetrics()
        writer.write(1, head, stages=digests, optimizer_state={}, loss=0.0, metrics=metrics, best=True)
        self.completed[version] = time.monotonic()
        writer.complete()
        return version

    def drop(self, *, rename: bool) -> int:
        """Drop a file with one more head beside the versions, written in place or renamed to its name when whole."""
        version = max(self._directory.versions(_MODEL)) + 1
        head = self.heads[version] = self._maker.head(100_000 + version)
        file = self._directory.root / _MODEL / "dropped.pt"
        target = file.with_name("dropped.part") if rename else file
        torch.save({"backbone": self._first.backbone, "state_dict": dict(head), "classes": list(CLASSES)}, target)
        if rename:
            self.completed[version] = time.monotonic()
            target.rename(file)
        else:
            self.completed[version] = time.monotonic()
        return version


def swaps(bench: Bench, backbone: str) -> None:
    """Swaps under 32 callers, in short turns with none, and swaps while one caller asks all the time.

    What a swap costs is less than what a shared machine gains or loses in a while: turns that follow one another are
    compared, and of all turns of a kind together the slowest hundredth of the answers.
    """
    turns, each = (1, 3) if bench.settings.quick else (_TURNS * bench.settings.rounds, _SWAPS)
    maker = bench.maker(backbone)
    models = maker.heads(1)
    with bench.daemon(f"{backbone}-swaps", backbone, models) as daemon:
        swapper = Swapper(maker, daemon.folder / "checkpoints")
        alone = {
            "a version of a job": _alone(daemon, bench, swapper.swap, swapper),
            "a dropped file": _alone(daemon, bench, lambda: swapper.drop(rename=False), swapper),
            "a renamed file": _alone(daemon, bench, lambda: swapper.drop(rename=True), swapper),
        }
        costs = [_cost(daemon, swapper, 2 if bench.settings.quick else _ALONE)]
        seconds = 1.0 if bench.settings.quick else each * (_PAUSE_SECONDS + _WRITE_SECONDS) - _WARM_UP_SECONDS
        memory = list[int]()

        def measure(swapping: int) -> dict[str, Any]:
            told = _loaded(bench, daemon, swapper, seconds=seconds, swapping=swapping)
            if swapping:
                memory.append(daemon.memory_bytes())
            return told

        found = in_rounds(turns, {"without": partial(measure, 0), "with": partial(measure, each)})
        costs.append(_cost(daemon, swapper, 2 if bench.settings.quick else _ALONE))
    told = {"alone": alone, "turns": found, "memory_bytes": memory, "cpu_ms": costs}
    bench.found.measurements[f"swaps {backbone}"] = told
    _tell(bench, backbone, found, alone, memory)
    group = f"{backbone}, what a version costs the daemon"
    bench.found.add(group, "CPU, at first", costs[0], "ms", note="nobody asks")
    bench.found.add(group, "CPU, at the end", costs[1], "ms", note=f"the model has {max(swapper.heads)} versions")


def _tell(
    bench: Bench,
    backbone: str,
    found: Mapping[str, list[dict[str, Any]]],
    alone: Mapping[str, list[float]],
    memory: Sequence[int],
) -> None:
    add, group = bench.found.add, f"{backbone}, swaps, {_CALLERS} callers"
    before, after = found["without"], found["with"]
    ratio, low, high = _slowest(before, after)
    add(group, "without swaps, p99", _p99(before), "ms", note=f"{len(before)} turns")
    note = f"95 % interval of the ratio {low:.2f} to {high:.2f}"
    add(group, "with swaps, p99", _p99(after), "ms", ratio=ratio, wanted="≤ 1.10", note=note)
    rate = "images_per_second"
    add(group, "without swaps", median(before, rate), "images/s")
    add(group, "with swaps", median(after, rate), "images/s", ratio=median_ratio(after, before, rate))
    done = sum(r["swaps"] for r in found["with"])
    answers = sum(r["answers"] for turns in found.values() for r in turns)
    wrong = sum(r["wrong"] for turns in found.values() for r in turns)
    failed = sum(r["failed"] for turns in found.values() for r in turns)
    seen = sum(r["versions"] for r in found["with"])
    add(group, "swaps", done, "", note=f"{seen} of the versions answered")
    add(group, "calls that failed", failed, "", wanted="0")
    add(group, "answers not their version's", wrong, "", wanted="0", note=f"of {answers}")
    waits = [wait for r in found["with"] for wait in r["first_answer_ms"]]
    if waits:
        add(group, "complete to first answer", statistics.median(waits), "ms", note="waiting among 32 calls included")
    third = max(1, len(memory) // 3)
    growth = (statistics.median(memory[-third:]) - statistics.median(memory[:third])) / 1e6
    note = f"first to last third of {len(memory)} turns; {min(memory) / 1e6:.0f} to {max(memory) / 1e6:.0f} MB"
    add(group, "memory, growth", growth, "MB", note=note)
    group = f"{backbone}, a new version, one caller"
    for name, times in alone.items():
        note = f"{min(times):.0f} to {max(times):.0f}"
        add(group, name, statistics.median(times), "ms", wanted="≤ 100", note=note)


def _loaded(bench: Bench, daemon: Daemon, swapper: Swapper, *, seconds: float, swapping: int = 0) -> dict[str, Any]:
    """What 32 callers see in so many seconds, while so many versions are written."""
    over = threading.Event()
    first = max(swapper.heads) + 1

    def swap() -> None:
        for _ in range(swapping):
            if over.wait(_PAUSE_SECONDS):
                return
            swapper.swap()

    thread = threading.Thread(target=swap)
    thread.start()
    try:
        told = bench.ask(
            daemon, [_MODEL], callers=_CALLERS, seconds=seconds, warm_up=min(_WARM_UP_SECONDS, seconds), all=True
        )
    finally:
        over.set()
        thread.join()
    daemon.check()
    answers = [(ended, photo, base64.b64decode(encoded)) for ended, photo, encoded in told["answers"]]
    right, at = _checked(bench, swapper, answers)
    written = [v for v in swapper.heads if v >= first]
    return {
        "latencies_ms": [1e3 * latency for latency in told["latencies"]],
        "images_per_second": told["images_per_second"],
        "failed": sum(count for code, count in told["codes"].items() if code != "OK"),
        "swaps": len(written),
        "versions": len(at.keys() & set(written)),
        "answers": len(answers),
        "wrong": len(answers) - right,
        "first_answer_ms": [1e3 * (at[v] - swapper.completed[v]) for v in written if v in at],
    }


def _slowest(before: Sequence[Mapping[str, Any]], after: Sequence[Mapping[str, Any]]) -> tuple[float, float, float]:
    """p99 of `after` by that of `before`, and the 95 % interval of that by resampling the pairs of turns."""
    pairs, draw = list(zip(before, after, strict=True)), random.Random(0)

    def ratio(pairs: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]]) -> float:
        return _p99([after for _, after in pairs]) / _p99([before for before, _ in pairs])

    ratios = sorted(ratio(draw.choices(pairs, k=len(pairs))) for _ in range(_RESAMPLES))
    return ratio(pairs), ratios[_RESAMPLES // 40], ratios[-_RESAMPLES // 40]


def _p99(turns: Sequence[Mapping[str, Any]]) -> float:
    return float(np.percentile(np.concatenate([turn["latencies_ms"] for turn in turns]), 99))


@torch.inference_mode()
def _checked(
    bench: Bench, swapper: Swapper, answers: Sequence[tuple[float, int, bytes]]
) -> tuple[int, dict[int, float]]:
    """How many answers are those of the version that they name, and when each version answered first."""
    truth = bench.maker(next(iter(bench.settings.backbones))).truth
    right, first = 0, dict[int, float]()
    for ended, photo, encoded in answers:
        answer = pb.PredictResponse.FromString(encoded)
        weight, bias = swapper.heads[answer.version].values()
        expected = F.linear(truth.features(photo).flatten(1), weight.flatten(1), bias).softmax(1)[0]
        given = {c.label: c.probability for c in answer.predictions[0].classes}
        error = (torch.tensor([given[name] for name in CLASSES]) - expected).abs().max().item()
        right += error <= LARGEST_ERROR
        first[answer.version] = min(ended, first.get(answer.version, ended))
    return right, first


def _alone(daemon: Daemon, bench: Bench, write: Callable[[], int], swapper: Swapper) -> list[float]:
    """Milliseconds from complete to the first answer, of some versions, where one caller asks again and again."""
    photo = bench.photo()
    found = []
    with Client(daemon.grpc) as client:
        for _ in range(2 if bench.settings.quick else _ALONE):
            version = write()
            deadline = time.monotonic() + 30
            while client.predict(_MODEL, [photo], top_k=1).version != version:
                if time.monotonic() > deadline:
                    raise SystemExit(f"version {version} never answered")
            found.append(1e3 * (time.monotonic() - swapper.completed[version]))
    return found


def _cost(daemon: Daemon, swapper: Swapper, versions: int) -> float:
    """Milliseconds of CPU that each of some new versions costs the daemon, beyond what it takes with nothing to do."""
    spent = []
    for write in (lambda: None, swapper.swap):
        before = cpu_seconds(daemon.pid)
        for _ in range(versions):
            write()
            time.sleep(_PAUSE_SECONDS)
        spent.append(cpu_seconds(daemon.pid) - before)
    return 1e3 * (spent[1] - spent[0]) / versions
