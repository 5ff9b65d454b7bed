"""What a trainer process is told: one line of JSON on its standard input."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from backboned.server.training.options import TrainingOptions


@dataclass(frozen=True)
class TrainerSpec:
    """A job, and all that is needed to run it. Paths are absolute; `options` are as asked for.

    `dataset` is a path below one of the `data_roots`, or a URI that `remote_data` allows; what is fetched or unpacked
    goes to `fetched_dir`, or without one to the work folder.

    `work_dir` is the job's own: what it needs to go on after its trainer was killed is kept there. Features are cached
    in `cache_dir`, which all jobs share, while they take `cache_bytes` at most. `compiled_dir` has stages that the
    daemon has compiled. `threads` is how many compute.

    Checkpoints are signed by the key in `signing_key`; with `trusted_keys`, a warm start is from a signed one alone.
    """

    model: str
    version: int
    backbone: str
    dataset: str
    data_roots: tuple[Path, ...]
    options: TrainingOptions
    checkpoint_dir: Path
    work_dir: Path
    weight_files: Mapping[str, Path]
    plugin_modules: tuple[str, ...]
    device: str
    threads: int
    max_image_pixels: int
    precision: str
    cache_dir: Path
    cache_bytes: int
    compiled_dir: Path | None = None
    remote_data: tuple[str, ...] = ()
    fetched_dir: Path | None = None
    signing_key: Path | None = None
    trusted_keys: tuple[Path, ...] = ()

    def to_json(self) -> str:
        """One line."""
        return json.dumps(asdict(self) | {"options": self.options.to_dict()}, default=str)

    @classmethod
    def from_json(cls, text: str) -> "TrainerSpec":
        """The inverse of `to_json`."""
        values = json.loads(text)
        for name in ("checkpoint_dir", "work_dir", "cache_dir"):
            values[name] = Path(values[name])
        values["options"] = TrainingOptions.from_dict(values["options"])
        for name in ("data_roots", "trusted_keys"):
            values[name] = tuple(map(Path, values[name]))
        values["weight_files"] = {name: Path(file) for name, file in values["weight_files"].items()}
        values["plugin_modules"] = tuple(values["plugin_modules"])
        values["remote_data"] = tuple(values["remote_data"])
        for name in ("fetched_dir", "compiled_dir", "signing_key"):
            values[name] = Path(values[name]) if values[name] else None
        return cls(**values)
