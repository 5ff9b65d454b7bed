"""Names and links that lead elsewhere, or that nobody would write."""

import os
from dataclasses import replace
from pathlib import Path
from random import Random

from tests.chaos.mutation import Expected, Site, make_socket

ODD = (
    "new\nline",
    "tab\t",
    "\x1b[31mred",
    "-rf",
    "--help",
    " ",
    "a b",
    "..x",
    "%s%n",
    "'; drop table",
    "é",
    "🐜",
    "a" * 200,
)


def file_name(random: Random, site: Site) -> Expected:
    """A file may be called as it likes."""
    name = site.stem + random.choice(ODD)
    name = random.choice([name, name[::-1].lstrip("."), "x" * 252])[:252]
    replace(site, stem=name).drop(site.good.head)
    return Expected.SERVED


def file_name_that_is_no_text(random: Random, site: Site) -> Expected:
    name = (
        os.fsencode(site.folder)
        + b"/"
        + site.stem.encode()
        + random.choice([b"\xff", b"\xed\xa0\x80", b"\xc3"])
        + b".pt"
    )
    with open(name, "wb") as file:  # noqa: PTH123 - a path in bytes
        file.write(site.good.head)
    return Expected.REFUSED


def model_name(random: Random, site: Site) -> Expected:
    odd = random.choice([*ODD, "x" * (255 - len(site.stem))])
    folder = site.folder.rename(site.folder.parent / random.choice([f"-{site.stem}", f"{site.stem}{odd} "])[:255])
    return replace(site, folder=folder).drop(site.good.head)


def model_name_that_is_no_text(random: Random, site: Site) -> Expected:
    name = os.fsencode(site.folder) + random.choice([b"\xff", b"\xed\xa0\x80"])
    site.folder.rename(os.fsdecode(name))
    return replace(site, folder=Path(os.fsdecode(name))).drop(site.good.head)


def link_out(random: Random, site: Site) -> Expected:
    outside = site.mark.parent / f"outside-{site.stem}.pt"
    outside.write_bytes(site.good.head)
    relative = os.path.relpath(outside, site.folder)
    return site.link(
        random.choice([str(outside), relative, "/etc/passwd", "/dev/zero", "/proc/self/mem", "/", "../../../.."])
    )


def link_of_links(random: Random, site: Site) -> Expected:
    match random.choice(["loop", "two", "long", "nothing", "through"]):
        case "loop":
            site.link(f"{site.stem}.pt")
        case "two":
            site.link(f"{site.stem}.pth")
            site.link(f"{site.stem}.pt", ".pth")
        case "long":
            site.link("x/" * 2000)
        case "nothing":
            site.link("nowhere")
        case "through":
            site.link(f"../{site.folder.name}/{site.stem}.pt")
    return Expected.REFUSED


def link_within(random: Random, site: Site) -> Expected:
    """A link that stays in the directory is as good as a file."""
    (site.folder / "kept").mkdir()
    (site.folder / "kept" / "file").write_bytes(site.good.head)
    site.link(random.choice(["kept/file", str(site.folder / "kept" / "file")]))
    return Expected.SERVED


def no_file(random: Random, site: Site) -> Expected:
    path = site.folder / f"{site.stem}{random.choice(['.pt', '.pth', '.safetensors'])}"
    match random.choice(["fifo", "socket", "folder", "device"]):
        case "fifo":
            os.mkfifo(path)
        case "socket":
            make_socket(path)
        case "folder":
            (path / "inside").mkdir(parents=True)
        case "device":
            path.symlink_to("/dev/null")
    return Expected.REFUSED


def version_that_leads_out(random: Random, site: Site) -> Expected:
    outside = site.mark.parent / f"version-{site.stem}"
    outside.mkdir()
    (outside / "manifest.json").write_text("{}")
    (site.folder / "1").symlink_to(random.choice([str(outside), "/etc", "/"]))
    return Expected.REFUSED


def model_that_leads_out(random: Random, site: Site) -> Expected:
    outside = site.mark.parent / f"model-{site.stem}"
    site.folder.rename(outside)
    site.folder.symlink_to(outside)
    (outside / f"{site.stem}.pt").write_bytes(site.good.head)
    return Expected.REFUSED


KINDS = (
    file_name,
    file_name_that_is_no_text,
    model_name,
    model_name_that_is_no_text,
    link_out,
    link_of_links,
    link_within,
    no_file,
    version_that_leads_out,
    model_that_leads_out,
)
