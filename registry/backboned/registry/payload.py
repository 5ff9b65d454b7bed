"""What a checkpoint file holds, read without running anything that is in it.

Loading is `torch.load(weights_only=True)` or safetensors, always, with no fallback. A file that is altered, truncated
or something else altogether is told from one that is whole.
"""

import json
import pickle
import re
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from backboned.registry.errors import BackbonedError, ErrorKind

SUFFIXES = (".pt", ".pth", ".safetensors")
"""Names of checkpoint files end so."""


@dataclass(frozen=True)
class Payload:
    """Tensors by key, and what was beside them: a backbone's name, an epoch, a loss, and further `metadata`.

    That is what our own trainer wrote, and under `classes` whatever stood under `classes` or `class_to_idx`; nobody has
    looked at it yet.
    """

    tensors: Mapping[str, Tensor]
    backbone: str | None = None
    epoch: int | None = None
    loss: float | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)


class IncompleteFile(BackbonedError):
    """A file that isn't whole: truncated, altered, or still being written. Waiting may mend it."""

    def __init__(self, message: str) -> None:
        super().__init__(ErrorKind.DATA_LOSS, message)


def refused(message: str) -> BackbonedError:
    """The error for a file that can't be used, and won't be until someone changes it."""
    return BackbonedError(ErrorKind.DATA_LOSS, message)


def read_payload(path: Path, *, suffix: str | None = None, verified: bool = False) -> Payload:
    """Read a `.pt`, `.pth` or `.safetensors` file; `suffix` says which it is where the path doesn't.

    Checks that archive members match their CRC (unless the file is `verified` by a digest already), that nothing but
    tensors and plain values is in the file, and that every tensor is a plain, finite one that its bytes really hold.
    Raises `BackbonedError` `DATA_LOSS` with the reason and the remedy, and `OSError` if there's no file to read.
    """
    safetensors = (suffix or path.suffix) == ".safetensors"
    payload = _read_safetensors(path) if safetensors else _read_torch(path, verified)
    if not payload.tensors:
        raise refused("it holds no tensors: save model.state_dict()")
    for key, tensor in payload.tensors.items():
        check_tensor(key, tensor)
    return payload


def _read_safetensors(path: Path) -> Payload:
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            # Cloned: safetensors maps the file, and a mapped file that someone truncates would end the process.
            tensors = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118 - it has no __iter__
    except (SafetensorError, OSError, ValueError) as error:
        raise IncompleteFile(f"not a whole safetensors file: {_line(error)}") from error
    return Payload(tensors, backbone=metadata.get("backbone"), metadata=_told_in_json(metadata.get("backboned", "{}")))


def _told_in_json(text: str) -> dict[str, Any]:
    """What a safetensors file, whose metadata are texts, says of itself as an object in JSON."""
    try:
        told = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise refused("what its metadata have under 'backboned' is not JSON") from error
    return {key: told[key] for key in ("classes", "task", "preprocessing") if isinstance(told, dict) and key in told}


def _read_torch(path: Path, verified: bool) -> Payload:
    archived = _is_archive(path)
    if archived and not verified:
        _check_members(path)  # first: whatever is compressed, torch would inflate
    if verified or not archived:
        return _load(path, archived)
    with ThreadPoolExecutor(1) as aside:  # checksums and tensors are read side by side: both let go of the GIL
        check = aside.submit(_check_sums, path)
        try:
            return _load(path, archived)
        finally:
            check.result()  # what it tells goes before what torch makes of an altered file


def _load(path: Path, archived: bool) -> Payload:
    try:
        with warnings.catch_warnings(action="ignore"):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises nearly anything on malformed bytes
        raise _unreadable(error, archived) from error
    return _unwrap(content)


def _is_archive(path: Path) -> bool:
    """Whether a file looks like an archive, as torch writes since 1.6."""
    with path.open("rb") as file:
        start = file.read(4)
    if not start:
        raise IncompleteFile("the file is empty")
    return start[:2] == b"PK"


def _check_members(path: Path) -> None:
    """Check that an archive is one that `torch.save` may have written, by its table of contents."""
    with _opened(path) as archive:
        names = archive.namelist()
        if any(name.endswith("/constants.pkl") or "/code/" in name for name in names):
            raise refused("this is a TorchScript program, not weights: save model.state_dict() instead")
        if any(info.compress_type != zipfile.ZIP_STORED for info in archive.infolist()):
            raise refused("its archive is compressed, which torch.save never does")
        if len(set(names)) != len(names):
            raise refused("its archive has two members of one name")


def _check_sums(path: Path) -> None:
    """Check that an archive's members match their CRC-32."""
    with _opened(path) as archive:
        broken = archive.testzip()
    if broken is not None:
        raise IncompleteFile(f"the file is altered: {broken!r} in it doesn't match its checksum")


@contextmanager
def _opened(path: Path) -> Iterator[zipfile.ZipFile]:
    try:
        with zipfile.ZipFile(path) as archive:
            yield archive
    except (zipfile.BadZipFile, EOFError, ValueError, OSError, NotImplementedError, RuntimeError) as error:
        raise IncompleteFile(f"the file is truncated or altered: {_line(error)}") from error


def _unreadable(error: Exception, archived: bool) -> BackbonedError:
    """What is wrong with a file that torch doesn't load. Unless it is an archive, nobody knows whether it is whole."""
    if not isinstance(error, pickle.UnpicklingError):
        message = f"not a checkpoint that can be read: {_line(error)}"
    elif found := re.search(r"(?:GLOBAL|class|type|function) (\w+(?:\.\w+)+)", str(error)):
        message = (
            f"it holds a pickled object ({found[1]}), not just tensors, and loading it could run any code; it looks "
            "like torch.save(model): save the weights instead, torch.save(model.state_dict(), 'model.pt')"
        )
    else:  # torch's own words advise to load it all the same
        message = "not a checkpoint that can be read: save model.state_dict() by torch.save"
    return refused(message) if archived else IncompleteFile(message)


def _unwrap(content: Any) -> Payload:
    if not isinstance(content, Mapping):
        raise refused(f"it holds a {type(content).__name__}, not a state_dict: save model.state_dict()")
    wrapped = next((k for k in ("model_state_dict", "state_dict") if isinstance(content.get(k), Mapping)), None)
    state = content[wrapped] if wrapped else content
    beside: Mapping[str, Any] = content if wrapped else {k: v for k, v in content.items() if isinstance(v, str)}
    tensors: dict[str, Tensor] = {}
    for key, value in state.items():
        if isinstance(value, Tensor) and isinstance(key, str):
            tensors[key] = value.detach()
        elif wrapped or not isinstance(value, str):
            raise refused(f"its state_dict has {str(key)[:80]!r}, a {type(value).__name__}, where tensors are expected")
    backbone, epoch, loss = beside.get("backbone"), beside.get("epoch"), beside.get("loss")
    if isinstance(loss, Tensor) and loss.numel() == 1:
        loss = loss.item()
    classes = next(({"classes": content[k]} for k in ("classes", "class_to_idx") if wrapped and k in content), {})
    metadata = beside.get("backboned")
    return Payload(
        tensors,
        backbone=backbone if isinstance(backbone, str) else None,
        epoch=epoch if isinstance(epoch, int) and 0 <= epoch < 2**31 else None,
        loss=float(loss) if isinstance(loss, int | float) else None,
        metadata=classes | {str(k): v for k, v in metadata.items()} if isinstance(metadata, Mapping) else classes,
    )


def check_tensor(key: str, tensor: Tensor) -> None:
    """Raise `BackbonedError` `DATA_LOSS` unless `tensor` is a plain, finite one that its bytes really hold."""
    if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_complex() or tensor.is_meta:
        raise refused(f"{key!r} is a {tensor.layout} {tensor.dtype} tensor; only plain dense ones can be served")
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise refused(f"{key!r} claims to be {list(tensor.shape)}, which its bytes don't hold")
    # A sum that is finite has only finite terms, and costs a fifth of looking at each.
    if tensor.is_floating_point() and not tensor.sum().isfinite() and not tensor.isfinite().all():
        raise refused(f"{key!r} has values that are not finite (NaN or infinity): the training diverged")


def _line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return (text[:200] or type(error).__name__).rstrip(".")
