"""One checkpoint directory for two daemons, laid out as Kubernetes does, behind a link: both serve what is there."""

import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import torch
from PIL import Image

from backboned.client import Client
from backboned.registry import Catalogue
from backboned.registry.weights import seeded_state
from backboned.server.commands.local_daemon import LocalDaemon
from backboned.v1 import model_service_pb2 as pb
from tests.chaos.served import drop as drop_into
from tests.chaos.served import wait_for

MODELS = 6


@dataclass(frozen=True)
class Pair:
    """Two daemons; `link` is what both know as their checkpoint directory, and leads to `volume`."""

    clients: tuple[Client, Client]
    volume: Path
    link: Path
    picture: Path

    def versions(self, model: str) -> list[dict[int, bool]]:
        """What each daemon knows of a model: the versions, and whether each is loaded."""
        return [
            {v.version: v.loaded for m in client.list_models() if m.name == model for v in m.versions}
            for client in self.clients
        ]

    def both_serve(self, model: str, version: int) -> bool:
        """Whether both answer with the version, and see its class."""
        if any(known.get(version) is not True for known in self.versions(model)):
            return False
        replies = [client.predict(model, self.picture, top_k=1) for client in self.clients]
        return all((r.version, r.predictions[0].classes[0].label) == (version, f"class_{version}") for r in replies)


def drop(folder: Path, version: int) -> None:
    """Drop what is to be the version, at one stroke."""
    aside = folder.parent / "..aside"
    made = drop_into(aside, version)
    folder.mkdir(exist_ok=True)
    made.rename(folder / made.name)


def lead(link: Path, target: Path) -> None:
    """Have a link lead elsewhere, at one stroke."""
    new = link.with_name("new-link")
    new.symlink_to(target)
    new.rename(link)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    folder = tmp_path_factory.mktemp("pair")
    for colour in ("red", "blue"):
        (folder / "data" / "squares" / colour).mkdir(parents=True)
        for i in range(8):
            Image.new("RGB", (16, 16), colour).rotate(i).save(folder / "data" / "squares" / colour / f"{i}.png")
    weights = folder / "digits.pth"
    torch.save(seeded_state(Catalogue.from_entry_points().get("digits"), seed=0), weights)
    (folder / "volume").mkdir()
    (folder / "link").symlink_to(folder / "volume")
    Image.new("RGB", (16, 16), "grey").save(folder / "grey.png")
    with ExitStack() as stack:

        def start(name: str) -> LocalDaemon:
            flags = [
                f"--checkpoint-dir={folder / 'link'}", f"--state-dir={folder / name / 'state'}", "--device=cpu",
                f"--data-root={folder / 'data'}", f"--weights=digits={weights}", "--precision=fp32", "--compile=off",
                "--grpc-port=0", "--http-port=0", "--trainer-standby=off",
            ]  # fmt: skip
            daemon = stack.enter_context(LocalDaemon.start(flags, folder / name))
            stack.callback(check, daemon.log)
            return daemon

        with ThreadPoolExecutor() as aside:
            one, two = (stack.enter_context(Client(daemon.grpc)) for daemon in aside.map(start, ("one", "two")))
        yield Pair((one, two), folder / "volume", folder / "link", folder / "grey.png")


def check(log: Path) -> None:
    assert "Traceback" not in log.read_text()


def test_a_dropped_file_becomes_one_version_that_both_serve(pair: Pair) -> None:
    models = [f"m{i}" for i in range(MODELS)]
    for version in (1, 2):
        for model in models:
            drop(pair.volume / model, version)
        for model in models:
            wait_for(partial(pair.both_serve, model, version))
    assert all(pair.versions(model) == [{1: True, 2: True}] * 2 for model in models)
    assert sorted(f.name for f in (pair.volume / "m0").iterdir()) == ["1", "1.pt", "2", "2.pt"]


def test_what_one_deletes_is_gone_for_both_and_its_file_is_adopted_by_neither(pair: Pair) -> None:
    for version in (1, 2):
        drop(pair.volume / "thinned", version)
        wait_for(partial(pair.both_serve, "thinned", version))
    pair.clients[0].delete_model_version("thinned", 1)
    wait_for(lambda: pair.versions("thinned") == [{2: True}] * 2)
    (pair.volume / "thinned" / "1.pt").chmod(0o600)  # it changed, and is what it was
    drop(pair.volume / "thinned", 3)
    wait_for(lambda: pair.both_serve("thinned", 3))
    assert pair.versions("thinned") == [{2: True, 3: True}] * 2


@pytest.mark.skipif("BACKBONED_CHAOS" not in os.environ, reason="takes long: set BACKBONED_CHAOS to run it")
def test_both_train_and_both_serve_what_came_of_it(pair: Pair) -> None:
    jobs = [client.fine_tune("squares", "digits", "squares", max_epochs=1) for client in pair.clients]
    ended = [client.wait(job.id) for client, job in zip(pair.clients, jobs, strict=True)]
    assert {job.state for job in ended} == {pb.JOB_STATE_SUCCEEDED}, ended
    assert {job.version for job in ended} == {1, 2}
    wait_for(lambda: pair.versions("squares") == [{1: True, 2: True}] * 2)


def test_files_behind_a_link_that_is_changed_as_kubernetes_does(pair: Pair) -> None:
    (pair.volume / "..2026_01").mkdir()
    drop(pair.volume / "..2026_01" / "lilies", 1)
    (pair.volume / "..data").symlink_to("..2026_01")
    (pair.volume / "lilies").symlink_to("..data/lilies")
    wait_for(lambda: pair.both_serve("lilies", 1))
    shutil.copytree(pair.volume / "..2026_01", pair.volume / "..2026_02")
    drop(pair.volume / "..2026_02" / "lilies", 2)
    lead(pair.volume / "..data", Path("..2026_02"))
    shutil.rmtree(pair.volume / "..2026_01")
    wait_for(lambda: pair.both_serve("lilies", 2))
    assert pair.versions("lilies") == [{1: True, 2: True}] * 2


def test_a_directory_that_is_a_link_is_where_the_link_leads_now(pair: Pair) -> None:
    other = pair.volume.with_name("other")
    shutil.copytree(pair.volume, other, symlinks=True)
    drop(other / "elsewhere", 1)
    lead(pair.link, other)
    wait_for(lambda: pair.both_serve("elsewhere", 1))
    drop(other / "elsewhere", 2)
    wait_for(lambda: pair.both_serve("elsewhere", 2))
    assert all(pair.both_serve(f"m{i}", 2) for i in range(MODELS))
    drop(pair.volume / "old", 1)
    drop(other / "elsewhere", 3)
    wait_for(lambda: pair.both_serve("elsewhere", 3))
    assert pair.versions("old") == [{}, {}]
    assert len(list(other.glob("elsewhere/[0-9]"))) == 3
