"""How near the machine's limit is the daemon, over real gRPC from another process?

    python benchmarks/serving.py                          everything: some 30 minutes on 2 cores
    python benchmarks/serving.py --only limit,callers --backbones resnet50
    python benchmarks/serving.py --device cuda

The limit and the daemon are measured in turns, in one run, and what is printed are medians over the rounds; a ratio is
the median of the ratios within each round. Weights are random: the time does not depend on them. A sample of the
answers is compared with what the model answers eagerly in fp32. See docs/performance.md.
"""

import argparse
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks._bench import Bench, Settings
from benchmarks._extremes import overload, warm
from benchmarks._report import plot, table
from benchmarks._shadow import shadow
from benchmarks._start import start
from benchmarks._swaps import swaps
from benchmarks._throughput import heads, mix, throughput

PARTS = ("limit", "callers", "heads", "mix", "shadow", "swaps", "overload", "warm", "start")


def main() -> int:
    """Measure what was asked for; print a table, and write `results.json` and `results.png`."""
    settings = _settings()
    if settings.device == "cuda" and not torch.cuda.is_available():
        print("this benchmark needs a CUDA device, and torch finds none here", file=sys.stderr)
        return 2
    settings.out.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=settings.out, prefix="work-") as work, Bench.open(settings, Path(work)) as bench:
        environment = bench.environment()
        print(", ".join(f"{name} {value}" for name, value in environment.items() if value != ""), flush=True)
        for i, backbone in enumerate(settings.backbones):
            _measure(bench, backbone, first=i == 0)
            print(table(bench.found.rows, of=backbone), flush=True)
        bench.write(settings.out / "results.json")
        plot(bench.found, environment, settings.out / "results.png")
    print(f"also in {settings.out / 'results.json'} and {settings.out / 'results.png'}")
    return 0


def _measure(bench: Bench, backbone: str, *, first: bool) -> None:
    """All parts for the first backbone; for the others those that depend on the backbone."""
    only = bench.settings.only
    if only & {"limit", "callers"}:
        throughput(bench, backbone)
    if "heads" in only:
        counts = (1, 10) if bench.settings.quick else (1, 10, 100, 1000) if first else (1, 100)
        heads(bench, backbone, counts)
    if "mix" in only and first:
        mix(bench, backbone)
    if "shadow" in only and first:
        shadow(bench, backbone)
    if "swaps" in only and first:
        swaps(bench, backbone)
    if "overload" in only and first:
        overload(bench, backbone)
    if "warm" in only and first:
        warm(bench, backbone)
    if "start" in only and first:
        start(bench, backbone)


def _settings() -> Settings:
    parser = argparse.ArgumentParser(description="Measure the daemon against what the machine can do.")
    parser.add_argument("--backbones", default="resnet50,vgg19", help="names; the first one gets every part")
    parser.add_argument("--seconds", type=float, default=6.0, help="of each measurement")
    parser.add_argument("--rounds", type=int, default=3, help="of which medians are taken")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--only", default=",".join(PARTS), help=f"some of {','.join(PARTS)}")
    parser.add_argument(
        "--out", type=Path, default=ROOT / "build" / "bench", help="folder for results and compiled code"
    )
    parser.add_argument("--photos", type=Path, help="folder of JPEG files; without one, photos are made")
    parser.add_argument("--quick", action="store_true", help="see that it runs: a second each, few models, one round")
    given = parser.parse_args()
    only = frozenset(given.only.split(","))
    if unknown := only - set(PARTS):
        parser.error(f"unknown parts {sorted(unknown)}: choose from {', '.join(PARTS)}")
    return Settings(
        backbones=tuple(given.backbones.split(",")),
        seconds=1.0 if given.quick else given.seconds,
        rounds=1 if given.quick else given.rounds,
        device=given.device,
        only=only,
        out=given.out.absolute(),
        photos=given.photos,
        quick=given.quick,
    )


if __name__ == "__main__":
    sys.exit(main())
