import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from backboned.server.training.heads.probe import Probes, fits, row_weights

CLASSES = 3
PENALTIES = (0.03, 0.3)
Start = tuple[Tensor, Tensor]


def rows_and_labels(count: int, features: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(count)
    labels = torch.arange(count) % CLASSES
    return torch.randn(count, features, generator=generator) + labels[:, None] / 4, labels


def nothing() -> None:
    pass


def zero(features: int) -> Start:
    return torch.zeros(CLASSES, features), torch.zeros(CLASSES)


def fitted(rows: Tensor, labels: Tensor, weights: Tensor, start: Start, epochs: int = 30) -> Probes:
    def losses(logits: Tensor) -> Tensor:
        return F.cross_entropy(logits.flatten(0, 1), labels.repeat(len(logits)), reduction="none").view(len(logits), -1)

    probes = Probes(rows, weights, torch.tensor(PENALTIES), start, losses)
    for _ in range(epochs):
        probes.run(nothing)
    return probes


def solved(rows: Tensor, labels: Tensor, row_weight: Tensor, penalty: float, start: Start) -> Start:
    """The same problem in all features, in float64, by torch."""
    weight, bias = (torch.zeros_like(part, dtype=torch.float64).requires_grad_() for part in start)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=500, line_search_fn="strong_wolfe", tolerance_grad=1e-9)

    def closure() -> Tensor:
        optimizer.zero_grad()
        logits = rows.double() @ (start[0].double() + weight).T + start[1].double() + bias
        loss = (F.cross_entropy(logits, labels, reduction="none") * row_weight).sum()
        loss = loss + penalty / 2 * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return (start[0] + weight.detach()).float(), (start[1] + bias.detach()).float()


@pytest.mark.parametrize(("count", "features"), [(24, 60), (60, 12)], ids=["fewer rows", "fewer features"])
@pytest.mark.parametrize("warm", [False, True])
def test_the_fitted_heads_are_the_solutions(count: int, features: int, warm: bool) -> None:
    rows, labels = rows_and_labels(count, features)
    generator = torch.Generator().manual_seed(5)
    learned = torch.randn(CLASSES, features, generator=generator) / 4, torch.randn(CLASSES, generator=generator)
    start = learned if warm else zero(features)
    weights = torch.full((2, count), 1 / count)
    found = fitted(rows, labels, weights, start).heads()
    for problem, penalty in enumerate(PENALTIES):
        weight, bias = solved(rows, labels, weights[problem], penalty, start)
        torch.testing.assert_close(found[0][problem], weight, atol=2e-3, rtol=0)
        # A softmax has one bias too many: only their differences are determined.
        shift = (found[1][problem] - bias).mean()
        torch.testing.assert_close(found[1][problem] - shift, bias, atol=5e-3, rtol=0)


def test_rows_that_weigh_nothing_have_no_influence() -> None:
    rows, labels = rows_and_labels(30, 8)
    kept = [torch.arange(30) < 20, torch.arange(30) >= 10]
    weights = row_weights(kept, 1, 1)
    found = fitted(rows, labels, weights, zero(8)).heads()
    for problem, part in enumerate(kept):
        weight, _ = solved(rows[part], labels[part], torch.full((20,), 1 / 20), PENALTIES[problem], zero(8))
        torch.testing.assert_close(found[0][problem], weight, atol=2e-3, rtol=0)


def test_it_goes_on_from_a_state_with_the_same_bits() -> None:
    rows, labels = rows_and_labels(24, 60)
    weights = torch.full((2, 24), 1 / 24)
    whole = fitted(rows, labels, weights, zero(60), epochs=2)
    again = fitted(rows, labels, weights, zero(60), epochs=0)
    again.load_state_dict(fitted(rows, labels, weights, zero(60), epochs=1).state_dict())
    again.run(nothing)
    assert all(map(torch.equal, again.heads(), whole.heads()))


def test_the_weights_of_rows_sum_to_one_over_the_images_that_are_kept() -> None:
    weights = row_weights([torch.tensor([True] * 4), torch.tensor([True, False, True, False])], 3, 2)
    assert weights.shape == (6, 8)
    torch.testing.assert_close(weights.sum(1), torch.ones(6))
    assert weights[0].tolist() == [1 / 8] * 8
    assert weights[3].tolist() == [1 / 4, 1 / 4, 0, 0, 1 / 4, 1 / 4, 0, 0]


def test_only_what_memory_holds_fits() -> None:
    assert fits(1000, 1280, 5, 30)
    assert not fits(1_000_000, 1280, 5, 30)
    assert not fits(1000, 1280, 1000, 30)
