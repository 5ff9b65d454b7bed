"""A version as a plain, full state_dict, with the keys and the order of the module that its backbone builds."""

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from backboned.registry.atomic import write_atomically
from backboned.registry.catalogue import Catalogue
from backboned.registry.digest import IGNORED_SUFFIX
from backboned.registry.directory import CheckpointDirectory
from backboned.registry.errors import BackbonedError, ErrorKind, invalid, not_found
from backboned.registry.manifest import Manifest, check_name
from backboned.registry.payload import SUFFIXES
from backboned.registry.recognise import Recogniser
from backboned.registry.version import VersionReader, VersionWeights
from backboned.registry.weights import WeightStore


def read_for_export(
    root: Path, model: str, version: int | None, catalogue: Catalogue, files: Mapping[str, Path]
) -> VersionWeights:
    """A version of a model below `root`, or its newest complete one; checked as for serving.

    Raises `BackbonedError`: `NOT_FOUND` for an unknown model or version, and whatever reading the version raises.
    """
    directory = CheckpointDirectory(root)
    numbers = directory.versions(check_name(model))
    if not numbers:
        known = [entry.name for entry in root.iterdir() if directory.versions(entry.name)] if root.is_dir() else []
        raise not_found("model", model, known, field="model", hint=f" (in {root})")
    if version is not None and version not in numbers:
        raise not_found(f"version of {model}", str(version), map(str, numbers), field="version")
    reader = VersionReader(directory, Recogniser(catalogue), WeightStore(catalogue, files))
    for number in reversed(numbers) if version is None else [version]:
        if version is None and not (directory.version(model, number) / "manifest.json").is_file():
            continue
        manifest = Manifest.read(directory.version(model, number))
        if manifest.complete or version is not None:
            return reader.read(manifest)
    raise BackbonedError(
        ErrorKind.FAILED_PRECONDITION, f"no version of {model} is complete yet; name one of {numbers}", field="version"
    )


def full_state_dict(version: VersionWeights) -> dict[str, Tensor]:
    """All tensors of a version by the keys of the backbone's module, in its order; step counters are zero."""
    outputs = version.manifest.task.outputs(len(version.manifest.classes))
    keys = version.backbone.module(outputs, device="meta").state_dict()
    tensors = {key: tensor for stage in version.stages.values() for key, tensor in stage.tensors.items()}
    counter = torch.zeros((), dtype=torch.long)
    return {key: tensors.get(key, counter) if key.endswith(IGNORED_SUFFIX) else tensors[key] for key in keys}


def check_suffix(path: Path) -> None:
    """Raise `BackbonedError` if the name doesn't say what to write."""
    if path.suffix not in SUFFIXES:
        raise invalid(f"{path.name!r} must end in {', '.join(SUFFIXES)}", field="output")


def write_state_dict(version: VersionWeights, path: Path) -> None:
    """Write `full_state_dict` to `path`, atomically, as its suffix says. Raises `BackbonedError` or `OSError`."""
    check_suffix(path)
    state = full_state_dict(version)
    if path.suffix == ".safetensors":
        plain = {key: tensor.contiguous().clone() for key, tensor in state.items()}
        content = save(plain, metadata={"backbone": version.backbone.name})
        write_atomically(path, lambda file: file.write(content))
    else:
        write_atomically(path, lambda file: torch.save(state, file))
