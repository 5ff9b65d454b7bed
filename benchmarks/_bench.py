"""What all parts of the serving benchmark share: photos, models, daemons, callers, and what was found so far."""

import base64
import json
import os
import platform
import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from backboned.server.compute.device import Device
from backboned.v1 import model_service_pb2 as pb
from benchmarks._daemon import Daemon, copy_state
from benchmarks._models import CLASSES, Maker, Models
from benchmarks._photos import make_photos
from benchmarks._processes import Worker

LARGEST_ERROR = 0.05
"""How far an answer in low precision may be from the eager fp32 one, as a probability."""


@dataclass(frozen=True)
class Settings:
    """What was asked for: see `serving.py --help`."""

    backbones: tuple[str, ...]
    seconds: float
    rounds: int
    device: str
    only: frozenset[str]
    out: Path
    photos: Path | None
    quick: bool


@dataclass(frozen=True)
class Row:
    """One line of the report. `ratio` is to what the group compares with; `wanted` is what issue or reader expect."""

    group: str
    name: str
    value: float
    unit: str
    ratio: float | None = None
    wanted: str = ""
    note: str = ""


@dataclass
class Found:
    """Rows for people, and beside them every single measurement."""

    rows: list[Row] = field(default_factory=list)
    measurements: dict[str, Any] = field(default_factory=dict)

    def add(self, group: str, name: str, value: float, unit: str, **more: Any) -> None:
        """One more row."""
        self.rows.append(Row(group, name, value, unit, **more))


class Bench:
    """The benchmark's parts, made when they are needed. For one thread."""

    def __init__(self, settings: Settings, work: Path, callers: Worker, photos: Sequence[bytes]) -> None:
        self.settings = settings
        self.work = work
        self.found = Found()
        self.cores = sorted(os.sched_getaffinity(0))
        self._callers = callers
        self._photos = photos
        self._makers: dict[str, Maker] = {}

    @classmethod
    @contextmanager
    def open(cls, settings: Settings, work: Path) -> Iterator["Bench"]:
        """Make the photos and start the callers' process."""
        photos = make_photos(work / "photos", settings.photos)
        log = settings.out / "callers.log"
        with Worker("benchmarks._load", str(work / "photos"), log=log) as callers:
            yield cls(settings, work, callers, photos)

    def maker(self, backbone: str) -> Maker:
        """The maker of a backbone's models."""
        if backbone not in self._makers:
            self._makers[backbone] = Maker(backbone, self.work / f"{backbone}.pth", self._photos)
        return self._makers[backbone]

    @contextmanager
    def daemon(self, name: str, backbone: str, models: Models, *flags: str) -> Iterator[Daemon]:
        """A daemon that serves `models`, and has compiled all that it wants to."""
        maker, folder = self.maker(backbone), self.work / name
        compiled = self.settings.out / "compiled" / backbone
        if not (folder / "checkpoints").is_dir():
            maker.write(models, folder / "checkpoints")
            copy_state(compiled, folder / "state")
        common = [f"--weights={backbone}={maker.weights}", f"--device={self.settings.device}"]
        with Daemon(folder, [*common, *flags]) as daemon:
            if (seconds := daemon.wait_until_compiled()) > 2:
                print(f"  {name}: compiled in {seconds:.0f} s", flush=True)
            copy_state(folder / "state", compiled)
            yield daemon

    def load(self, daemon: Daemon, backbone: str, models: Models, **question: Any) -> dict[str, Any]:
        """Let the callers load a daemon, and check a sample of its answers. Raises `SystemExit` if one is wrong."""
        answer = self._ask(daemon.grpc, daemon.pid, sorted(models), question)
        daemon.check()
        samples = [(m, p, _probabilities(base64.b64decode(encoded))) for m, p, encoded in answer.pop("samples")]
        error = self.maker(backbone).truth.largest_error(models, samples)
        if error > LARGEST_ERROR:
            raise SystemExit(f"{backbone}: an answer is {error:.3f} from the truth; {LARGEST_ERROR} is allowed")
        if not question.get("rate") and answer["codes"].keys() != {"OK"}:
            raise SystemExit(f"{backbone}: not every call was answered: {answer['codes']}")
        return {**answer, "checked_answers": len(samples), "largest_error": error}

    def ask(self, daemon: Daemon, models: Sequence[str], **question: Any) -> dict[str, Any]:
        """Let the callers load a daemon; what they tell is for the caller of this to check."""
        return self._ask(daemon.grpc, daemon.pid, models, question)

    def photo(self) -> bytes:
        """One of the photos."""
        return self._photos[0]

    def flood(self, address: str, pid: int, *, rate: float) -> dict[str, Any]:
        """Let the callers send `rate` requests a second to any server."""
        return self._ask(address, pid, ["any"], {"rate": rate})

    def _ask(self, address: str, pid: int, models: Sequence[str], question: Mapping[str, Any]) -> dict[str, Any]:
        seconds = self.settings.seconds
        told: dict[str, Any] = {"seconds": seconds, "warm_up": min(1.5, seconds), "callers": 1, "pause": 0}
        told |= {"rate": 0, "images": 1, "all": False, "throttled": False, "beside": []}
        return self._callers.ask(address=address, pid=pid, models=models, **{**told, **question})

    def environment(self) -> dict[str, Any]:
        """What the figures depend on."""
        device = Device.choose(self.settings.device)
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        cpu = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown CPU")
        gpu = torch.cuda.get_device_name(device.device) if device.device.type == "cuda" else ""
        return {
            "cpu": cpu,
            "cores": len(self.cores),
            "gpu": gpu,
            "precision": device.precision,
            "torch": torch.__version__,
            "python": platform.python_version(),
        }

    def write(self, path: Path) -> None:
        """All that was found, as JSON."""
        settings = {k: sorted(v) if isinstance(v, frozenset) else v for k, v in vars(self.settings).items()}
        rows = [vars(row) for row in self.found.rows]
        content = {"environment": self.environment(), "settings": settings, "rows": rows}
        path.write_text(json.dumps({**content, "measurements": self.found.measurements}, indent=1, default=str) + "\n")


def median(measurements: Sequence[Mapping[str, Any]], key: str) -> float:
    """The median of one figure over rounds."""
    return statistics.median(float(m[key]) for m in measurements)


def median_ratio(above: Sequence[Mapping[str, Any]], below: Sequence[Mapping[str, Any]], key: str) -> float:
    """The median over rounds of the ratios of one figure, each within its round."""
    return statistics.median(float(a[key]) / float(b[key]) for a, b in zip(above, below, strict=True))


def _probabilities(answer: bytes) -> list[float]:
    by_label = {c.label: c.probability for c in pb.PredictResponse.FromString(answer).predictions[0].classes}
    return [by_label[name] for name in CLASSES]
