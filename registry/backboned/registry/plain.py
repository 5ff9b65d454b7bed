"""Values from a pickle, as plain ones: nothing in them that goes on without end, or answers otherwise than it looks."""

from typing import Any

import torch
from torch import Tensor

from backboned.registry.refusal import refused

MAX_DEPTH = 20
MAX_CHARACTERS = 16 * 2**20
"""Of all values together, written out: a list may hold itself twice, and so on."""


def plain(value: object, what: str) -> Any:
    """A copy of `value` of dicts, lists, text, numbers and tensors alone; `what` names it in errors.

    Raises `BackbonedError` `DATA_LOSS` if it holds anything else, or is beyond all measure.
    """
    return _Copier(what).copy(value, MAX_DEPTH)


def plain_tensor(key: str, value: Tensor) -> Tensor:
    """`value` without gradients, hooks and attributes. Raises `BackbonedError` `DATA_LOSS` as `check_tensor` does."""
    tensor = Tensor.detach(value)  # an attribute of its own may be called `detach`
    check_tensor(key, tensor)
    return tensor


def check_tensor(key: str, tensor: Tensor) -> None:
    """Raise `BackbonedError` `DATA_LOSS` unless `tensor` is a plain, finite one that its bytes really hold."""
    check_dense(key, tensor)
    check_finite(key, tensor)


def check_dense(key: str, tensor: Tensor) -> None:
    """Raise `BackbonedError` `DATA_LOSS` unless `tensor` is a plain one that its bytes really hold; reads none."""
    odd = tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_complex() or tensor.is_neg()
    if odd or tensor.device.type != "cpu":
        raise refused(f"{key!r} is a {tensor.layout} {tensor.dtype} tensor; only plain dense ones can be served")
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise refused(f"{key!r} claims to be {list(tensor.shape)}, which its bytes don't hold")
    if tensor.is_floating_point() and tensor.dtype not in _FLOATS:
        raise refused(f"{key!r} has type {tensor.dtype}, which can't be computed with: save it as float16 or wider")


def check_finite(key: str, tensor: Tensor) -> None:
    """Raise `BackbonedError` `DATA_LOSS` if `tensor` has values that float32 can't hold."""
    if not tensor.is_floating_point():
        return
    values = tensor.float() if tensor.dtype is torch.float64 else tensor
    # A sum that is finite has only finite terms, and costs a fifth of looking at each.
    if not values.sum().isfinite() and not values.isfinite().all():
        raise refused(f"{key!r} has values that are not finite (NaN or infinity): the training diverged")


_FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


class _Copier:
    def __init__(self, what: str) -> None:
        self._what = what
        self._left = MAX_CHARACTERS

    def copy(self, value: object, depth: int) -> Any:
        self._left -= 8 + (len(value) if isinstance(value, str) else 0)
        if self._left < 0 or depth < 0:
            raise refused(f"{self._what} has no measure: it holds too much, or itself")
        if isinstance(value, dict):  # by `dict` itself: an attribute of its own may be called `items`
            return {self._key(k): self.copy(v, depth - 1) for k, v in dict.items(value)}
        if isinstance(value, list | tuple):
            return [self.copy(v, depth - 1) for v in value]
        if isinstance(value, Tensor):
            return plain_tensor(self._what, value)
        if value is None or isinstance(value, str | float) or (isinstance(value, int) and abs(value) < 2**63):
            return value
        raise refused(f"{self._what} holds a {type(value).__name__} that is no plain value")

    def _key(self, key: object) -> str | int:
        if isinstance(key, str | int):
            self.copy(key, 0)
            return key
        raise refused(f"{self._what} has a key that is a {type(key).__name__}, not text or a number")
