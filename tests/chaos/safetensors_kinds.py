"""Safetensors whose header lies."""

import json
from random import Random
from struct import pack
from typing import Any

from tests.chaos.mutation import Expected, Site


def parts(content: bytes) -> tuple[dict[str, Any], bytes]:
    size = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + size]), content[8 + size :]


def whole(header: bytes, data: bytes) -> bytes:
    return pack("<Q", len(header)) + header + data


def length(random: Random, site: Site) -> Expected:
    content = site.good.safetensors_head
    claimed = random.choice([0, 1, len(content), 2**25, 2**31, 2**63, 2**64 - 1])
    return site.drop(pack("<Q", claimed) + content[8:], ".safetensors")


def header(random: Random, site: Site) -> Expected:
    _, data = parts(site.good.safetensors_head)
    odd = random.choice(
        [
            b"",
            b"{}",
            b"[]",
            b"null",
            b"{" * 100_000,
            b'{"a":' * 1000 + b"1" + b"}" * 1000,
            b'{"__metadata__":{"a":' + b"[" * 10_000,
            b'{"fc.bias":{"dtype":"F32","shape":[],"data_offsets":[0,4]},' * 50_000,
            b"\xff\xfe{}",
            b"{"
            + b",".join(b'"k%d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}' % i for i in range(30_000))
            + b"}",
            b'{"__metadata__": {"backbone": 5}}',
        ]
    )
    return site.drop(whole(odd, data), ".safetensors")


def entry(random: Random, site: Site) -> Expected:
    told, data = parts(site.good.safetensors_head)
    field, odd = random.choice(
        [
            *(("dtype", d) for d in ("I32", "BOOL", "F64", "F16", "F8_E4M3", "F8_E5M2", "C64", "F4", "X", "", 5)),
            *(
                ("shape", s)
                for s in ([], [3], [2**62, 2**62], [2**40], [-1, 256], [3, 255], [3, 256, 1], [0, 256], "x")
            ),
            *(
                ("data_offsets", o)
                for o in ([0, 0], [0, 2**40], [2**63, 2**63], [4, 0], [-4, 4], [0, 12], [12, 24], [])
            ),
        ]
    )
    told["fc.weight"][field] = odd
    return site.drop(whole(json.dumps(told).encode(), data), ".safetensors")


def overlap(random: Random, site: Site) -> Expected:
    told, data = parts(site.good.safetensors_head)
    for i in range(random.choice([1, 100])):
        told[f"x{i}"] = dict(told["fc.weight"])
    return site.drop(whole(json.dumps(told).encode(), data), ".safetensors")


def key_twice(random: Random, site: Site) -> Expected:
    told, data = parts(site.good.safetensors_head)
    again = json.dumps({"fc.bias": told["fc.bias"] | {"shape": [3], "data_offsets": [0, 12]}})
    site.drop(whole(json.dumps(told)[:-1].encode() + b"," + again[1:].encode(), data), ".safetensors")
    return Expected.FINITE


def bytes_behind(random: Random, site: Site) -> Expected:
    return site.drop(site.good.safetensors + bytes(random.choice([1, 8, 1000])), ".safetensors")


def other_format(random: Random, site: Site) -> Expected:
    return site.drop(random.choice([site.good.head, site.good.legacy]), ".safetensors")


def under_another_name(random: Random, site: Site) -> Expected:
    return site.drop(random.choice([site.good.safetensors, site.good.safetensors_head]), random.choice([".pt", ".pth"]))


KINDS = (length, header, entry, overlap, key_twice, bytes_behind, other_format, under_another_name)
