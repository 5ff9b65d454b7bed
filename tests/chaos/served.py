"""A daemon whose answers are known, and whoever watches it while something is wrong."""

import ctypes
import json
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import grpc
import torch

from backboned.client import Client
from backboned.registry import Catalogue
from backboned.registry.weights import seeded_state
from backboned.server.commands.local_daemon import LocalDaemon
from backboned.v1.model_service_pb2_grpc import ModelServiceStub

PATIENCE_SECONDS = 60.0
PR_CAPBSET_DROP, CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH = 24, 1, 2


class Served:
    """A daemon whose versions each see a class of their own, whatever the picture; `steady` has three of them."""

    def __init__(self, daemon: LocalDaemon, place: Path, picture: Path) -> None:
        self.daemon = daemon
        self.place = place
        self.picture = picture
        self.client = Client(daemon.grpc)
        self.channel = grpc.insecure_channel(daemon.grpc)
        self.stub = ModelServiceStub(self.channel)
        self.fresh = 0
        self.logged = 0

    @property
    def root(self) -> Path:
        return self.place / "checkpoints"

    def make_steady(self) -> None:
        for version in (1, 2, 3):
            drop(self.root / "steady", version)
            wait_for(partial(self.has, "steady", version))
        self.client.set_alias("steady", "stable", 1)
        self.client.set_alias("steady", "canary", 2)
        self.client.set_traffic("steady", {"stable": 1, "canary": 1})

    def serves(self, model: str) -> int:
        return next((m.serving_version for m in self.client.list_models() if m.name == model), 0)

    def has(self, model: str, version: int) -> bool:
        return self.serves(model) == version

    def answers(self, model: str, **asked: object) -> int:
        """The version that answers, which must be the one whose class is seen."""
        reply = self.client.predict(model, self.picture, top_k=1, **asked)  # type: ignore[arg-type]
        assert reply.predictions[0].classes[0].label == f"class_{reply.version}"
        return reply.version

    def takes_in_what_is_dropped(self, folder: Path | None = None) -> None:
        """A version that is dropped now is served."""
        self.fresh += 1
        drop((folder or self.root) / "fresh", self.fresh)
        wait_for(lambda: self.serves("fresh") == self.fresh)
        assert self.answers("fresh") == self.fresh

    def troubles(self) -> dict[str, str]:
        """What `/health` tells, by kind; the other places must agree with it."""
        told = json.loads(fetch(f"{self.daemon.http}/health"))
        assert told["ready"] is True
        return {trouble["kind"]: " | ".join(trouble["messages"]) for trouble in told["troubles"]}

    def metric(self, kind: str) -> bool:
        return f'backboned_trouble{{kind="{kind}"}} 1.0' in fetch(f"{self.daemon.http}/metrics").splitlines()

    @contextmanager
    def in_trouble(self, kind: str, what: str) -> Iterator[None]:
        """Inside, calls go on being answered as before; what is wrong is told everywhere, until it is over."""
        with self.traffic():
            wait_for(lambda: what in self.troubles().get(kind, ""))
            assert self.metric(kind)
            lines = fetch(f"{self.daemon.http}/readyz").splitlines()
            assert lines[0] == "ready" and any(line.startswith(f"trouble with {kind}: ") for line in lines[1:])
            yield
        wait_for(lambda: kind not in self.troubles())
        assert not self.metric(kind)
        told, self.logged = self.daemon.log.read_bytes()[self.logged :].decode(), self.daemon.log.stat().st_size
        words = kind.replace("_", " ")
        assert f"trouble with {words}: " in told and f"the trouble with {words} is over" in told

    @contextmanager
    def traffic(self) -> Iterator[None]:
        """Inside, calls by version, by alias, and for whatever the split says, are answered, each by the right one."""
        over, failures, answered = threading.Event(), list[object](), [0]

        def call() -> None:
            while not over.is_set():
                try:
                    assert self.answers("steady", version=3) == 3
                    assert self.answers("steady", alias="stable") == 1
                    assert self.answers("steady") in (1, 2)
                    answered[0] += 3
                except Exception as error:
                    failures.append(error)

        thread = threading.Thread(target=call)
        thread.start()
        try:
            wait_for(lambda: answered[0] or failures)
            yield
            before = answered[0]
            wait_for(lambda: answered[0] > before + 3 or failures)
        finally:
            over.set()
            thread.join()
        assert not failures, failures[0]


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)


def fetch(url: str) -> str:
    try:
        with urllib.request.urlopen(url, timeout=10) as response:  # noqa: S310 - http, on loopback
            return str(response.read().decode())
    except urllib.error.HTTPError as error:
        with error:
            return error.read().decode()


def drop(folder: Path, version: int) -> Path:
    """Drop what is to be the version, which sees its own class."""
    digits = Catalogue.from_entry_points().get("digits")
    state = seeded_state(digits, seed=0)
    state["fc.weight"], state["fc.bias"] = 1e-3 * torch.randn(50, digits.feature_size), torch.zeros(50)
    state["fc.bias"][version] = 9.0
    folder.mkdir(exist_ok=True)
    torch.save({"backbone": "digits", "model_state_dict": state}, folder / f"{version}.pt")
    return folder / f"{version}.pt"


def start_without_privileges(flags: list[str], folder: Path) -> LocalDaemon:
    """A daemon that files' permissions hold for, also where the tests are root's."""
    started: list[LocalDaemon] = []

    def start() -> None:  # what a thread gives up, its children lack, and no other thread
        for capability in (CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH):
            ctypes.CDLL(None).prctl(PR_CAPBSET_DROP, capability, 0, 0, 0)
        started.append(LocalDaemon.start(flags, folder))

    thread = threading.Thread(target=start)
    thread.start()
    thread.join()
    assert started, (folder / "daemon.log").read_text()
    return started[0]
