"""Outcomes decide, on real handwritten digits: a worse version never serves for long, a better one is promoted."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
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


@pytest.fixture(scope="module")
def flags(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("outcomes")
    return [
        f"--checkpoint-dir={folder / 'checkpoints'}", f"--state-dir={folder / 'state'}", "--device=cpu",
        "--precision=fp32", "--compile=off", "--grpc-port=0", "--http-port=0",
    ]  # fmt: skip


class Served:
    """A daemon that may be followed by another one on the same folders."""

    def __init__(self, flags: list[str], heads: Mapping[str, Mapping[str, Tensor]], photos: Path) -> None:
        self._flags, self._heads = flags, heads
        self._stack = ExitStack()
        self.files = image_files(photos / "held-out")
        self.start()

    def start(self) -> None:
        folder = Path(self._flags[0].partition("=")[2])
        self._daemon = self._stack.enter_context(LocalDaemon.start(self._flags, folder.parent))
        self.client = self._stack.enter_context(Client(self._daemon.grpc))

    def stop(self) -> None:
        self._stack.close()
        assert "Traceback" not in self._daemon.log.read_text()

    def drop(self, model: str, name: str) -> None:
        folder = Path(self._flags[0].partition("=")[2]) / model
        folder.mkdir(exist_ok=True)
        (folder / "classes.txt").write_text("\n".join(CLASSES))
        torch.save({"backbone": "digits", "model_state_dict": {**BODY, **self._heads[name]}}, folder / f"{name}.pt")

    def serves(self, model: str, version: int) -> bool:
        return any((m.name, m.serving_version) == (model, version) for m in self.client.list_models())

    def ask(self, model: str, images: int) -> dict[str, str]:
        """The truth by the id of the prediction."""
        asked = [self.files[7 * i % len(self.files)] for i in range(images)]
        reply = self.client.predict(model, asked, top_k=1)
        return {p.id: f.parent.name for p, f in zip(reply.predictions, asked, strict=True)}


@pytest.fixture(scope="module")
def served(flags: list[str], heads: Mapping[str, Mapping[str, Tensor]], photos: Path) -> Iterator[Served]:
    served = Served(flags, heads, photos)
    yield served
    served.stop()


def test_a_worse_version_is_rejected_and_a_better_one_promoted(served: Served, wait_for: Wait) -> None:
    client = served.client

    def model() -> pb.Model:
        return client.get_model("promoted")

    served.drop("promoted", "weak")
    wait_for(lambda: served.serves("promoted", 1))
    client.set_version_policy("promoted", "promote_when_better")

    served.drop("promoted", "shuffled")
    wait_for(lambda: model().shadow_version == 2)
    told = client.report_outcomes(served.ask("promoted", 256))
    assert (told.accepted, list(told.unknown_prediction_ids)) == (256, [])
    wait_for(lambda: not model().shadow_version)
    found = model()
    assert found.serving_version == 1
    assert "over 256 outcomes version 1 has" in found.versions[0].rejected

    served.drop("promoted", "good")
    wait_for(lambda: model().shadow_version == 3)
    answers = served.ask("promoted", 256)
    wait_for(lambda: model().comparison.answers == 256)
    assert model().comparison.agreements < 256 and not model().comparison.HasField("shadow")
    client.report_outcomes(answers)
    wait_for(lambda: model().serving_version == 3)
    changes = [c for c in client.list_history(model="promoted") if c.kind == pb.CHANGE_KIND_PROMOTED]
    assert [(c.previous_version, c.version, c.actor) for c in changes] == [(1, 3, "the daemon, by outcomes")]
    assert "version 3 has" in changes[0].reason


def test_a_newest_version_that_is_worse_is_called_back(served: Served, wait_for: Wait) -> None:
    client = served.client
    served.drop("called-back", "good")
    wait_for(lambda: served.serves("called-back", 1))
    client.set_version_policy("called-back", "rollback_when_worse")
    served.drop("called-back", "shuffled")
    wait_for(lambda: served.serves("called-back", 2))
    assert client.get_model("called-back").shadow_version == 1
    client.report_outcomes(served.ask("called-back", 200))
    wait_for(lambda: served.serves("called-back", 1))
    assert pb.CHANGE_KIND_REJECTED in [c.kind for c in client.list_history(model="called-back")]


def test_outcomes_come_after_a_restart_and_count_once(served: Served, wait_for: Wait) -> None:
    served.drop("later", "weak")
    wait_for(lambda: served.serves("later", 1))
    answers = served.ask("later", 20)
    served.stop()
    served.start()
    client = served.client
    first, *others = answers
    told = client.report_outcomes({first: answers[first], "0" * 24: "5", "no id": "5"})
    assert (told.accepted, list(told.unknown_prediction_ids)) == (1, ["0" * 24, "no id"])
    with pytest.raises(ClientError) as caught:
        client.report_outcomes({others[0]: answers[others[0]], others[1]: "five"})
    assert (caught.value.code, caught.value.field) == (grpc.StatusCode.INVALID_ARGUMENT, "outcomes[1].label")
    assert client.get_model("later").comparison.outcomes == 1, "nothing of a report with a mistake is counted"
    assert client.report_outcomes(answers).accepted == 19
    again = client.report_outcomes(answers)
    assert (again.accepted, list(again.unknown_prediction_ids)) == (0, [])
    figures = client.get_model("later").comparison
    assert figures.outcomes == 20 and figures.serving.accuracy.low < figures.serving.accuracy.value
