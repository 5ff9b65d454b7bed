"""Part `start`: a start with a thousand models, and how soon one more of them answers."""

import time
from pathlib import Path
from typing import Any

from backboned.client import Client, ClientError
from benchmarks._bench import Bench, median
from benchmarks._daemon import Daemon, import_seconds

_MORE = 10


def start(bench: Bench, backbone: str) -> None:
    """Starts with many models on one backbone, everything compiled; then models that come while it serves."""
    count = 10 if bench.settings.quick else 1000
    name, maker = f"{backbone}-start", bench.maker(backbone)
    with bench.daemon(name, backbone, maker.heads(count)):
        pass
    flags = [f"--weights={backbone}={maker.weights}", f"--device={bench.settings.device}"]
    starts = [_start(bench, bench.work / name, flags, count) for _ in range(bench.settings.rounds)]
    with Daemon(bench.work / name, flags) as daemon, Client(daemon.grpc) as client:
        while (daemon.metric("backboned_stages_loaded") or 0) < count:  # heads go on being loaded while it serves
            time.sleep(0.1)
        waits = [{"ms": _add(bench, backbone, daemon, client, number)} for number in range(_MORE)]
    bench.found.measurements[f"start {backbone}"] = {"starts": starts, "added": waits}
    group, add = f"{backbone}, {count} models", bench.found.add
    note = f"{median(starts, 'import_seconds'):.2f} s of it for imports"
    add(group, "ready", median(starts, "ready_seconds"), "s", note=note)
    add(group, "ready after the imports", median(starts, "after_imports_seconds"), "s", wanted="< 5")
    slowest = max(w["ms"] for w in waits)
    add(group, "one more: first answer", median(waits, "ms"), "ms", wanted="< 200", note=f"at most {slowest:.0f}")


def _start(bench: Bench, folder: Path, flags: list[str], count: int) -> dict[str, Any]:
    imported = import_seconds()
    with Daemon(folder, flags) as daemon, Client(daemon.grpc) as client:
        if client.predict(f"head-{count - 1:04}", [bench.photo()]).version != 1:
            raise SystemExit("the last model doesn't answer")
    ready = daemon.seconds_to_ready
    return {"import_seconds": imported, "ready_seconds": ready, "after_imports_seconds": ready - imported}


def _add(bench: Bench, backbone: str, daemon: Daemon, client: Client, number: int) -> float:
    """Milliseconds from the moment that a new model is complete to its first answer."""
    name, maker = f"more-{number}", bench.maker(backbone)
    maker.write({name: maker.head(200_000 + number)}, daemon.folder / "checkpoints")
    complete = time.monotonic()
    while True:
        try:
            client.predict(name, [bench.photo()])
        except ClientError:
            if time.monotonic() > complete + 30:
                raise
        else:
            return 1e3 * (time.monotonic() - complete)
