"""A daemon is killed at random moments while everything about its models changes: what it said stays true.

The test keeps its own account, of the files that it completed and of the calls that were answered. A call that a kill
cut off may have had its effect or not; which of the two, the daemon must tell the same in all places.
"""

import logging
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

import grpc
import pytest
import torch

from backboned.registry import Catalogue
from backboned.registry.digest import file_digest
from backboned.registry.weights import seeded_state
from backboned.server.commands.local_daemon import LocalDaemon
from backboned.v1 import model_service_pb2 as pb
from backboned.v1.model_service_pb2_grpc import ModelServiceStub
from tests.chaos.served import wait_for

_logger = logging.getLogger(__name__)
_CHAOS = os.environ.get("BACKBONED_CHAOS", "")
KILLS = max(3, int(_CHAOS) // 100 if _CHAOS.isdigit() else 0)
SEED = 7
EARLY_SHARE = 0.2
"""So many of the kills come while the daemon starts."""

MODELS = ("ants", "bees")
FILES = tuple(f"{i}.pt" for i in range(5))
LATEST, PINNED, MANUAL = (pb.VersionPolicy.Value(f"VERSION_POLICY_{n}") for n in ("LATEST", "PINNED", "MANUAL"))
SERVES = (pb.CHECKPOINT_STATE_AVAILABLE, pb.CHECKPOINT_STATE_SERVING)
LOST = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED, grpc.StatusCode.UNKNOWN)


@dataclass
class Account:
    """What must be so of one model. Files and versions are known by their sha256: no two are alike."""

    files: dict[str, str] = field(default_factory=dict)
    versions: dict[int, str] = field(default_factory=dict)
    deleted: dict[int, str] = field(default_factory=dict)
    aliases: dict[str, int] = field(default_factory=dict)
    policy: int = LATEST
    policy_version: int = 0
    rejected: set[int] = field(default_factory=set)

    @property
    def serving(self) -> int:
        return self.policy_version or max((v for v in self.versions if v not in self.rejected), default=0)


@dataclass
class Change:
    """A call that changes a model; whether its effect is there, and what there is to note then."""

    name: str
    rpc: str
    request: Any
    there: Callable[[pb.Model], bool]
    note: Callable[[pb.Model], object]
    actor: str = ""


class Life:
    """The daemon's lives, one after another; the account of all of them; and what is done in each."""

    def __init__(self, folder: Path, weights: Path, photo: bytes) -> None:
        self.root = folder / "checkpoints"
        self.root.mkdir()
        self.folder = folder
        self.photo = pb.Image(encoded=photo)
        self.chance = random.Random(SEED)
        self.accounts = {model: Account() for model in MODELS}
        self.labels: dict[str, str] = {}
        self.outcomes: list[str] = []
        self.journal: set[str] = set()
        self.open: Change | None = None
        self.calls, self.start_seconds = 0, 5.0
        self.done: Counter[str] = Counter()
        self.flags = [
            f"--checkpoint-dir={self.root}", f"--state-dir={folder / 'state'}", f"--weights=digits={weights}",
            "--device=cpu", "--precision=fp32", "--compile=off", "--grpc-port=0", "--http-port=0",
            "--settle-seconds=2", "--max-loaded-versions=2",
        ]  # fmt: skip
        self.stub: ModelServiceStub

    @contextmanager
    def begin(self) -> Iterator[LocalDaemon]:
        began = time.monotonic()
        with (
            LocalDaemon.start(self.flags, self.folder) as daemon,
            grpc.insecure_channel(daemon.grpc, options=[("grpc.enable_retries", 0)]) as channel,
        ):
            self.start_seconds = time.monotonic() - began
            self.stub = ModelServiceStub(channel)
            yield daemon
        log = daemon.log.read_text()
        assert "Traceback" not in log and "ERROR" not in log, log

    def end_before_it_began(self) -> None:
        command = [sys.executable, "-m", "backboned.server.commands", "serve", *self.flags]
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
            time.sleep(self.chance.uniform(0, 1.2 * self.start_seconds))  # at no moment in particular
            process.kill()

    def go_on_until_killed(self, daemon: LocalDaemon) -> None:
        killer = threading.Timer(self.chance.uniform(0, 3), os.kill, (daemon.pid, signal.SIGKILL))
        killer.start()
        try:
            while True:
                self.act(self.accounts[model := self.chance.choice(MODELS)], model)
        except grpc.RpcError as error:
            assert error.code() in LOST, error
        killer.join()
        daemon.wait()

    def act(self, account: Account, model: str) -> None:
        """One thing or another. Raises `RpcError` if the daemon can't be asked any more."""
        action = self.chance.choice(("drop", "drop", "remove", "report", "look", *["change"] * 6))
        if action == "drop":
            self.drop(account, model)
        elif action == "remove" and len(account.files) == len(FILES):
            name = self.chance.choice(FILES)
            (self.root / model / name).unlink()
            del account.files[name]
        elif action == "report" and account.versions:
            self.report(model)
        elif action == "look":
            self.is_settled()
        elif action == "change" and account.versions:
            if (change := self.chosen(account, model, self.ask(model).serving_version)) is None:
                return
            self.make(change)
            action = change.name
        self.done[action] += 1

    def drop(self, account: Account, model: str) -> None:
        """A file comes, or takes the place of another one: at one stroke, or slowly."""
        aside, name = self.folder / "aside.pt", self.chance.choice(FILES)
        head = {"fc.weight": 1e-3 * torch.randn(2, 256), "fc.bias": torch.tensor([9.0, 0.0])}
        label = f"class {len(self.labels)}"
        torch.save({"backbone": "digits", "state_dict": head, "classes": [label, "other"]}, aside)
        digest, content = file_digest(aside), aside.read_bytes()
        self.labels[digest] = label
        target = self.root / model / name
        target.parent.mkdir(exist_ok=True)
        account.files[name] = digest
        if self.chance.random() < 0.5:
            aside.rename(target)
            return
        half = self.chance.randrange(1, len(content))
        with target.open("wb", buffering=0) as file:
            file.write(content[:half])
            time.sleep(self.chance.uniform(0, 0.4))  # the copy's own pace
            file.write(content[half:])

    def report(self, model: str) -> None:
        try:
            reply = self.stub.Predict(pb.PredictRequest(model=model, images=[self.photo]), timeout=30)
        except grpc.RpcError as error:  # what is to serve is being loaded, or the daemon is dead: the next call tells
            assert error.code() in LOST, error
            return
        prediction = reply.predictions[0]
        outcome = pb.Outcome(prediction_id=prediction.id, label=prediction.classes[0].label)
        if self.stub.ReportOutcome(pb.ReportOutcomeRequest(outcomes=[outcome]), timeout=30).accepted:
            self.outcomes.append(prediction.id)

    def chosen(self, account: Account, model: str, serving: int) -> Change | None:
        """Some change that can be told from what was before."""
        version = self.chance.choice(sorted(account.versions))
        alias = self.chance.choice(("stable", "canary"))
        policy = self.chance.choice((LATEST, PINNED, MANUAL))
        named = 0 if policy == LATEST else version
        match self.chance.choice(("alias", "alias", "unalias", "policy", "roll back", "delete", "delete")):
            case "alias" if account.aliases.get(alias) != version:
                return Change(
                    "alias", "SetAlias", pb.SetAliasRequest(model=model, alias=alias, version=version),
                    lambda m: m.aliases.get(alias) == version, lambda _: account.aliases.update({alias: version}),
                )  # fmt: skip
            case "unalias" if alias in account.aliases:
                return Change(
                    "unalias", "DeleteAlias", pb.DeleteAliasRequest(model=model, alias=alias),
                    lambda m: alias not in m.aliases, lambda _: account.aliases.pop(alias),
                )  # fmt: skip
            case "policy" if (policy, named) != (account.policy, account.policy_version):

                def choose(_: pb.Model) -> None:
                    account.policy, account.policy_version = policy, named
                    account.rejected.discard(named)

                return Change(
                    "policy", "SetVersionPolicy",
                    pb.SetVersionPolicyRequest(model=model, policy=policy, version=named or None),
                    lambda m: (m.policy, m.policy_version) == (policy, named), choose,
                )  # fmt: skip
            case "roll back" if serving not in account.rejected:

                def reject(told: pb.Model) -> None:
                    account.rejected.add(serving)
                    account.policy_version = told.policy_version

                return Change(
                    "roll back", "RollBack", pb.RollBackRequest(model=model, expected_version=serving),
                    lambda m: any(v.version == serving and v.rejected for v in m.versions), reject,
                )  # fmt: skip
            case "delete":
                return Change(
                    "delete", "DeleteModelVersion", pb.DeleteModelVersionRequest(model=model, version=version),
                    lambda m: all(v.version != version for v in m.versions),
                    lambda _: account.deleted.update({version: account.versions.pop(version)}),
                )  # fmt: skip
        return None

    def make(self, change: Change) -> None:
        self.calls += 1
        change.actor = f"call-{self.calls}"
        try:
            told = getattr(self.stub, change.rpc)(
                change.request, timeout=30, metadata=[("backboned-actor", change.actor)]
            )
        except grpc.RpcError as error:
            if error.code() in LOST:
                self.open = change
                raise
            assert error.code() in (grpc.StatusCode.FAILED_PRECONDITION, grpc.StatusCode.ABORTED), error
        else:
            change.note(told)
            self.journal.add(change.actor)

    def check(self) -> None:
        """See that what the daemon tells, what lies on disk, and the account are one."""
        wait_for(self.is_settled)
        models = {m.name: m for m in self.stub.ListModels(pb.ListModelsRequest()).models}
        if (change := self.open) is not None:
            self.open = None
            model = models[change.request.model]
            if change.there(model):
                change.note(model)
                self.journal.add(change.actor)
        for name, model in models.items():
            self.check_model(self.accounts[name], model)
        told = Counter(c.actor.partition(" ")[0] for c in self.history() if c.actor)
        assert told == dict.fromkeys(self.journal, 1)
        if self.outcomes:
            outcomes = [pb.Outcome(prediction_id=each, label="other") for each in self.outcomes]
            reply = self.stub.ReportOutcome(pb.ReportOutcomeRequest(outcomes=outcomes))
            assert (reply.accepted, list(reply.unknown_prediction_ids)) == (0, [])

    def is_settled(self) -> bool:
        """Whether all files are adopted; what is found on the way is entered in the account."""
        rows = self.pages("ListCheckpoints", pb.ListCheckpointsRequest(), "checkpoints")
        assert len({row.sha256 for row in rows if row.version}) == sum(row.version > 0 for row in rows), "adopted twice"
        for row in rows:
            account = self.accounts[row.model]
            if row.version:
                assert row.version not in account.deleted and row.sha256 not in account.deleted.values()
                assert account.versions.setdefault(row.version, row.sha256) == row.sha256
        return all(row.version and row.state in SERVES for row in rows) and all(
            digest in (*account.versions.values(), *account.deleted.values())
            for account in self.accounts.values()
            for digest in account.files.values()
        )

    def check_model(self, account: Account, model: pb.Model) -> None:
        there = {v.version: v.checkpoint for v in model.versions}
        assert {v: c.sha256 for v, c in there.items()} == account.versions
        assert dict(model.aliases) == account.aliases
        assert (model.policy, model.policy_version) == (account.policy, account.policy_version)
        assert {v.version for v in model.versions if v.rejected} == account.rejected & there.keys()
        wait_for(lambda: self.ask(model.name).serving_version == account.serving)
        for checkpoint in there.values():
            path = Path(unquote(urlparse(checkpoint.uri).path))
            assert file_digest(path) == checkpoint.sha256
            assert {f.name for f in path.parent.iterdir()} == {path.name, "manifest.json"}
        for folder in (self.root / model.name).iterdir():
            assert not folder.name.startswith("."), "a half adopted file is left"
            if folder.is_dir() and int(folder.name) not in there:
                assert {f.name for f in folder.iterdir()} <= {"deleted.json"}
        asked = {0: account.serving} | {v: v for v in self.chance.sample(sorted(there), min(3, len(there)))}
        for wanted, version in asked.items():
            request = pb.PredictRequest(model=model.name, images=[self.photo], top_k=1)
            if wanted:
                request.version = wanted
            wait_for(partial(self.loaded, request))
            reply = self.stub.Predict(request, timeout=30)
            label = self.labels[account.versions[version]]
            assert (reply.version, reply.predictions[0].classes[0].label) == (version, label)
        wait_for(lambda: self.served(model.name)[-1] == (account.serving, True))
        assert all(follows for _, follows in self.served(model.name))

    def served(self, name: str) -> list[tuple[int, bool]]:
        """What has served, as the journal has it, and whether each entry follows from the one before."""
        told = [c for c in reversed(self.history()) if (c.model, c.kind) == (name, pb.CHANGE_KIND_SERVING)]
        before = [0, *(c.version for c in told)]
        return [(c.version, c.previous_version == previous) for c, previous in zip(told, before, strict=False)]

    def loaded(self, request: pb.PredictRequest) -> bool:
        try:
            self.stub.Predict(request, timeout=30)
        except grpc.RpcError as error:
            assert error.code() is grpc.StatusCode.UNAVAILABLE, error
            return False
        return True

    def ask(self, name: str) -> pb.Model:
        return self.stub.GetModel(pb.GetModelRequest(model=name), timeout=30)

    def history(self) -> list[pb.Change]:
        return self.pages("ListHistory", pb.ListHistoryRequest(), "changes")

    def pages(self, rpc: str, request: Any, field_name: str) -> list[Any]:
        found: list[Any] = []
        while True:
            reply = getattr(self.stub, rpc)(request, timeout=30)
            found += getattr(reply, field_name)
            request.page_token = reply.next_page_token
            if not reply.next_page_token:
                return found


@pytest.mark.timeout(120 + 60 * KILLS)
def test_what_the_daemon_said_is_true_after_every_start(tmp_path: Path, photo: bytes) -> None:
    weights = tmp_path / "digits.pth"
    torch.save(seeded_state(Catalogue.from_entry_points().get("digits"), seed=0), weights)
    life, early = Life(tmp_path, weights, photo), 0
    for _ in range(KILLS):
        if life.chance.random() < EARLY_SHARE:
            life.end_before_it_began()
            early += 1
            continue
        with life.begin() as daemon:
            life.check()
            life.go_on_until_killed(daemon)
    with life.begin():
        life.check()
    _logger.warning("%d kills, %d of them during start-up; done: %s", KILLS, early, dict(life.done))
