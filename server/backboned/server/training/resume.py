"""What a job needs to go on after its trainer was killed."""

import logging
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from backboned.registry.atomic import write_atomically

NAME = "state.pt"

log = logging.getLogger(__name__)


class ResumeFile:
    """A file in the job's own folder: plain values and tensors, written anew after every epoch. For one thread."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / NAME
        self.state: dict[str, Any] = self._read()

    def write(self, **values: Any) -> None:
        """Put `values` into the state and on disk, all or nothing. Raises `OSError`."""
        self.state = {**self.state, **values}
        write_atomically(self._path, lambda file: torch.save(self.state, file))

    def _read(self) -> dict[str, Any]:
        try:
            with zipfile.ZipFile(self._path) as file:  # which torch writes, and whose checksums it doesn't check
                if (damaged := file.testzip()) is not None:
                    raise ValueError(f"{damaged} doesn't match its checksum")
            state: Mapping[str, Any] = torch.load(self._path, weights_only=True, map_location="cpu")
            return dict(state)
        except FileNotFoundError:
            return {}
        except Exception as error:  # a damaged file makes parsers raise anything
            log.warning("%s can't be read, the job begins anew: %s", self._path, error)
            return {}
