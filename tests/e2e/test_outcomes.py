"""Outcomes decide, on real handwritten digits: a worse version never serves for long, a better one is promoted."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import grpc
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from backboned.client import Client, ClientError
from backboned.registry import Catalogue
from backboned.registry.weights import seeded_state
from backboned.server.commands.demo.digits import image_files, load, write_images
from backboned.server.commands.local_daemon import LocalDaemon
from backboned.v1 import model_service_pb2 as pb

Wait = Callable[[Callable[[], object]], None]
CLASSES = "56789"
BACKBONE = Catalogue.from_entry_points().get("digits")
BODY = seeded_state(BACKBONE, seed=0)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("digits")
    write_images(folder, images_a_class=40, seed=0)
    return folder


@pytest.fixture(scope="module")
def heads(photos: Path) -> Mapping[str, Mapping[str, Tensor]]:
    """Heads on a random network: `good`, `weak` of 15 images, and `shuffled`, which learned wrong labels."""
    images = load(image_files(photos / "labelled" / "train"), BACKBONE.preprocessing)
    network = BACKBONE.module(len(BODY["fc.bias"])).eval()
    network.load_state_dict(BODY)
    features = images.pixels
    with torch.no_grad():
        for stage in BACKBONE.stages:
            features = stage.forward(network, features)
    some = torch.cat([(images.labels == label).nonzero()[:3, 0] for label in range(5)])
    wrong = images.labels[torch.randperm(len(images.labels), generator=torch.Generator().manual_seed(0))]
    return {
        "good": head(features, images.labels),
        "weak": head(features[some], images.labels[some]),
        "shuffled": head(features, wrong),
    }


def head(features: Tensor, labels: Tensor) -> Mapping[str, Tensor]:
    """A logistic regression."""
    mean, deviation = features.mean(0), features.std(0) + 1e-3
    weight, bias = torch.zeros(5, features.shape[1], requires_grad=True), torch.zeros(5, requires_grad=True)
    solver = torch.optim.LBFGS([weight, bias], max_iter=50)

    def loss() -> Tensor:
        solver.zero_grad()
        found = F.cross_entropy((features - mean) / deviation @ weight.T + bias, labels) + 0.05 * weight.square().sum()
        found.backward()
        return found

    solver.step(loss)
    scaled = (weight / deviation).detach()
    return {"fc.weight": scaled, "fc.bias": bias.detach() - scaled @ mean}


@pytest.fixture
def flags(tmp_path: Path) -> list[str]:
    return [
        f"--checkpoint-dir={tmp_path / 'checkpoints'}", f"--state-dir={tmp_path / 'state'}", "--device=cpu",
        "--precision=fp32", "--compile=off", "--grpc-port=0", "--http-port=0",
    ]  # fmt: skip


@pytest.fixture
def daemon(flags: list[str], tmp_path: Path) -> Iterator[LocalDaemon]:
    with LocalDaemon.start(flags, tmp_path) as daemon:
        yield daemon
    assert "Traceback" not in daemon.log.read_text()


class Users:
    """Ask about digits, and tell later which ones they were."""

    def __init__(self, client: Client, photos: Path) -> None:
        self.client = client
        self.files = image_files(photos / "held-out")
        self.next = 0

    def ask(self, images: int = 64) -> dict[str, str]:
        """The truth by the id of the prediction."""
        asked = [self.files[(7 * (self.next + i)) % len(self.files)] for i in range(images)]
        self.next += images
        reply = self.client.predict("digits", asked, top_k=1)
        return {p.id: f.parent.name for p, f in zip(reply.predictions, asked, strict=True)}


def drop(folder: Path, name: str, tensors: Mapping[str, Tensor]) -> None:
    model = folder / "checkpoints" / "digits"
    model.mkdir(exist_ok=True)
    (model / "classes.txt").write_text("\n".join(CLASSES))
    torch.save({"backbone": "digits", "model_state_dict": {**BODY, **tensors}}, model / f"{name}.pt")


def test_a_worse_version_is_rejected_and_a_better_one_promoted(
    daemon: LocalDaemon, heads: Mapping[str, Mapping[str, Tensor]], photos: Path, tmp_path: Path, wait_for: Wait
) -> None:
    with Client(daemon.grpc) as client:
        users = Users(client, photos)

        def model() -> pb.Model:
            return client.get_model("digits")

        drop(tmp_path, "weak", heads["weak"])
        wait_for(lambda: any(m.serving_version == 1 for m in client.list_models()))
        client.set_version_policy("digits", "promote_when_better")

        drop(tmp_path, "shuffled", heads["shuffled"])
        wait_for(lambda: model().shadow_version == 2)
        told = client.report_outcomes(users.ask(256))
        assert (told.accepted, list(told.unknown_prediction_ids)) == (256, [])
        wait_for(lambda: not model().shadow_version)
        found = model()
        assert found.serving_version == 1
        assert "over 256 outcomes version 1 has" in found.versions[0].rejected

        drop(tmp_path, "good", heads["good"])
        wait_for(lambda: model().shadow_version == 3)
        answers = users.ask(256)
        before = model().comparison
        wait_for(lambda: model().comparison.answers == 256)
        assert not before.HasField("shadow") and model().comparison.agreements < 256
        client.report_outcomes(answers)
        wait_for(lambda: model().serving_version == 3)
        changes = [c for c in client.list_history(model="digits") if c.kind == pb.CHANGE_KIND_PROMOTED]
        assert [(c.previous_version, c.version, c.actor) for c in changes] == [(1, 3, "the daemon, by outcomes")]
        assert "version 3 has" in changes[0].reason


def test_a_newest_version_that_is_worse_is_called_back(
    daemon: LocalDaemon, heads: Mapping[str, Mapping[str, Tensor]], photos: Path, tmp_path: Path, wait_for: Wait
) -> None:
    with Client(daemon.grpc) as client:
        users = Users(client, photos)
        drop(tmp_path, "good", heads["good"])
        wait_for(lambda: any(m.serving_version == 1 for m in client.list_models()))
        client.set_version_policy("digits", "rollback_when_worse")
        drop(tmp_path, "shuffled", heads["shuffled"])
        wait_for(lambda: client.get_model("digits").serving_version == 2)
        assert client.get_model("digits").shadow_version == 1
        client.report_outcomes(users.ask(200))
        wait_for(lambda: client.get_model("digits").serving_version == 1)
        kinds = [c.kind for c in client.list_history(model="digits")]
        assert pb.CHANGE_KIND_REJECTED in kinds


def test_outcomes_come_after_a_restart_and_count_once(
    flags: list[str], heads: Mapping[str, Mapping[str, Tensor]], photos: Path, tmp_path: Path, wait_for: Wait
) -> None:
    with LocalDaemon.start(flags, tmp_path) as daemon, Client(daemon.grpc) as client:
        drop(tmp_path, "weak", heads["weak"])
        wait_for(lambda: any(m.serving_version == 1 for m in client.list_models()))
        answers = Users(client, photos).ask(20)
    with LocalDaemon.start(flags, tmp_path) as daemon, Client(daemon.grpc) as client:
        first, *others = answers
        told = client.report_outcomes({first: answers[first], "0" * 24: "5", "no id": "5"})
        assert (told.accepted, list(told.unknown_prediction_ids)) == (1, ["0" * 24, "no id"])
        with pytest.raises(ClientError) as caught:
            client.report_outcomes({others[0]: answers[others[0]], others[1]: "five"})
        assert (caught.value.code, caught.value.field) == (grpc.StatusCode.INVALID_ARGUMENT, "outcomes[1].label")
        assert client.get_model("digits").comparison.outcomes == 1, "nothing of a report with a mistake is counted"
        assert client.report_outcomes(answers).accepted == 19
        again = client.report_outcomes(answers)
        assert (again.accepted, list(again.unknown_prediction_ids)) == (0, [])
        figures = client.get_model("digits").comparison
        assert figures.outcomes == 20 and figures.serving.accuracy.low < figures.serving.accuracy.value
