"""How long after a dropped file is whole does the daemon answer with it?

    python benchmarks/reload.py

For each kind of file: the median and the range over several drops, from the moment that the last byte is written to
the first answer of the new version, over gRPC from this process. Beside it the limit: one bare `torch.load` of the same
file. The weights are random: the time does not depend on them.
"""

import statistics
import tempfile
import time
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn
from torchvision import models

from backboned.client import Client, ClientError
from backboned.server.commands.local_daemon import LocalDaemon

REPEATS = 5


def main() -> None:
    """Run all drops on one daemon and print a table."""
    photo = BytesIO()
    Image.effect_noise((500, 375), 60).convert("RGB").save(photo, "JPEG")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        weights = folder / "resnet50.pth"
        torch.save(models.resnet50().state_dict(), weights)
        flags = [
            f"--checkpoint-dir={folder / 'checkpoints'}",
            f"--state-dir={folder / 'state'}",
            f"--weights=resnet50={weights}",
            "--grpc-port=0",
            "--http-port=0",
            "--max-loaded-versions=2",
        ]
        with LocalDaemon.start(flags, folder) as daemon, Client(daemon.grpc) as client:
            print(f"{'dropped file':<32}{'MB':>6}{'to first answer':>18}{'range':>16}{'torch.load':>13}")
            for name, state in _states().items():
                _measure(client, folder, name, state, photo.getvalue())


def _states() -> Mapping[str, nn.Module | dict[str, object]]:
    resnet18, resnet50, vgg19 = models.resnet18(), models.resnet50(), models.vgg19()
    resnet18.fc, resnet50.fc = nn.Linear(512, 5), nn.Linear(2048, 5)
    vgg19.classifier[6] = nn.Linear(4096, 5)
    head = {"backbone": "resnet50", "state_dict": {"fc.weight": torch.randn(5, 2048), "fc.bias": torch.zeros(5)}}
    return {"resnet50-head-alone": head, "resnet18": resnet18, "resnet50": resnet50, "vgg19": vgg19}


def _measure(client: Client, folder: Path, name: str, model: nn.Module | dict[str, object], photo: bytes) -> None:
    (folder / "checkpoints" / name).mkdir(parents=True)
    file = folder / "checkpoints" / name / "model.pt"
    content: dict[str, object] = dict(model.state_dict()) if isinstance(model, nn.Module) else model
    seconds, loads = [], []
    for version in range(1, REPEATS + 2):
        _shift(content)
        torch.save(content, file)
        start = time.monotonic()
        while _serving(client, name) != version:
            time.sleep(0.01)
        assert client.predict(name, [photo], top_k=1).version == version
        seconds.append(time.monotonic() - start)
        start = time.monotonic()
        torch.load(file, weights_only=True)
        loads.append(time.monotonic() - start)
    seconds, loads = seconds[1:], loads[1:]  # the first one builds the backbone's description
    print(
        f"{name:<32}{file.stat().st_size / 1e6:>6.0f}{statistics.median(seconds):>16.2f} s"
        f"{min(seconds):>9.2f} - {max(seconds):.2f}{statistics.median(loads):>11.2f} s"
    )


def _shift(content: dict[str, object]) -> None:
    """Change one tensor a little, so that each drop is new."""
    for value in content.values():
        if isinstance(value, dict):
            _shift(value)
        elif isinstance(value, Tensor) and value.is_floating_point():
            value.view(-1)[0] += 0.01
            return


def _serving(client: Client, name: str) -> int:
    try:
        return client.get_model(name).serving_version
    except ClientError:
        return 0


if __name__ == "__main__":
    main()
