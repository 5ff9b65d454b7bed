"""What the parts of the training benchmark share: what was asked for, and daemons that may fine-tune."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from backboned.client import Client
from backboned.registry import Catalogue
from backboned.registry.weights import seeded_state
from benchmarks._albums import Album
from benchmarks._bench import Bench
from benchmarks._daemon import Daemon, copy_state

COMPILED = "compiled"
"""The folder of compiled code in a daemon's state: features that it keeps there are not for the next run."""


@dataclass(frozen=True)
class Plan:
    """What was asked for beside the common settings: see `training.py --help`."""

    weights: Mapping[str, Path]
    epochs: int
    train_images: int
    validation_images: int
    loop_seconds: float
    whole: bool
    stages: Mapping[str, tuple[str, ...]]
    served: str
    fresh_images: int
    views: int
    compiles: bool
    ways: frozenset[str]
    loops: tuple[str, ...]


@dataclass(frozen=True)
class Course:
    """The benchmark, its plan and its photos. `real` tells that these were given."""

    bench: Bench
    plan: Plan
    album: Album
    real: bool

    def weights(self, backbone: str) -> Path:
        """The file that was given for a backbone, or seeded random weights."""
        if given := self.plan.weights.get(backbone):
            return given
        file = self.bench.work / f"{backbone}-random.pth"
        if not file.is_file():
            torch.save(seeded_state(Catalogue.from_entry_points().get(backbone), seed=0), file)
        return file

    @contextmanager
    def new_daemon(self, name: str, backbone: str, *data_roots: Path) -> Iterator[tuple[Daemon, Client]]:
        """A daemon that knows nothing yet, and a client of it.

        It compiles if the plan says so; `compiled` waits for that.
        """
        folder = self.bench.work / name
        (folder / "checkpoints").mkdir(parents=True)
        if self.plan.compiles:
            copy_state(self._compiled(backbone) / COMPILED, folder / "state" / COMPILED)
        flags = [f"--weights={backbone}={self.weights(backbone)}", f"--device={self.bench.settings.device}"]
        flags.append(f"--compile={'auto' if self.plan.compiles else 'off'}")
        roots = [f"--data-root={root}" for root in data_roots]
        with Daemon(folder, [*flags, *roots]) as daemon, Client(daemon.grpc, timeout_seconds=600) as client:
            yield daemon, client

    def compiled(self, daemon: Daemon, backbone: str) -> float:
        """Wait until a daemon has compiled, and keep that for the next run; the seconds that this took."""
        seconds = daemon.wait_until_compiled()
        if self.plan.compiles:
            copy_state(daemon.folder / "state" / COMPILED, self._compiled(backbone) / COMPILED)
        return seconds

    def _compiled(self, backbone: str) -> Path:
        return self.bench.settings.out / "compiled" / backbone

    def skip(self, what: str, why: str) -> None:
        """Say what is left out."""
        line = f"skipped: {what}: {why}"
        self.bench.found.measurements.setdefault("skipped", []).append(line)
        print(line, flush=True)
