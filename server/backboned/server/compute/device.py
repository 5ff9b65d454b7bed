"""Which device computes, and in which precision."""

import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from backboned.registry.errors import invalid

CPU_INFO = Path("/proc/cpuinfo")
MEMORY_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))
"""Of control groups, versions 2 and 1."""

_PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Device:
    """Where and in what type stages run."""

    device: torch.device
    dtype: torch.dtype

    @classmethod
    def choose(cls, device: str = "auto", precision: str = "auto") -> "Device":
        """The device called `auto`, `cpu`, `cuda` or `cuda:N`, in precision `auto`, `fp32`, `bf16` or `fp16`.

        The device `auto` is CUDA where there is one. The precision `auto` is bf16 where the device multiplies it in
        hardware (tensor cores, AMX, AVX512-BF16), and fp32 elsewhere. Raises `BackbonedError` for a device that isn't
        there.
        """
        available = torch.cuda.device_count() if torch.cuda.is_available() else 0
        name = ("cuda:0" if available else "cpu") if device == "auto" else device
        try:
            chosen = torch.device(name)
        except RuntimeError as error:
            raise invalid(f"unknown device {device!r}: use auto, cpu, cuda or cuda:N", field="device") from error
        if chosen.type == "cuda" and (chosen.index or 0) >= available:
            raise invalid(f"device {device!r} is not there: {available} CUDA devices are available", field="device")
        if chosen.type not in ("cpu", "cuda"):
            raise invalid(f"device {device!r} can't be used: use auto, cpu, cuda or cuda:N", field="device")
        if precision == "auto":
            precision = "bf16" if _multiplies_bf16(chosen) else "fp32"
        dtype = _PRECISIONS.get(precision)
        if dtype is None:
            raise invalid(f"unknown precision {precision!r}: use auto, fp32, bf16 or fp16", field="precision")
        return cls(chosen, dtype)

    @property
    def precision(self) -> str:
        """`fp32`, `bf16` or `fp16`."""
        return next(name for name, dtype in _PRECISIONS.items() if dtype == self.dtype)

    def in_fp32(self) -> "Device":
        """The same device in full precision."""
        return Device(self.device, torch.float32)

    def memory_bytes(self) -> int:
        """All of its memory; on a CPU what this process may use of it."""
        if self.device.type == "cuda":
            return int(torch.cuda.get_device_properties(self.device).total_memory)
        return usable_memory_bytes()

    def __str__(self) -> str:
        return str(self.device)


def usable_cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def usable_memory_bytes() -> int:
    """The machine's memory, or what control groups let this process have of it."""
    sizes = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for limit in MEMORY_LIMITS:
        with suppress(OSError, ValueError):  # none there, or `max`
            sizes.append(int(limit.read_text(encoding="ascii")))
    return min(sizes)


def cpu_features() -> frozenset[str]:
    """What the kernel says that this CPU can do, in its words (`avx512_bf16`, `amx_bf16`, …); empty if it doesn't."""
    try:
        lines = CPU_INFO.read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return frozenset()
    found = next((line for line in lines if line.lower().startswith(("flags", "features"))), "")
    return frozenset(found.partition(":")[2].split())


def _multiplies_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return not cpu_features().isdisjoint({"amx_bf16", "avx512_bf16"})
