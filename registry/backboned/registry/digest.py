"""Digests: what a stage's tensors are, whatever file they came in."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

IGNORED_SUFFIX = "num_batches_tracked"
"""Keys that end so count training steps; they change no answer and are in no digest."""


def stage_digest(tensors: Mapping[str, Tensor]) -> str:
    """The SHA-256, in hex, of a stage's tensors: names, shapes and values as float32, in the order of their names.

    Two stages with equal digests give equal answers. Floating types narrower than float32 widen without loss, so the
    same weights kept as bfloat16 and as the float32 copy of that have one digest.
    """
    digest = hashlib.sha256()
    for key in sorted(k for k in tensors if not k.endswith(IGNORED_SUFFIX)):
        tensor = tensors[key].detach().cpu()
        if tensor.is_floating_point():
            tensor = tensor.float()
        digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        flat = tensor.contiguous().view(-1)
        if flat.numel():
            digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()


class DigestingFile:
    """Writes through to a file, and knows the SHA-256 of what was written: of these bytes, whatever is there later."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._digest = hashlib.sha256()
        self.size_bytes = 0

    def write(self, content: bytes) -> int:
        """Write bytes at the end. Raises `OSError`."""
        self._digest.update(content)
        self.size_bytes += len(content)
        return self._file.write(content)

    def flush(self) -> None:
        """Hand what was written to the operating system. Raises `OSError`."""
        self._file.flush()

    @property
    def sha256(self) -> str:
        """In hex."""
        return self._digest.hexdigest()


def file_digest(path: Path) -> str:
    """The SHA-256 of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
