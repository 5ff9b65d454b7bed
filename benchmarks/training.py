"""How long does a FineTune take, how good is what it makes, and what do callers notice of it?

    python benchmarks/training.py                         some ten minutes: made photos, random weights, scaled loops
    python benchmarks/training.py --photos DIR --weights mobilenet_v2=FILE --weights squeezenet1_1=FILE --full
    python benchmarks/training.py --only interference --served resnet50

`speed` compares three ways to train on the same photos for as many epochs: the loop of a tutorial, a good hand-written
loop (`_rivals.py`), and a FineTune, from the call over gRPC to the first prediction of the new version. A loop's time
begins once torch is imported and the network is built; a FineTune's has it all. Each round has photos that are new to
all; a FineTune looks at two views of each, which is its default, and once more at one. Unless `--full` is given, a loop
is stopped after `--loop-seconds`, and its time for all epochs is worked out from its images a second, which the table
says; with `--weights`, each loop is run whole in the first round, for its accuracy. `accuracy` trains on all photos of
`--photos`, a folder with `train/` and `val/`. `interference` alternates callers alone and callers beside a FineTune.
See docs/performance.md.
"""

import argparse
import signal
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks._accuracy import WANTED, WAYS, accuracy
from benchmarks._albums import Album
from benchmarks._bench import Bench, Settings
from benchmarks._curves import plot
from benchmarks._interference import interference
from benchmarks._plan import Course, Plan
from benchmarks._report import table
from benchmarks._speed import LOOPS, speed

PARTS = ("speed", "accuracy", "interference")
LAST_STAGES = {"mobilenet_v2": ("layer6", "layer7", "conv"), "squeezenet1_1": ("layer3",)}
"""What trains beside the head, of `accuracy`, where nothing else is asked for."""


def main() -> int:
    """Measure what was asked for; print a table, and write `training.json` and `training.png`."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # end the daemons too
    settings, plan = _settings()
    settings.out.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=settings.out, prefix="work-") as work, Bench.open(settings, Path(work)) as bench:
        environment = bench.environment()
        print(", ".join(f"{name} {value}" for name, value in environment.items() if value != ""), flush=True)
        album = Album(settings.photos) if settings.photos else Album.made(bench.work / "album")
        course = Course(bench, plan, album, real=settings.photos is not None)
        try:
            _measure(course)
        finally:
            bench.write(settings.out / "training.json")
        plot(bench.found, environment, settings.out / "training.png")
    print(f"also in {settings.out / 'training.json'} and {settings.out / 'training.png'}")
    return 0


def _measure(course: Course) -> None:
    settings = course.bench.settings
    if "speed" in settings.only:
        for backbone in settings.backbones:
            _part(course, backbone, partial(speed, course, backbone))
    if "accuracy" in settings.only and not course.real:
        course.skip("accuracy", "it needs --photos DIR, a folder with train/ and val/")
    elif "accuracy" in settings.only:
        for backbone in dict.fromkeys((*WANTED, *course.plan.weights)):
            if backbone in course.plan.weights:
                _part(course, backbone, partial(accuracy, course, backbone))
            else:
                course.skip(f"{backbone}'s accuracy", f"it needs --weights {backbone}=FILE")
    if "interference" in settings.only:
        _part(course, course.plan.served, partial(interference, course))


def _part(course: Course, backbone: str, measure: Callable[[], None]) -> None:
    """Measure, and print what was found."""
    before = len(course.bench.found.rows)
    measure()
    print(table(course.bench.found.rows[before:], of=backbone), flush=True)


def _settings() -> tuple[Settings, Plan]:
    parser = argparse.ArgumentParser(description="Measure FineTune against other ways to train.")
    parser.add_argument("--only", default=",".join(PARTS), help=f"some of {','.join(PARTS)}")
    parser.add_argument("--photos", type=Path, help="folder with train/ and val/; without one, photos are made")
    parser.add_argument("--weights", action="append", default=[], metavar="BACKBONE=FILE", help="repeatable")
    parser.add_argument("--backbones", default="mobilenet_v2,vgg19", help="of `speed`")
    parser.add_argument("--epochs", type=int, default=10, help="of each run")
    parser.add_argument("--images", type=int, default=400, help="photos that train, of `speed`")
    parser.add_argument("--validation-images", type=int, default=100, help="photos that validate, of `speed`")
    parser.add_argument("--loops", default=",".join(LOOPS), help=f"of `speed`, some of {','.join(LOOPS)}")
    parser.add_argument("--full", action="store_true", help="run every loop for all epochs in every round")
    parser.add_argument("--loop-seconds", type=float, default=20.0, help="of a loop that isn't run whole")
    parser.add_argument(
        "--stages", action="append", default=[], metavar="BACKBONE=STAGE,…", help="what trains too, of `accuracy`"
    )
    parser.add_argument("--ways", default=",".join(WAYS), help=f"of `accuracy`, some of {','.join(WAYS)}")
    parser.add_argument(
        "--compile",
        action="store_true",
        help="let the daemons of `speed` and `accuracy` compile, and wait: minutes, kept in OUT for the next run",
    )
    parser.add_argument("--served", default="resnet50", help="the backbone of `interference`")
    parser.add_argument("--fresh-images", type=int, default=400, help="photos of its jobs, at first")
    parser.add_argument("--views", type=int, default=16, help="of each of these")
    parser.add_argument("--seconds", type=float, default=6.0, help="of each of its windows")
    parser.add_argument("--rounds", type=int, default=3, help="of which medians are taken")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "bench", help="folder for the results")
    parser.add_argument("--quick", action="store_true", help="see that it runs: few photos, two epochs, one round")
    given = parser.parse_args()
    only = frozenset(given.only.split(","))
    if unknown := only - set(PARTS):
        parser.error(f"unknown parts {sorted(unknown)}: choose from {', '.join(PARTS)}")
    ways = frozenset(given.ways.split(","))
    if unknown := ways - set(WAYS):
        parser.error(f"unknown ways {sorted(unknown)}: choose from {', '.join(WAYS)}")
    loops = tuple(given.loops.split(","))
    if unknown := frozenset(loops) - set(LOOPS):
        parser.error(f"unknown loops {sorted(unknown)}: choose from {', '.join(LOOPS)}")
    quick: bool = given.quick
    settings = Settings(
        backbones=tuple(given.backbones.split(",")),
        seconds=0.5 if quick else given.seconds,
        rounds=1 if quick else given.rounds,
        device="cpu",
        only=only,
        out=given.out.absolute(),
        photos=given.photos and given.photos.absolute(),
        quick=quick,
    )
    files = {name: Path(file).absolute() for name, file in _pairs(parser, given.weights).items()}
    if missing := [str(file) for file in files.values() if not file.is_file()]:
        parser.error(f"no such file: {missing[0]}")
    stages = {name: tuple(names.split(",")) for name, names in _pairs(parser, given.stages).items()}
    plan = Plan(
        weights=files,
        epochs=2 if quick else given.epochs,
        train_images=20 if quick else given.images,
        validation_images=10 if quick else given.validation_images,
        loop_seconds=2.0 if quick else given.loop_seconds,
        whole=given.full,
        stages={**LAST_STAGES, **stages},
        served=given.served,
        fresh_images=given.fresh_images,
        compiles=given.compile,
        views=64 if quick else given.views,
        ways=ways,
        loops=loops,
    )
    return settings, plan


def _pairs(parser: argparse.ArgumentParser, given: Sequence[str]) -> dict[str, str]:
    pairs = dict(text.partition("=")[::2] for text in given)
    if bad := [name for name, value in pairs.items() if not name or not value]:
        parser.error(f"expected BACKBONE=…, got {bad[0]!r}")
    return pairs


if __name__ == "__main__":
    sys.exit(main())
