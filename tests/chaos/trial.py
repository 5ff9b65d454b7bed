"""A real loader on directories of mutated files, in a process of its own that is watched.

    python -m tests.chaos.trial FOLDER COUNT [KIND:SEED …]

Writes one line of JSON for each mutation, and one about the process at the end.
"""

import faulthandler
import json
import logging
import os
import resource
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch

from backboned.registry.directory import CheckpointDirectory
from backboned.registry.weights import WeightStore
from backboned.server.compute.device import Device
from backboned.server.compute.stages import StageStore
from backboned.server.database import open_database
from backboned.server.ops.metrics import Metrics
from backboned.server.serving.loader import Loader, LoaderSettings
from backboned.server.serving.plan import Limits
from backboned.server.serving.records import Records
from backboned.server.serving.snapshot import LoadedModel, Snapshot, State
from backboned.server.troubles import TroubleKind, Troubles
from tests.chaos import (
    beside_kinds,
    bytes_kinds,
    extreme_kinds,
    name_kinds,
    pickle_kinds,
    safetensors_kinds,
    tensor_kinds,
    version_kinds,
    zip_kinds,
)  # fmt: skip
from tests.chaos.good import catalogue, good, saved, state, write_version
from tests.chaos.mutation import Expected, Good, Kind, Site

ROOMS = (
    bytes_kinds, zip_kinds, pickle_kinds, tensor_kinds, beside_kinds, safetensors_kinds, version_kinds, name_kinds,
    extreme_kinds,
)  # fmt: skip
BATCH = 250
PATIENCE_SECONDS = 300.0
MOST_BYTES = 16 * 2**30
"""Of address space: what has no bound ends here, and not with the machine's memory."""
FORBIDDEN = (
    "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "os.forkpty", "os.putenv", "os.chmod", "os.chown",
    "subprocess.Popen", "pickle.find_class", "socket.connect", "socket.getaddrinfo", "urllib.Request", "ctypes.dlopen",
)  # fmt: skip
"""Audit events that the loading of a checkpoint never causes."""


@dataclass(frozen=True)
class Outcome:
    """What became of a mutation: what was served of it, if anything, and the reasons for what wasn't."""

    kind: str
    seed: int
    expected: str
    served: bool
    intact: bool
    reasons: Sequence[str]


def kinds() -> dict[str, Kind]:
    """All kinds, by the names of their room and their own."""
    return {
        f"{room.__name__.rpartition('.')[2].removesuffix('_kinds')}.{k.__name__}": k
        for room in ROOMS
        for k in room.KINDS
    }


def chosen(count: int) -> list[tuple[str, int]]:
    """Kinds in turns, each time with another seed."""
    names = list(kinds())
    return [(names[i % len(names)], i // len(names)) for i in range(count)]


def plant(name: str, seed: int, root: Path, number: int, files: Good) -> tuple[Site, Expected, set[Path]]:
    """Put a mutation into a model's folder of its own; returns also the folders that it made in `root`."""
    before = set(root.iterdir())
    site = Site(root / f"m{number}", f"f{number}", files, root.parent / "mark")
    site.folder.mkdir()
    expected = kinds()[name](Random(f"{name}:{seed}"), site)
    return site, expected, set(root.iterdir()) - before


class Watch:
    """Hears what Python does: events that are forbidden, writing out of the folder, the last file that was opened."""

    def __init__(self, folder: Path) -> None:
        self._folder = str(folder)
        self._last = os.open(folder / "last-opened", os.O_CREAT | os.O_WRONLY)
        self.listening = False
        self.heard: list[str] = []
        sys.addaudithook(self._hear)

    def _hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.listening:
            return
        if event in FORBIDDEN:
            self.heard.append(f"{event} {arguments!r}"[:300])
        elif event == "open" and isinstance(arguments[0], str):
            path, _, flags = arguments
            if not path.startswith(self._folder) and flags & (os.O_WRONLY | os.O_RDWR) and not path.startswith("/dev/"):
                self.heard.append(f"open {arguments!r}"[:300])
            os.pwrite(self._last, path.encode("utf-8", "replace")[:1000].ljust(1000), 0)


def fingerprint(model: LoadedModel) -> str:
    """What answers stand on: tensors by their digests, classes, preprocessing, calibration."""
    told = model.manifest
    answers = model.answers
    calibrated = answers and [
        answers.temperature, answers.uncertain_below, answers.unfamiliar_beyond, answers.centres.double().sum().item(),
        answers.scale.double().sum().item(),
    ]  # fmt: skip
    values = [[s.key.digest for s in model.path], told.task.value, told.classes, asdict(told.preprocessing), calibrated]
    return json.dumps(values)


def look(root: Path, work: Path, weights: Path, watch: Watch) -> Snapshot:
    """What a loader makes of `root`, once it has looked at everything."""
    with ExitStack() as stack:
        database = open_database(work / "db.sqlite")
        stack.callback(database.dispose)
        known, troubles = catalogue(), Troubles()
        loader = Loader(
            CheckpointDirectory(root),
            known,
            WeightStore(known, {"digits": weights}),
            StageStore(Device.choose("cpu", "fp32")),
            telemetry=Metrics(version="0", torch_version="0", device="cpu"),
            records=Records.of(database),
            troubles=troubles,
            settings=LoaderSettings(0.2, "polling", Limits(settle_seconds=0.2)),
        )
        watch.listening = True
        stack.callback(loader.stop)
        loader.start()
        deadline = time.monotonic() + PATIENCE_SECONDS
        while True:
            snapshot = loader.refresh().result(PATIENCE_SECONDS)
            if troubles.has(TroubleKind.CHECKPOINT_DIRECTORY):
                raise SystemExit(f"the loader is stuck: {troubles.now()}")
            states = [v.state for m in snapshot.models.values() for v in m.versions.values()]
            waiting = [f for f in snapshot.refused if f.state is State.LOADING]
            settled = snapshot.refused and not waiting and not {State.LOADING, State.AVAILABLE} & set(states)
            if settled and loader.refresh().result(PATIENCE_SECONDS).models.keys() == snapshot.models.keys():
                return snapshot
            if time.monotonic() > deadline:
                return snapshot
            time.sleep(0.02)


def outcomes(snapshot: Snapshot, site: Site, made: set[Path]) -> tuple[list[LoadedModel], list[str]]:
    """What is served of the folders that a mutation made, and the reasons for what isn't."""
    versions = [
        v for name, m in snapshot.models.items() if site.folder.parent / name in made for v in m.versions.values()
    ]
    refused = [f for f in snapshot.refused if f.path.parent in made or f.path.parent.parent in made]
    reasons = [v.reason for v in versions if v.state is State.QUARANTINED]
    reasons += [f.reason if f.state is State.QUARANTINED else f"it is still waited for: {f.reason}" for f in refused]
    return [v.loaded for v in versions if v.loaded is not None], reasons


def peak_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]) * 1024


def batches(folder: Path, mutations: Sequence[tuple[str, int]]) -> Iterator[Outcome]:
    """Plant and judge, some hundred at a time; good files stand among them, and must be served."""
    files = good(folder / "good")
    weights = folder / "digits.pth"
    weights.write_bytes(saved(state()))
    watch = Watch(folder)
    plain: set[str] = set()
    baseline = 0
    for start in (-1, *range(0, len(mutations), BATCH)):  # the first batch is of good files alone
        work = folder / f"batch-{start}"
        root = work / "checkpoints"
        root.mkdir(parents=True)
        for name in ("full", "head", "trained", "legacy", "legacy_head", "safetensors", "safetensors_head"):
            (root / f"good-{name}").mkdir()
            suffix = ".safetensors" if name.startswith("safe") else ".pt"
            (root / f"good-{name}" / f"x{suffix}").write_bytes(getattr(files, name))
            if name.startswith("safe"):
                (root / f"good-{name}" / "classes.txt").write_text("ant\nbee\nwasp\n")
        (root / "good-bad").mkdir()
        (root / "good-bad" / "x.pt").write_bytes(b"bad")
        write_version(root / "good-version" / "1")
        wanted = mutations[start : start + BATCH] if start >= 0 else []
        planted = [(n, s, *plant(n, s, root, i, files)) for i, (n, s) in enumerate(wanted)]
        snapshot = look(root, work, weights, watch)
        watch.listening = False
        good_ones = [k.loaded for n, m in snapshot.models.items() if n.startswith("good-") for k in m.versions.values()]
        found = {fingerprint(m) for m in good_ones if m is not None}
        assert len(good_ones) == 8 and (not plain or found == plain), "good files among the mutated ones are served"
        plain = found
        for name, seed, site, expected, made in planted:
            served, reasons = outcomes(snapshot, site, made)
            intact = all(fingerprint(m) in plain for m in served)
            yield Outcome(name, seed, expected.value, bool(served), intact, reasons)
        if start < 0:
            baseline = peak_bytes()
    told = {
        "heard": watch.heard,
        "baseline_bytes": baseline,
        "peak_bytes": peak_bytes(),
        "mark": (folder / "mark").exists(),
    }
    tell(told)


def tell(values: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(values) + "\n")
    sys.stdout.flush()


def main() -> None:
    faulthandler.enable()
    resource.setrlimit(resource.RLIMIT_AS, (MOST_BYTES, MOST_BYTES))
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    folder, count, *only = sys.argv[1:]
    wanted = [(name, int(seed)) for name, _, seed in (o.partition(":") for o in only)] or chosen(int(count))
    for outcome in batches(Path(folder).resolve(), wanted):
        tell(asdict(outcome))


if __name__ == "__main__":
    main()
