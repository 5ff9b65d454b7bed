"""What a checkpoint file holds, read without running anything that is in it.

Loading is `torch.load(weights_only=True)` or safetensors, always, with no fallback. A file that is altered, truncated
or something else altogether is told from one that is whole.
"""

import json
import os
import pickle
import warnings
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from backboned.registry.archive import check_end, check_members, check_sums
from backboned.registry.errors import BackbonedError
from backboned.registry.pickled import MAX_PICKLE_BYTES, check_pickle
from backboned.registry.plain import check_dense, check_finite, plain
from backboned.registry.refusal import IncompleteFile, one_line, refused

MAX_KEY_CHARACTERS = 500
MAX_TENSORS = 20_000
MAX_HEADER_BYTES = 16 * 2**20
"""Of a safetensors file."""
MAX_SHARING = 8
"""So many times its size may all tensors of a file have together, where they share their bytes."""

_MAX_LOSS = 1e300
_ARCHIVE_START = b"PK\x03\x04"
_LEGACY_START = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
_LEGACY_PICKLES = 5
"""A number that tells the format, its version, the machine, the content, and the names of storages."""

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


def read_payload(path: Path, *, suffix: str | None = None, verified: bool = False) -> Payload:
    """Read a `.pt`, `.pth` or `.safetensors` file; `suffix` says which it is where the path doesn't.

    Checks that archive members match their CRC (unless the file is `verified` by a digest already), that nothing but
    tensors and plain values is in the file, and that every tensor is a plain, finite one that its bytes really hold.
    Raises `BackbonedError` `DATA_LOSS` with the reason and the remedy, and `OSError` if there's no file to read.
    """
    safetensors = (suffix or path.suffix) == ".safetensors"
    glance(path, suffix)
    payload = _read_safetensors(path) if safetensors else _read_torch(path, verified)
    if not payload.tensors:
        raise refused("it holds no tensors: save model.state_dict()")
    _check_tensors(payload.tensors, path.stat().st_size)
    return payload


def glance(path: Path, suffix: str | None = None) -> None:
    """A first look, which takes no time however large the file is: is it worth copying and reading?

    Raises `BackbonedError` `DATA_LOSS` if it isn't, and `OSError` if there's no file to read.
    """
    with path.open("rb") as file:
        start = file.read(len(_LEGACY_START))
        size_bytes = os.fstat(file.fileno()).st_size
    if not start:
        raise IncompleteFile("the file is empty")
    if size_bytes > (most := os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2):
        raise refused(
            f"it has {size_bytes >> 20} MiB, more than half of the memory here: {most >> 20} MiB are the most"
        )
    if (suffix or path.suffix) == ".safetensors":
        header_bytes = int.from_bytes(start[:8], "little")
        if header_bytes > size_bytes - 8:
            raise IncompleteFile(f"not a whole safetensors file: its header has {header_bytes} bytes, it {size_bytes}")
        if header_bytes > MAX_HEADER_BYTES:
            raise refused(f"its safetensors header has more than {MAX_HEADER_BYTES >> 20} MiB")
    elif start.startswith(_ARCHIVE_START):
        check_end(path)
    elif start != _LEGACY_START:
        raise IncompleteFile("not a checkpoint that can be read: save model.state_dict() by torch.save")


def _read_safetensors(path: Path) -> Payload:
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            _check_count(len(file.keys()))
            # Cloned: safetensors maps the file, and a mapped file that someone truncates would end the process.
            tensors = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118 - it has no __iter__
    except (SafetensorError, OSError, ValueError, AttributeError, RuntimeError) as error:
        raise IncompleteFile(f"not a whole safetensors file: {one_line(error)}") from error
    return Payload(tensors, backbone=metadata.get("backbone"), metadata=_told_in_json(metadata.get("backboned", "{}")))


def _told_in_json(text: str) -> dict[str, Any]:
    """What a safetensors file, whose metadata are texts, says of itself as an object in JSON."""
    try:
        told = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise refused("what its metadata have under 'backboned' is not JSON") from error
    return {key: told[key] for key in ("classes", "task", "preprocessing") if isinstance(told, dict) and key in told}


def _read_torch(path: Path, verified: bool) -> Payload:
    with path.open("rb") as file:
        archived = file.read(len(_ARCHIVE_START)) == _ARCHIVE_START  # as torch writes since 1.6
    if archived:
        check_members(path)  # first: torch does whatever a file asks for
    else:
        _check_legacy(path)
    if verified or not archived:
        return _load(path, archived)
    with ThreadPoolExecutor(1) as aside:  # checksums and tensors are read side by side: both let go of the GIL
        check = aside.submit(check_sums, path)
        try:
            return _load(path, archived)
        finally:
            check.result()  # what it tells goes before what torch makes of an altered file


def _load(path: Path, archived: bool) -> Payload:
    try:
        with warnings.catch_warnings(action="ignore"):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises nearly anything on malformed bytes
        message = f"not a checkpoint that can be read: {_said(error)}"
        raise (refused(message) if archived else IncompleteFile(message)) from error
    return _unwrap(content)


def _check_legacy(path: Path) -> None:
    """Check the pickles of a file as torch wrote it until 1.5: nobody knows whether such a file is whole."""
    with path.open("rb") as file:
        start = file.read(MAX_PICKLE_BYTES)
    try:
        at = 0
        for _ in range(_LEGACY_PICKLES):
            at = check_pickle(start, at)
    except BackbonedError as error:
        raise IncompleteFile(error.message) from error


def _said(error: Exception) -> str:
    """What torch says of a file; of a pickle it would advise to load it all the same."""
    return "save model.state_dict() by torch.save" if isinstance(error, pickle.UnpicklingError) else one_line(error)


def _unwrap(content: Any) -> Payload:
    if not isinstance(content, dict):
        raise refused(f"it holds a {type(content).__name__}, not a state_dict: save model.state_dict()")
    content = dict(dict.items(content))  # by `dict` itself: an attribute of its own may be called `items`
    wrapped = next((k for k in ("model_state_dict", "state_dict") if isinstance(content.get(k), dict)), None)
    state = dict.items(content[wrapped] if wrapped else content)
    beside = content if wrapped else {k: v for k, v in content.items() if isinstance(v, str)}
    tensors: dict[str, Tensor] = {}
    for key, value in state:
        name = _key(key)
        if isinstance(value, Tensor) and isinstance(key, str):
            tensors[key] = Tensor.detach(value)  # by `Tensor` itself, for the same reason
        elif wrapped or not isinstance(value, str):
            raise refused(f"its state_dict has {name!r}, a {type(value).__name__}, where tensors are expected")
    backbone, epoch = beside.get("backbone"), beside.get("epoch")
    classes = next(({"classes": content[k]} for k in ("classes", "class_to_idx") if wrapped and k in content), {})
    metadata = beside.get("backboned")
    told = plain({**classes, **metadata} if isinstance(metadata, dict) else classes, "what is beside its tensors")
    return Payload(
        tensors,
        backbone=backbone if isinstance(backbone, str) else None,
        epoch=epoch if isinstance(epoch, int) and 0 <= epoch < 2**31 else None,
        loss=_loss(beside.get("loss")),
        metadata={str(k): v for k, v in told.items()},
    )


def _key(key: object) -> str:
    """A key as it may be quoted."""
    if isinstance(key, str | int) and len(text := str(key)) <= MAX_KEY_CHARACTERS:
        return text
    raise refused(f"its state_dict has a key that is no text of 1 to {MAX_KEY_CHARACTERS} characters")


def _loss(value: object) -> float | None:
    if isinstance(value, Tensor):
        value = Tensor.detach(value)
        dense = value.layout is torch.strided and value.device.type == "cpu" and not value.is_quantized
        value = value.item() if dense and value.numel() == 1 else None
    return float(value) if isinstance(value, int | float) and abs(value) < _MAX_LOSS else None


def _check_count(count: int) -> None:
    if count > MAX_TENSORS:
        raise refused(f"it holds {count} tensors, and no network that is known here has more than {MAX_TENSORS}")


def _check_tensors(tensors: Mapping[str, Tensor], size_bytes: int) -> None:
    """Check tensors from a file of so many bytes, one by one and together."""
    _check_count(len(tensors))
    for key, tensor in tensors.items():
        check_dense(_key(key), tensor)
    if sum(t.nbytes for t in tensors.values()) > MAX_SHARING * size_bytes:
        raise refused("its tensors are larger together than the file by far: save each with bytes of its own")
    for key, tensor in tensors.items():
        check_finite(key, tensor)
