"""Which version answers: by policy, after a rollback, by a division of traffic; and who changed it."""

import os
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import grpc
import pytest
import torch
from PIL import Image

from backboned.client import Client, ClientError
from backboned.registry import Catalogue
from backboned.registry.weights import seeded_state
from backboned.server.commands.local_daemon import LocalDaemon
from backboned.v1 import model_service_pb2 as pb

Wait = Callable[[Callable[[], object]], None]


class Served:
    """A model of three versions, each with a class of its own that it always sees."""

    def __init__(self, client: Client, daemon: LocalDaemon, folder: Path, picture: Path) -> None:
        self.client = client
        self.daemon = daemon
        self.folder = folder
        self._picture = picture

    def drop(self, model: str, version: int) -> None:
        digits = Catalogue.from_entry_points().get("digits")
        state = seeded_state(digits, seed=0)
        state["fc.weight"], state["fc.bias"] = 1e-3 * torch.randn(5, digits.feature_size), torch.zeros(5)
        state["fc.bias"][version] = 9.0
        (self.folder / model).mkdir(exist_ok=True)
        torch.save({"backbone": "digits", "model_state_dict": state}, self.folder / model / f"{version}.pt")

    def answers(self, model: str, **asked: str) -> int:
        """The version that answers, which must be the one whose class is seen."""
        reply = self.client.predict(model, self._picture, top_k=1, **asked)  # type: ignore[arg-type]
        assert reply.predictions[0].classes[0].label == f"class_{reply.version}"
        return reply.version

    def make(self, model: str, wait_for: Wait, versions: int = 3) -> None:
        for version in range(1, versions + 1):
            self.drop(model, version)
            wait_for(partial(self._serves, model, version))

    def _serves(self, model: str, version: int) -> bool:
        return any((m.name, m.serving_version) == (model, version) for m in self.client.list_models())

    def changes(self, model: str) -> list[tuple[int, int, int, str]]:
        return [(c.kind, c.previous_version, c.version, c.subject) for c in self.client.list_history(model=model)]


@pytest.fixture(scope="module")
def flags(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("versions")
    return [
        f"--checkpoint-dir={folder / 'checkpoints'}", f"--state-dir={folder / 'state'}", "--device=cpu",
        "--precision=fp32", "--compile=off", "--grpc-port=0", "--http-port=0",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def served(flags: list[str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    picture = tmp_path_factory.mktemp("picture") / "grey.png"
    Image.new("RGB", (16, 16), "grey").save(picture)
    folder = Path(flags[0].partition("=")[2])
    with LocalDaemon.start(flags, folder.parent) as daemon, Client(daemon.grpc, actor="ann@desk") as client:
        yield Served(client, daemon, folder, picture)
    assert daemon.stop() == 0
    assert "Traceback" not in daemon.log.read_text()


def refused(code: grpc.StatusCode, call: Callable[..., object], *arguments: object, **options: object) -> str:
    with pytest.raises(ClientError) as caught:
        call(*arguments, **options)
    assert caught.value.code is code, caught.value
    return caught.value.message


def test_a_policy_says_which_version_answers(served: Served, wait_for: Wait) -> None:
    served.make("chosen", wait_for)
    client = served.client
    assert client.get_model("chosen").policy == pb.VERSION_POLICY_LATEST
    pinned = client.set_version_policy("chosen", "pinned", version=1)
    assert (pinned.serving_version, pinned.policy, pinned.policy_version) == (1, pb.VERSION_POLICY_PINNED, 1)
    assert served.answers("chosen") == 1 and served.answers("chosen", alias="latest") == 3
    client.set_version_policy("chosen", "manual")
    served.drop("chosen", 4)
    wait_for(lambda: len(client.get_model("chosen").versions) == 4)
    assert served.answers("chosen") == 1
    assert client.set_version_policy("chosen", "latest").serving_version == 4
    assert served.answers("chosen") == 4


def test_a_policy_that_cannot_be_is_refused(served: Served, wait_for: Wait) -> None:
    served.make("refused", wait_for, versions=1)
    client = served.client
    set_policy = client.set_version_policy
    assert "no policy" in refused(grpc.StatusCode.INVALID_ARGUMENT, set_policy, "refused", "newest")
    assert "leave it out" in refused(grpc.StatusCode.INVALID_ARGUMENT, set_policy, "refused", "best", version=1)
    assert "version" in refused(grpc.StatusCode.NOT_FOUND, set_policy, "refused", "pinned", version=9)
    refused(grpc.StatusCode.NOT_FOUND, set_policy, "nothing", "best")
    (served.folder / "refused" / "2.pt").write_bytes(b"PK broken")
    assert served.answers("refused") == 1


def test_a_rollback_goes_to_what_served_before_and_a_newer_version_serves_again(served: Served, wait_for: Wait) -> None:
    served.make("back", wait_for)
    client = served.client
    message = refused(grpc.StatusCode.ABORTED, client.roll_back, "back", expected_version=1)
    assert "serves version 3, not 1" in message
    model = client.roll_back("back", expected_version=3, reason="it sees only tulips")
    assert model.serving_version == 2 == served.answers("back")
    assert {v.version: v.rejected for v in model.versions} == {3: "it sees only tulips", 2: "", 1: ""}
    assert client.roll_back("back").serving_version == 1
    assert "no earlier version" in refused(grpc.StatusCode.FAILED_PRECONDITION, client.roll_back, "back")
    served.drop("back", 4)
    wait_for(lambda: client.get_model("back").serving_version == 4)
    assert served.answers("back") == 4


def test_traffic_is_divided_and_a_key_sticks(served: Served, wait_for: Wait) -> None:
    served.make("divided", wait_for)
    client = served.client
    client.set_alias("divided", "stable", 1)
    client.set_alias("divided", "canary", 2)
    assert dict(client.set_traffic("divided", {"stable": 3, "canary": 1}).traffic) == {"stable": 3, "canary": 1}
    seen = Counter(served.answers("divided") for _ in range(200))
    assert seen.keys() == {1, 2} and 20 < seen[2] < 90
    for key in ("ann", "bob", "eve"):
        assert len({served.answers("divided", sticky_key=key) for _ in range(10)}) == 1
    assert "goes to" in refused(grpc.StatusCode.FAILED_PRECONDITION, client.delete_alias, "divided", "canary")
    refused(grpc.StatusCode.NOT_FOUND, client.set_traffic, "divided", {"nobody": 1})
    refused(grpc.StatusCode.INVALID_ARGUMENT, client.set_traffic, "divided", {"stable": 0})
    refused(grpc.StatusCode.INVALID_ARGUMENT, served.answers, "divided", sticky_key="k" * 300)
    client.set_traffic("divided", {})
    assert {served.answers("divided") for _ in range(20)} == {3}


def test_a_deleted_version_is_gone_for_good_and_its_number_is_not_given_again(served: Served, wait_for: Wait) -> None:
    served.make("thinned", wait_for)
    client, delete = served.client, served.client.delete_model_version
    assert "serves" in refused(grpc.StatusCode.FAILED_PRECONDITION, delete, "thinned", 3)
    client.set_alias("thinned", "kept", 2)
    assert "has the alias 'kept'" in refused(grpc.StatusCode.FAILED_PRECONDITION, delete, "thinned", 2)
    delete("thinned", 1)
    refused(grpc.StatusCode.NOT_FOUND, delete, "thinned", 1)
    client.roll_back("thinned")
    delete("thinned", 3)
    assert [v.version for v in client.get_model("thinned").versions] == [2]
    served.drop("thinned", 4)  # the files of 1 and 3 are still there, and aren't adopted anew
    wait_for(lambda: client.get_model("thinned").serving_version == 4)
    assert [v.version for v in client.get_model("thinned").versions] == [4, 2]
    assert served.answers("thinned") == 4


def test_the_history_tells_what_served_and_who_changed_it(served: Served, wait_for: Wait) -> None:
    served.make("told", wait_for, versions=2)
    client = served.client
    client.set_alias("told", "stable", 1)
    client.set_alias("told", "stable", 2)
    client.set_version_policy("told", "pinned")
    client.roll_back("told", reason="no good")
    client.delete_alias("told", "stable")
    client.delete_model_version("told", 2)
    wait_for(lambda: (pb.CHANGE_KIND_SERVING, 2, 1, "") in served.changes("told"))
    assert sorted(served.changes("told")) == sorted(
        [
            (pb.CHANGE_KIND_SERVING, 0, 1, ""),
            (pb.CHANGE_KIND_SERVING, 1, 2, ""),
            (pb.CHANGE_KIND_ALIAS, 0, 1, "stable"),
            (pb.CHANGE_KIND_ALIAS, 1, 2, "stable"),
            (pb.CHANGE_KIND_POLICY, 0, 2, "PINNED"),
            (pb.CHANGE_KIND_REJECTED, 2, 1, ""),
            (pb.CHANGE_KIND_SERVING, 2, 1, ""),
            (pb.CHANGE_KIND_ALIAS, 2, 0, "stable"),
            (pb.CHANGE_KIND_DELETED, 2, 0, ""),
        ]
    )
    actors = {c.kind: c.actor for c in client.list_history(model="told")}
    assert actors[pb.CHANGE_KIND_ALIAS].startswith("ann@desk (ipv4:127.0.0.1:")
    assert actors[pb.CHANGE_KIND_SERVING] == ""
    assert next(c for c in client.list_history(model="told") if c.kind == pb.CHANGE_KIND_REJECTED).reason == "no good"
    refused(grpc.StatusCode.NOT_FOUND, lambda: list(client.list_history(model="never-there")))
    assert len(list(client.list_history(page_size=2))) == len(list(client.list_history()))


def test_all_of_it_outlives_the_daemon(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, wait_for: Wait
) -> None:
    picture = tmp_path / "grey.png"
    Image.new("RGB", (16, 16), "grey").save(picture)
    flags = [
        f"--checkpoint-dir={tmp_path / 'checkpoints'}", f"--state-dir={tmp_path / 'state'}", "--device=cpu",
        "--precision=fp32", "--compile=off", "--grpc-port=0", "--http-port=0",
        "--max-loaded-versions=1",
    ]  # fmt: skip
    with LocalDaemon.start(flags, tmp_path) as daemon, Client(daemon.grpc) as client:
        there = Served(client, daemon, tmp_path / "checkpoints", picture)
        there.make("kept", wait_for)
        client.set_version_policy("kept", "pinned", version=1)
        before = there.changes("kept")
        os.kill(daemon.pid, signal.SIGKILL)
        daemon.wait()
    with LocalDaemon.start(flags, tmp_path) as daemon, Client(daemon.grpc) as client:
        there = Served(client, daemon, tmp_path / "checkpoints", picture)
        assert there.answers("kept") == 1
        assert there.changes("kept")[-len(before) :] == before
        (tmp_path / "checkpoints" / "kept" / "1" / "manifest.json").unlink()
        wait_for(lambda: client.get_model("kept").serving_version == 0)
        assert "pinned to version 1, which is gone" in refused(
            grpc.StatusCode.FAILED_PRECONDITION, there.answers, "kept"
        )
        assert client.set_version_policy("kept", "latest").serving_version == 3


def test_old_versions_are_deleted_and_what_is_in_use_is_kept(tmp_path: Path, wait_for: Wait) -> None:
    picture = tmp_path / "grey.png"
    Image.new("RGB", (16, 16), "grey").save(picture)
    flags = [
        f"--checkpoint-dir={tmp_path / 'checkpoints'}", f"--state-dir={tmp_path / 'state'}", "--device=cpu",
        "--precision=fp32", "--compile=off", "--grpc-port=0", "--http-port=0",
    ]  # fmt: skip
    with LocalDaemon.start(flags, tmp_path) as daemon, Client(daemon.grpc) as client:
        there = Served(client, daemon, tmp_path / "checkpoints", picture)
        there.make("many", wait_for, versions=4)
        client.set_alias("many", "stable", 1)
    with LocalDaemon.start([*flags, "--keep-versions=1"], tmp_path) as daemon, Client(daemon.grpc) as client:
        wait_for(lambda: [v.version for v in client.get_model("many").versions] == [4, 3, 1])  # 3 served before 4
        assert (pb.CHANGE_KIND_DELETED, 2, 0, "") in [
            (c.kind, c.previous_version, c.version, c.subject) for c in client.list_history(model="many")
        ]
