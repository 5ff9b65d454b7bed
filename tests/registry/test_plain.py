"""What stands beside tensors is copied as plain values, or refused where it has no measure."""

from collections import OrderedDict
from typing import Any

import pytest
import torch

from backboned.registry.errors import BackbonedError
from backboned.registry.plain import MAX_DEPTH, plain, plain_tensor


def endless() -> list[Any]:
    value: list[Any] = []
    value.append(value)
    return value


def doubling() -> list[Any]:
    value: list[Any] = []
    for _ in range(MAX_DEPTH - 1):
        value = [value, value, value]
    return value


def test_plain_values_are_copied() -> None:
    value = {"classes": ("a", "b"), 3: [1, 2.5, None, True], "inner": OrderedDict(weight=torch.ones(2))}
    found = plain(value, "it")
    assert found["inner"].pop("weight").equal(torch.ones(2))
    assert found == {"classes": ["a", "b"], 3: [1, 2.5, None, True], "inner": {}}


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (endless(), "it has no measure"),
        (doubling(), "it has no measure"),
        (["x" * 2**20] * 20, "it has no measure"),
        ({(1, 2): 3}, "it has a key that is a tuple"),
        ({10**400: 3}, "it holds a int that is no plain value"),
        ([10**400], "it holds a int that is no plain value"),
        ([{1, 2}], "it holds a set that is no plain value"),
        ([torch.tensor([float("nan")])], "values that are not finite"),
        ([torch.zeros(2, device="meta")], "only plain dense ones"),
    ],
)
def test_what_is_not_plain_is_refused(value: Any, message: str) -> None:
    with pytest.raises(BackbonedError, match=message):
        plain(value, "it")


def test_methods_that_a_file_has_replaced_are_not_called() -> None:
    tensor, mapping = torch.ones(2), OrderedDict(a=1)
    for name in ("detach", "sum", "dim"):
        setattr(tensor, name, 5)
    for name in ("items", "keys", "get"):
        setattr(mapping, name, 5)
    assert plain_tensor("it", tensor).sum() == 2
    assert plain(mapping, "it") == {"a": 1}


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_types_that_nothing_computes_with_are_refused(dtype: torch.dtype) -> None:
    with pytest.raises(BackbonedError, match="which can't be computed with"):
        plain_tensor("it", torch.zeros(2).to(dtype))


def test_values_that_float32_cannot_hold_are_refused() -> None:
    with pytest.raises(BackbonedError, match="not finite"):
        plain_tensor("it", torch.tensor([1.0, 1e300], dtype=torch.float64))
