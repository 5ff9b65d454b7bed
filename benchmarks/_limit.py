"""The limit: what this machine does with no server at all, in loops that decode and compute and do nothing else.

On the CPU it is one process a core, pinned and single-threaded, with batches of 8; on CUDA one process whose pool
decodes the next batch meanwhile. Each runs the whole network frozen, compiled, channels-last, in the precision that the
daemon would choose.
"""

import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from benchmarks._processes import Worker, answer_questions

CPU_BATCH = 8
CUDA_BATCH = 64
PAUSE_SECONDS = 0.003
"""What a caller that waits for its answer leaves idle between two images."""


class Limit:
    """The loops of one backbone, compiled and waiting. For one thread."""

    def __init__(self, backbone: str, weights: Path, photos: Path, *, device: str, cores: Sequence[int], out: Path):
        """Start the processes and compile; `cores` are those to use, `out` has the compiler's cache and the log."""
        environment = {"TORCHINDUCTOR_CACHE_DIR": str(out / "inductor")}
        self._stack = ExitStack()

        def start(cores: Sequence[int], threads: int, *batches: int) -> Worker:
            numbers = (",".join(map(str, cores)), str(threads), ",".join(map(str, batches)))
            arguments = (backbone, str(weights), str(photos), device, *numbers)
            worker = Worker("benchmarks._limit", *arguments, log=out / "limit.log", environment=environment)
            worker = self._stack.enter_context(worker)
            worker.receive()  # it is ready: the next one finds in the cache what this one has compiled
            return worker

        try:
            if device == "cpu":
                self._batch = CPU_BATCH
                self._workers = [start([core], 1, CPU_BATCH, *([] if i else [1])) for i, core in enumerate(cores)]
                self._alone = [self._workers[0]] + ([start(cores, len(cores), 1)] if len(cores) > 1 else [])
            else:
                self._batch = CUDA_BATCH
                self._workers = self._alone = [start(cores, len(cores), CUDA_BATCH, 1)]
        except BaseException:
            self._stack.close()
            raise

    def throughput(self, seconds: float) -> dict[str, Any]:
        """Images a second of all loops together, and the CPU time of an image in milliseconds."""
        begin = time.monotonic() + 0.2
        for worker in self._workers:
            worker.send(batch=self._batch, begin=begin, seconds=seconds, pause=0)
        answers = [worker.receive() for worker in self._workers]
        images = sum(a["images"] for a in answers)
        return {
            "images_per_second": sum(a["images"] / a["seconds"] for a in answers),
            "cpu_ms_per_image": 1e3 * sum(a["cpu_seconds"] for a in answers) / images,
        }

    def one_image(self, seconds: float) -> dict[str, float]:
        """The median milliseconds of one image at a time, on one thread and on all, with idling between them."""
        answers = [w.ask(batch=1, begin=time.monotonic(), seconds=seconds, pause=PAUSE_SECONDS) for w in self._alone]
        names = ("one_thread_ms", "all_threads_ms")
        return dict(zip(names, (a["median_ms"] for a in answers), strict=False))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stack.__exit__(kind, error, at)


def main() -> None:
    """One loop's process: compile, say so, and then run as it is told."""
    from backboned.server.process import tune_process

    tune_process()  # as the daemon does, before torch is there
    from benchmarks._loop import Loop

    backbone, weights, photos, device, cores, threads, batches = sys.argv[1:]
    loop = Loop(
        backbone, Path(weights), Path(photos), device, cores=[int(c) for c in cores.split(",")], threads=int(threads)
    )
    for batch in batches.split(","):
        loop.compile(int(batch))
    print("{}", flush=True)

    def run(question: Mapping[str, Any]) -> dict[str, float]:
        times = loop.run(question["batch"], question["begin"], question["seconds"], question["pause"])
        return {
            "images": question["batch"] * len(times.seconds),
            "seconds": times.elapsed,
            "cpu_seconds": times.cpu,
            "median_ms": 1e3 * statistics.median(times.seconds),
        }

    answer_questions(run)


if __name__ == "__main__":
    main()
