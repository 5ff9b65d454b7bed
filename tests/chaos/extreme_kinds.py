"""What is just small enough to be read: the most that a file can make the daemon build."""

from random import Random

from backboned.registry.archive import MAX_CONTENTS_BYTES
from backboned.registry.manifest import MAX_MANIFEST_BYTES
from backboned.registry.payload import MAX_HEADER_BYTES
from backboned.registry.pickled import MAX_OPCODES
from backboned.registry.sidecar import MAX_SIDECAR_BYTES
from tests.chaos.good import write_version
from tests.chaos.mutation import Expected, Site
from tests.chaos.pickle_kinds import PROTO, archive, storage, tensor, text
from tests.chaos.safetensors_kinds import whole


def lists(size_bytes: int) -> bytes:
    """JSON of as many lists as there is room for."""
    return b"[" + b"[]," * (size_bytes // 3 - 2) + b"[]]"


def manifest(random: Random, site: Site) -> Expected:
    write_version(site.folder / "1")
    (site.folder / "1" / "manifest.json").write_bytes(lists(MAX_MANIFEST_BYTES))
    return Expected.REFUSED


def sidecar(random: Random, site: Site) -> Expected:
    site.beside(lists(MAX_SIDECAR_BYTES))
    return site.drop(site.good.head)


def pickled_values(random: Random, site: Site) -> Expected:
    return site.drop(archive(PROTO + b"(" + random.choice([b"}", b"]", b"G" + bytes(8)]) * (MAX_OPCODES - 10) + b"t."))


def pickled_dicts(random: Random, site: Site) -> Expected:
    return site.drop(archive(PROTO + b"](" + random.choice([b"}", b"]", b"G" + bytes(8)]) * (MAX_OPCODES - 10) + b"e."))


def pickled_tensors(random: Random, site: Site) -> Expected:
    """Views of the same bytes: three opcodes each."""
    again = tensor(storage())[:-1]  # all but the call; its function and arguments are kept
    kept = again.replace(b"_v2\n", b"_v2\nq\x00", 1) + b"q\x01R"
    more = b"".join(text(f"{i:x}") + b"h\x00h\x01R" for i in range(MAX_OPCODES // 4 - 100))
    return site.drop(archive(PROTO + b"}(" + text("k") + kept + more + b"u."))


def header(random: Random, site: Site) -> Expected:
    entry = b'"%06x":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    count = MAX_HEADER_BYTES // (len(entry % 0) + 1) - 1
    return site.drop(whole(b"{" + b",".join(entry % i for i in range(count)) + b"}", b""), ".safetensors")


def contents(random: Random, site: Site) -> Expected:
    """As many members as there is room for, each of them empty."""
    return site.drop(archive(PROTO + b"}.", **{f"{i:x}": b"" for i in range(1, MAX_CONTENTS_BYTES // 70)}))


def as_large_as_may_be(random: Random, site: Site) -> Expected:
    """One of these: each takes a second or two."""
    kinds = (manifest, sidecar, pickled_values, pickled_dicts, pickled_tensors, header, contents)
    return random.choice(kinds)(random, site)


KINDS = (as_large_as_may_be,)
