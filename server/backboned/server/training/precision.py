"""In which type the stages above the freezing boundary compute while they train."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from backboned.server.compute.device import Device


@dataclass(frozen=True)
class Precision:
    """The device that trains, and the type of its multiplications where that isn't float32; weights are float32."""

    device: torch.device
    autocast: torch.dtype | None

    @classmethod
    def of(cls, device: Device) -> "Precision":
        """bfloat16 where stages are served in it. fp16 would need its losses scaled: then float32."""
        return cls(device.device, torch.bfloat16 if device.dtype is torch.bfloat16 else None)

    def __call__(self) -> AbstractContextManager[Any]:
        """A context in which networks compute so."""
        return nullcontext() if self.autocast is None else torch.autocast(self.device.type, self.autocast)
