"""Digests: what a stage's tensors are, whatever file they came in."""

import hashlib
from collections.abc import Mapping
from pathlib import Path

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


def file_digest(path: Path) -> str:
    """The SHA-256 of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
