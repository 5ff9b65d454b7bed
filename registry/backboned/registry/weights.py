"""Pretrained weights of backbones: from a file that the operator names, or from what the plugin can fetch."""

import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from backboned.registry.backbone import Backbone
from backboned.registry.catalogue import Catalogue
from backboned.registry.digest import stage_digest
from backboned.registry.errors import BackbonedError, ErrorKind
from backboned.registry.payload import Payload, read_payload
from backboned.registry.recognise import Recogniser


@dataclass(frozen=True)
class StageWeights:
    """A stage's tensors by key, on the CPU and never written to, and their digest."""

    tensors: Mapping[str, Tensor]
    digest: str

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> "StageWeights":
        """The tensors, widened to float32, with their digest."""
        wide = {k: t.float() if t.is_floating_point() else t for k, t in tensors.items()}
        return cls(wide, stage_digest(wide))


class WeightStore:
    """The weights that backbones stand on here, read once and kept. Safe to use from several threads."""

    def __init__(self, catalogue: Catalogue, files: Mapping[str, Path] | None = None) -> None:
        self._catalogue = catalogue
        self._files = dict(files or {})
        self._stages: dict[str, Mapping[str, StageWeights]] = {}
        self._locks: dict[str, threading.Lock] = {}  # one for each backbone: a download may take minutes

    def stages(self, name: str) -> Mapping[str, StageWeights]:
        """The weights of a backbone by stage, its pretrained head included.

        The first call reads the operator's file or fetches what the plugin knows, which may download. Raises
        `BackbonedError`: `FAILED_PRECONDITION` saying what to do if there are none, `NOT_FOUND` for an unknown name.
        """
        backbone = self._catalogue.get(name)
        with self._locks.setdefault(name, threading.Lock()):
            if name not in self._stages:
                self._stages[name] = self._read(backbone)
            return self._stages[name]

    def loaded(self, name: str) -> Mapping[str, StageWeights]:
        """The weights of a backbone by stage if they have been read already, else nothing; at once in any case."""
        return self._stages.get(name, {})

    def is_local(self, name: str) -> bool:
        """Whether `stages` will answer without the network: read before, a file, or in torch's own cache."""
        if self.loaded(name) or name in self._files:
            return True
        url = getattr(self._catalogue.get(name).weights, "url", None)
        return url is not None and (Path(torch.hub.get_dir()) / "checkpoints" / Path(url).name).is_file()

    def source(self, name: str) -> str:
        """Where the weights of a backbone come from, for people; empty if from nowhere."""
        if name in self._files:
            return str(self._files[name])
        weights = self._catalogue.get(name).weights
        return "" if weights is None else str(getattr(weights, "url", weights))

    def check(self, name: str) -> None:
        """Raise `FAILED_PRECONDITION` if there is surely nothing to read, without reading or downloading anything."""
        backbone = self._catalogue.get(name)
        file = self._files.get(name)
        if file is not None and not file.is_file():
            raise _missing(backbone, f"the file given for it, {file}, does not exist")
        if file is None and backbone.weights is None:
            raise _missing(backbone, "its plugin knows none")

    def _read(self, backbone: Backbone) -> Mapping[str, StageWeights]:
        self.check(backbone.name)
        payload = self._payload(backbone)
        try:
            found = Recogniser(self._catalogue).recognise(payload, backbone.name)
        except BackbonedError as error:
            raise _missing(backbone, f"{self.source(backbone.name)} can't be used: {error.message}") from error
        if found.missing:
            raise _missing(backbone, f"{self.source(backbone.name)} lacks the stages {', '.join(found.missing)}")
        return {name: StageWeights.of(tensors) for name, tensors in found.stages.items()}

    def _payload(self, backbone: Backbone) -> Payload:
        file = self._files.get(backbone.name)
        if file is not None:
            try:
                return read_payload(file)
            except (BackbonedError, OSError) as error:
                raise _missing(backbone, f"{file} can't be read: {error}") from error
        assert backbone.weights is not None  # check() saw to it
        try:
            state = backbone.weights.get_state_dict(progress=False, check_hash=True)
        except Exception as error:  # no network, no space, a wrong hash: whatever the library raises
            reason = f"they could not be downloaded ({type(error).__name__}: {' '.join(str(error).split())[:200]})"
            raise _missing(backbone, reason) from error
        return Payload({k: v for k, v in state.items() if isinstance(v, Tensor)})


def seeded_state(backbone: Backbone, seed: int) -> dict[str, Tensor]:
    """Random weights as the module itself draws them from `seed`: for pretraining, tests and benchmarks."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return backbone.module().state_dict()


def _missing(backbone: Backbone, reason: str) -> BackbonedError:
    url = getattr(backbone.weights, "url", None)
    where = f" (the file is {url})" if url else ""
    return BackbonedError(
        ErrorKind.FAILED_PRECONDITION,
        f"no weights for backbone {backbone.name!r}: {reason}; start the daemon with --weights "
        f"{backbone.name}=FILE, a state_dict{where}",
        field="backbone",
    )
