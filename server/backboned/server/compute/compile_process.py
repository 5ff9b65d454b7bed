"""The process that compiles stages, so that Dynamo and a compiler's hours stay out of the daemon.

    python -m backboned.server.compute.compile_process    < orders, one JSON a line > reports, one JSON a line

It lives as long as its standard input, at the lowest priority.
"""

import contextlib
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from backboned.registry.backbone import Stage
from backboned.registry.catalogue import Catalogue
from backboned.server.compute.compiled import CompiledBatch, Layout
from backboned.server.compute.stages import Templates

_LARGEST_ERROR = 0.05
_RUNS = 7


@dataclass(frozen=True)
class Order:
    """What to compile: a stage with the weights in `weights`, for batches of `bucket` images, into `library`."""

    backbone: str
    stage: str
    plugins: tuple[str, ...]
    weights: Path
    layout: Layout
    bucket: int
    device: str
    library: Path

    def to_json(self) -> str:
        """One line."""
        values = {**vars(self), "weights": str(self.weights), "library": str(self.library)}
        layout = {**vars(self.layout), "dtype": str(self.layout.dtype).removeprefix("torch.")}
        return json.dumps({**values, "layout": layout})

    @classmethod
    def from_json(cls, line: str) -> "Order":
        """The inverse of `to_json`."""
        told: dict[str, Any] = json.loads(line)
        layout = told.pop("layout")
        shape, dtype = tuple(layout["shape"]), getattr(torch, layout["dtype"])
        return cls(
            **{**told, "weights": Path(told["weights"]), "library": Path(told["library"])}
            | {"plugins": tuple(told["plugins"]), "layout": Layout(shape, dtype, layout["channels_last"])}
        )


@dataclass(frozen=True)
class Report:
    """What became of an order: the seconds that a batch takes on one thread, or what went wrong."""

    seconds: float = 0.0
    error: str = ""


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
        compiled = CompiledBatch(order.library, device, concurrency=1)
        expected, got = network(x), compiled(x)
        error = ((got - expected).abs().max() / expected.abs().max().clamp(min=1e-9)).item()
        if got.shape != expected.shape or got.stride() != expected.stride() or not error <= _LARGEST_ERROR:
            raise ValueError(f"compiled code differs from the stage by {error:.1%}: it is not used")
        return Report(_seconds(lambda: compiled(x), device))


def _seconds(run: Callable[[], object], device: torch.device) -> float:
    taken = []
    for _ in range(_RUNS + 2):
        started = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        taken.append(time.perf_counter() - started)
    fastest = sorted(taken[2:])[: _RUNS // 2 + 1]  # others use the machine meanwhile: their share isn't ours
    return statistics.median(fastest)


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
        reports.write(json.dumps(vars(report)) + "\n")
        reports.flush()


if __name__ == "__main__":
    main()
