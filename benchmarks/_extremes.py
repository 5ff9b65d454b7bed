"""Parts `overload` and `warm`: far too many requests, and a start on what an earlier one has compiled."""

import math
import statistics
import threading
import time
from typing import Any

from backboned.client import Client
from benchmarks._bench import Bench, median
from benchmarks._daemon import Daemon, import_seconds
from benchmarks._processes import Worker, resident_bytes

TIMES = 20


class _Peak:
    """The most memory that a daemon has been seen with, in bytes, while the block runs."""

    def __init__(self, daemon: Daemon) -> None:
        self._pid = daemon.pid
        self.bytes = resident_bytes(daemon.pid)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def __enter__(self) -> "_Peak":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._over.wait(0.5):
            self.bytes = max(self.bytes, resident_bytes(self._pid))


def overload(bench: Bench, backbone: str) -> None:
    """20 times more requests than are answered at best: from callers as the Python client is, and from any others."""
    both = bench.maker(backbone).heads(2)
    flooding, other = sorted(both)
    models = {flooding: both[flooding]}
    seconds = 3.0 if bench.settings.quick else 30.0
    with bench.daemon(f"{backbone}-overload", backbone, both) as daemon:
        best = [bench.load(daemon, backbone, models, callers=32) for _ in range(bench.settings.rounds)]
        rate = TIMES * median(best, "images_per_second")
        found = {}
        for group, throttled in (("Python client", True), ("any callers", False)):
            before = resident_bytes(daemon.pid)
            with _Peak(daemon) as peak:
                flooded = bench.load(
                    daemon, backbone, models, rate=rate, seconds=seconds, throttled=throttled, beside=[other]
                )
            found[group] = {**flooded, "memory_bytes": {"before": before, "peak": peak.bytes}}
            _tell_overload(bench, f"{backbone}, overload, {group}", median(best, "images_per_second"), found[group])
        after = bench.load(daemon, backbone, models, callers=32)
    refusing = _refusing(bench, rate)
    bench.found.measurements[f"overload {backbone}"] = {
        "best": best, **found, "after": after, "rate": rate, "refusing": refusing,
    }  # fmt: skip
    cores = len(bench.cores)
    possible = max(0.0, 1 - rate * (refusing["server_ms"] + refusing["callers_ms"]) / 1e3 / cores)
    note = (
        f"gRPC alone: a server that refuses all takes {refusing['server_ms']:.2f} ms of a core a call, "
        f"its callers {refusing['callers_ms']:.2f} ms"
    )
    group = f"{backbone}, overload"
    bench.found.add(group, "left by calls and refusals, were all sent", 100 * possible, "%", note=note)
    bench.found.add(group, "afterwards, 32 callers", after["images_per_second"], "images/s")


def _refusing(bench: Bench, rate: float) -> dict[str, float]:
    """What a call costs that is refused by nothing but gRPC, in milliseconds of a core: here, and at the callers."""
    with Worker("benchmarks._refuse", log=bench.settings.out / "refuse.log") as server:
        found = bench.flood(server.receive()["address"], server.pid, rate=rate)
    calls = sum(found["codes"].values()) or 1
    server, callers = (1e3 * found[f"{who}_cpu_seconds"] / calls for who in ("daemon", "callers"))
    return {"server_ms": server, "callers_ms": callers}


def _tell_overload(bench: Bench, group: str, best: float, flooded: dict[str, Any]) -> None:
    add, seconds, cores = bench.found.add, flooded["seconds"], len(bench.cores)
    asked, codes, memory = flooded["sent"] / seconds, dict(flooded["codes"]), flooded["memory_bytes"]
    add(group, "best, 32 callers", best, "images/s")
    add(group, "asked", asked, "requests/s", note=f"{asked / best:.1f} times the best; {TIMES * best:.0f} were due")
    callers = flooded["callers_cpu_seconds"] / seconds
    neighbour = {code: found["count"] for code, found in flooded["beside_ms"].items()}
    answered = flooded["images_per_second"] + neighbour.get("OK", 0) / seconds
    ratio = answered / best
    left = ratio / (1 - callers / cores)
    note = f"the callers took {callers:.2f} of {cores} cores: {left:.2f} of the best a core left"
    add(group, "answered", answered, "images/s", ratio=ratio, wanted="≥ 0.90", note=note)
    refused = flooded["latency_ms"].get("RESOURCE_EXHAUSTED")
    if refused:
        count = codes["RESOURCE_EXHAUSTED"]
        undelayed = f"{flooded['refused_without_delay']} of {count} without a retry delay"
        unsent = f"{flooded['not_sent']} by the callers themselves"
        note = f"p50 {refused['p50']:.1f}, p99 {refused['p99']:.1f} ms; {undelayed}; {unsent}"
        add(group, "refused, latest", refused["max"], "ms", wanted="< 50", note=note)
    others = sum(count for code, count in codes.items() if code not in ("OK", "RESOURCE_EXHAUSTED"))
    add(group, "other status codes", others, "calls", wanted="0", note=str(codes))
    times = flooded["beside_ms"].get("OK", {"p50": math.nan, "max": math.nan})
    note = f"at most {times['max']:.0f} ms; {neighbour}"
    add(group, "another model's caller, p50", times["p50"], "ms", wanted="all answered", note=note)
    add(group, "memory, peak", memory["peak"] / 1e6, "MB", note=f"{memory['before'] / 1e6:.0f} MB before")


def warm(bench: Bench, backbone: str) -> None:
    """Starts on a state folder in which everything is compiled already."""
    models, name = bench.maker(backbone).heads(1), f"{backbone}-warm"
    with bench.daemon(name, backbone, models):
        pass
    starts = [_start(bench, name, backbone) for _ in range(bench.settings.rounds)]
    bench.found.measurements[f"warm {backbone}"] = starts
    group = f"{backbone}, warm start"
    ready, imports = median(starts, "ready_seconds"), median(starts, "import_seconds")
    after = statistics.median(s["ready_seconds"] - s["import_seconds"] for s in starts)
    bench.found.add(group, "ready", ready, "s", note=f"{imports:.2f} s of it for imports")
    bench.found.add(group, "ready after the imports", after, "s", wanted="≤ 3")
    compiled = [s["compiled_stages"] for s in starts]
    note = f"first answer after {median(starts, 'first_answer_ms'):.0f} ms more"
    bench.found.add(group, "compiled stages when ready", min(c or 0 for c in compiled), "", wanted="> 0", note=note)


def _start(bench: Bench, name: str, backbone: str) -> dict[str, Any]:
    imported = import_seconds()
    maker = bench.maker(backbone)
    photo = next(iter(sorted((bench.work / "photos").iterdir()))).read_bytes()
    flags = [f"--weights={backbone}={maker.weights}", f"--device={bench.settings.device}"]
    with Daemon(bench.work / name, flags) as daemon, Client(daemon.grpc) as client:
        compiled, begin = daemon.metric("backboned_stages_compiled"), time.monotonic()
        client.predict("head-0000", [photo])
        first = 1e3 * (time.monotonic() - begin)
    return {
        "import_seconds": imported,
        "ready_seconds": daemon.seconds_to_ready,
        "compiled_stages": compiled,
        "first_answer_ms": first,
    }
