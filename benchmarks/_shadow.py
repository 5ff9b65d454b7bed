"""Part `shadow`: what it costs that another version sees each image too."""

import time
from collections.abc import Callable
from functools import partial
from typing import Any

from backboned.client import Client
from benchmarks._bench import Bench, median, median_ratio
from benchmarks._throughput import in_rounds

_CALLERS = 32
_SECONDS = 2.0
_TURNS = 8
"""So many turns of so many seconds a round."""


def shadow(bench: Bench, backbone: str) -> None:
    """32 callers of one model, with a shadow and without one, in many short turns on one daemon.

    What a shadow costs is less than what a shared machine gains or loses in a while: turns that follow one another are
    compared.
    """
    maker = bench.maker(backbone)
    models = maker.heads(1)
    (name,) = models
    seconds = min(_SECONDS, bench.settings.seconds)
    with bench.daemon(f"{backbone}-shadow", backbone, models) as daemon, Client(daemon.grpc) as client:
        other = {name: maker.heads(2)["head-0001"]}
        client.set_version_policy(name, "pinned", version=1)
        maker.write(other, daemon.folder / "checkpoints")
        while not any(v.version == 2 and v.loaded for v in client.get_model(name).versions):
            time.sleep(0.1)
        daemon.wait_until_compiled()

        def measure(policy: str) -> dict[str, Any]:
            client.set_version_policy(name, policy, version=1)
            told = bench.load(daemon, backbone, models, callers=_CALLERS, seconds=seconds, warm_up=seconds / 4)
            images = told["images_per_second"] * told["seconds"]
            return {**told, "cpu_ms_per_image": 1e3 * told["daemon_cpu_seconds"] / images}

        steps: dict[str, Callable[[], dict[str, Any]]] = {
            "without": partial(measure, "pinned"),
            "with": partial(measure, "manual"),
        }
        found = in_rounds(1 if bench.settings.quick else _TURNS * bench.settings.rounds, steps)
        client.set_version_policy(name, "manual", version=1)  # whichever came last
        seen = client.get_model(name).comparison.answers
    if not seen:
        raise SystemExit("the shadow has seen nothing")
    bench.found.measurements[f"shadow {backbone}"] = found
    add, group = bench.found.add, f"{backbone}, {_CALLERS} callers, a shadow of one head"
    figures = [("images_per_second", "", "images/s", "≥ 0.97"), ("cpu_ms_per_image", ", CPU", "ms/image", "≤ 1.03")]
    for figure, name, unit, wanted in figures:
        before, after = found["without"], found["with"]
        add(group, f"without{name}", median(before, figure), unit, note=f"{len(before)} turns of {seconds:.0f} s")
        ratio = median_ratio(after, before, figure)
        add(group, f"with{name}", median(after, figure), unit, ratio=ratio, wanted=wanted, note=f"it saw {seen}")
