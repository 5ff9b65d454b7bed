"""Compiled stages on disk: shared libraries, each with a description beside it.

    compiled/ab12….so  ab12….json

A name is a digest of all that the code depends on: the weights, the shape, the precision, the machine's instructions
and torch itself. So nothing here is ever out of date, and what isn't used any more goes when room is needed.
"""

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from backboned.registry.atomic import write_atomically
from backboned.registry.digest import file_digest
from backboned.server.compute.device import Device, cpu_features
from backboned.server.compute.stages import LoadedStage

log = logging.getLogger(__name__)

_WORK_PREFIX = "work-"
_RECIPE = 2
"""Of `compile_process.compile_stage`: another number when it makes other code of the same stage."""


@dataclass(frozen=True)
class ArtefactKey:
    """What one compiled stage is made for. `shape` is that of its input, batch and all."""

    backbone: str
    stage: str
    digest: str
    shape: tuple[int, ...]
    precision: str
    platform: str

    @classmethod
    def of(cls, stage: LoadedStage, size: int, platform: str) -> "ArtefactKey":
        """What is made of a stage that has been called, for batches of `size`."""
        assert stage.layout is not None
        precision = str(stage.layout.dtype).removeprefix("torch.")
        shape = (size, *stage.layout.shape)
        return cls(stage.key.backbone, stage.key.stage, stage.key.digest, shape, precision, platform)

    @property
    def bucket(self) -> int:
        """Images in a batch."""
        return self.shape[0]

    @property
    def name(self) -> str:
        """A digest of it all."""
        return _digest(json.dumps([*asdict(self).values(), torch.__version__, _RECIPE]))[:32]


@dataclass(frozen=True)
class Artefact:
    """A compiled stage on disk: its library, and the `seconds` that one batch takes on one thread."""

    library: Path
    seconds: float


class ArtefactStore:
    """A folder of compiled stages, of at most about `limit_bytes`. Safe for threads; one process writes."""

    def __init__(self, folder: Path, *, limit_bytes: int) -> None:
        self._folder = folder
        self._limit_bytes = limit_bytes

    def find(self, key: ArtefactKey) -> Artefact | None:
        """What was compiled for `key`, if it is there and whole. A damaged one is removed."""
        library, description = self._paths(key)
        try:
            told = json.loads(description.read_bytes())
            if told["sha256"] == file_digest(library):
                os.utime(library)
                return Artefact(library, float(told["seconds"]))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, LookupError, TypeError) as error:
            log.warning("the compiled stage %s can't be used: %s", library, error)
        else:
            log.warning("the compiled stage %s is damaged; it will be compiled again", library)
        for path in (description, library):
            with suppress(OSError):
                path.unlink()
        return None

    def seconds(self, key: ArtefactKey) -> float | None:
        """What a batch takes by what was compiled for `key`, as far as its description tells; None if there is none."""
        try:
            return float(json.loads(self._paths(key)[1].read_bytes())["seconds"])
        except (OSError, ValueError, LookupError, TypeError):
            return None

    @contextmanager
    def work_folder(self) -> Iterator[Path]:
        """A folder on the same disk, gone afterwards, to compile in."""
        self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        for left in self._folder.glob(f"{_WORK_PREFIX}*"):  # by a process that was killed
            shutil.rmtree(left, ignore_errors=True)
        with TemporaryDirectory(dir=self._folder, prefix=_WORK_PREFIX) as folder:
            yield Path(folder)

    def add(self, key: ArtefactKey, made: Artefact) -> Artefact:
        """Take in what was made in a `work_folder`, and make room for it. Raises `OSError`."""
        target, description = self._paths(key)
        told = {
            **asdict(key),
            "torch": torch.__version__,
            "seconds": made.seconds,
            "sha256": file_digest(made.library),
        }
        made.library.replace(target)
        _write(description, told)
        self._make_room(target)
        return replace(made, library=target)

    def retime(self, key: ArtefactKey, seconds: float) -> None:
        """Note what a batch of an earlier artefact takes by the latest measurement. Raises `OSError`."""
        _, description = self._paths(key)
        _write(description, {**json.loads(description.read_bytes()), "seconds": seconds})

    def _paths(self, key: ArtefactKey) -> tuple[Path, Path]:
        return self._folder / f"{key.name}.so", self._folder / f"{key.name}.json"

    def _make_room(self, newest: Path) -> None:
        libraries = sorted(self._folder.glob("*.so"), key=lambda path: path.stat().st_mtime, reverse=True)
        used = 0
        for library in libraries:
            used += library.stat().st_size
            if used > self._limit_bytes and library != newest:
                library.with_suffix(".json").unlink(missing_ok=True)
                library.unlink(missing_ok=True)  # who has it loaded keeps it


def platform_of(device: Device) -> str:
    """What compiled code depends on in the machine, besides torch: its instructions, or its GPU's architecture."""
    if device.device.type == "cuda":
        properties = torch.cuda.get_device_properties(device.device)
        return f"cuda {properties.name} {properties.major}.{properties.minor} {torch.version.cuda}"
    features = sorted(f for f in cpu_features() if f.startswith(("avx", "amx", "fma", "asimd", "sve", "bf16")))
    return f"cpu {torch.backends.cpu.get_cpu_capability()} {_digest(' '.join(features))[:16]}"


def _write(description: Path, told: Mapping[str, object]) -> None:
    write_atomically(description, lambda file: file.write(json.dumps(told, indent=1).encode()))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
