"""A pickle is followed on paper before torch follows it: what would hang, crash or fill the memory is refused."""

import io
import zipfile
from collections import Counter, OrderedDict
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from backboned.registry.errors import BackbonedError
from backboned.registry.pickled import MAX_OPCODES, MAX_TUPLE, check_pickle

PROTO = b"\x80\x02"
TEXT = b"X\x01\x00\x00\x00a"
SPARSE = b"ctorch._utils\n_rebuild_sparse_tensor\n"
ENDLESS_LIST = b"]q\x00" + b"h\x00h\x00\x86q\x01"


def pickle_of(content: Any, **options: Any) -> bytes:
    file = io.BytesIO()
    torch.save(content, file, **options)
    with zipfile.ZipFile(file) as archive:
        return archive.read(next(n for n in archive.namelist() if n.endswith("data.pkl")))


@pytest.mark.parametrize(
    "content",
    [
        {"weight": torch.zeros(2, 3), "steps": torch.tensor(3)},
        OrderedDict(weight=torch.nn.Parameter(torch.zeros(2))),
        torch.nn.BatchNorm2d(3).state_dict(),  # with its `_metadata`
        {"a": torch.zeros(2, dtype=torch.uint16), "b": torch.zeros(2, dtype=torch.float8_e5m2)},
        {"state_dict": {}, "epoch": 2**40, "loss": 0.5, "betas": (0.9, 0.999), "best": None, "amsgrad": False},
        {"milestones": Counter([30, 60]), "shape": torch.Size([1, 2]), "device": torch.device("cpu"), "names": {"a"}},
    ],
)
def test_what_scripts_save_passes_and_ends_where_it_ends(content: Any) -> None:
    data = pickle_of(content)
    assert check_pickle(data) == len(data)
    assert check_pickle(b"before" + data + b"behind", len(b"before")) == len(b"before") + len(data)


@pytest.mark.parametrize(
    ("opcodes", "message"),
    [
        (b"}" + b")" + b"\x85" * 2_000_000 + b"K\x01s.", f"a tuple of more than {MAX_TUPLE} values"),  # crashes hash()
        (b"})" + b"q\x00h\x00\x86" * 60 + b"K\x01s.", f"a tuple of more than {MAX_TUPLE} values"),  # hashes for years
        (b"cbuiltins\nbytearray\n\x8a\x05\x00\x00\x00\x00\x7f\x85R.", "builtins.bytearray"),  # fills the memory
        (b"c__builtin__\neval\n" + TEXT + b"\x85R.", "builtins.eval"),
        (b"cos\nsystem\n" + TEXT + b"\x85R.", "it holds a pickled object (os.system)"),
        (SPARSE + b")R.", "only plain dense ones can be served"),
        (b"N" * (MAX_OPCODES + 1) + b".", "more than 1000000 values"),
    ],
    ids=["deep", "doubling", "bytearray", "eval", "system", "sparse", "long"],
)
def test_what_no_checkpoint_needs_is_refused_by_what_it_is(opcodes: bytes, message: str) -> None:
    with pytest.raises(BackbonedError) as caught:
        check_pickle(PROTO + opcodes)
    assert message in caught.value.message


@pytest.mark.parametrize(
    "opcodes",
    [
        ENDLESS_LIST + b")R.",  # torch would print what isn't a function
        b"]Q.",  # the name of a storage is a tuple…
        b"]\x85Q.",  # …of plain values
        b"ctorch\nFloatStorage\n)R.",  # a kind of storage is nothing to call
        b"ctorch\nSize\n)\x81.",
        b"NNb.",
        b"Na.",
        b"h\x05.",
        b"(.",
        b"t.",
        b"(\x85.",
        b"q\x00.",
        b"(ios\nsystem\n.",
        b"\x95\x00\x00\x00\x00\x00\x00\x00\x00N.",
        b"X\xff\xff\xff\xffa.",
        b"",
    ],
)
def test_what_torch_never_writes_is_refused(opcodes: bytes) -> None:
    with pytest.raises(BackbonedError, match="not a checkpoint that can be read"):
        check_pickle(PROTO + opcodes)


@given(st.lists(st.sampled_from([bytes([i]) for i in b"ctorch\nSizeRbQ(t)]}aesuqhrjKNX.\x00\x01\x85\x86\x87\x80\x8a"])))
@settings(deadline=None, max_examples=300)
def test_any_opcodes_end_in_a_typed_error_or_where_the_pickle_does(opcodes: list[bytes]) -> None:
    data = b"".join(opcodes)
    try:
        end = check_pickle(data)
    except BackbonedError:
        return
    assert data[end - 1 : end] == b"."
