"""Pickles that would run something, or that have no end: in archives, in old files, and bare."""

import os
import pickle
import subprocess
import tarfile
import zipfile
from collections.abc import Sequence
from io import BytesIO
from random import Random
from struct import pack
from typing import Any

from tests.chaos.good import saved
from tests.chaos.mutation import Expected, Site

PROTO = b"\x80\x02"
OLD_START = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19." + b"\x80\x02M\xe9\x03." + b"\x80\x02}."
REBUILD = b"ctorch._utils\n_rebuild_tensor_v2\n"
HOOKS = b"ccollections\nOrderedDict\n)R"


class Runs:
    """Unpickles by running something that leaves `mark` behind."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self._reduced = function, arguments

    def __reduce__(self) -> Any:
        return self._reduced


def payloads(mark: str) -> Sequence[Runs]:
    code = f"open({mark!r}, 'w')"
    return (
        Runs(os.system, f"touch {mark}"),
        Runs(eval, code),
        Runs(exec, code),
        Runs(open, mark, "w"),
        Runs(subprocess.check_output, ["touch", mark]),
        Runs(os.mkdir, mark),
    )


def text(value: str) -> bytes:
    return b"X" + pack("<I", len(value.encode())) + value.encode()


def integer(value: int) -> bytes:
    if -(2**31) <= value < 2**31:
        return b"J" + pack("<i", value)
    data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(data)]) + data


def storage(key: str = "0", size: int = 4, kind: bytes = b"torch\nFloatStorage\n", where: str = "cpu") -> bytes:
    return b"(" + text("storage") + b"c" + kind + text(key) + text(where) + integer(size) + b"tQ"


def tensor(stored: bytes, offset: int = 0, size: Sequence[int] = (4,), stride: Sequence[int] = (1,)) -> bytes:
    def tuple_of(values: Sequence[int]) -> bytes:
        return b"(" + b"".join(map(integer, values)) + b"t"

    return REBUILD + b"(" + stored + integer(offset) + tuple_of(size) + tuple_of(stride) + b"\x89" + HOOKS + b"tR"


def state(value: bytes, key: str = "fc.bias") -> bytes:
    return PROTO + b"}" + text("state_dict") + b"}" + text(key) + value + b"ss."


def archive(pickled: bytes, **data: bytes) -> bytes:
    out = BytesIO()
    with zipfile.ZipFile(out, "w") as new:
        new.writestr("archive/data.pkl", pickled)
        new.writestr("archive/version", b"3\n")
        new.writestr("archive/byteorder", b"little")
        for key, value in ({"0": bytes(16)} | data).items():
            new.writestr(f"archive/data/{key}", value)
    return out.getvalue()


def drop_either(random: Random, site: Site, pickled: bytes) -> Expected:
    """The pickle in an archive, in an old file, or bare."""
    form = random.choice(["archive", "archive", "old", "bare"])
    if form == "archive":
        return site.drop(archive(pickled), random.choice([".pt", ".pth"]))
    return site.drop(OLD_START + pickled + b"\x80\x02]." if form == "old" else pickled)


def saved_object_that_runs(random: Random, site: Site) -> Expected:
    evil = random.choice(payloads(str(site.mark)))
    wrapped = random.choice([evil, {"state_dict": {}, "extra": evil}, {"state_dict": {"fc.bias": evil}}, [evil]])
    return site.drop(saved(wrapped, _use_new_zipfile_serialization=random.random() < 0.7))


def bare_pickle_that_runs(random: Random, site: Site) -> Expected:
    content = pickle.dumps(random.choice(payloads(str(site.mark))), random.randint(0, 5))
    return site.drop(random.choice([content, archive(content), OLD_START + content]))


def opcode_that_runs(random: Random, site: Site) -> Expected:
    command = text(f"touch {site.mark}")
    line = f"touch {site.mark}".encode()
    return drop_either(
        random,
        site,
        random.choice(
            [
                b"cos\nsystem\n(" + command + b"tR.",
                b"(S'" + line + b"'\nios\nsystem\n.",  # INST
                b"(cos\nsystem\n" + command + b"o.",  # OBJ
                PROTO + b"cos\nsystem\n" + command + b"\x85\x81.",  # NEWOBJ
                PROTO + text("os") + text("system") + b"\x93" + command + b"\x85R.",  # STACK_GLOBAL
                PROTO + b"\x82\x01.",  # EXT1
                PROTO + b"c__builtin__\neval\n" + command + b"\x85R.",
                PROTO + b"cbuiltins\ngetattr\ncos\nsys\n" + text("modules") + b"\x86R.",
                PROTO + b"ctorch\nload\n" + text("/etc/passwd") + b"\x85R.",
                PROTO + b"ctorch.serialization\nload\n" + text("/etc/passwd") + b"\x85R.",
                PROTO + b"ctorch.hub\nload_state_dict_from_url\n" + text("http://127.0.0.1/x") + b"\x85R.",
                PROTO + b"cnumpy.core.multiarray\n_reconstruct\n)R.",
                PROTO + b"ccollections\nOrderedDict\n)Rcos\nsystem\nb.",
                PROTO + b"P" + line + b"\n.",  # PERSID
                PROTO + b"ctorch._utils\n_import_dotted_name\n" + text("os.system") + b"\x85R.",
                PROTO + b"ctorch._utils\n_rebuild_wrapper_subclass\n)R.",
                PROTO
                + b"ctorch._tensor\n_rebuild_from_type_v2\n(cos\nsystem\nctorch\nTensor\n"
                + command
                + b"\x85}tR.",
                PROTO + b"c_codecs\nencode\n" + text("x" * 1000) + text("punycode") + b"\x86R.",
            ]
        ),
    )


def nothing_to_end(random: Random, site: Site) -> Expected:
    """Deep, doubled, recursive, huge: what takes forever to hash or print, or all memory."""
    key = b"K\x01s."
    doubled_list = b"]" + b"q\x00]h\x00ah\x00a" * 40
    return drop_either(
        random,
        site,
        random.choice(
            [
                PROTO + b"})" + b"\x85" * random.choice([1_000, 20_000, 500_000]) + key,
                PROTO + b"})" + b"q\x00h\x00\x86" * random.choice([15, 60]) + key,
                PROTO + b"]" * 500_000 + b"a" * 499_999 + b".",
                PROTO + b"}" * 100_000 + b".",
                PROTO + b"(" * 500_000 + b".",
                PROTO + doubled_list + b")R.",
                PROTO + doubled_list + b")\x81.",
                PROTO + b"(" + text("storage") + doubled_list + doubled_list + b"NNtQ.",
                PROTO
                + b"}"
                + text("state_dict")
                + b"}s"
                + text("backboned")
                + b"}"
                + text("task")
                + doubled_list
                + b"ss.",
                PROTO + b"}" + text("state_dict") + b"}s" + text("classes") + doubled_list + b"s.",
                PROTO + b"}" + text("state_dict") + b"}q\x01h\x01" + text("x") + b"h\x01sbs.",
                PROTO + b"]q\x00h\x00a.",
                PROTO + b"}q\x00" + text("state_dict") + b"h\x00s.",
                PROTO + b"cbuiltins\nbytearray\n" + integer(2**36) + b"\x85R.",
                PROTO + b"ctorch\nTensor\n" + integer(2**40) + b"\x85R.",
                PROTO + b"ctorch.storage\nUntypedStorage\n" + integer(2**40) + b"\x85R.",
                PROTO + b"X\xff\xff\xff\x7fa.",
                PROTO + b"\x8d" + pack("<Q", 2**60) + b"a.",
                PROTO + b"\x8b" + pack("<I", 2**31 - 1) + b"a.",
                b"\x80\x04\x95" + pack("<Q", 2**62) + b"N.",
                PROTO + b"\x96" + pack("<Q", 2**40) + b"a.",
                PROTO + b"Nr\xff\xff\xff\xffj\xff\xff\xff\xff.",
                PROTO + b"N" * 1_500_000 + b".",
                state(b"]" * 3 + b"aa"),
                state(b"ctorch\nSize\n" + b"(" + integer(2**62) * 5 + b"t\x85R"),
                PROTO + b"}" + integer(1 << 2000) + b"Ns.",
                PROTO + b"}" + text("k" * 100_000) + tensor(storage()) + b"s.",
                PROTO + b"}" + text("a." * 200_000) + tensor(storage()) + b"s.",
            ]
        ),
    )


def thousands_of_keys(random: Random, site: Site) -> Expected:
    """Each with a prefix of its own, all on the same bytes."""
    first = tensor(storage()) + b"q\x01"
    middle = random.choice(["", ".weight", ".a.b.c"])
    more = b"".join(text(f"k{i}{middle}") + b"h\x01" for i in range(random.choice([1_000, 20_000])))
    return site.drop(archive(PROTO + b"}(" + text("k") + first + more + b"u."))


def storage_of_an_odd_name(random: Random, site: Site) -> Expected:
    odd = random.choice(
        [
            storage(key="../0"),
            storage(key="1"),
            storage(key="0\n"),
            storage(size=-1),
            storage(size=5),
            storage(size=2**40),
            storage(size=2**62),
            storage(kind=b"torch\nDoubleStorage\n"),
            storage(kind=b"torch\nNoSuchStorage\n"),
            storage(kind=b"torch.storage\nUntypedStorage\n"),
            storage(kind=b"torch\nfloat32\n"),
            storage(kind=b"collections\nOrderedDict\n"),
            storage(where="cuda:99" if random.random() < 0.5 else "nowhere").replace(b"J\x04", b"J\x03"),
            b"(" + text("module") + text("a") + text("b") + text("c") + b"tQ",
            b"(" + text("storage") + b"tQ",
            text("storage") + b"Q",
            b")Q",
            b"NQ",
            b"K\x01Q",
            b"]",
        ]
    )
    return drop_either(random, site, state(tensor(odd)))


def tensor_beyond_its_storage(random: Random, site: Site) -> Expected:
    size, stride, offset = random.choice(
        [
            ((5,), (1,), 0),
            ((2,), (1000,), 0),
            ((2,), (2**40,), 0),
            ((4,), (1,), 1),
            ((4,), (1,), 2**40),
            ((4,), (1,), -4),
            ((4,), (-1,), 3),
            ((2**31,), (1,), 0),
            ((2**40,), (1,), 0),
            ((2**62, 2**62), (1, 1), 0),
            ((2**40,), (0,), 0),
            ((2**20, 2**20), (0, 0), 0),
            ((-1,), (1,), 0),
            ((4,), (), 0),
            ((), (1,), 0),
            ((1,) * 3000, (1,) * 3000, 0),
            ((0, 2**62), (1, 1), 0),
        ]
    )
    return drop_either(random, site, state(tensor(storage(), offset, size, stride)))


def tensor_with_a_bit_set(random: Random, site: Site) -> Expected:
    metadata = b"}" + text(random.choice(["neg", "conj", "x"])) + b"\x88s"
    return site.drop(archive(state(tensor(storage())[:-2] + metadata + b"tR")))


def tar_of_old(random: Random, site: Site) -> Expected:
    out = BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name in ("sys_info", "pickle", "tensors", random.choice(["storages", "../storages", "/storages"])):
            content = pickle.dumps(random.choice(payloads(str(site.mark))))
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, BytesIO(content))
    return site.drop(out.getvalue())


def opcodes_at_random(random: Random, site: Site) -> Expected:
    opcodes = [bytes([b]) for b in range(256)]
    likely = [
        text("state_dict"),
        text("w"),
        tensor(storage()),
        b"}",
        b"]",
        b"(",
        b"t",
        b"s",
        b"u",
        b"a",
        b"R",
        b"b",
        b"Q",
    ]
    content = b"".join(random.choice(opcodes if random.random() < 0.1 else likely) for _ in range(random.randrange(40)))
    drop_either(random, site, PROTO + content + b".")
    return Expected.REFUSED


KINDS = (
    saved_object_that_runs,
    bare_pickle_that_runs,
    opcode_that_runs,
    nothing_to_end,
    thousands_of_keys,
    storage_of_an_odd_name,
    tensor_beyond_its_storage,
    tensor_with_a_bit_set,
    tar_of_old,
    opcodes_at_random,
)
