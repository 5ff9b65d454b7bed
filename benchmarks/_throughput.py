"""Parts `limit`, `callers`, `heads` and `mix`: images a second, latency, memory."""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any

from benchmarks._bench import Bench, median, median_ratio
from benchmarks._daemon import Daemon
from benchmarks._limit import PAUSE_SECONDS, Limit
from benchmarks._models import Models

_Rounds = dict[str, list[dict[str, Any]]]
_WANTED = {"32 callers": "≥ 0.90", "8 callers": "≥ 0.75"}
_WANTED_ON_CUDA = {"32 callers, 32 images each": "≥ 0.80"}
_RATE = "images_per_second"


def in_rounds(rounds: int, steps: Mapping[str, Callable[[], dict[str, Any]]]) -> _Rounds:
    """Each step once a round, in one order and then in the other, so that a slow drift favours none."""
    found: _Rounds = {name: [] for name in steps}
    for number in range(rounds):
        for name in list(steps)[:: -1 if number % 2 else 1]:
            found[name].append(steps[name]())
    return found


def throughput(bench: Bench, backbone: str) -> None:
    """The limit, and beside it the daemon with one model under 32, 8 and 1 callers."""
    settings, models = bench.settings, bench.maker(backbone).heads(1)
    steps: dict[str, Callable[[], dict[str, Any]]] = {}
    with ExitStack() as stack:
        if "limit" in settings.only:
            limit = stack.enter_context(
                Limit(
                    backbone,
                    bench.maker(backbone).weights,
                    bench.work / "photos",
                    device=settings.device,
                    cores=bench.cores,
                    out=settings.out,
                )
            )
            steps["limit"] = partial(limit.throughput, settings.seconds)
        if "callers" in settings.only:
            daemon = stack.enter_context(bench.daemon(f"{backbone}-callers", backbone, models))
            load = partial(bench.load, daemon, backbone, models)
            if settings.device == "cuda":
                steps["32 callers, 32 images each"] = partial(load, callers=32, images=32)
            steps |= {f"{callers} callers": partial(load, callers=callers) for callers in (32, 8, 1)}
            steps["1 caller that pauses"] = partial(load, callers=1, pause=PAUSE_SECONDS)
        if "limit" in settings.only:
            steps["one image"] = partial(limit.one_image, settings.seconds)
        found = in_rounds(settings.rounds, steps)
    bench.found.measurements[f"throughput {backbone}"] = found
    _tell_throughput(bench, backbone, found)


def _tell_throughput(bench: Bench, backbone: str, found: _Rounds) -> None:
    add, limit = bench.found.add, found.get("limit")
    wanted = _WANTED_ON_CUDA if bench.settings.device == "cuda" else _WANTED
    if limit:
        note = f"{median(limit, 'cpu_ms_per_image'):.1f} ms of CPU an image"
        add(backbone, "limit", median(limit, _RATE), "images/s", note=note)
    for name, rounds in found.items():
        if "callers" not in name:
            continue
        ratio = median_ratio(rounds, limit, _RATE) if limit else None
        add(
            backbone,
            name,
            median(rounds, _RATE),
            "images/s",
            ratio=ratio,
            wanted=wanted.get(name, ""),
            note=_cost(rounds),
        )
    if one := found.get("one image"):
        best = [{"ms": min(r.values())} for r in one]
        add(backbone, "limit, one image", median(best, "ms"), "ms")
        if alone := found.get("1 caller that pauses"):
            answered = [{"ms": r["latency_ms"]["OK"]["p50"]} for r in alone]
            ratio = median_ratio(answered, best, "ms")
            on_cpu = "≤ 1.10" if bench.settings.device == "cpu" else ""
            add(backbone, "1 caller that pauses, p50", median(answered, "ms"), "ms", ratio=ratio, wanted=on_cpu)


def heads(bench: Bench, backbone: str, counts: tuple[int, ...]) -> None:
    """Daemons with ever more heads on one backbone, under 32 callers who ask for all of them alike."""
    served = {f"{count} heads": bench.maker(backbone).heads(count) for count in counts}
    found, memory = _side_by_side(bench, backbone, f"{backbone}-heads", served)
    bench.found.measurements[f"heads {backbone}"] = {"rounds": found, "memory_bytes": memory}
    first = f"{counts[0]} heads"
    for name, rounds in found.items():
        ratio = None if name == first else median_ratio(rounds, found[first], _RATE)
        more = (memory[name]["after traffic"] - memory[first]["after traffic"]) / 1e6
        last = name == f"{counts[-1]} heads" and counts[-1] >= 100
        group = f"{backbone}, 32 callers"
        bench.found.add(
            group,
            name,
            median(rounds, _RATE),
            "images/s",
            ratio=ratio,
            wanted="≥ 0.95" if last else "",
            note=_cost(rounds),
        )
        note = f"{memory[name]['after load'] / 1e6:.0f} MB before traffic"
        wanted = f"≤ {memory[first]['after traffic'] / 1e6 + 150:.0f}" if last and name == "1000 heads" else ""
        if name != first:
            note += f"; {more:+.0f} MB to {first}"
        bench.found.add(group, f"{name}, memory", memory[name]["after traffic"] / 1e6, "MB", wanted=wanted, note=note)


def mix(bench: Bench, backbone: str) -> None:
    """Models of all kinds at once: heads alone, with the last stage unfrozen, and fine-tuned as a whole."""
    kinds = (3, 2, 1) if bench.settings.quick else (50, 10, 5)
    maker = bench.maker(backbone)
    served = {"1 model": maker.heads(1), f"{'+'.join(map(str, kinds))} models": maker.mixed(*kinds)}
    found, memory = _side_by_side(bench, backbone, f"{backbone}-mix", served)
    bench.found.measurements[f"mix {backbone}"] = {"rounds": found, "memory_bytes": memory}
    for name, rounds in found.items():
        ratio = None if name == "1 model" else median_ratio(rounds, found["1 model"], _RATE)
        note = f"{memory[name]['after traffic'] / 1e6:.0f} MB; {_cost(rounds)}"
        bench.found.add(f"{backbone}, a mix", name, median(rounds, _RATE), "images/s", ratio=ratio, note=note)


def _side_by_side(
    bench: Bench, backbone: str, folder: str, served: Mapping[str, Models]
) -> tuple[_Rounds, dict[str, dict[str, int]]]:
    """A daemon for each, all alive (an idle one costs nothing), loaded in turns; and the memory of each."""
    with ExitStack() as stack:
        daemons: dict[str, Daemon] = {}
        memory: dict[str, dict[str, int]] = {}
        for name, models in served.items():
            daemons[name] = stack.enter_context(bench.daemon(f"{folder}-{name.split()[0]}", backbone, models))
            memory[name] = {"after load": daemons[name].memory_bytes()}
        steps = {
            name: partial(bench.load, daemons[name], backbone, models, callers=32) for name, models in served.items()
        }
        found = in_rounds(bench.settings.rounds, steps)
        for name, daemon in daemons.items():
            memory[name]["after traffic"] = daemon.memory_bytes()
    return found, memory


def _cost(rounds: list[dict[str, Any]]) -> str:
    """Latency, and where the CPU's time goes."""
    middle = rounds[len(rounds) // 2]
    latency = middle["latency_ms"]["OK"]
    images = middle["images_per_second"] * middle["seconds"]
    cpu = [1e3 * middle[f"{who}_cpu_seconds"] / images for who in ("daemon", "callers")]
    percentiles = " / ".join(f"{latency[p]:.0f}" for p in ("p50", "p95", "p99"))
    return f"{percentiles} ms; CPU {cpu[0]:.1f} + {cpu[1]:.1f} ms an image"
