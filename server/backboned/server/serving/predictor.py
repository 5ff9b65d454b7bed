"""From a call to an answer: choose the version, decode, queue, compute, rank. No gRPC here."""

import asyncio
import secrets
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from backboned.registry.backbone import Preprocessing
from backboned.registry.errors import BackbonedError, ErrorKind, invalid, not_found
from backboned.registry.manifest import check_name
from backboned.registry.task import Task
from backboned.server.compute.decode import decode, from_pixels
from backboned.server.compute.preprocess import prepare
from backboned.server.serving.aliases import LATEST, Aliases
from backboned.server.serving.engine import Answer, Engine
from backboned.server.serving.loader import Loader, not_loaded
from backboned.server.serving.snapshot import KnownModel, KnownVersion, LoadedModel, State
from backboned.server.serving.telemetry import ServingTelemetry

MAX_IMAGES = 256
_REFRESH_TIMEOUT_SECONDS = 10.0


@dataclass(frozen=True)
class Pixels:
    """An image as raw uint8 RGB bytes, of `shape` [height, width, 3]."""

    data: bytes
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Call:
    """What is asked; see PredictRequest."""

    model: str
    images: Sequence[bytes | Pixels]
    version: int | None = None
    alias: str | None = None
    top_k: int = 0
    labels: Sequence[str] = ()
    embedding: bool = False


@dataclass(frozen=True)
class Prediction:
    """What one image shows: classes with probabilities, best first."""

    id: str
    classes: tuple[tuple[str, float], ...]
    embedding: tuple[float, ...] = ()


@dataclass(frozen=True)
class Result:
    """The predictions, and the version that made them."""

    model: str
    version: int
    predictions: tuple[Prediction, ...]


class Predictor:
    """Answers calls. For one event loop."""

    def __init__(
        self,
        loader: Loader,
        aliases: Aliases,
        engine: Engine,
        telemetry: ServingTelemetry,
        *,
        decode_threads: int,
        max_image_pixels: int,
        max_queued_images: int,
        max_queued_bytes: int,
    ) -> None:
        self._loader = loader
        self._aliases = aliases
        self._engine = engine
        self._telemetry = telemetry
        self._max_image_pixels = max_image_pixels
        self._admission = _Admission(max_queued_images, max_queued_bytes, engine)
        self._pool = ThreadPoolExecutor(
            decode_threads, thread_name_prefix="decode", initializer=torch.set_num_threads, initargs=(1,)
        )

    def close(self) -> None:
        """Stop decoding."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    async def predict(self, call: Call) -> Result:
        """Answer one call. Raises `BackbonedError`; see the proto for which."""
        started = time.monotonic()
        code, model = "INTERNAL", ""
        try:
            check_name(call.model)
            model = call.model if call.model in self._loader.snapshot.models else ""
            loaded = await self._choose(call)
            model = call.model
            result = await self._answer(loaded, call)
            code = "OK"
            return result
        except BackbonedError as error:
            code = error.kind.name
            raise
        except asyncio.CancelledError:
            code = "CANCELLED"
            raise
        finally:
            self._telemetry.predict_done(model, code)
            self._telemetry.predict_phase("total", time.monotonic() - started)

    async def _choose(self, call: Call) -> LoadedModel:
        """The loaded version that is to answer; looks at the directory once more before saying no."""
        try:
            return self._find(call)
        except BackbonedError as error:
            if error.kind not in (ErrorKind.NOT_FOUND, ErrorKind.UNAVAILABLE):
                raise
        future = asyncio.wrap_future(self._loader.refresh())
        await asyncio.wait([future], timeout=_REFRESH_TIMEOUT_SECONDS)
        future.cancel()
        return self._find(call)

    def _find(self, call: Call) -> LoadedModel:
        snapshot = self._loader.snapshot
        model = snapshot.models.get(call.model)
        if model is None:
            refused = next((f for f in snapshot.refused if f.model == call.model), None)
            hint = f" ({refused.path.name} is there but {refused.state.value}: {refused.reason})" if refused else ""
            raise not_found("model", call.model, snapshot.models, field="model", hint=hint)
        number = call.version
        if call.alias is not None and call.alias != LATEST:
            aliases = self._aliases.of(call.model)
            if call.alias not in aliases:
                raise not_found(f"alias of {call.model}", call.alias, [*aliases, LATEST], field="alias")
            number = aliases[call.alias]
        if number is None:
            if (default := model.default) is None:
                raise _why_none(model)
            return default
        known = model.versions.get(number)
        if known is None:
            versions = [str(v) for v in model.versions]
            raise not_found(f"version of {call.model}", str(number), versions, field="version")
        if known.loaded is None:
            raise self._why_not(call.model, number, known)
        return known.loaded

    def _why_not(self, model: str, number: int, known: KnownVersion) -> BackbonedError:
        if known.state is State.QUARANTINED:
            message = f"{model} version {number} is quarantined: {known.reason}"
            return BackbonedError(ErrorKind.FAILED_PRECONDITION, message, field="version")
        self._loader.want(model, number)
        return not_loaded(model, number)

    async def _answer(self, loaded: LoadedModel, call: Call) -> Result:
        manifest = loaded.manifest
        self._check(call, manifest.classes)
        truths = [_truth(manifest.task, manifest.classes, label, i) for i, label in enumerate(call.labels)]
        with self._admission.admit(call):
            images = await self._decode(call, manifest.preprocessing)
            futures = [self._engine.submit(loaded, image) for image in images]
            try:
                answers = await asyncio.gather(*futures)
            finally:
                for future in futures:
                    future.cancel()
        logits = torch.stack([a.logits for a in answers])
        probabilities = manifest.task.probabilities(logits)
        self._score(manifest.model, manifest.task, logits, probabilities, truths)
        k = call.top_k or len(manifest.classes)
        return Result(
            manifest.model,
            manifest.version,
            tuple(
                _prediction(row, manifest.classes, k, answer if call.embedding else None)
                for row, answer in zip(probabilities, answers, strict=True)
            ),
        )

    def _check(self, call: Call, classes: Sequence[str]) -> None:
        if not call.images:
            raise invalid("a request needs at least one image", field="images")
        if len(call.images) > MAX_IMAGES:
            raise invalid(
                f"{len(call.images)} images in one request; send at most {MAX_IMAGES}, or use PredictStream",
                field="images",
            )
        if not 0 <= call.top_k <= len(classes):
            raise invalid(f"top_k is {call.top_k}; {call.model} has {len(classes)} classes", field="top_k")
        if call.labels and len(call.labels) != len(call.images):
            raise invalid(
                f"{len(call.labels)} labels for {len(call.images)} images: give one for each, or none", field="labels"
            )

    async def _decode(self, call: Call, preprocessing: Preprocessing) -> list[Tensor]:
        loop = asyncio.get_running_loop()
        tasks = [
            loop.run_in_executor(self._pool, self._prepare, image, i, preprocessing)
            for i, image in enumerate(call.images)
        ]
        try:
            return await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()

    def _prepare(self, image: bytes | Pixels, index: int, preprocessing: Preprocessing) -> Tensor:
        started = time.monotonic()
        try:
            if isinstance(image, Pixels):
                pixels = from_pixels(image.data, image.shape, max_pixels=self._max_image_pixels)
            else:
                pixels = decode(image, max_pixels=self._max_image_pixels)
            return prepare(pixels, preprocessing)
        except BackbonedError as error:
            raise BackbonedError(error.kind, f"image {index}: {error.message}", field=f"images[{index}]") from error
        finally:
            self._telemetry.predict_phase("decode", time.monotonic() - started)

    def _score(self, model: str, task: Task, logits: Tensor, probabilities: Tensor, truths: Sequence[Tensor]) -> None:
        for row, probability, truth in zip(logits, probabilities, truths, strict=False):
            loss = task.loss(row[None], truth[None]).item()
            if task is Task.MULTI_LABEL:
                correct = bool(((probability > 0.5) == truth.bool()).all())
            else:
                correct = int(probability.argmax()) == int(truth)
            self._telemetry.serving_loss(model, "serving", loss, correct)


class _Admission:
    """Bounds what waits, in images and bytes. For the event loop."""

    def __init__(self, max_images: int, max_bytes: int, engine: Engine) -> None:
        self._max_images, self._max_bytes = max_images, max_bytes
        self._images = self._bytes = 0
        self._engine = engine

    def admit(self, call: Call) -> "_Admitted":
        size = sum(len(i.data) if isinstance(i, Pixels) else len(i) for i in call.images)
        # A request that is alone is let in whatever its size: it could never be otherwise.
        if self._images and (
            self._images + len(call.images) > self._max_images or self._bytes + size > self._max_bytes
        ):
            delay = min(max(self._engine.seconds_to_clear(self._images) / 2, 0.05), 10.0)
            raise BackbonedError(
                ErrorKind.RESOURCE_EXHAUSTED,
                f"the queue is full ({self._images} images, {self._bytes} bytes wait); try again in {delay:.2f} s",
                retry_delay_seconds=delay,
            )
        return _Admitted(self, len(call.images), size)

    def add(self, images: int, size: int) -> None:
        self._images += images
        self._bytes += size


@dataclass(frozen=True)
class _Admitted:
    admission: _Admission
    images: int
    size: int

    def __enter__(self) -> None:
        self.admission.add(self.images, self.size)

    def __exit__(self, *_: object) -> None:
        self.admission.add(-self.images, -self.size)


def _why_none(model: KnownModel) -> BackbonedError:
    newest = model.versions[max(model.versions)]
    if newest.state is State.QUARANTINED:
        message = f"{model.name} has no version that can serve; version {newest.manifest.version}: {newest.reason}"
        return BackbonedError(ErrorKind.FAILED_PRECONDITION, message, field="model")
    return not_loaded(model.name, newest.manifest.version)


def _truth(task: Task, classes: Sequence[str], label: str, index: int) -> Tensor:
    names = [n for n in label.split("|") if n] if task is Task.MULTI_LABEL else [label]
    for name in names:
        if name not in classes:
            error = not_found("label", name, classes)
            raise invalid(f"labels[{index}]: {error.message}", field=f"labels[{index}]")
    indices = [classes.index(n) for n in names]
    if task is not Task.MULTI_LABEL:
        return torch.tensor(indices[0])
    truth = torch.zeros(len(classes))
    truth[indices] = 1.0
    return truth


def _prediction(row: Tensor, classes: Sequence[str], k: int, answer: Answer | None) -> Prediction:
    values, indices = row.topk(k)
    ranked = tuple((classes[i], p) for i, p in zip(indices.tolist(), values.tolist(), strict=True))
    return Prediction(secrets.token_hex(12), ranked, tuple(answer.features.tolist()) if answer else ())
