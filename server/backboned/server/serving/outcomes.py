"""What became of answers: the truth, sent along with the images or hours later, scores who answered and its shadow."""

import asyncio
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from sqlalchemy.exc import SQLAlchemyError
from torch import Tensor

from backboned.registry.errors import BackbonedError, ErrorKind, invalid
from backboned.registry.manifest import Manifest
from backboned.registry.task import Task
from backboned.server.serving.calls import Prediction
from backboned.server.serving.comparison import LARGEST_LOSS, Score, Tally
from backboned.server.serving.rank import correct, truth_of
from backboned.server.serving.recent import Recent
from backboned.server.serving.remembered import Memory, Pair, Remembered
from backboned.server.serving.snapshot import KnownModel, LoadedModel, Snapshot
from backboned.server.serving.telemetry import ServingTelemetry
from backboned.server.serving.tree import Answer

MAX_OUTCOMES = 10_000
_RETRY_SECONDS = 1.0


@dataclass(frozen=True)
class Answers:
    """What a model and its shadow, if any, made of the images of a call: calibrated logits `[n, outputs]`.

    `shadow_logits` have a row of NaN where the shadow failed.
    """

    model: LoadedModel
    logits: Tensor
    shadow: LoadedModel | None = None
    shadow_logits: Tensor | None = None

    @classmethod
    def of(
        cls,
        model: LoadedModel,
        answers: Sequence[Answer],
        shadow: LoadedModel | None,
        shadow_answers: Sequence[Answer],
    ) -> "Answers":
        """Those of a model, an answer an image, and of its shadow, if it has one."""
        logits = model.calibrated(torch.stack([answer.logits for answer in answers]))
        if shadow is None:
            return cls(model, logits)
        seen = shadow.calibrated(torch.stack([answer.logits for answer in shadow_answers]))
        return cls(model, logits, shadow, seen)


class Outcomes:
    """Remembers answers and counts what became of them. For one event loop.

    `recent` tells what there is to tell of answers without outcomes.
    """

    def __init__(self, memory: Memory, snapshot: Callable[[], Snapshot], telemetry: ServingTelemetry) -> None:
        self._memory = memory
        self._snapshot = snapshot
        self._telemetry = telemetry
        self.recent = Recent(snapshot)
        self._turn = asyncio.Lock()

    def answered(self, answers: Answers, predictions: Sequence[Prediction], labels: Sequence[str]) -> None:
        """Keep a call's answers; with `labels`, one an image, they are scored at once."""
        self.recent.answered(answers.model, predictions)
        model = answers.model.manifest
        shadow = None if answers.shadow is None else answers.shadow.manifest
        rows = _bytes(answers.logits)
        shadow_rows = [b""] * len(rows) if answers.shadow_logits is None else _bytes(answers.shadow_logits)
        agree = _agree(answers)
        pair = pair_of(answers.model, answers.shadow)
        remembered = []
        for place, prediction in enumerate(predictions):
            scores = None
            if labels:
                shadow_logits = None if answers.shadow_logits is None else answers.shadow_logits[place]
                scores = _scores(labels[place], (model, answers.logits[place]), (shadow, shadow_logits))
                self._tell(model.model, scores)
            remembered.append(
                Remembered(
                    prediction.id,
                    pair if shadow_rows[place] else pair.alone,
                    rows[place],
                    shadow_rows[place],
                    scores=scores,
                    agrees=agree[place],
                )
            )
        if shadow is not None:
            self._telemetry.shadow_answers(model.model, sum(agree), len(agree) - sum(agree))
        self._memory.remember(remembered)

    async def report(self, outcomes: Mapping[str, str]) -> tuple[int, list[str]]:
        """Score answers by their true labels, by id: how many were new, and the ids that aren't known (any more).

        An answer's first outcome counts. Raises `BackbonedError` for a label that the model doesn't have; then nothing
        has been counted.
        """
        if len(outcomes) > MAX_OUTCOMES:
            raise invalid(f"{len(outcomes)} outcomes in one call; send at most {MAX_OUTCOMES}", field="outcomes")
        ids = [each for each in outcomes if _is_id(each)]
        try:
            async with self._turn:
                found = await asyncio.to_thread(self._memory.find, ids)
                scored = await asyncio.to_thread(self._score, outcomes, found)
                await asyncio.to_thread(self._memory.count, [(found[each], scores) for each, scores in scored.items()])
        except SQLAlchemyError as error:
            why = getattr(error, "orig", None) or error
            message = f"outcomes can't be counted now: {why}"
            raise BackbonedError(ErrorKind.UNAVAILABLE, message, retry_delay_seconds=_RETRY_SECONDS) from error
        for each, scores in scored.items():
            self._tell(found[each].pair.model, scores)
        known = {each for each in found if found[each].known or each in scored}
        return len(scored), [each for each in outcomes if each not in known]

    def tally(self, model: KnownModel) -> Tally:
        """What is known of the version that serves a model, and of its shadow."""
        if model.default is None:
            return Tally()
        return self._memory.tallies().get(pair_of(model.default, model.shadow), Tally())

    def _score(
        self, outcomes: Mapping[str, str], found: Mapping[str, Remembered]
    ) -> dict[str, tuple[Score, Score | None]]:
        scored = {}
        for place, (each, label) in enumerate(outcomes.items()):
            answer = found.get(each)
            if answer is None or answer.known:
                continue
            pair = answer.pair
            manifest, logits = self._side(pair.model, pair.version, answer.logits)
            if manifest is None or logits is None:
                continue  # it was deleted
            try:
                shadow = self._side(pair.model, pair.shadow_version, answer.shadow_logits)
                scored[each] = _scores(label, (manifest, logits), shadow)
            except BackbonedError as error:
                raise invalid(f"outcomes[{place}]: {error.message}", field=f"outcomes[{place}].label") from error
        return scored

    def _side(self, name: str, version: int, data: bytes) -> "_Side":
        """The manifest and the logits of a version; neither, if there is none that they could be of."""
        model = self._snapshot().models.get(name)
        known = None if model is None else model.versions.get(version)
        if known is None or not data:
            return None, None
        logits = torch.frombuffer(bytearray(data), dtype=torch.float16).float()
        fits = len(logits) == known.manifest.task.outputs(len(known.manifest.classes))
        return (known.manifest, logits) if fits else (None, None)

    def _tell(self, model: str, scores: tuple[Score, Score | None]) -> None:
        for role, score in zip(("serving", "shadow"), scores, strict=True):
            if score is not None:
                self._telemetry.serving_loss(model, role, score.loss, score.right)


def pair_of(model: LoadedModel, shadow: LoadedModel | None) -> Pair:
    """A loaded version and its shadow."""
    pair = Pair(model.manifest.model, model.manifest.version, model.sha256)
    if shadow is None:
        return pair
    return replace(pair, shadow_version=shadow.manifest.version, shadow_digest=shadow.sha256)


_Side = tuple[Manifest | None, Tensor | None]


def _scores(label: str, serving: tuple[Manifest, Tensor], shadow: _Side) -> tuple[Score, Score | None]:
    """Of both; a version that has no such class is as wrong as can be. Raises if neither has."""
    manifest, logits = serving
    other, other_logits = shadow
    truth = truth_of(manifest, label)
    if other is None or other_logits is None or not bool(other_logits.isfinite().all()):
        if isinstance(truth, BackbonedError):
            raise truth
        return _score_of(manifest, logits, truth), None
    other_truth = truth_of(other, label)
    if isinstance(truth, BackbonedError) and isinstance(other_truth, BackbonedError):
        raise truth
    return _score_of(manifest, logits, truth), _score_of(other, other_logits, other_truth)


def _score_of(manifest: Manifest, logits: Tensor, truth: Tensor | BackbonedError) -> Score:
    if isinstance(truth, BackbonedError):
        return Score(LARGEST_LOSS, right=False)
    loss = manifest.task.loss(logits[None], truth[None]).item()
    if not math.isfinite(loss):
        return Score(LARGEST_LOSS, right=False)
    return Score(min(loss, LARGEST_LOSS), correct(manifest.task, logits, truth))


def _agree(answers: Answers) -> list[bool]:
    """Whether both say the same, image by image."""
    if answers.shadow is None or answers.shadow_logits is None:
        return [False] * len(answers.logits)
    ours = _said(answers.model.manifest, answers.logits)
    theirs = _said(answers.shadow.manifest, answers.shadow_logits)
    return [a == b for a, b in zip(ours, theirs, strict=True)]


def _said(manifest: Manifest, logits: Tensor) -> list[object]:
    """What each row says: its likeliest class, or with several labels all that are likelier than not."""
    probabilities = manifest.task.probabilities(logits)
    if manifest.task is Task.MULTI_LABEL:
        said = (probabilities > 0.5).tolist()
        return [frozenset(itertools.compress(manifest.classes, row)) for row in said]
    return [manifest.classes[place] for place in probabilities.argmax(1).tolist()]


def _bytes(logits: Tensor) -> list[bytes]:
    """Each row as little-endian float16; nothing of one that isn't finite."""
    rows = logits.clamp(-60_000, 60_000).half().numpy()
    finite = logits.isfinite().all(1).tolist()
    return [row.tobytes() if good else b"" for row, good in zip(rows, finite, strict=True)]


def _is_id(text: str) -> bool:
    try:
        return len(bytes.fromhex(text)) == 12 and text == text.lower()
    except ValueError:
        return False
