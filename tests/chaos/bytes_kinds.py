"""Files with bytes that are turned, lost, added, or in the wrong place."""

import zipfile
from collections.abc import Mapping, Sequence
from io import BytesIO
from random import Random

from tests.chaos.mutation import Expected, Site, flipped


def regions(content: bytes) -> Mapping[str, Sequence[range]]:
    """Where in an archive what is."""
    with zipfile.ZipFile(BytesIO(content)) as archive:
        members, contents_at = archive.infolist(), archive.start_dir
    found: dict[str, list[range]] = {"header": [], "padding": [], "pickle": [], "tensor": [], "record": []}
    end_at = content.rindex(b"PK\x06\x06")
    for member in members:
        at = member.header_offset
        name_at = at + 30
        extra_at = name_at + int.from_bytes(content[at + 26 : at + 28], "little")
        data_at = extra_at + int.from_bytes(content[at + 28 : at + 30], "little")
        found["header"].append(range(at, extra_at))
        found["padding"].append(range(extra_at, data_at))
        what = "tensor" if "/data/" in member.filename else "record"
        what = "pickle" if member.filename.endswith("data.pkl") else what
        found[what].append(range(data_at, data_at + member.file_size))
    found["contents"] = [range(contents_at, end_at)]
    found["end"] = [range(end_at, len(content))]
    return {name: [r for r in ranges if len(r)] for name, ranges in found.items()}


def bit_anywhere(random: Random, site: Site) -> Expected:
    content = random.choice(site.good.archives)
    site.drop(flipped(content, random.randrange(len(content)), random.randrange(8)))
    return Expected.INTACT


def bit_somewhere_particular(random: Random, site: Site) -> Expected:
    content = random.choice(site.good.archives)
    places = regions(content)
    place = random.choice(sorted(places))
    site.drop(flipped(content, random.choice(random.choice(places[place])), random.randrange(8)))
    return Expected.REFUSED if place in ("pickle", "tensor") else Expected.INTACT


def many_bits(random: Random, site: Site) -> Expected:
    content = random.choice(site.good.archives)
    for _ in range(random.randint(2, 200)):
        content = flipped(content, random.randrange(len(content)), random.randrange(8))
    site.drop(content)
    return Expected.INTACT


def byte_in_the_structure(random: Random, site: Site) -> Expected:
    content = bytearray(random.choice(site.good.archives))
    places = regions(bytes(content))
    for _ in range(random.randint(1, 3)):
        place = random.choice(random.choice(places[random.choice(["header", "contents", "end"])]))
        content[place] = random.choice([0, 1, 0x7F, 0x80, 0xFF])
    site.drop(bytes(content))
    return Expected.INTACT


def cut_at_a_boundary(random: Random, site: Site) -> Expected:
    content = random.choice(site.good.archives)
    edges = sorted({edge for ranges in regions(content).values() for r in ranges for edge in (r.start, r.stop)})
    at = random.choice(edges) + random.choice([-1, 0, 1])
    return site.drop(content[: max(0, min(at, len(content) - 1))])


def cut_anywhere(random: Random, site: Site) -> Expected:
    good = site.good
    content, suffix = random.choice(
        [(c, ".pt") for c in (*good.archives, good.legacy, good.legacy_head)]
        + [(c, ".safetensors") for c in (good.safetensors, good.safetensors_head)]
    )
    return site.drop(content[: random.randrange(len(content))], suffix)


def bytes_behind(random: Random, site: Site) -> Expected:
    content = random.choice(site.good.archives)
    return site.drop(content + random.randbytes(random.choice([1, 4, 22, 1000])))


def bytes_before(random: Random, site: Site) -> Expected:
    content = random.choice(site.good.archives)
    return site.drop(random.choice([b"\0", b"#!/bin/sh\n", content[:4], content]) + content)


def bytes_put_in(random: Random, site: Site) -> Expected:
    content = random.choice(site.good.archives)
    at = random.randrange(1, len(content))
    site.drop(content[:at] + random.randbytes(random.choice([1, 8, 64])) + content[at:])
    return Expected.INTACT


def run_of_zeros(random: Random, site: Site) -> Expected:
    content = random.choice(site.good.archives)
    at, size = random.randrange(len(content)), random.choice([1, 8, 64, 512, 4096])
    site.drop(content[:at] + bytes(min(size, len(content) - at)) + content[at + size :])
    return Expected.INTACT


def blocks_swapped(random: Random, site: Site) -> Expected:
    content = bytearray(random.choice(site.good.archives))
    size = random.choice([16, 64, 512])
    one, two = (random.randrange(len(content) // size) * size for _ in range(2))
    content[one : one + size], content[two : two + size] = content[two : two + size], content[one : one + size]
    site.drop(bytes(content))
    return Expected.INTACT


def other_content(random: Random, site: Site) -> Expected:
    suffix = random.choice([".pt", ".pth", ".safetensors"])
    return site.drop(
        random.choice(
            [
                b"",
                b"\0" * random.randrange(1, 10_000),
                random.randbytes(random.randrange(1, 10_000)),
                b"<!doctype html><title>404</title>",
                b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 97\n",
                b"PK\x03\x04",
                b"PK\x05\x06" + bytes(18),
                b"\x80\x02",
                b"\x89PNG\r\n\x1a\n",
                b"\x7fELF" + bytes(60),
            ]
        ),
        suffix,
    )


def file_beyond_all_measure(random: Random, site: Site) -> Expected:
    suffix = random.choice([".pt", ".safetensors"])
    site.drop(
        random.choice([b"", b"PK\x03\x04", b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.", b"\x10" + bytes(7)]), suffix
    )
    with (site.folder / f"{site.stem}{suffix}").open("r+b") as file:
        file.truncate(random.choice([2**40, 2**43]))  # of holes: it takes no space
        file.seek(-22, 2)
        file.write(b"PK\x05\x06" + bytes(18))
    return Expected.REFUSED


def bit_of_an_old_file(random: Random, site: Site) -> Expected:
    content = random.choice([site.good.legacy, site.good.legacy_head])
    site.drop(flipped(content, random.randrange(len(content)), random.randrange(8)))
    return Expected.FINITE


def bit_of_a_safetensors_file(random: Random, site: Site) -> Expected:
    content = random.choice([site.good.safetensors, site.good.safetensors_head])
    at = random.randrange(random.choice([8, 200, len(content)]))
    site.drop(flipped(content, at, random.randrange(8)), ".safetensors")
    return Expected.FINITE


KINDS = (
    bit_anywhere,
    bit_somewhere_particular,
    many_bits,
    byte_in_the_structure,
    cut_at_a_boundary,
    cut_anywhere,
    bytes_behind,
    bytes_before,
    bytes_put_in,
    run_of_zeros,
    blocks_swapped,
    other_content,
    file_beyond_all_measure,
    bit_of_an_old_file,
    bit_of_a_safetensors_file,
)
