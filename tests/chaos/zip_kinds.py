"""Archives with other members, sizes, methods and ends than `torch.save` writes."""

import struct
import warnings
import zipfile
from collections.abc import Callable, Iterator
from io import BytesIO
from random import Random

from tests.chaos.mutation import Expected, Site

BOMB_BYTES = 64 * 2**20


def rewritten(
    content: bytes,
    change: Callable[[str, bytes], Iterator[tuple[str, bytes]]] = lambda name, data: iter([(name, data)]),
    method: int = zipfile.ZIP_STORED,
    comment: bytes = b"",
) -> bytes:
    """An archive with each member in the place of which `change` gives it, by another writer than torch."""
    out = BytesIO()
    with warnings.catch_warnings(action="ignore"), zipfile.ZipFile(out, "w", method) as new:
        with zipfile.ZipFile(BytesIO(content)) as old:
            for name in old.namelist():
                for new_name, data in change(name, old.read(name)):
                    new.writestr(new_name, data)
        new.comment = comment
    return out.getvalue()


def entries(content: bytes) -> list[int]:
    """Where the entries of the table of contents begin."""
    with zipfile.ZipFile(BytesIO(content)) as archive:
        at, count = archive.start_dir, len(archive.infolist())
    found = []
    for _ in range(count):
        found.append(at)
        at += 46 + sum(struct.unpack_from("<3H", content, at + 28))
    return found


def packed(content: bytes, at: int, form: str, value: int) -> bytes:
    changed = bytearray(content)
    struct.pack_into(form, changed, at, value)
    return bytes(changed)


def written_by_another(random: Random, site: Site) -> Expected:
    site.drop(rewritten(random.choice(site.good.archives)))
    return Expected.SERVED


def compressed(random: Random, site: Site) -> Expected:
    method = random.choice([zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
    return site.drop(rewritten(random.choice(site.good.archives), method=method))


def bomb(random: Random, site: Site) -> Expected:
    def inflate(name: str, data: bytes) -> Iterator[tuple[str, bytes]]:
        yield name, bytes(BOMB_BYTES) if name.endswith(random.choice(["/data/0", "data.pkl"])) else data

    return site.drop(rewritten(site.good.head, inflate, zipfile.ZIP_DEFLATED))


def size_that_lies(random: Random, site: Site) -> Expected:
    content = rewritten(random.choice(site.good.archives))
    at = random.choice(entries(content))
    fields = random.choice([(20,), (24,), (20, 24)])
    claimed = random.choice([0, 1, 2**20, 2**31, 2**32 - 2])
    for field in fields:
        content = packed(content, at + field, "<L", claimed)
    site.drop(content)
    return Expected.INTACT


def offset_that_lies(random: Random, site: Site) -> Expected:
    content = rewritten(random.choice(site.good.archives))
    one, two = random.sample(entries(content), 2)
    other = struct.unpack_from("<L", content, two + 42)[0]
    return site.drop(packed(content, one + 42, "<L", random.choice([other, other + 1, 2**31, 2**32 - 2])))


def flag(random: Random, site: Site) -> Expected:
    content = rewritten(random.choice(site.good.archives))
    at = random.choice(entries(content))
    site.drop(packed(content, at + 8, "<H", random.choice([0x1, 0x8, 0x20, 0x40, 0x800, 0x2000, 0xFFFF])))
    return Expected.INTACT


def method_that_lies(random: Random, site: Site) -> Expected:
    content = rewritten(random.choice(site.good.archives))
    at = random.choice(entries(content))
    return site.drop(packed(content, at + 10, "<H", random.choice([1, 8, 12, 14, 93, 99, 0xFFFF])))


def member_twice(random: Random, site: Site) -> Expected:
    chosen = random.choice(["data.pkl", "/data/0", "/version"])

    def double(name: str, data: bytes) -> Iterator[tuple[str, bytes]]:
        yield name, data
        if name.endswith(chosen):
            yield name, random.choice([data, b"", bytes(len(data))])

    return site.drop(rewritten(random.choice(site.good.archives), double))


def member_of_an_odd_name(random: Random, site: Site) -> Expected:
    names = ("../../outside", "/etc/passwd", "archive/../x", "new\nline", "x" * 60_000, "\u202e", "C:\\x", "archive/")
    added = random.sample(names, random.randint(1, 3))

    def add(name: str, data: bytes) -> Iterator[tuple[str, bytes]]:
        yield name, data
        if name.endswith("/version"):
            yield from ((odd, b"x") for odd in added)

    site.drop(rewritten(random.choice(site.good.archives), add))
    return Expected.INTACT


def member_renamed(random: Random, site: Site) -> Expected:
    chosen, prefix = random.choice(["data.pkl", "/data/0"]), random.choice(["../", "/", "x/", "\n"])
    return site.drop(
        rewritten(
            random.choice(site.good.archives),
            lambda name, data: iter([(prefix + name if name.endswith(chosen) else name, data)]),
        )
    )


def member_missing(random: Random, site: Site) -> Expected:
    missing = random.choice(["data.pkl", "/data/0", "/data/1"])
    return site.drop(
        rewritten(
            random.choice(site.good.archives), lambda name, data: iter([] if name.endswith(missing) else [(name, data)])
        )
    )


def record_of_nonsense(random: Random, site: Site) -> Expected:
    chosen = random.choice(["/version", "/byteorder", "/.format_version", "/.storage_alignment"])
    nonsense = random.choice([b"", b"x", b"-1", b"9" * 400, b"big", b"\xff\xfe", b"\0" * 100, b"64\n64"])

    def change(name: str, data: bytes) -> Iterator[tuple[str, bytes]]:
        yield name, nonsense if name.endswith(chosen) else data

    site.drop(rewritten(random.choice(site.good.archives), change))
    return Expected.FINITE if chosen == "/byteorder" else Expected.INTACT


def program(random: Random, site: Site) -> Expected:
    name = random.choice(["archive/constants.pkl", "archive/code/__torch__.py"])

    def add(old: str, data: bytes) -> Iterator[tuple[str, bytes]]:
        yield old, data
        if old.endswith("/version"):
            yield name, b"import os"

    return site.drop(rewritten(random.choice(site.good.archives), add))


def end_that_lies(random: Random, site: Site) -> Expected:
    content = random.choice(site.good.archives)
    field, form = random.choice([(24, "<Q"), (32, "<Q"), (40, "<Q"), (48, "<Q"), (56 + 8, "<Q")])
    at = content.rindex(b"PK\x06\x06") + field
    return site.drop(packed(content, at, form, random.choice([0, 1, 2**31, 2**40, 2**63, 2**64 - 1])))


def second_end(random: Random, site: Site) -> Expected:
    one, two = rewritten(site.good.head), rewritten(site.good.trained, method=zipfile.ZIP_DEFLATED)
    return site.drop(random.choice([one + two, two + one, one[:-22] + two[-22:], rewritten(one, comment=two[-2000:])]))


def thousands_of_members(random: Random, site: Site) -> Expected:
    def add(name: str, data: bytes) -> Iterator[tuple[str, bytes]]:
        yield name, data
        if name.endswith("/version"):
            yield from ((f"archive/data/x{i}", b"") for i in range(2000))

    site.drop(rewritten(site.good.head, add))
    return Expected.INTACT


def no_members(random: Random, site: Site) -> Expected:
    return site.drop(rewritten(site.good.head, lambda *_: iter([])))


KINDS = (
    written_by_another,
    compressed,
    bomb,
    size_that_lies,
    offset_that_lies,
    flag,
    method_that_lies,
    member_twice,
    member_of_an_odd_name,
    member_renamed,
    member_missing,
    record_of_nonsense,
    program,
    end_that_lies,
    second_end,
    thousands_of_members,
    no_members,
)
