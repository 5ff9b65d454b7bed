"""Files that a person drops into the checkpoint directory of a running daemon."""

import re
import shutil
import time
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision import models, transforms

from backboned.client import Client, ClientError
from backboned.registry import Catalogue
from backboned.registry.weights import seeded_state
from backboned.server.commands.local_daemon import LocalDaemon
from backboned.v1 import model_service_pb2 as pb

PATIENCE_SECONDS = 60.0

# As every tutorial has it.
tutorial_transform = transforms.Compose(
    [
        transforms.Resize(256),
        transforms.CenterCrop(224),
        transforms.ToTensor(),
        transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
    ]
)


class Wrapper(nn.Module):
    """A backbone in an attribute, and a new layer that reads its 1000 logits."""

    def __init__(self) -> None:
        super().__init__()
        self.vgg19 = models.vgg19()
        self.linear_layers = nn.Linear(1000, 1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.linear_layers(self.vgg19(x))
        return out


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Client, Path]]:
    folder = tmp_path_factory.mktemp("drops")
    weights = folder / "resnet18.pth"
    torch.save(seeded_state(Catalogue.from_entry_points().get("resnet18"), seed=3), weights)
    flags = [
        f"--checkpoint-dir={folder / 'checkpoints'}",
        f"--state-dir={folder / 'state'}",
        f"--weights=resnet18={weights}",
        "--device=cpu",
        "--precision=fp32",
        "--compile=off",
        "--grpc-port=0",
        "--http-port=0",
        "--settle-seconds=1.5",
    ]
    with LocalDaemon.start(flags, folder) as running, Client(running.grpc) as client:
        yield client, folder / "checkpoints"


def resnet(classes: int, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    model: nn.Module = models.resnet18()
    model.fc = nn.Linear(512, classes)
    return model.eval()


def script_probabilities(model: nn.Module, photo: bytes) -> Tensor:
    batch = tutorial_transform(Image.open(BytesIO(photo))).unsqueeze(0)
    with torch.no_grad():
        logits = model.eval()(batch)[0]
    return torch.stack([1 - logits.sigmoid(), logits.sigmoid()])[:, 0] if len(logits) == 1 else logits.softmax(0)


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)


def serving_version(client: Client, model: str) -> int:
    try:
        return client.get_model(model).serving_version
    except ClientError:
        return 0


def wait_for_version(client: Client, model: str, version: int) -> None:
    wait_for(lambda: serving_version(client, model) == version)


def refused(client: Client, name: str) -> str:
    """The reason of the quarantined file of this name; empty while there is none."""
    found = client.list_checkpoints(filter="state = QUARANTINED")
    return next((c.reason for c in found if c.uri.endswith(f"/{name}")), "")


def answer(client: Client, model: str, photo: bytes) -> tuple[int, dict[str, float]]:
    response = client.predict(model, [photo])
    return response.version, {c.label: c.probability for c in response.predictions[0].classes}


def assert_answers_like(client: Client, name: str, model: nn.Module, photo: bytes, classes: list[str]) -> None:
    _, probabilities = answer(client, name, photo)
    expected = script_probabilities(model, photo)
    assert [probabilities[c] for c in classes] == pytest.approx(expected.tolist(), abs=1e-4)


def test_a_tutorials_state_dict_is_served_with_its_own_answers(daemon: tuple[Client, Path], photo: bytes) -> None:
    client, root = daemon
    model = resnet(5, seed=1)
    (root / "tutorial").mkdir()
    torch.save(model.state_dict(), root / "tutorial" / "model.pt")
    wait_for_version(client, "tutorial", 1)
    assert_answers_like(client, "tutorial", model, photo, [f"class_{i}" for i in range(5)])


def test_the_dict_with_epoch_and_optimizer_is_served(daemon: tuple[Client, Path], photo: bytes) -> None:
    client, root = daemon
    model = resnet(3, seed=2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    (root / "checkpointed").mkdir()
    (root / "checkpointed" / "classes.txt").write_text("ant\nbee\nwasp\n")
    torch.save(
        {
            "epoch": 7,
            "model_state_dict": model.state_dict(),
            "optimizer_state_dict": optimizer.state_dict(),
            "loss": torch.tensor(0.25),
        },
        root / "checkpointed" / "checkpoint.pth",
    )
    wait_for_version(client, "checkpointed", 1)
    assert_answers_like(client, "checkpointed", model, photo, ["ant", "bee", "wasp"])
    (checkpoint,) = client.list_checkpoints(model="checkpointed")
    assert (checkpoint.epoch, checkpoint.train_loss, checkpoint.backbone) == (7, 0.25, "resnet18")


@pytest.mark.slow
def test_a_wrapper_with_one_output_on_vgg19_is_served_as_binary(daemon: tuple[Client, Path], photo: bytes) -> None:
    client, root = daemon
    torch.manual_seed(4)
    model = nn.DataParallel(Wrapper())
    (root / "wrapped").mkdir()
    torch.save({"state_dict": model.state_dict()}, root / "wrapped" / "vgg.pt")
    wait_for_version(client, "wrapped", 1)
    assert_answers_like(client, "wrapped", model.module, photo, ["class_0", "class_1"])
    (checkpoint,) = client.list_checkpoints(model="wrapped")
    assert (checkpoint.backbone, checkpoint.task) == ("vgg19", pb.TASK_BINARY)


def test_safetensors_and_a_head_alone_are_served(daemon: tuple[Client, Path], photo: bytes) -> None:
    client, root = daemon
    full = models.resnet18()
    full.load_state_dict(seeded_state(Catalogue.from_entry_points().get("resnet18"), seed=3))
    torch.manual_seed(5)
    full.fc = nn.Linear(512, 4)
    full.eval()
    (root / "head").mkdir()
    torch.save(
        {
            "backbone": "resnet18",
            "model_state_dict": {k: v for k, v in full.state_dict().items() if k.startswith("fc")},
        },
        root / "head" / "head.pt",
    )
    wait_for_version(client, "head", 1)  # it brings in the backbone's weights, which the other one is compared with
    (root / "tensors").mkdir()
    save_file(full.state_dict(), root / "tensors" / "model.safetensors")
    wait_for_version(client, "tensors", 1)
    for name in ("tensors", "head"):
        assert_answers_like(client, name, full, photo, [f"class_{i}" for i in range(4)])
    shared = client.get_model("tensors").versions[0].shared_stages
    assert set(shared) >= {"stem", "layer1", "layer2", "layer3", "layer4"}  # recognised stage by stage


def test_a_pickled_module_is_refused_with_the_remedy(daemon: tuple[Client, Path]) -> None:
    client, root = daemon
    (root / "pickled").mkdir()
    torch.save(models.resnet18(), root / "pickled" / "whole.pt")
    wait_for(lambda: refused(client, "whole.pt"))
    reason = refused(client, "whole.pt")
    assert "torch.save(model.state_dict()" in reason and "resnet.ResNet" in reason
    with pytest.raises(ClientError, match="QUARANTINED"):
        client.predict("pickled", [b"x"])


def test_a_slow_copy_is_served_once_it_is_whole(daemon: tuple[Client, Path], photo: bytes, tmp_path: Path) -> None:
    client, root = daemon
    model = resnet(6, seed=6)
    torch.save(model.state_dict(), tmp_path / "slow.pt")
    content = (tmp_path / "slow.pt").read_bytes()
    (root / "slow").mkdir()
    with (root / "slow" / "slow.pt").open("wb", buffering=0) as file:
        for part in range(10):
            file.write(content[part * len(content) // 10 : (part + 1) * len(content) // 10])
            time.sleep(0.25)  # the copy's own pace, longer than the daemon's quiet time
            if part < 9:
                assert serving_version(client, "slow") == 0
    wait_for_version(client, "slow", 1)
    assert_answers_like(client, "slow", model, photo, [f"class_{i}" for i in range(6)])
    assert not refused(client, "slow.pt")


def test_replacing_renaming_in_and_linking_each_make_a_version(
    daemon: tuple[Client, Path], photo: bytes, tmp_path: Path
) -> None:
    client, root = daemon
    folder = root / "replaced"
    folder.mkdir()
    several = [resnet(5, seed=seed) for seed in (10, 11, 12, 13)]
    names = [f"class_{i}" for i in range(5)]
    outside = root.parent / "outside"  # on the same file system, as a rename and a hard link need
    outside.mkdir()
    for i, model in enumerate(several):
        torch.save(model.state_dict(), outside / f"{i}.pt")

    shutil.copy(outside / "0.pt", folder / "a.pt")
    wait_for_version(client, "replaced", 1)
    shutil.copy(outside / "1.pt", folder / "a.pt")  # over it, in place
    wait_for_version(client, "replaced", 2)
    (outside / "2.pt").rename(folder / "a.pt")  # over it, by rename
    wait_for_version(client, "replaced", 3)
    (folder / "linked.pt").hardlink_to(outside / "3.pt")
    wait_for_version(client, "replaced", 4)
    for version, model in enumerate(several, start=1):
        response = client.predict("replaced", [photo], version=version)
        found = {c.label: c.probability for c in response.predictions[0].classes}
        assert [found[n] for n in names] == pytest.approx(script_probabilities(model, photo).tolist(), abs=1e-4)
        assert response.version == version


def truncated(content: bytes) -> bytes:
    return content[: len(content) * 2 // 3]


def flipped(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 0x10]) + content[middle + 1 :]


def other_shape(content: bytes) -> bytes:
    state = torch.load(BytesIO(content))
    state["layer1.0.conv1.weight"] = torch.zeros(64, 64, 5, 5)
    return saved(state)


def not_finite(content: bytes) -> bytes:
    state = torch.load(BytesIO(content))
    state["fc.weight"][0, 0] = float("nan")
    return saved(state)


def saved(state: object) -> bytes:
    file = BytesIO()
    torch.save(state, file)
    return file.getvalue()


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (truncated, "truncated or altered"),
        (flipped, "altered"),
        (other_shape, r"'layer1.0.conv1.weight' has shape \[64, 64, 5, 5\], resnet18 needs"),
        (not_finite, "'fc.weight' has values that are not finite"),
        (lambda _: b"<!doctype html><title>404</title>", "not a checkpoint"),
        (lambda _: b"", "empty"),
    ],
    ids=["truncated", "flipped byte", "wrong shape", "NaN", "not a checkpoint", "empty"],
)
def test_a_bad_file_is_quarantined_with_its_reason_and_what_served_serves_on(
    daemon: tuple[Client, Path],
    photo: bytes,
    damage: Callable[[bytes], bytes],
    reason: str,
    request: pytest.FixtureRequest,
) -> None:
    client, root = daemon
    name = "bad-" + "".join(c if c.isalnum() else "-" for c in request.node.callspec.id)
    model = resnet(5, seed=20)
    good = saved(model.state_dict())
    folder = root / name
    folder.mkdir()
    (folder / "model.pt").write_bytes(good)
    wait_for_version(client, name, 1)
    before = answer(client, name, photo)

    (folder / "model.pt").write_bytes(damage(good))
    wait_for(lambda: any(c.reason for c in client.list_checkpoints(model=name, filter="state = QUARANTINED")))
    (bad,) = client.list_checkpoints(model=name, filter="state = QUARANTINED")
    assert bad.uri.endswith(f"/{name}/model.pt") and bad.version == 0
    assert re.search(reason, bad.reason), bad.reason
    assert answer(client, name, photo) == before

    # Mended, it is the next version, and no longer in quarantine.
    (folder / "model.pt").write_bytes(saved(resnet(5, seed=21).state_dict()))
    wait_for_version(client, name, 2)
    assert not list(client.list_checkpoints(model=name, filter="state = QUARANTINED"))


def test_a_version_whose_file_is_altered_keeps_its_earlier_epoch_or_version(
    daemon: tuple[Client, Path], photo: bytes
) -> None:
    client, root = daemon
    folder = root / "versions"
    folder.mkdir()
    torch.save(resnet(5, seed=30).state_dict(), folder / "model.pt")
    wait_for_version(client, "versions", 1)
    before = answer(client, "versions", photo)
    # A version copied from elsewhere, with a damaged file: version 1 goes on answering.
    shutil.copytree(folder / "1", folder / "2")
    manifest = folder / "2" / "manifest.json"
    (checkpoint,) = (folder / "2").glob("epoch-*")
    checkpoint.write_bytes(flipped(checkpoint.read_bytes()))
    manifest.write_text(manifest.read_text().replace('"version": 1', '"version": 2'))
    wait_for(lambda: any("sha256" in c.reason for c in client.list_checkpoints(model="versions")))
    assert answer(client, "versions", photo) == before
    with pytest.raises(ClientError, match="quarantined"):
        client.predict("versions", [photo], version=2)


def test_what_was_adopted_is_known_again_after_a_restart(
    start_daemon: Callable[..., LocalDaemon], connect: Callable[[LocalDaemon], Client], photo: bytes, tmp_path: Path
) -> None:
    (tmp_path / "checkpoints" / "kept").mkdir(parents=True)
    torch.save(resnet(5, seed=40).state_dict(), tmp_path / "checkpoints" / "kept" / "model.pt")
    first = start_daemon()
    client = connect(first)
    wait_for_version(client, "kept", 1)
    before = answer(client, "kept", photo)
    assert first.stop() == 0
    client = connect(start_daemon())
    assert answer(client, "kept", photo) == before  # ready means loaded
    assert [v.version for v in client.get_model("kept").versions] == [1]
