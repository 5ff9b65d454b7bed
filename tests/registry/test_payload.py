"""A checkpoint file is read whole and without running anything, or refused with the reason and the remedy."""

import os
import pickle
import zipfile
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save as save_safetensors
from torch import Tensor, nn

from backboned.registry.errors import BackbonedError, ErrorKind
from backboned.registry.payload import Payload, read_payload
from backboned.registry.refusal import IncompleteFile

STATE = {"layer.weight": torch.arange(64.0).reshape(8, 8), "layer.bias": torch.ones(8), "count": torch.tensor(3)}


def saved(content: Any, **options: Any) -> bytes:
    file = BytesIO()
    torch.save(content, file, **options)
    return file.getvalue()


GOOD = saved(STATE)
LEGACY = saved(STATE, _use_new_zipfile_serialization=False)
SAFETENSORS = save_safetensors(STATE, metadata={"backbone": "resnet18"})


@pytest.fixture(scope="module")
def read(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Payload]:
    """Reads these bytes as a file."""
    folder = tmp_path_factory.mktemp("payloads")

    def read_bytes(content: bytes, suffix: str = ".pt", *, verified: bool = False) -> Payload:
        path = folder / f"file{suffix}"
        path.write_bytes(content)
        return read_payload(path, verified=verified)

    return read_bytes


@pytest.fixture(scope="module")
def refusal(read: Callable[..., Payload]) -> Callable[..., BackbonedError]:
    """The error that reading these bytes ends in."""

    def refuse(content: bytes, suffix: str = ".pt", *, verified: bool = False) -> BackbonedError:
        with pytest.raises(BackbonedError) as caught:
            read(content, suffix, verified=verified)
        assert caught.value.kind is ErrorKind.DATA_LOSS
        return caught.value

    return refuse


Read = Callable[..., Payload]
Refusal = Callable[..., BackbonedError]


def same(found: Payload, expected: dict[str, Tensor]) -> bool:
    return found.tensors.keys() == expected.keys() and all(found.tensors[k].equal(t) for k, t in expected.items())


@pytest.mark.parametrize(
    ("content", "suffix"),
    [(GOOD, ".pt"), (GOOD, ".pth"), (LEGACY, ".pt"), (SAFETENSORS, ".safetensors")],
    ids=["zip", "pth", "legacy", "safetensors"],
)
def test_a_bare_state_dict_is_read(read: Read, content: bytes, suffix: str) -> None:
    assert same(read(content, suffix), STATE)
    assert same(read(content, suffix, verified=True), STATE)


@pytest.mark.parametrize("key", ["model_state_dict", "state_dict"])
def test_a_checkpoint_dict_is_read_with_what_is_beside(read: Read, key: str) -> None:
    content = {
        "epoch": 7,
        key: STATE,
        "optimizer_state_dict": {"state": {0: {"step": torch.tensor(1.0)}}, "param_groups": [{"lr": 0.1}]},
        "loss": torch.tensor(0.25),
        "classes": ["ant", "bee"],
        "backbone": "resnet18",
        "backboned": {"task": "single_label", "stages": {"head": "0"}, 5: "five"},
    }
    found = read(saved(content))
    assert same(found, STATE)
    assert (found.epoch, found.loss, found.backbone) == (7, 0.25, "resnet18")
    assert found.metadata == {
        "classes": ["ant", "bee"],
        "task": "single_label",
        "stages": {"head": "0"},
        "5": "five",
    }


def test_a_string_may_stand_beside_bare_tensors(read: Read) -> None:
    found = read(saved({"backbone": "resnet18", **STATE}))
    assert same(found, STATE) and found.backbone == "resnet18"


def test_safetensors_may_name_the_backbone_in_their_metadata(read: Read) -> None:
    assert read(SAFETENSORS, ".safetensors").backbone == "resnet18"
    assert read(save_safetensors(STATE), ".safetensors").backbone is None


@pytest.mark.parametrize(
    ("beside", "epoch", "loss"),
    [
        ({}, None, None),
        ({"epoch": "seven", "loss": "low"}, None, None),
        ({"epoch": -1, "loss": 3}, None, 3.0),
        ({"epoch": 2**40, "loss": torch.zeros(2)}, None, None),
        ({"backbone": 5, "backboned": "?"}, None, None),
    ],
)
def test_what_is_beside_and_makes_no_sense_counts_for_nothing(
    read: Read, beside: dict[str, Any], epoch: int | None, loss: float | None
) -> None:
    found = read(saved({"state_dict": STATE, **beside}))
    assert (found.epoch, found.loss, found.backbone, found.metadata) == (epoch, loss, None, {})


@pytest.mark.parametrize("loss", [2**1500, -(2**1500), torch.tensor(1j), torch.zeros(2)])
def test_a_loss_that_is_no_number_of_ours_counts_for_nothing(read: Read, loss: object) -> None:
    assert read(saved({"state_dict": STATE, "loss": loss})).loss is None


def test_tensors_that_share_their_bytes_by_the_thousand_are_refused(read: Read, refusal: Refusal) -> None:
    shared = torch.ones(10_000)
    assert same(read(saved({"a": shared, "b": shared})), {"a": shared, "b": shared})
    assert "larger together than the file" in refusal(saved({f"k{i}": shared for i in range(1000)})).message


def test_a_key_beyond_all_measure_is_refused(refusal: Refusal) -> None:
    message = refusal(saved({"a." * 100_000: torch.ones(1)})).message
    assert message == "its state_dict has a key that is no text of 1 to 500 characters"


def test_tensors_by_the_ten_thousand_are_refused(refusal: Refusal) -> None:
    state = {f"k{i}": torch.zeros(0) for i in range(20_001)}
    for message in (refusal(saved(state)).message, refusal(save_safetensors(state), ".safetensors").message):
        assert message.startswith("it holds 20001 tensors")


def test_a_safetensors_header_beyond_all_measure_is_refused(refusal: Refusal) -> None:
    size = 2**24 + 1
    assert "header has more than 16 MiB" in refusal(size.to_bytes(8, "little") + bytes(size), ".safetensors").message


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([STATE], "it holds a list, not a state_dict"),
        (torch.zeros(3), "it holds a Tensor, not a state_dict"),
        ({}, "it holds no tensors"),
        ({"backbone": "resnet18"}, "it holds no tensors"),
        ({"state_dict": {}}, "it holds no tensors"),
        ({"epoch": 3, "weights": STATE}, "its state_dict has 'epoch', a int, where tensors are expected"),
        ({"state_dict": {"layer": [1.0]}}, "its state_dict has 'layer', a list, where tensors are expected"),
        ({"state_dict": {3: torch.zeros(1)}}, "its state_dict has '3', a Tensor"),
    ],
)
def test_what_is_no_state_dict_is_refused_by_what_it_is(refusal: Refusal, content: Any, message: str) -> None:
    assert message in refusal(saved(content)).message


class _Malicious:
    """What unpickles by running a command."""

    def __init__(self, command: str) -> None:
        self._command = command

    def __reduce__(self) -> Any:
        return os.system, (self._command,)


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("wrap", [lambda evil: evil, lambda evil: {"state_dict": STATE, "extra": evil}])
@pytest.mark.parametrize("verified", [False, True])
def test_a_pickle_with_a_side_effect_is_refused_and_nothing_happens(
    refusal: Refusal, tmp_path: Path, wrap: Callable[[Any], Any], legacy: bool, verified: bool
) -> None:
    mark = tmp_path / "it-ran"
    content = saved(wrap(_Malicious(f"touch {mark}")), _use_new_zipfile_serialization=not legacy)
    error = refusal(content, verified=verified)
    assert "it holds a pickled object (posix.system)" in error.message and "could run any code" in error.message
    assert not mark.exists()


def test_a_bare_pickle_is_refused_and_nothing_happens(refusal: Refusal, tmp_path: Path) -> None:
    mark = tmp_path / "it-ran"
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        refusal(pickle.dumps(_Malicious(f"touch {mark}"), protocol))
    assert not mark.exists()


@pytest.mark.parametrize("legacy", [False, True])
def test_a_whole_module_is_refused_with_the_remedy(refusal: Refusal, legacy: bool) -> None:
    content = saved(nn.Sequential(nn.Linear(2, 2)), _use_new_zipfile_serialization=not legacy)
    message = refusal(content).message
    assert "torch.nn.modules.container.Sequential" in message
    assert "torch.save(model.state_dict(), 'model.pt')" in message


@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_a_torchscript_program_is_refused_with_the_remedy(refusal: Refusal) -> None:
    file = BytesIO()
    torch.jit.save(torch.jit.trace(nn.Linear(2, 2), torch.zeros(1, 2)), file)
    message = refusal(file.getvalue()).message
    assert "TorchScript" in message and "save model.state_dict()" in message


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_values_that_are_not_finite_are_refused(refusal: Refusal, value: float, dtype: torch.dtype) -> None:
    weight = torch.zeros(100, dtype=dtype)
    weight[37] = value
    assert refusal(saved({"a": torch.zeros(1), "b.weight": weight})).message.startswith("'b.weight' has values that")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_values_whose_sum_is_beyond_the_type_are_finite_all_the_same(read: Read, dtype: torch.dtype) -> None:
    state = {"weight": torch.full((8,), torch.finfo(dtype).max, dtype=dtype)}
    assert same(read(saved(state)), state)


def test_a_tensor_that_claims_more_than_its_bytes_is_refused(refusal: Refusal) -> None:
    content = saved({"weight": torch.zeros(1).expand(100_000, 100_000)})
    assert len(content) < 10_000
    assert refusal(content).message == "'weight' claims to be [100000, 100000], which its bytes don't hold"


@pytest.mark.parametrize(
    "tensor",
    [
        torch.eye(3).to_sparse(),
        torch.zeros(2, dtype=torch.complex64),
        torch.zeros(2, device="meta"),
    ],
    ids=["sparse", "complex", "meta"],
)
def test_tensors_that_are_not_plain_are_refused(refusal: Refusal, tensor: Tensor) -> None:
    assert "only plain dense ones" in refusal(saved({"weight": tensor})).message


def repacked(content: bytes, change: Callable[[zipfile.ZipFile, zipfile.ZipInfo, bytes], None], method: int) -> bytes:
    out = BytesIO()
    with zipfile.ZipFile(BytesIO(content)) as old, zipfile.ZipFile(out, "w", method) as new:
        for member in old.infolist():
            change(new, member, old.read(member))
    return out.getvalue()


def test_a_compressed_archive_is_refused_before_anything_is_inflated(
    refusal: Refusal, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(new: zipfile.ZipFile, member: zipfile.ZipInfo, data: bytes) -> None:
        new.writestr(member.filename, data if not member.filename.endswith("/0") else bytes(2**24))

    content = repacked(GOOD, write, zipfile.ZIP_DEFLATED)
    assert len(content) < 2**16  # 16 MB inside
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("torch has read it"))
    assert refusal(content).message == "its archive is compressed, which torch.save never does"


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_an_archive_with_two_members_of_one_name_is_refused(refusal: Refusal) -> None:
    def write(new: zipfile.ZipFile, member: zipfile.ZipInfo, data: bytes) -> None:
        for _ in range(2 if member.filename.endswith("/0") else 1):
            new.writestr(member.filename, data)

    assert "two members of one name" in refusal(repacked(GOOD, write, zipfile.ZIP_STORED)).message


def test_an_archive_of_something_else_is_refused(refusal: Refusal) -> None:
    file = BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("word/document.xml", "<xml/>")
    error = refusal(file.getvalue())
    assert "not a checkpoint that can be read" in error.message and not isinstance(error, IncompleteFile)


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".safetensors"])
def test_an_empty_file_is_not_whole_yet(refusal: Refusal, suffix: str) -> None:
    assert isinstance(refusal(b"", suffix), IncompleteFile)


@pytest.mark.parametrize("content", [b"<!doctype html><title>404</title>", b"hello\n", b"# a script\nimport torch\n"])
def test_a_text_is_refused_without_advice_to_load_it_all_the_same(refusal: Refusal, content: bytes) -> None:
    for suffix in (".pt", ".safetensors"):
        message = refusal(content, suffix).message
        assert message.startswith("not a ") and "weights_only" not in message


def test_a_folder_or_nothing_is_no_file(tmp_path: Path) -> None:
    for name in ("a.pt", "a.safetensors"):
        with pytest.raises((OSError, BackbonedError)):
            read_payload(tmp_path / name)
        (tmp_path / name).mkdir()
        with pytest.raises((OSError, BackbonedError)):
            read_payload(tmp_path / name)


@pytest.mark.parametrize(
    ("content", "suffix"), [(GOOD, ".pt"), (LEGACY, ".pt"), (SAFETENSORS, ".safetensors")], ids=["zip", "old", "safe"]
)
@given(data=st.data())
@settings(deadline=None, max_examples=60)
def test_a_truncated_file_is_found_wherever_it_ends(
    refusal: Refusal, content: bytes, suffix: str, data: st.DataObject
) -> None:
    error = refusal(content[: data.draw(st.integers(0, len(content) - 1))], suffix)
    assert isinstance(error, IncompleteFile), error.message


def tensor_bytes(content: bytes) -> list[int]:
    """Where in an archive the tensors' bytes are."""
    with zipfile.ZipFile(BytesIO(content)) as archive:
        members = [m for m in archive.infolist() if "/data/" in m.filename]
        starts = [m.header_offset + 30 + int.from_bytes(content[m.header_offset + 26 :][:2], "little") for m in members]
        extra = [int.from_bytes(content[m.header_offset + 28 :][:2], "little") for m in members]
    return [s + x + i for s, x, m in zip(starts, extra, members, strict=True) for i in range(m.file_size)]


def test_every_flipped_bit_of_a_tensor_is_found(refusal: Refusal) -> None:
    offsets = tensor_bytes(GOOD)
    assert len(offsets) == sum(t.nbytes for t in STATE.values())
    for offset in offsets:
        flipped = bytearray(GOOD)
        flipped[offset] ^= 1 << offset % 8
        error = refusal(bytes(flipped))
        assert isinstance(error, IncompleteFile) and "altered" in error.message


@given(data=st.data())
@settings(deadline=None, max_examples=150)
def test_a_file_with_any_bytes_changed_is_refused_or_holds_the_same(read: Read, data: st.DataObject) -> None:
    changed = bytearray(GOOD)
    for offset in data.draw(st.lists(st.integers(0, len(GOOD) - 1), min_size=1, max_size=4)):
        changed[offset] = data.draw(st.integers(0, 255))
    try:
        found = read(bytes(changed))
    except BackbonedError:
        return
    assert all(key in STATE and found.tensors[key].equal(STATE[key]) for key in found.tensors)


@given(
    start=st.sampled_from([b"", GOOD[:200], LEGACY[:60], LEGACY[:200], SAFETENSORS[:60], b"PK\x03\x04", b"\x80\x02"]),
    content=st.binary(max_size=300),
    end=st.sampled_from([b"", GOOD[-200:], b"."]),
    suffix=st.sampled_from([".pt", ".pth", ".safetensors"]),
)
@settings(deadline=None, max_examples=300)
def test_any_bytes_at_all_end_in_a_typed_error(
    read: Read, start: bytes, content: bytes, end: bytes, suffix: str
) -> None:
    try:
        read(start + content + end, suffix)
    except BackbonedError as error:
        assert error.kind is ErrorKind.DATA_LOSS
