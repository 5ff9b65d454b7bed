"""The truth scores who answered and its shadow: by their own classes, once, and not at all where it can't be."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from sqlalchemy import Engine
from torch import Tensor, nn

from backboned.registry import BackbonedError, ErrorKind
from backboned.registry.task import Task
from backboned.server.serving.calls import Prediction
from backboned.server.serving.comparison import LARGEST_LOSS
from backboned.server.serving.outcomes import MAX_OUTCOMES, Answers, Outcomes
from backboned.server.serving.policy import Policy, VersionPolicy
from backboned.server.serving.remembered import Memory
from backboned.server.serving.snapshot import KnownModel, KnownVersion, LoadedModel, Snapshot, State
from backboned.server.serving.tree import Answer
from backboned.server.troubles import Troubles

SURE = torch.tensor([9.0, 0.0, 0.0])
"""Of an ant."""


class Desk:
    """Outcomes of a model whose first version serves, with the second one as its shadow."""

    def __init__(self, database: Engine, telemetry: Any, *versions: LoadedModel) -> None:
        known = {m.manifest.version: KnownVersion(m.manifest, State.SERVING, loaded=m) for m in versions}
        self.model = KnownModel("flowers", known, Policy(VersionPolicy.MANUAL, 1))
        self.models = {"flowers": self.model}
        self.memory = Memory(database, 2**20, Troubles())
        self.outcomes = Outcomes(self.memory, lambda: Snapshot(self.models), telemetry)
        self.serving, self.shadow = versions
        self.asked = 0

    def answer(self, logits: Tensor, seen: Tensor, *labels: str) -> str:
        self.asked += 1
        prediction = Prediction(f"{self.asked:024x}", ())
        answers = Answers.of(self.serving, [Answer(logits)], self.shadow, [Answer(seen)])
        self.outcomes.answered(answers, [prediction], labels)
        return prediction.id


@pytest.fixture
def make_desk(
    database: Engine, telemetry: Any, load: Callable[..., LoadedModel], make_network: Callable[..., nn.Module]
) -> Callable[..., Desk]:
    def make(task: Task = Task.SINGLE_LABEL, **shadow: Any) -> Desk:
        classes = len(shadow.get("classes", "abc"))
        other = load(make_network(classes, head=1), version=2, task=task, **shadow)
        return Desk(database, telemetry, load(make_network(), task=task), other)

    return make


async def test_both_are_scored_when_the_truth_comes(make_desk: Callable[..., Desk], telemetry: Any) -> None:
    desk = make_desk()
    right = desk.answer(SURE, -SURE)
    assert await desk.outcomes.report({right: "ant"}) == (1, [])
    tally = desk.outcomes.tally(desk.model)
    assert (tally.serving.right, tally.shadow.right) == (1, 0)
    assert (tally.answers, tally.agreements) == (1, 0)
    assert tally.gain.value == pytest.approx(-(9.6934 - 2.47e-4), abs=1e-2)
    assert [(model, role, good) for model, role, _, good in telemetry.losses] == [
        ("flowers", "serving", True), ("flowers", "shadow", False),
    ]  # fmt: skip
    assert await desk.outcomes.report({right: "bee"}) == (0, []), "the first outcome counts"
    assert telemetry.seen == {"flowers": 1}


async def test_a_label_with_the_image_counts_as_one_that_comes_later(make_desk: Callable[..., Desk]) -> None:
    desk = make_desk()
    known = desk.answer(SURE, SURE, "ant")
    assert await desk.outcomes.report({known: "ant"}) == (0, [])
    tally = desk.outcomes.tally(desk.model)
    assert (tally.serving.count, tally.shadow.count, tally.agreements) == (1, 1, 1)


async def test_a_shadow_that_failed_costs_nothing_but_its_own_score(make_desk: Callable[..., Desk]) -> None:
    desk = make_desk()
    asked = desk.answer(SURE, SURE * float("nan"))
    assert await desk.outcomes.report({asked: "ant"}) == (1, [])
    assert desk.outcomes.tally(desk.model).shadow.count == 0
    assert desk.memory.find([asked])[asked].pair.shadow_version == 0


async def test_an_answer_that_is_no_number_is_as_wrong_as_can_be(make_desk: Callable[..., Desk]) -> None:
    desk = make_desk()
    desk.answer(SURE * float("nan"), SURE, "ant")
    desk.answer(SURE * float("inf"), SURE, "bee")
    desk.memory.find([])
    tally = desk.outcomes.tally(desk.model)
    assert (tally.serving.count, tally.serving.loss.value, tally.serving.right) == (2, LARGEST_LOSS, 0)


async def test_a_class_that_one_of_them_lacks_is_as_wrong_as_can_be(make_desk: Callable[..., Desk]) -> None:
    desk = make_desk(classes=("ant", "bee", "wasp", "fly"))
    asked = desk.answer(SURE, torch.tensor([0.0, 0.0, 0.0, 9.0]))
    assert await desk.outcomes.report({asked: "fly"}) == (1, [])
    tally = desk.outcomes.tally(desk.model)
    assert (tally.serving.loss.value, tally.serving.right, tally.shadow.right) == (LARGEST_LOSS, 0, 1)


async def test_several_labels_agree_where_all_of_them_do(make_desk: Callable[..., Desk]) -> None:
    desk = make_desk(task=Task.MULTI_LABEL)
    desk.answer(SURE, torch.tensor([5.0, -5.0, -5.0]))
    desk.answer(SURE, torch.tensor([5.0, 5.0, -5.0]))
    desk.memory.find([])
    assert desk.outcomes.tally(desk.model).agreements == 1


async def test_a_mistake_in_a_report_names_its_place_and_counts_nothing(make_desk: Callable[..., Desk]) -> None:
    desk = make_desk()
    first, second = desk.answer(SURE, SURE), desk.answer(SURE, SURE)
    with pytest.raises(BackbonedError, match=r"outcomes\[1\].*did you mean 'ant'") as caught:
        await desk.outcomes.report({first: "ant", second: "aunt"})
    assert (caught.value.kind, caught.value.field) == (ErrorKind.INVALID_ARGUMENT, "outcomes[1].label")
    assert desk.outcomes.tally(desk.model).serving.count == 0
    with pytest.raises(BackbonedError, match="at most 10000"):
        await desk.outcomes.report({str(number): "ant" for number in range(MAX_OUTCOMES + 1)})


async def test_what_was_answered_by_a_version_that_is_gone_is_unknown(make_desk: Callable[..., Desk]) -> None:
    desk = make_desk()
    asked = desk.answer(SURE, SURE)
    desk.models = {}
    assert await desk.outcomes.report({asked: "ant", "f" * 24: "ant", "é": "ant"}) == (0, [asked, "f" * 24, "é"])


async def test_a_database_that_cannot_be_read_is_told(make_desk: Callable[..., Desk], database: Engine) -> None:
    desk = make_desk()
    with database.begin() as connection:
        connection.exec_driver_sql("DROP TABLE answers")
    with pytest.raises(BackbonedError, match="can't be counted now: no such table") as caught:
        await desk.outcomes.report({"0" * 24: "ant"})
    assert caught.value.kind is ErrorKind.UNAVAILABLE
