"""What stands beside tensors, in the file and next to it, and is wrong or beyond all measure."""

import json
import os
import pickle
from collections import OrderedDict
from io import BytesIO
from random import Random
from typing import Any

import torch

from tests.chaos.good import CLASSES, head, saved
from tests.chaos.mutation import Expected, Site, make_socket
from tests.chaos.pickle_kinds import PROTO, archive, storage, tensor, text

NONSENSE: tuple[Any, ...] = (
    5, -1, 2**70, 10**700, 1e400, float("nan"), "", "x" * 100_000, "\ud800", "\0", None, True, [], [[[]]], {},
    {"a": {}}, [1, 2, 3], ["a", 5], {"a": 1.5}, {5: 5}, (1, 2), torch.zeros(3), torch.zeros(()),
    torch.tensor(float("nan")),
    torch.zeros(2, device="meta"), torch.eye(2).to_sparse(), torch.zeros(1, dtype=torch.complex64), {"a", "b"},
    OrderedDict(a=OrderedDict()), {None: 1}, {(1, 2): 3}, 1j,
)  # fmt: skip


def told(random: Random, site: Site) -> Expected:
    """Nonsense where a script keeps epochs, losses and classes."""
    field = random.choice(["epoch", "loss", "classes", "class_to_idx", "backbone", "optimizer_state_dict", "backboned"])
    site.drop(saved({"backbone": "digits", "state_dict": head(), field: random.choice(NONSENSE)}))
    return Expected.FINITE


def of_our_own(random: Random, site: Site) -> Expected:
    """Nonsense in what our own trainer writes."""
    content = read(site.good.trained)
    field = random.choice(["task", "classes", "stages", "preprocessing", "answers"])
    content["backboned"][field] = random.choice(NONSENSE)
    site.drop(saved(content))
    return Expected.FINITE


def answers(random: Random, site: Site) -> Expected:
    content = read(site.good.trained)
    field = random.choice(["temperature", "uncertain_below", "unfamiliar_beyond", "centres", "scale"])
    odd = [torch.zeros(3, 256), torch.full((3, 256), 1e30), torch.full((256,), float("inf")), torch.zeros(4, 255)]
    content["backboned"]["answers"][field] = random.choice([*NONSENSE, *odd])
    site.drop(saved(content))
    return Expected.FINITE


def preprocessing(random: Random, site: Site) -> Expected:
    content = read(site.good.trained)
    field = random.choice(["resize_size", "crop_size", "mean", "std", "interpolation"])
    values = [*NONSENSE, [0.5, 0.5, torch.zeros(2)], [0, 0, 0], [[1], [2], [3]], 10**6, [1e300] * 3, [1e-320] * 3]
    content["backboned"]["preprocessing"][field] = random.choice(values)
    site.drop(saved(content))
    return Expected.FINITE


def read(content: bytes) -> dict[str, Any]:
    found: dict[str, Any] = torch.load(BytesIO(content), weights_only=True)
    return found


def stages_of_others(random: Random, site: Site) -> Expected:
    content = read(site.good.trained)
    content["backboned"]["stages"] |= {random.choice(["stem", "layer1", "layer3"]): "0" * 64}
    return site.drop(saved(content))


def replaced_methods(random: Random, site: Site) -> Expected:
    """A dict whose own attributes are called as its methods are."""
    shadow = b"}" + b"".join(text(n) + b"K\x05s" for n in ("items", "get", "keys", "values", "__len__"))
    ordered = (
        b"ccollections\nOrderedDict\n)R" + text("fc.bias") + tensor(storage(size=3), size=(3,)) + b"s" + shadow + b"b"
    )
    return site.drop(
        archive(PROTO + random.choice([ordered, b"}" + text("state_dict") + ordered + b"s"]) + b".", **{"0": bytes(12)})
    )


def class_names(random: Random, site: Site) -> Expected:
    odd: Any = random.choice(
        [
            ["ant", "bee"],
            ["ant", "bee", "wasp", "fly"],
            ["ant", "ant", "bee"],
            ["ant", "bee", ""],
            ["ant", "bee", " "],
            ["ant", "bee", "\ud800"],
            ["ant", "bee", "x" * 1_000_000],
            ["ant"] * 100_000,
            {"ant": 0, "bee": 1, "wasp": 1},
            {"ant": 0, "bee": 1, "wasp": 3},
            {"0": "ant", "1": "bee", "2": "ant"},
            {"classes": "abc"},
            {"classes": {"ant": "0"}},
            [],
            {"task": "binary"},
            {"task": "regression"},
            {"task": ["binary"]},
            {"backbone": "resnet18"},
            {"backbone": 5},
            {"preprocessing": {}},
            {"preprocessing": "x" * 100_000},
        ]
    )
    return site.drop(random.choice([site.good.head, site.good.full]), beside=odd)


def sidecar_bytes(random: Random, site: Site) -> Expected:
    suffix = random.choice([".pt.json", ".json"])
    site.beside(
        random.choice(
            [
                b"",
                b"{",
                b"\xff\xfe",
                b"[" * 100_000,
                b'{"a":' * 50_000,
                b"[" + b"[]," * 300_000 + b"[]]",
                b"9" * 100_000,
                b"[1e999]",
                b'{"classes": ["a", "b", "c"], "classes": ["a", "a", "a"]}',
                b"NaN",
                b'"' + b"\\ud800" * 1000 + b'"',
                b" " * (5 * 2**20) + b"[]",
                b"\0" * 1000,
                site.good.head,
            ]
        ),
        suffix,
    )
    return site.drop(site.good.head)


def sidecar_beyond_all_measure(random: Random, site: Site) -> Expected:
    suffix = random.choice([".pt.json", ".json", ".txt"])
    site.beside(b"[", suffix)
    os.truncate(site.folder / f"{site.stem}{suffix}", 2**40)
    return site.drop(site.good.head)


def text_of_names(random: Random, site: Site) -> Expected:
    site.beside(random.choice([b"a\nb\n", b"a\na\nb\n", b"\xff\n", b"a\0b\nc\n", b"a\n" * 1_000_000]), ".txt")
    return site.drop(saved({"backbone": "digits", **head()}))


def sidecar_that_is_no_file(random: Random, site: Site) -> Expected:
    path = site.folder / f"{site.stem}.json"
    match random.choice(["fifo", "socket", "folder", "zero", "loop", "nothing"]):
        case "fifo":
            os.mkfifo(path)
        case "socket":
            make_socket(path)
        case "folder":
            path.mkdir()
        case "zero":
            path.symlink_to("/dev/zero")
        case "loop":
            path.symlink_to(path.name)
        case "nothing":
            path.symlink_to("nowhere")
    site.drop(saved({"backbone": "digits", "state_dict": head(), "classes": list(CLASSES)}))
    return Expected.INTACT


def sidecar_from_outside(random: Random, site: Site) -> Expected:
    """Names that aren't in the directory are nobody's to read out."""
    outside = site.mark.parent / f"outside-{site.stem}.json"
    outside.write_text(json.dumps(["secret", "words", "elsewhere"]))
    (site.folder / f"{site.stem}.json").symlink_to(outside)
    return site.drop(saved({"backbone": "digits", "state_dict": head()}))


def sidecar_of_pickle(random: Random, site: Site) -> Expected:
    site.beside(pickle.dumps(list(CLASSES)))
    return site.drop(site.good.head)


KINDS = (
    told,
    of_our_own,
    answers,
    preprocessing,
    stages_of_others,
    replaced_methods,
    class_names,
    sidecar_bytes,
    sidecar_beyond_all_measure,
    text_of_names,
    sidecar_that_is_no_file,
    sidecar_from_outside,
    sidecar_of_pickle,
)
