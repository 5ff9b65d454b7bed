"""What a mutation is: a kind and a seed, from which the same files come each time."""

import json
import os
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from random import Random
from typing import Any


class Expected(Enum):
    """What may become of a mutated file. Whatever isn't served has a reason."""

    REFUSED = "it is refused"
    INTACT = "it is refused, or serves what the original would"
    FINITE = "it is refused, or serves finite numbers: the format has no checksums"
    SERVED = "it serves what the original would"


@dataclass(frozen=True)
class Good:
    """A good checkpoint file, in the forms that a person may have it in."""

    full: bytes
    head: bytes
    trained: bytes
    safetensors: bytes
    safetensors_head: bytes
    legacy: bytes
    legacy_head: bytes

    @property
    def archives(self) -> Sequence[bytes]:
        """Those that `torch.save` writes today, the small ones more often."""
        return (self.head, self.trained, self.head, self.trained, self.full)


@dataclass(frozen=True)
class Site:
    """Where one mutation goes: files called `stem` in a model's folder. `mark` must not exist when all is over."""

    folder: Path
    stem: str
    good: Good
    mark: Path

    def drop(self, content: bytes, suffix: str = ".pt", *, beside: Any = None) -> Expected:
        """Drop a file, with what is `beside` it as JSON first; it is expected to be refused."""
        if beside is not None:
            self.beside(json.dumps(beside).encode())
        (self.folder / f"{self.stem}{suffix}").write_bytes(content)
        return Expected.REFUSED

    def beside(self, content: bytes, suffix: str = ".json") -> None:
        """Write what stands beside the dropped file."""
        (self.folder / f"{self.stem}{suffix}").write_bytes(content)

    def link(self, target: str | Path, suffix: str = ".pt") -> Expected:
        """Link the dropped file to elsewhere."""
        (self.folder / f"{self.stem}{suffix}").symlink_to(target)
        return Expected.REFUSED


Kind = Callable[[Random, Site], Expected]
"""Plants a mutation; its name tells what is done."""


def make_socket(path: Path) -> None:
    """A socket at `path`, which may be longer than the address of one."""
    folder = os.open(path.parent, os.O_PATH)
    try:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(f"/proc/self/fd/{folder}/{path.name}")
    finally:
        os.close(folder)


def flipped(content: bytes, offset: int, bit: int) -> bytes:
    """`content` with one bit turned."""
    changed = bytearray(content)
    changed[offset] ^= 1 << bit
    return bytes(changed)
