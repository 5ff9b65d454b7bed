"""From a call to an answer: choose who answers, queue, rank, score. No gRPC here."""

import asyncio
import time
from collections.abc import Sequence

from backboned.registry.errors import BackbonedError, invalid
from backboned.server.serving.admission import Admission
from backboned.server.serving.calls import Call, Pixels, Prepared, Result, Target
from backboned.server.serving.choose import Chooser, tap_of
from backboned.server.serving.engine import Engine
from backboned.server.serving.outcomes import Answers, Outcomes
from backboned.server.serving.queue import Group
from backboned.server.serving.rank import check_labels, rank
from backboned.server.serving.snapshot import LoadedModel
from backboned.server.serving.telemetry import ServingTelemetry
from backboned.server.serving.tree import Answer

MAX_IMAGES = 256


class Predictor:
    """Answers calls. For one event loop."""

    def __init__(
        self,
        chooser: Chooser,
        engine: Engine,
        admission: Admission,
        outcomes: Outcomes,
        telemetry: ServingTelemetry,
    ) -> None:
        self._chooser = chooser
        self._outcomes = outcomes
        self._engine = engine
        self._admission = admission
        self._telemetry = telemetry

    def check_wait(self, model: str, patience_seconds: float | None) -> None:
        """Refuse, before it is read, a call that `predict` would refuse for its deadline.

        `model` is the one that it asks; "" where that isn't known, as for one that nobody else waits for.
        """
        try:
            self._admission.check_wait(model, patience_seconds)
        except BackbonedError as error:
            self._telemetry.predict_done(model if self._chooser.knows(model) else "", error.kind.name)
            raise

    async def predict(self, call: Call) -> tuple[Result, ...]:
        """A result for each target, in their order. Raises `BackbonedError`; see the proto for which."""
        started = time.monotonic()
        code = "INTERNAL"
        try:
            results = await self._answer(call)
            code = "OK"
            return results
        except BackbonedError as error:
            code = error.kind.name
            raise
        except asyncio.CancelledError:
            code = "CANCELLED"
            raise
        finally:
            for target in call.targets:
                self._telemetry.predict_done(target.model if self._chooser.knows(target.model) else "", code)
            self._telemetry.predict_phase("total", time.monotonic() - started)

    async def _answer(self, call: Call) -> tuple[Result, ...]:
        size = sum(map(_size, call.images))
        # Counted from here on: a call may wait for a version that is loaded for it, and holds its images meanwhile.
        with self._admission.admit(call.targets[0].model, len(call.images), size, call.patience_seconds):
            models = await self._chooser.choose(call.targets, call.patience_seconds)
            _check(call, models)
            for model in models:
                check_labels(model.manifest, call.labels)
            shadows = [self._shadow(target, model) for target, model in zip(call.targets, models, strict=True)]
            answers, seen = await self._compute(models, shadows, call)
        results = []
        for place, model in enumerate(models):
            ranked = rank(model, answers[place], call.top_k)
            told = Answers.of(model, answers[place], shadows[place], seen[place])
            self._outcomes.answered(told, ranked, call.labels)
            results.append(Result(model.manifest.model, model.manifest.version, ranked))
        return tuple(results)

    def _shadow(self, target: Target, model: LoadedModel) -> LoadedModel | None:
        """What looks at a call's images beside `model`.

        One that shares all but its head costs next to nothing; any other one looks only while nobody waits.
        """
        shadow = self._chooser.shadow(target, model)
        if shadow is None or Group.of(shadow) != Group.of(model):
            return None
        shares = all(a is b for a, b in zip(model.path[:-1], shadow.path[:-1], strict=True))
        return shadow if shares or self._engine.depth() < self._engine.lanes else None

    async def _compute(
        self, models: Sequence[LoadedModel], shadows: Sequence[LoadedModel | None], call: Call
    ) -> tuple[list[list[Answer]], list[list[Answer]]]:
        """For each model an answer for each image, and for each shadow one where it has one.

        Models of one group look at an image together.
        """
        groups: dict[Group, list[int]] = {}
        for place, model in enumerate(models):
            groups.setdefault(Group.of(model), []).append(place)
        answers: list[list[Answer]] = [[] for _ in models]
        seen: list[list[Answer]] = [[] for _ in models]
        futures: dict[Group, list[asyncio.Future[tuple[Answer, ...]]]] = {}
        try:
            for group, places in groups.items():
                tap = tap_of(models[places[0]], call.embedding_stage, call.embedding)
                beside = [shadow for place in places if (shadow := shadows[place]) is not None]
                futures[group] = self._engine.submit([models[place] for place in places], call.images, tap, beside)
            for group, places in groups.items():
                with_shadow = [place for place in places if shadows[place] is not None]
                for index, future in enumerate(futures[group]):
                    given = await _of_image(future, index)
                    for place, answer in zip(places, given[: len(places)], strict=True):
                        answers[place].append(answer)
                    for place, answer in zip(with_shadow, given[len(places) :], strict=True):
                        seen[place].append(answer)
        finally:
            for future in (f for each in futures.values() for f in each):
                if not future.cancel() and not future.cancelled():
                    future.exception()  # it has been seen: another image's error is the one that is told
        return answers, seen


async def _of_image(future: "asyncio.Future[tuple[Answer, ...]]", index: int) -> tuple[Answer, ...]:
    try:
        return await future
    except BackbonedError as error:
        if error.kind.name != "INVALID_ARGUMENT":
            raise
        raise BackbonedError(error.kind, f"image {index}: {error.message}", field=f"images[{index}]") from error


def _check(call: Call, models: Sequence[LoadedModel]) -> None:
    if not call.images:
        raise invalid("a request needs at least one image", field="images")
    if len(call.images) > MAX_IMAGES:
        raise invalid(
            f"{len(call.images)} images in one request; send at most {MAX_IMAGES}, or use PredictStream",
            field="images",
        )
    if call.labels and len(call.labels) != len(call.images):
        raise invalid(
            f"{len(call.labels)} labels for {len(call.images)} images: give one for each, or none", field="labels"
        )
    for model in models:
        name, classes = model.manifest.model, model.manifest.classes
        if not 0 <= call.top_k <= len(classes):
            raise invalid(f"top_k is {call.top_k}; {name} has {len(classes)} classes", field="top_k")
        tap_of(model, call.embedding_stage, call.embedding)


def _size(image: bytes | Pixels | Prepared) -> int:
    if isinstance(image, Prepared):
        return image.image.nbytes
    return len(image.data) if isinstance(image, Pixels) else len(image)
