"""Checkpoints that are whole, of tensors that can't be served."""

import warnings
from collections.abc import Callable, Mapping
from functools import partial
from random import Random
from typing import Any

import torch
from torch import Tensor

from tests.chaos.good import CLASSES, head, saved, state
from tests.chaos.mutation import Expected, Site

STATISTICS = "stem.0.1.running_var"
BODY = "layer2.body.0.0.weight"


def drop(random: Random, site: Site, tensors: Mapping[str, Any], *, whole: bool = False) -> Expected:
    """Tensors in the place of the good ones of these names, bare or in a dict, in a whole state_dict or a head."""
    whole = whole or any(not k.startswith("fc.") for k in tensors)
    values = {k: t for k, t in {**(state() if whole else head()), **tensors}.items() if t is not None}
    form = random.choice(["bare", "model_state_dict", "state_dict"])
    beside = {"backbone": "digits"}
    content = {**beside, **values} if form == "bare" else {**beside, form: values, "classes": list(CLASSES)}
    return site.drop(saved(content))


def dtype(random: Random, site: Site) -> Expected:
    key = random.choice(["fc.weight", "fc.bias", BODY, STATISTICS])
    kind = random.choice(
        [
            torch.int8, torch.uint8, torch.int32, torch.int64, torch.bool, torch.uint16, torch.uint32, torch.uint64,
            torch.complex64, torch.complex128, torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu,
        ]
    )  # fmt: skip
    return drop(random, site, {key: state()[key].abs().to(kind)})


def layout(random: Random, site: Site) -> Expected:
    weight = head()["fc.weight"]
    makers: list[Callable[[], Tensor]] = [
        partial(weight.to_sparse, layout=torch.sparse_coo),
        partial(weight.to_sparse, layout=torch.sparse_csr),
        lambda: weight.to("meta"),
        lambda: torch.quantize_per_tensor(weight, 0.1, 0, torch.qint8),
        lambda: torch.quantize_per_channel(weight, torch.ones(3), torch.zeros(3), 0, torch.quint8),
    ]
    with warnings.catch_warnings(action="ignore"):
        return drop(random, site, {"fc.weight": random.choice(makers)()})


def not_finite(random: Random, site: Site) -> Expected:
    key = random.choice(["fc.weight", "fc.bias", BODY, STATISTICS, "stem.0.1.running_mean", "stem.0.1.weight"])
    kind = random.choice([torch.float32, torch.float64, torch.float16, torch.bfloat16])
    tensor = state()[key].to(kind).flatten()
    tensor[random.randrange(len(tensor))] = random.choice([float("nan"), float("inf"), float("-inf")])
    return drop(random, site, {key: tensor.reshape(state()[key].shape)})


def beyond_float32(random: Random, site: Site) -> Expected:
    key = random.choice(["fc.weight", "fc.bias", STATISTICS])
    tensor = state()[key].double()
    tensor.view(-1)[random.randrange(tensor.numel())] = random.choice([1e39, -1e300])
    return drop(random, site, {key: tensor})


def negative_variance(random: Random, site: Site) -> Expected:
    variance = state()[STATISTICS]
    variance[random.randrange(len(variance))] = -random.choice([0.5, 1.0, 1e30])
    return drop(random, site, {STATISTICS: variance})


def shape(random: Random, site: Site) -> Expected:
    key = random.choice(["fc.weight", "fc.bias", BODY, STATISTICS])
    good = state()[key]
    odd = random.choice(
        [
            good[None],
            good.flatten()[:-1],
            good.T if key == "fc.weight" else good[..., None],
            torch.zeros(()),
            torch.zeros(0),
            torch.zeros(0, *good.shape[1:]),
            torch.zeros(*good.shape, 2),
            torch.zeros(len(CLASSES) + 1),
        ]
    )
    return drop(random, site, {key: odd})


def expanded(random: Random, site: Site) -> Expected:
    rows = random.choice([10**3, 10**6, 10**12])
    return drop(random, site, {"fc.weight": torch.zeros(1).expand(rows, 256), "fc.bias": None})


def keys(random: Random, site: Site) -> Expected:
    odd: Mapping[str, Any] = random.choice(
        [
            {"fc.weight": None},
            {BODY: None},
            {"fc.scale": torch.ones(3)},
            {"": torch.ones(3)},
            {"fc": torch.ones(3)},
            {"fc.weight\n": torch.ones(3)},
            {"\ud800": torch.ones(3)},
            {"x" * 10_000: torch.ones(3)},
            {"fc.weight.": torch.ones(3)},
            {"..": torch.ones(3)},
            {"fc.weight": "text"},
            {"fc.weight": [1.0]},
            {"fc.weight": 3.0},
        ]
    )
    return drop(random, site, odd, whole=random.random() < 0.5)


def sharing(random: Random, site: Site) -> Expected:
    """Thousands of tensors on the same bytes, which together would take long to look at."""
    base = torch.zeros(2**16)
    return drop(random, site, {f"x{i}.weight": base for i in range(random.choice([100, 3000]))})


def other_state_dict(random: Random, site: Site) -> Expected:
    content: Any = random.choice(
        [
            {},
            [state()],
            None,
            5,
            "text",
            torch.zeros(3),
            {"state_dict": {}},
            {"state_dict": None, "fc.weight": torch.zeros(3, 256)},
            {"model_state_dict": {"state_dict": state()}},
            {"weights": state()},
            {"conv1.weight": torch.zeros(64, 3, 7, 7)},
            {"backbone": "no-such-backbone", "state_dict": head()},
            {"backbone": "timm/../../etc", "state_dict": head()},
            {"backbone": "x" * 100_000, "state_dict": head()},
            {"backbone": "\ud800", "state_dict": head()},
            {"state_dict": head()},
            {3: torch.zeros(1)},
            {(1, 2): torch.zeros(1)},
            {None: torch.zeros(1)},
        ]
    )
    return site.drop(saved(content))


KINDS = (
    dtype,
    layout,
    not_finite,
    beyond_float32,
    negative_variance,
    shape,
    expanded,
    keys,
    sharing,
    other_state_dict,
)
