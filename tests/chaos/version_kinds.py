"""Versions whose manifest or checkpoint isn't what it should be."""

import json
import os
import zipfile
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from random import Random
from typing import Any

from tests.chaos.good import saved, write_version
from tests.chaos.mutation import Expected, Site
from tests.chaos.pickle_kinds import archive, payloads
from tests.chaos.zip_kinds import BOMB_BYTES, rewritten

NONSENSE: tuple[Any, ...] = (
    None,
    -1,
    10**30,
    1e400,
    float("nan"),
    "",
    "x" * 10_000,
    "\ud800",
    [],
    {},
    [[]],
    {"a": 1},
    True,
)


def made(site: Site, change: Callable[[dict[str, Any]], object]) -> Expected:
    """A version whose manifest has a change."""
    folder = site.folder / "1"
    write_version(folder)
    values = json.loads((folder / "manifest.json").read_text())
    change(values)
    (folder / "manifest.json").write_text(json.dumps(values))
    return Expected.REFUSED


def holding(site: Site, content: bytes) -> Expected:
    """A version whose manifest is right, of other content."""
    made(site, lambda m: m["epochs"][0].update(sha256=sha256(content).hexdigest(), size_bytes=len(content)))
    (site.folder / "1" / "epoch-0001.pt").write_bytes(content)
    return Expected.REFUSED


def field(random: Random, site: Site) -> Expected:
    fields = (
        "format",
        "model",
        "version",
        "backbone",
        "task",
        "classes",
        "stages",
        "preprocessing",
        "epochs",
        "best_epoch",
    )
    name, value = random.choice(fields), random.choice([v for v in NONSENSE if v is not True])  # True is 1
    return made(site, lambda m: m.update({name: value}))


def field_for_people(random: Random, site: Site) -> Expected:
    names = ("complete", "trained", "adopted_from", "adopted_key", "dataset", "options", "versions")
    name, value = random.choice(names), random.choice(NONSENSE)
    made(site, lambda m: m.update({name: value}))
    return Expected.INTACT


def field_missing(random: Random, site: Site) -> Expected:
    return made(site, lambda m: m.pop(random.choice(sorted(m.keys() - {"trained"}))))


def epoch_field(random: Random, site: Site) -> Expected:
    name = random.choice(["epoch", "file", "sha256", "size_bytes"])
    value = random.choice([v for v in NONSENSE if v is not True])
    return made(site, lambda m: m["epochs"][0].update({name: value}))


def epoch_field_for_people(random: Random, site: Site) -> Expected:
    name, value = random.choice(["create_time", "metrics"]), random.choice(NONSENSE)
    made(site, lambda m: m["epochs"][0].update({name: value}))
    return Expected.INTACT


def file_elsewhere(random: Random, site: Site) -> Expected:
    name = random.choice(
        ["../1.pt", "/etc/passwd", "..", ".", "a/b.pt", "epoch-0001.pt/", "\0", "x" * 300, ".hidden", "no"]
    )
    return made(site, lambda m: m["epochs"][0].update(file=name))


def number(random: Random, site: Site) -> Expected:
    odd = random.choice([0, -1, 2, 2**31, 2**63, 10**30, 0.5, "2"])
    return made(site, lambda m: m["epochs"][0].update(epoch=odd))


def classes(random: Random, site: Site) -> Expected:
    odd: Any = random.choice(
        [[], ["a"], ["a", "b"], ["a", "b", "c", "d"], ["a", "a", "b"], "abc", {"a": 0, "b": 1, "c": 2}, ["a", "b", ""],
         ["a", "b", 3], [["a"], "b", "c"], ["a", "b", "x" * 1_000_000]]
    )  # fmt: skip
    return made(site, lambda m: m.update(classes=odd))


def task(random: Random, site: Site) -> Expected:
    odd = random.choice(["binary", "regression", "", "SINGLE_LABEL", 5])
    return made(site, lambda m: m.update(task=odd))


def stages(random: Random, site: Site) -> Expected:
    odd: Any = random.choice([{"stem": "0" * 64}, {"layer3": "x"}, {"layer1": ""}])
    return made(site, lambda m: m["stages"].update(odd))


def other_backbone(random: Random, site: Site) -> Expected:
    odd = random.choice(["resnet18", "no-such-backbone", "timm/x", "../digits", "digits\n", "x" * 10_000])
    return made(site, lambda m: m.update(backbone=odd))


def other_json(random: Random, site: Site) -> Expected:
    folder = site.folder / "1"
    write_version(folder)
    odd = [
        b"",
        b"null",
        b"[]",
        b"{}",
        b"\xff",
        b"[" * 100_000,
        b'{"a":' * 50_000,
        b"9" * 10_000,
        b"[" + b"[]," * 500_000 + b"[]]",
    ]
    (folder / "manifest.json").write_bytes(random.choice(odd))
    return Expected.REFUSED


def manifest_cut(random: Random, site: Site) -> Expected:
    folder = site.folder / "1"
    write_version(folder)
    whole = (folder / "manifest.json").read_bytes()
    (folder / "manifest.json").write_bytes(whole[: random.randrange(len(whole) - 1)])
    return Expected.REFUSED


def manifest_that_is_no_file(random: Random, site: Site) -> Expected:
    folder = site.folder / "1"
    write_version(folder)
    return no_file(random, site, folder / "manifest.json")


def checkpoint_that_is_no_file(random: Random, site: Site) -> Expected:
    made(
        site, lambda m: m["epochs"][0].update(random.choice([{}, {"size_bytes": 0, "sha256": sha256(b"").hexdigest()}]))
    )
    return no_file(random, site, site.folder / "1" / "epoch-0001.pt")


def tombstone_that_is_no_file(random: Random, site: Site) -> Expected:
    """Of a deleted version: nothing is listed of it, and the good file beside it is served."""
    (site.folder / "1").mkdir()
    path = site.folder / "1" / "deleted.json"
    if random.random() < 0.5:
        no_file(random, site, path)
    else:
        path.write_bytes(
            random.choice([b"", b"[" * 100_000, b"{}", b"5", b'{"adopted_from": "' + b"\\ud800" + b'"}', b"\xff"])
        )
    site.drop(site.good.head)
    return Expected.SERVED


def no_file(random: Random, site: Site, path: Path) -> Expected:
    outside = site.mark.parent / f"outside-{site.stem}"
    if path.exists():
        path.replace(outside)
    match random.choice(["fifo", "folder", "zero", "loop", "nothing", "outside", "huge"]):
        case "fifo":
            os.mkfifo(path)
        case "folder":
            path.mkdir()
        case "zero":
            path.symlink_to("/dev/zero")
        case "loop":
            path.symlink_to(path.name)
        case "nothing":
            path.symlink_to("nowhere")
        case "outside":
            path.symlink_to(outside)
        case "huge":
            path.touch()
            os.truncate(path, 2**40)
    return Expected.REFUSED


def checkpoint_altered(random: Random, site: Site) -> Expected:
    made(site, lambda _: None)
    path = site.folder / "1" / "epoch-0001.pt"
    content = bytearray(path.read_bytes())
    content[random.randrange(len(content))] ^= 1 << random.randrange(8)
    path.write_bytes(random.choice([bytes(content), bytes(content[:-1]), b"", site.good.head, site.good.legacy]))
    return Expected.REFUSED


def verified_content_that_runs(random: Random, site: Site) -> Expected:
    """A manifest that is right about a file is no reason to trust the file."""
    evil = random.choice(payloads(str(site.mark)))
    return holding(site, saved({"state_dict": evil}, _use_new_zipfile_serialization=random.random() < 0.7))


def verified_bomb(random: Random, site: Site) -> Expected:
    big = rewritten(
        site.good.trained,
        lambda name, data: iter([(name, bytes(BOMB_BYTES) if name.endswith("/data/0") else data)]),
        zipfile.ZIP_DEFLATED,
    )
    deep = archive(b"\x80\x02})" + b"\x85" * 500_000 + b"K\x01s.")
    return holding(site, random.choice([big, deep]))


def verified_content_of_another(random: Random, site: Site) -> Expected:
    return holding(site, random.choice([b"", b"x", site.good.safetensors, saved({}), saved([1])]))


KINDS = (
    field,
    field_for_people,
    field_missing,
    epoch_field,
    epoch_field_for_people,
    file_elsewhere,
    number,
    classes,
    task,
    stages,
    other_backbone,
    other_json,
    manifest_cut,
    manifest_that_is_no_file,
    checkpoint_that_is_no_file,
    tombstone_that_is_no_file,
    checkpoint_altered,
    verified_content_that_runs,
    verified_bomb,
    verified_content_of_another,
)
