"""Part `shadow`: what it costs that another version sees each image too."""

import time
from collections.abc import Callable
from functools import partial
from typing import Any

from backboned.client import Client
from benchmarks._bench import Bench, median, median_ratio
from benchmarks._throughput import in_rounds

_CALLERS = 32


def shadow(bench: Bench, backbone: str) -> None:
    """32 callers of one model, with a shadow and without one, in turns on one daemon."""
    maker = bench.maker(backbone)
    models = maker.heads(1)
    (name,) = models
    with bench.daemon(f"{backbone}-shadow", backbone, models) as daemon, Client(daemon.grpc) as client:
        other = {name: maker.heads(2)["head-0001"]}
        client.set_version_policy(name, "pinned", version=1)
        maker.write(other, daemon.folder / "checkpoints")
        while not any(v.version == 2 and v.loaded for v in client.get_model(name).versions):
            time.sleep(0.1)
        daemon.wait_until_compiled()

        def measure(policy: str) -> dict[str, Any]:
            client.set_version_policy(name, policy, version=1)
            return bench.load(daemon, backbone, models, callers=_CALLERS)

        steps: dict[str, Callable[[], dict[str, Any]]] = {
            "without": partial(measure, "pinned"),
            "with": partial(measure, "manual"),
        }
        found = in_rounds(bench.settings.rounds, steps)
        seen = client.get_model(name).comparison.answers
    if not seen:
        raise SystemExit("the shadow has seen nothing")
    bench.found.measurements[f"shadow {backbone}"] = found
    rate, add = "images_per_second", bench.found.add
    group = f"{backbone}, {_CALLERS} callers, a shadow of one head"
    add(group, "without", median(found["without"], rate), "images/s")
    ratio = median_ratio(found["with"], found["without"], rate)
    add(group, "with", median(found["with"], rate), "images/s", ratio=ratio, wanted="≥ 0.97", note=f"it saw {seen}")
