"""A digest is of what tensors say, not of how they are kept."""

import hashlib
from pathlib import Path

import pytest
import torch
from torch import Tensor

from backboned.registry.digest import file_digest, stage_digest

WEIGHT = torch.arange(6.0).reshape(2, 3)


@pytest.mark.parametrize(
    "same",
    [
        {"b": torch.zeros(2), "a": WEIGHT},
        {"a": WEIGHT.to(torch.bfloat16), "b": torch.zeros(2, dtype=torch.float16)},
        {"a": WEIGHT.t().contiguous().t(), "b": torch.zeros(4)[::2]},
        {"a": torch.nn.Parameter(WEIGHT), "b": torch.zeros(2)},
        {"a": WEIGHT, "b": torch.zeros(2), "num_batches_tracked": torch.tensor(7)},
        {"a": WEIGHT, "b": torch.zeros(2), "bn.num_batches_tracked": torch.tensor(3)},
    ],
    ids=["other order", "narrower types", "other strides", "a parameter", "a counter", "a nested counter"],
)
def test_the_same_values_have_one_digest(same: dict[str, Tensor]) -> None:
    assert stage_digest(same) == stage_digest({"a": WEIGHT, "b": torch.zeros(2)})


@pytest.mark.parametrize(
    "other",
    [
        {"a": WEIGHT},
        {"a": WEIGHT, "c": torch.zeros(2)},
        {"a": WEIGHT, "b": torch.zeros(3)},
        {"a": WEIGHT, "b": torch.zeros(2, 1)},
        {"a": WEIGHT, "b": torch.zeros(2, dtype=torch.int64)},
        {"a": WEIGHT, "b": torch.tensor([0.0, 1e-45])},
        {"a": WEIGHT.reshape(3, 2), "b": torch.zeros(2)},
        {"a": WEIGHT.flip(0), "b": torch.zeros(2)},
    ],
    ids=["fewer", "other name", "longer", "other shape", "other type", "the least bit", "reshaped", "permuted"],
)
def test_anything_else_has_another(other: dict[str, Tensor]) -> None:
    assert stage_digest(other) != stage_digest({"a": WEIGHT, "b": torch.zeros(2)})


def test_scalars_empty_tensors_and_stages_without_any_have_digests() -> None:
    several = [{}, {"a": torch.tensor(1.0)}, {"a": torch.zeros(0)}, {"a": torch.zeros(0, 3)}]
    assert len({stage_digest(tensors) for tensors in several}) == len(several)


def test_a_file_digest_is_the_sha256_of_its_bytes(tmp_path: Path) -> None:
    content = bytes(range(256)) * 10_000
    (tmp_path / "file").write_bytes(content)
    assert file_digest(tmp_path / "file") == hashlib.sha256(content).hexdigest()
