"""Answers are calibrated, and doubted where there is reason to, at the cost of one small product a model."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from backboned.registry import Backbone
from backboned.registry.answers import Answers
from backboned.registry.task import Task
from backboned.server.serving.rank import rank
from backboned.server.serving.snapshot import LoadedModel
from backboned.server.serving.tree import Answer, Leg, pool, run_tree

Load = Callable[..., LoadedModel]
MakeNetwork = Callable[..., nn.Module]
LOGITS = torch.tensor([2.0, 1.0, -1.0])


def trusting(seed: int = 0, **changes: object) -> Answers:
    """Answers whose centres are random ones."""
    generator = torch.Generator().manual_seed(seed)
    fields: dict[str, object] = {"temperature": 2.0, "uncertain_below": 0.0, "unfamiliar_beyond": 1e9}
    made = {
        "centres": torch.randn(3, 256, generator=generator).half(),
        "scale": 1 + torch.rand(256, generator=generator),
    }
    return Answers(**fields | made | changes)  # type: ignore[arg-type]


@pytest.fixture
def model(load: Load, make_network: MakeNetwork) -> LoadedModel:
    return replace(load(make_network()), answers=trusting())


def images(n: int, digits: Backbone) -> Tensor:
    return torch.randn(n, *digits.preprocessing.input_shape, generator=torch.Generator().manual_seed(7))


def test_logits_are_divided_by_the_temperature(model: LoadedModel) -> None:
    (found,) = rank(model, [Answer(LOGITS)], 0)
    expected = (LOGITS / 2).softmax(0).tolist()
    assert [p for _, p in found.classes] == pytest.approx(expected)
    (plain,) = rank(replace(model, answers=None), [Answer(LOGITS)], 0)
    assert [p for _, p in plain.classes] == pytest.approx(LOGITS.softmax(0).tolist())


@pytest.mark.parametrize(("below", "beyond", "told"), [
    (0.5, 1.0, (False, False)),
    (0.6, 1.0, (True, False)),
    (0.5, 0.2, (True, True)),
])  # fmt: skip
def test_an_answer_is_doubted_if_it_is_little_certain_or_its_image_lies_far_off(
    model: LoadedModel, below: float, beyond: float, told: tuple[bool, bool]
) -> None:
    model = replace(model, answers=trusting(uncertain_below=below, unfamiliar_beyond=beyond))
    (found,) = rank(model, [Answer(LOGITS, None, torch.tensor(0.5))], 1)  # its highest probability is 0.547
    assert (found.uncertain, found.unfamiliar) == told


def test_several_labels_are_doubted_for_the_least_certain_one(load: Load, make_network: MakeNetwork) -> None:
    model = load(make_network(), task=Task.MULTI_LABEL)
    model = replace(model, answers=trusting(temperature=1.0, uncertain_below=0.7))
    answers = [Answer(torch.tensor(logits)) for logits in ([5.0, -5.0, -5.0], [5.0, -5.0, 0.1])]
    assert [p.uncertain for p in rank(model, answers, 0)] == [False, True]


def test_a_model_without_answers_never_doubts(model: LoadedModel) -> None:
    (found,) = rank(replace(model, answers=None), [Answer(torch.zeros(3), None, torch.tensor(1e9))], 0)
    assert (found.uncertain, found.unfamiliar) == (False, False)


def test_distances_are_of_the_features_that_each_models_head_reads(
    load: Load, make_network: MakeNetwork, digits: Backbone
) -> None:
    networks = [make_network(head=1), make_network(head=2), make_network(body=5), make_network(head=3)]
    models = [load(network) for network in networks]
    models = [replace(m, answers=trusting(i) if i < 3 else None) for i, m in enumerate(models)]
    x = images(3, digits)
    rows = [(row, m) for m in models for row in (range(3) if m is not models[1] else [2, 0])]
    with torch.inference_mode():
        found = run_tree([Leg(row, m.path, None, m.answers) for row, m in rows], x)
    for (row, m), answer in zip(rows, found, strict=True):
        assert isinstance(answer, Answer) and answer.embedding is None
        y = x[row : row + 1]
        with torch.inference_mode():
            for stage in m.path[:-1]:
                y = stage(y)
            logits = m.path[-1](y)[0]
        assert torch.allclose(answer.logits, logits, atol=1e-4)
        if m.answers is None:
            assert answer.distance is None
        else:
            assert answer.distance is not None
            assert answer.distance.item() == pytest.approx(m.answers.distances(pool(y)).item(), rel=1e-3)


def test_models_that_share_their_features_still_run_once_and_alike(model: LoadedModel, digits: Backbone) -> None:
    calls = []
    x = images(2, digits)
    bare = replace(model, answers=None)
    legs = [Leg(row, m.path, len(m.path) - 2, m.answers) for m in (model, bare) for row in range(2)]
    first = model.path[0]
    forward = first._forward

    def counted(module: nn.Module, y: Tensor) -> Tensor:
        calls.append(len(y))
        return forward(module, y)

    first._forward = counted
    with torch.inference_mode():
        found = run_tree(legs, x)
    assert calls == [2]
    both = [a for a in found if isinstance(a, Answer)]
    assert len(both) == 4
    for row in range(2):
        assert both[row].logits.equal(both[row + 2].logits)
        embeddings = [both[at].embedding for at in (row, row + 2)]
        assert embeddings[0] is not None and embeddings[1] is not None and embeddings[0].equal(embeddings[1])
        assert both[row].distance is not None and both[row + 2].distance is None
