"""What a thread of the engine runs batches with."""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from backboned.registry.errors import BackbonedError, ErrorKind
from backboned.server.compute.device import Device
from backboned.server.compute.preprocess import normalise, stack
from backboned.server.serving.queue import Group, Item
from backboned.server.serving.snapshot import LoadedModel
from backboned.server.serving.tree import Answer, Leg, run_tree


class Lane:
    """Runs prepared images on a device; on CUDA by a stream and a pinned buffer of its own. For one thread."""

    def __init__(self, device: Device, max_batch_size: int) -> None:
        self._device = device
        self._max_batch_size = max_batch_size
        self._stream = torch.cuda.Stream(device.device) if device.device.type == "cuda" else None
        self._pinned: dict[tuple[int, ...], Tensor] = {}

    @torch.inference_mode()
    def run(self, batch: Sequence[Item]) -> list[tuple[Answer, ...] | Exception]:
        """An outcome for each item: of its models, then of its shadows; an exception where any of its models failed."""
        with torch.cuda.stream(self._stream):  # of None: no stream
            group = Group.of(batch[0].models[0])
            x = normalise(self._moved(batch), group.preprocessing, group.dtype)
            legs = [leg for row, item in enumerate(batch) for leg in _legs(row, item)]
            answers = iter(_on_cpu(run_tree(legs, x)))
        return [_of_item(item, [next(answers) for _ in (*item.models, *item.shadows)]) for item in batch]

    def _moved(self, batch: Sequence[Item]) -> Tensor:
        """The batch's images `[n, 3, crop, crop]` uint8 on the device, channels last."""
        images = [item.image for item in batch if item.image is not None]
        if self._stream is None:
            return stack(images)
        shape = tuple(images[0].shape)
        pinned = self._pinned.get(shape)
        if pinned is None or len(pinned) < len(images):
            empty = torch.empty((max(self._max_batch_size, len(images)), *shape), dtype=torch.uint8)
            pinned = self._pinned[shape] = empty.contiguous(memory_format=torch.channels_last).pin_memory()
        for row, image in zip(pinned, images, strict=False):
            row.copy_(image)
        # The buffer is free again once the batch is done: answers are waited for before the next one.
        return pinned[: len(images)].to(self._device.device, non_blocking=True)


def as_told(error: Exception) -> Exception:
    """What a caller is told of an error in a batch."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return BackbonedError(
            ErrorKind.RESOURCE_EXHAUSTED, "the device is out of memory; try again", retry_delay_seconds=1.0
        )
    return error


def _on_cpu(answers: Sequence[Answer | Exception]) -> list[Answer | Exception]:
    """The same values on the CPU, brought over in one copy."""
    tensors = [t for a in answers if not isinstance(a, Exception) for t in a if t is not None]
    if not tensors or tensors[0].device.type == "cpu":
        return list(answers)
    brought = iter(torch.cat([t.flatten() for t in tensors]).cpu().split([t.numel() for t in tensors]))
    return [a if isinstance(a, Exception) else _brought(a, brought) for a in answers]


def _brought(answer: Answer, tensors: Iterator[Tensor]) -> Answer:
    """`answer` made of the next of `tensors`, in the order of its own."""
    logits = next(tensors)
    embedding = None if answer.embedding is None else next(tensors)
    return Answer(logits, embedding, None if answer.distance is None else next(tensors))


def _legs(row: int, item: Item) -> Iterator[Leg]:
    for model in item.models:
        yield Leg(row, model.path, item.tap, model.answers)
    for shadow in item.shadows:
        yield Leg(row, shadow.path)


def _of_item(item: Item, answers: Sequence[Answer | Exception]) -> tuple[Answer, ...] | Exception:
    failed = next((a for a in answers[: len(item.models)] if isinstance(a, Exception)), None)
    if failed is not None:
        return as_told(failed)
    models = (*item.models, *item.shadows)
    return tuple(_nothing(model) if isinstance(a, Exception) else a for model, a in zip(models, answers, strict=True))


def _nothing(shadow: LoadedModel) -> Answer:
    """What a shadow that failed answers: logits of NaN."""
    manifest = shadow.manifest
    return Answer(torch.full((manifest.task.outputs(len(manifest.classes)),), math.nan))
