"""Which device computes, and in which precision."""

from dataclasses import dataclass

import torch

from backboned.registry.errors import invalid

_PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Device:
    """Where and in what type stages run."""

    device: torch.device
    dtype: torch.dtype

    @classmethod
    def choose(cls, device: str = "auto", precision: str = "auto") -> "Device":
        """The device called `auto`, `cpu`, `cuda` or `cuda:N`, in precision `auto`, `fp32`, `bf16` or `fp16`.

        `auto` is CUDA where there is one, and fp32: what is served then equals what was trained. Raises
        `BackbonedError` for a device that isn't there.
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
        dtype = torch.float32 if precision == "auto" else _PRECISIONS.get(precision)
        if dtype is None:
            raise invalid(f"unknown precision {precision!r}: use auto, fp32, bf16 or fp16", field="precision")
        return cls(chosen, dtype)

    def __str__(self) -> str:
        return str(self.device)
