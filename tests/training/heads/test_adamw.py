from typing import Any

import torch
from torch import Tensor

from backboned.server.training.heads.adamw import StackedAdamW

RATES = (1e-4, 3e-3, 3e-3, 0.1)
DECAYS = (0.0, 1e-4, 1.0, 0.1)
STEPS = 25
SHAPES = {"fc.weight": (3, 5), "fc.bias": (3,), "conv.weight": (2, 4, 1, 1), "norm.weight": (4,)}


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def start() -> dict[str, Tensor]:
    return {k: torch.randn(len(RATES), *shape, generator=generator(1)) for k, shape in SHAPES.items()}


def gradients(step: int) -> dict[str, Tensor]:
    """Of very different sizes, and some of them 0."""
    made = {k: torch.randn(len(RATES), *shape, generator=generator(100 + step)) for k, shape in SHAPES.items()}
    return {k: (g * 10 ** (step % 5 - 3)).where(g > -1, 0) for k, g in made.items()}


def factor(step: int) -> float:
    return 1 - step / STEPS


def stacked(parameters: dict[str, Tensor]) -> StackedAdamW:
    return StackedAdamW(parameters, torch.tensor(RATES), torch.tensor(DECAYS))


def test_each_head_learns_as_by_an_optimizer_of_its_own() -> None:
    parameters = start()
    optimizer = stacked(parameters)
    for step in range(STEPS):
        optimizer.step(gradients(step), factor(step))
    for head, (rate, decay) in enumerate(zip(RATES, DECAYS, strict=True)):
        alone = {k: t[head].clone().requires_grad_() for k, t in start().items()}
        matrices = [p for p in alone.values() if p.dim() > 1]
        vectors = [p for p in alone.values() if p.dim() <= 1]
        groups: list[dict[str, Any]] = [{"params": matrices, "weight_decay": decay}, {"params": vectors}]
        theirs = torch.optim.AdamW(groups, weight_decay=0.0)
        for step in range(STEPS):
            for group in theirs.param_groups:
                group["lr"] = rate * factor(step)
            for key, parameter in alone.items():
                parameter.grad = gradients(step)[key][head]
            theirs.step()
        for key, parameter in alone.items():
            torch.testing.assert_close(parameters[key][head], parameter.detach(), atol=1e-6, rtol=1e-6)


def test_it_goes_on_from_a_state_with_the_same_bits() -> None:
    whole, parts = start(), start()
    first, second, straight = stacked(parts), stacked(parts), stacked(whole)
    for step in range(STEPS):
        straight.step(gradients(step), factor(step))
        (first if step < 9 else second).step(gradients(step), factor(step))
        if step == 8:
            second.load_state_dict(first.state_dict())
    assert all(torch.equal(t, whole[k]) for k, t in parts.items())
