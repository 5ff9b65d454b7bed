import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from backboned.server.training.heads.lbfgs import Evaluate, StackedLBFGS

PROBLEMS, VARIABLES = 4, 12


def nothing() -> None:
    pass


def quadratic(condition: float = 100.0) -> tuple[Evaluate, Tensor]:
    """Convex quadratic problems, and their solutions."""
    generator = torch.Generator().manual_seed(0)
    turned = torch.linalg.qr(torch.randn(PROBLEMS, VARIABLES, VARIABLES, generator=generator)).Q
    scales = torch.logspace(0, -torch.tensor(condition).log10().item(), VARIABLES)
    matrix = turned @ torch.diag(scales) @ turned.transpose(1, 2)
    solution = torch.randn(PROBLEMS, VARIABLES, generator=generator)

    def evaluate(x: Tensor) -> tuple[Tensor, Tensor]:
        gradient = (matrix[: len(x)] @ (x - solution[: len(x)])[..., None])[..., 0]
        return ((x - solution[: len(x)]) * gradient).sum(1) / 2, gradient

    return evaluate, solution


def logistic(penalties: list[float], dtype: torch.dtype = torch.float32) -> Evaluate:
    """Logistic regressions on the same rows, with a penalty each."""
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(60, VARIABLES, generator=generator).to(dtype)
    labels = (rows[:, 0] + torch.randn(60, generator=generator) > 0).to(dtype)
    strengths = torch.tensor(penalties, dtype=dtype)

    def evaluate(x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.detach().requires_grad_()
        losses = F.binary_cross_entropy_with_logits(x @ rows.T, labels.expand(len(x), -1), reduction="none").mean(1)
        values = losses + strengths / 2 * x.square().sum(1)
        (gradients,) = torch.autograd.grad(values.sum(), x)
        return values.detach(), gradients

    return evaluate


def test_quadratic_problems_are_solved() -> None:
    evaluate, solution = quadratic()
    solver = StackedLBFGS(evaluate, torch.zeros(PROBLEMS, VARIABLES))
    solver.run(200, nothing)
    torch.testing.assert_close(solver.variables, solution, atol=1e-3, rtol=0)


@pytest.mark.parametrize("penalty", [1e-3, 0.1])
def test_it_finds_what_torch_finds(penalty: float) -> None:
    evaluate = logistic([penalty])
    solver = StackedLBFGS(evaluate, torch.zeros(1, VARIABLES))
    solver.run(100, nothing)
    theirs = torch.zeros(1, VARIABLES, requires_grad=True)
    optimizer = torch.optim.LBFGS([theirs], max_iter=200, line_search_fn="strong_wolfe", tolerance_grad=1e-7)

    def closure() -> Tensor:
        values, theirs.grad = evaluate(theirs)
        return values.sum()

    optimizer.step(closure)
    torch.testing.assert_close(solver.variables, theirs.detach(), atol=1e-3, rtol=1e-3)


def test_many_problems_at_once_come_to_what_each_comes_to_alone() -> None:
    penalties, double = [1e-3, 1e-2, 0.1, 10.0], torch.float64  # in which rounding hardly differs by shape
    together = StackedLBFGS(logistic(penalties, double), torch.zeros(4, VARIABLES, dtype=double))
    together.run(15, nothing)
    for problem, penalty in enumerate(penalties):
        alone = StackedLBFGS(logistic([penalty], double), torch.zeros(1, VARIABLES, dtype=double))
        alone.run(15, nothing)
        torch.testing.assert_close(together.variables[problem], alone.variables[0], atol=1e-9, rtol=0)


def test_a_problem_that_has_converged_stays_as_it_is() -> None:
    evaluate, solution = quadratic()
    start = torch.zeros(PROBLEMS, VARIABLES)
    start[2] = solution[2]
    solver = StackedLBFGS(evaluate, start)
    assert solver.done.tolist() == [False, False, True, False]
    solver.run(20, nothing)
    assert torch.equal(solver.variables[2], solution[2])
    assert not torch.equal(solver.variables[0], start[0])


def test_values_never_rise() -> None:
    evaluate = logistic([0.0, 1e-3])
    solver = StackedLBFGS(evaluate, torch.full((2, VARIABLES), 3.0))
    values = []
    for _ in range(30):
        values.append(evaluate(solver.variables)[0])
        solver.run(1, nothing)
    assert (torch.stack(values).diff(dim=0) <= 0).all()


def test_it_goes_on_from_a_state_with_the_same_bits() -> None:
    whole, first = (StackedLBFGS(logistic([1e-3, 0.1]), torch.zeros(2, VARIABLES)) for _ in range(2))
    whole.run(14, nothing)
    first.run(6, nothing)
    second = StackedLBFGS(logistic([1e-3, 0.1]), torch.zeros(2, VARIABLES))
    second.load_state_dict(first.state_dict())
    second.run(8, nothing)
    assert torch.equal(second.variables, whole.variables)


def test_what_the_check_raises_ends_it() -> None:
    def stop() -> None:
        raise InterruptedError("enough")

    with pytest.raises(InterruptedError, match="enough"):
        StackedLBFGS(logistic([0.1]), torch.zeros(1, VARIABLES)).run(5, stop)
