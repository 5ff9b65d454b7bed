"""A version of a model: written by a trainer, adopted from a dropped file, read for serving."""

import secrets
import shutil
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch
from torch import Tensor

from backboned.registry.adoption import Before, adding, keep, taken_by_another
from backboned.registry.answers import Answers
from backboned.registry.atomic import TEMPORARY_PREFIX, sync_path, write_atomically
from backboned.registry.backbone import Backbone
from backboned.registry.digest import DigestingFile, file_digest
from backboned.registry.directory import CheckpointDirectory
from backboned.registry.inside import open_inside
from backboned.registry.lock import locked
from backboned.registry.look import Drop
from backboned.registry.manifest import Epoch, EpochMetrics, Manifest
from backboned.registry.payload import glance, read_payload
from backboned.registry.recognise import Recognised, Recogniser
from backboned.registry.refusal import refused
from backboned.registry.sealed import sealed
from backboned.registry.signatures import Signer, Trust, read_signature, unsigned, write_signature
from backboned.registry.task import class_names
from backboned.registry.told import (
    answers_of,
    check_manifest,
    foundations,
    manifest_of,
    says_the_same,
    told_by_file,
    told_of,
)
from backboned.registry.weights import StageWeights, WeightStore


@dataclass(frozen=True)
class VersionWeights:
    """A version in memory: its manifest, its backbone, and the weights of every stage of the chain, in order.

    `answers` is what validation has taught about its answers; None for a file that wasn't written by a FineTune.
    """

    manifest: Manifest
    backbone: Backbone
    stages: Mapping[str, StageWeights]
    shared: tuple[str, ...]
    answers: Answers | None = None


class VersionWriter:
    """Writes a version epoch by epoch into its folder: the checkpoint first, the manifest last. For one thread.

    With a `signer`, each checkpoint has its signature beside it before the manifest tells of it.
    """

    def __init__(self, folder: Path, manifest: Manifest, signer: Signer | None = None) -> None:
        self._folder = folder
        self._signer = signer
        self.manifest = manifest

    def write(
        self,
        epoch: int,
        tensors: Mapping[str, Tensor],
        *,
        stages: Mapping[str, str],
        optimizer_state: Mapping[str, Any],
        loss: float,
        metrics: EpochMetrics,
        best: bool,
        trained: tuple[str, ...] | None = None,
        answers: Answers | None = None,
    ) -> Epoch:
        """Write `epoch-NNNN.pt`, and its signature, and then the manifest. Raises `OSError`.

        `stages` has the digests of the whole chain at this epoch, `trained` the names of those that `tensors` are of,
        if these aren't the manifest's.
        """
        name = f"epoch-{epoch:04d}.pt"
        content = {
            "epoch": epoch,
            "model_state_dict": {k: t.detach().cpu().clone() for k, t in tensors.items()},
            "optimizer_state_dict": optimizer_state,
            "loss": float(loss),
            "backbone": self.manifest.backbone,
            "backboned": {
                "model": self.manifest.model,
                "version": self.manifest.version,
                "task": self.manifest.task.value,
                "classes": list(self.manifest.classes),
                "stages": dict(stages),
                "preprocessing": self.manifest.preprocessing.to_dict(),
                **({} if answers is None else {"answers": answers.to_payload()}),
            },
        }
        path = self._folder / name
        record = Epoch(epoch, name, *_save(content, path), time.time(), metrics)
        if self._signer is not None:
            write_signature(path, self._signer.sign(name, record.sha256))
        self.manifest = self.manifest.with_epoch(record, best=best, stages=stages, trained=trained)
        self.manifest.write(self._folder)
        return record

    def complete(self) -> None:
        """Say in the manifest that the version has ended well."""
        self.manifest = replace(self.manifest, complete=True)
        self.manifest.write(self._folder)


class VersionReader:
    """Reads versions and adopts dropped files. For one thread at a time.

    With a `trust`, only files that it trusts, and by what these say of themselves alone: the manifest, and what stands
    beside a dropped file, may say the same and nothing else. What is checked then is a copy in memory, which is read.
    """

    def __init__(
        self, directory: CheckpointDirectory, recogniser: Recogniser, weights: WeightStore, trust: Trust | None = None
    ) -> None:
        self._directory = directory
        self._recogniser = recogniser
        self._weights = weights
        self._trust = trust

    def read(self, manifest: Manifest, epoch: int | None = None) -> VersionWeights:
        """The weights of a version's best epoch, or of `epoch`.

        Raises `BackbonedError`: `DATA_LOSS` if the file isn't what the manifest says, or isn't signed as it must be,
        `FAILED_PRECONDITION` if the backbone's weights aren't to be had, `NOT_FOUND` if no plugin offers the backbone.
        Raises `OSError` if the file can't be read now, which is no fault of the file's.
        """
        record = manifest.best if epoch is None else next(e for e in manifest.epochs if e.epoch == epoch)
        path = self._directory.version(manifest.model, manifest.version) / record.file
        try:
            open_inside(path, self._directory.root).close()
            with self._held(path) as held:
                if held.stat().st_size != record.size_bytes or file_digest(held) != record.sha256:
                    raise refused(f"{record.file} is truncated or altered: it doesn't match the sha256 in the manifest")
                if self._trust is not None:
                    self._trust.check(record.file, record.sha256, read_signature(path))
                payload = read_payload(held, suffix=path.suffix, verified=True)
        except ValueError as error:
            raise refused(f"{record.file} can't be read: {error}") from error
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
            raise refused(f"{record.file} can't be read: {error.strerror}") from error
        inside = None if self._trust is None else told_by_file(payload)
        found = self._recogniser.recognise(payload, manifest.backbone if inside is None else inside.backbone)
        if found.outputs != manifest.task.outputs(len(manifest.classes)):
            raise refused(f"{record.file} has {found.outputs} outputs for {len(manifest.classes)} classes")
        class_names(manifest.classes, found.outputs, manifest.task)
        best = record.epoch == manifest.best_epoch
        expected: Mapping[str, str] = manifest.stages if best else {}
        if inside is not None or not best:  # of a file that is signed, what it says itself counts
            expected = {**expected, **foundations(payload)}
        if unknown := set(found.missing) - expected.keys():
            raise refused(f"it isn't told by what digest it stands on stage {min(unknown)!r}")
        stages = self._assemble(found, expected)
        if inside is not None:
            digests = {name: weights.digest for name, weights in stages.items()} if best else manifest.stages
            check_manifest(manifest, inside, found, digests)
        shared = found.missing or self._shared(found, stages)
        return VersionWeights(manifest, found.backbone, stages, shared, answers_of(payload, manifest, found.backbone))

    def adopt(self, drop: Drop, before: Before = Before()) -> VersionWeights | None:  # noqa: B008 - it is immutable
        """Make a dropped file the model's next version: a private copy of it, checked, with a manifest.

        Returns None if it says nothing new against what was adopted `before`, or another daemon has adopted it
        meanwhile; a new signature of it is taken over. Raises `BackbonedError` with the reason if it can't be used
        (`IncompleteFile` if its signature isn't there or doesn't hold), and `OSError` if it can't be copied; then
        nothing is left behind.
        """
        signature = read_signature(drop.path)
        if self._trust is not None and signature is None:
            raise unsigned("it")
        glance(drop.path)
        copy = drop.path.parent / f"{TEMPORARY_PREFIX}{secrets.token_hex(8)}{drop.path.suffix}"
        try:
            with locked(copy):
                return self._adopt(drop, copy, signature, before)
        finally:
            copy.unlink(missing_ok=True)

    def _adopt(self, drop: Drop, copy: Path, signature: bytes | None, before: Before) -> VersionWeights | None:
        shutil.copyfile(drop.path, copy)
        with self._held(copy) as held, ThreadPoolExecutor(2) as aside:
            sha256, synced = aside.submit(file_digest, held), aside.submit(sync_path, copy)
            if self._trust is not None:
                self._trust.check("it", sha256.result(), signature)
            payload = read_payload(held, suffix=copy.suffix)
            sidecar = told_of(drop, payload, signed=self._trust is not None)
            found = self._recogniser.recognise(payload, sidecar.backbone)
            stages = self._assemble(found, foundations(payload))
            size_bytes = held.stat().st_size
        synced.result()
        manifest = manifest_of(drop, payload, sidecar, found, stages)
        answers = answers_of(payload, manifest, found.backbone)
        best = replace(manifest.best, sha256=sha256.result(), size_bytes=size_bytes)
        manifest = replace(manifest, epochs=(best,))
        if best.sha256 in before.deleted:
            return None
        if before.previous is not None and says_the_same(manifest, before.previous):
            if self._trust is not None:
                self._take_over(signature, before.previous)
            return None
        with adding(self._directory):
            if taken_by_another(self._directory, drop, manifest, before.versions):
                return None
            manifest = replace(manifest, version=self._directory.reserve(drop.model))
            keep(copy, manifest, self._directory.version(manifest.model, manifest.version), signature)
        shared = found.missing or self._shared(found, stages)
        return VersionWeights(manifest, found.backbone, stages, shared, answers)

    @contextmanager
    def _held(self, path: Path) -> Iterator[Path]:
        """A path to what is at `path`, which nobody can change any more if it matters who made it."""
        if self._trust is None:
            yield path
        else:
            with sealed(path) as held:
                yield held

    def _take_over(self, signature: bytes | None, manifest: Manifest) -> None:
        """Put the signature of a dropped file beside the same file in the version that was made of it."""
        path = self._directory.version(manifest.model, manifest.version) / manifest.best.file
        if signature is not None and signature != read_signature(path):
            write_signature(path, signature)

    def _assemble(self, found: Recognised, expected: Mapping[str, str]) -> dict[str, StageWeights]:
        """The weights of all stages: the file's own, and for the missing ones those of the backbone, if as expected."""
        stages: dict[str, StageWeights] = {}
        base = self._weights.stages(found.backbone.name) if found.missing else {}
        for stage in found.backbone.chain:
            if stage.name in found.stages:
                stages[stage.name] = StageWeights.of(found.stages[stage.name])
                continue
            weights = stages[stage.name] = base[stage.name]
            digest = expected.get(stage.name, weights.digest)
            if weights.digest != digest:
                raise refused(
                    f"it stands on a stage {stage.name!r} with digest {digest[:12]}…, but the weights of "
                    f"{found.backbone.name} given here have {weights.digest[:12]}…; start the daemon with the weights "
                    "that it was trained on"
                )
        return stages

    def _shared(self, found: Recognised, stages: Mapping[str, StageWeights]) -> tuple[str, ...]:
        """The stages that are those of the backbone's own weights, as far as these are at hand."""
        base = self._weights.loaded(found.backbone.name)
        return tuple(n for n, w in stages.items() if n in base and base[n].digest == w.digest)


def _save(content: Mapping[str, Any], path: Path) -> tuple[str, int]:
    """Save a checkpoint; the SHA-256 and the size in bytes of what was written, not of what may be there since."""
    written: list[DigestingFile] = []

    def save(file: BinaryIO) -> None:
        written.append(DigestingFile(file))
        torch.save(content, cast("BinaryIO", written[0]))

    write_atomically(path, save)
    return written[0].sha256, written[0].size_bytes
