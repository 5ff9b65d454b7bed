"""The process that compiles stages, so that Dynamo and a compiler's hours stay out of the daemon.

    python -m backboned.server.compute.compile_process    < orders, one JSON a line > reports, one JSON a line

It lives as long as its standard input, at the lowest priority.
"""

import contextlib
import json
import os
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from backboned.registry.backbone import Stage
from backboned.registry.catalogue import Catalogue
from backboned.server.compute.compiled import CompiledBatch, Layout
from backboned.server.compute.stages import Templates

_LARGEST_ERROR = 0.05
_MIN_ROUNDS = 15
_TIMING_SECONDS = 1.5


@dataclass(frozen=True)
class Order:
    """What to compile: a stage with the weights in `weights`, for batches of `bucket` images, into `library`.

    `others` are the stage's libraries for other sizes of batch, which are timed together with the new one.
    """

    backbone: str
    stage: str
    plugins: tuple[str, ...]
    weights: Path
    layout: Layout
    bucket: int
    device: str
    library: Path
    others: Mapping[int, Path]

    def to_json(self) -> str:
        """One line."""
        others = {size: str(path) for size, path in self.others.items()}
        values = {**vars(self), "weights": str(self.weights), "library": str(self.library), "others": others}
        layout = {**vars(self.layout), "dtype": str(self.layout.dtype).removeprefix("torch.")}
        return json.dumps({**values, "layout": layout})

    @classmethod
    def from_json(cls, line: str) -> "Order":
        """The inverse of `to_json`."""
        told: dict[str, Any] = json.loads(line)
        layout = told.pop("layout")
        shape, dtype = tuple(layout["shape"]), getattr(torch, layout["dtype"])
        others = {int(size): Path(path) for size, path in told["others"].items()}
        return cls(
            **{**told, "weights": Path(told["weights"]), "library": Path(told["library"]), "others": others}
            | {"plugins": tuple(told["plugins"]), "layout": Layout(shape, dtype, layout["channels_last"])}
        )


@dataclass(frozen=True)
class Report:
    """What became of an order: the seconds that a batch takes on one thread, by its size, or what went wrong."""

    seconds: Mapping[int, float] = field(default_factory=dict)
    error: str = ""

    def to_json(self) -> str:
        """One line."""
        return json.dumps(vars(self))

    @classmethod
    def from_json(cls, line: str) -> "Report":
        """The inverse of `to_json`."""
        told = json.loads(line)
        return cls({int(size): seconds for size, seconds in told["seconds"].items()}, told["error"])


class _Runs(nn.Module):
    """A stage as a module: what `torch.export` takes."""

    def __init__(self, stage: Stage, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self._stage = stage

    def forward(self, x: Tensor) -> Tensor:
        """`[bucket, …]` → `[bucket, …]`."""
        return self._stage.forward(self.module, x)


def compile_stage(order: Order) -> Report:
    """Write the library, see that it answers what the stage answers, and time it.

    Whatever torch or the C++ compiler raises comes through.
    """
    from torch._inductor import aot_compile

    backbone = Catalogue.installed(order.plugins).get(order.backbone)
    stage = next(s for s in backbone.chain if s.name == order.stage)
    device = torch.device(order.device)
    tensors = torch.load(order.weights, map_location=device, weights_only=True)
    network = _Runs(stage, Templates().fill(backbone, stage, tensors).eval().requires_grad_(False))
    x = torch.randn(order.bucket, *order.layout.shape, generator=torch.Generator().manual_seed(0))
    x = order.layout.arrange(x.to(device, order.layout.dtype))
    options = {
        "aot_inductor.output_path": str(order.library),
        "freezing": True,
        "cpp.threads": 1,
        **({"aot_inductor.embed_kernel_binary": True} if device.type == "cuda" else {}),
    }
    with torch.no_grad():
        exported = torch.export.export(network, (x,))
        aot_compile(exported.module(), (x,), options=options)
        _align_weights(order.library)
        compiled = CompiledBatch(order.library, device, concurrency=1)
        expected, got = network(x), compiled(x)
        error = ((got - expected).abs().max() / expected.abs().max().clamp(min=1e-9)).item()
        if got.shape != expected.shape or got.stride() != expected.stride() or not error <= _LARGEST_ERROR:
            raise ValueError(f"compiled code differs from the stage by {error:.1%}: it is not used")
        batches = {size: CompiledBatch(path, device, concurrency=1) for size, path in order.others.items()}
        return Report(_seconds({**batches, order.bucket: compiled}, x, order.layout))


def _align_weights(library: Path) -> None:
    """Let the library put its weights on a page of their own.

    AOTInductor's runtime takes memory for them by malloc, which aligns to 16 bytes. AMX reads rows of 64, each of two
    cache lines then: ResNet-50 takes 17 ms an image instead of 10 (torch 2.15, Xeon of the fourth generation). The
    name of valloc is as long; it is in the same version of glibc, and free takes back what it gave.
    """
    library.write_bytes(library.read_bytes().replace(b"\0malloc\0", b"\0valloc\0"))


def _seconds(batches: Mapping[int, CompiledBatch], x: Tensor, layout: Layout) -> dict[int, float]:
    """The least that each takes, in turns: what else goes on in the machine meanwhile meets all alike."""
    inputs = {size: layout.arrange(x[:1].expand(size, *x.shape[1:])) for size in batches}
    taken: dict[int, list[float]] = {size: [] for size in batches}
    end = time.perf_counter() + _TIMING_SECONDS
    while len(taken[min(taken)]) < _MIN_ROUNDS or time.perf_counter() < end:
        for size, batch in batches.items():
            started = time.perf_counter()
            batch(inputs[size])
            if x.is_cuda:
                torch.cuda.synchronize(x.device)
            taken[size].append(time.perf_counter() - started)
    return {size: min(seconds) for size, seconds in taken.items()}


def main() -> None:
    """Carry out orders until the input ends."""
    reports = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # whatever a library prints is no report
    with contextlib.suppress(OSError):
        os.nice(19)
    torch.set_num_threads(1)
    for line in sys.stdin:
        try:
            report = compile_stage(Order.from_json(line))
        except Exception as error:  # whatever torch, a plugin's code or a compiler raises
            report = Report(error=" ".join(f"{type(error).__name__}: {error}".split())[:500])
        reports.write(report.to_json() + "\n")
        reports.flush()


if __name__ == "__main__":
    main()
