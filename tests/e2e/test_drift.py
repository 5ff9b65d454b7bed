"""Drift on real handwritten digits, without labels: none of digits like those in training, much of altered ones.

The daemon has a front end: what images come is counted where they are answered, whoever took the call.
"""

import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from backboned.client import Client
from backboned.server.commands.demo.digits import image_files, write_images
from backboned.server.commands.local_daemon import LocalDaemon
from backboned.server.training.finetune import finetune
from backboned.server.training.options import TrainingOptions
from backboned.server.training.spec import TrainerSpec
from backboned.v1 import model_service_pb2 as pb

Wait = Callable[[Callable[[], object]], None]
Fetch = Callable[[str], str]


@dataclass(frozen=True)
class Served:
    """A daemon with a version of `digits` that has just been trained, and digits that no training has seen."""

    client: Client
    checkpoints: Path
    metrics: Callable[[], str]
    held_out: list[bytes]

    def series(self, model: str) -> dict[str, float]:
        """The drift that Prometheus is told, by kind."""
        told = (line.split('kind="') for line in self.metrics().splitlines() if f'model="{model}"' in line)
        return {
            part[1].partition('"')[0]: float(part[1].split()[1])
            for part in told
            if part[0].startswith("backboned_serving_drift{")
        }

    def ask(self, model: str, images: list[bytes]) -> pb.Drift:
        for begin in range(0, len(images), 100):
            self.client.predict(model, images[begin : begin + 100], top_k=1)
        return self.client.get_model(model).drift


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, digits_weights: Path, fetch: Fetch) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("drift")
    write_images(folder, images_a_class=60, seed=0)
    flags = [
        f"--checkpoint-dir={folder / 'checkpoints'}",
        f"--state-dir={folder / 'state'}",
        f"--weights=digits={digits_weights}",
        "--device=cpu",
        "--precision=fp32",
        "--compile=off",
        "--grpc-port=0",
        "--http-port=0",
        "--frontends=1",
    ]
    held_out = [file.read_bytes() for file in image_files(folder / "held-out")]
    train(folder, digits_weights)
    with ExitStack() as stack:
        daemon = stack.enter_context(LocalDaemon.start(flags, folder))
        client = stack.enter_context(Client(daemon.grpc))
        yield Served(client, folder / "checkpoints", lambda: fetch(f"{daemon.http}/metrics"), held_out)
    assert "Traceback" not in daemon.log.read_text()


def test_digits_that_no_training_has_seen_are_no_drift(served: Served) -> None:
    assert served.client.get_model("digits").drift == pb.Drift() and served.series("digits") == {}
    few = served.ask("digits", served.held_out[::3])
    assert few.images == len(served.held_out[::3]) < 100 and not few.HasField("features")
    drift = served.ask("digits", served.held_out[1::3] + served.held_out[2::3])
    assert (drift.images, drift.drifted) == (len(served.held_out), False), drift
    assert drift.unfamiliar < 0.1
    told = {"confidence": drift.confidence.distance, "features": drift.features.distance}
    assert served.series("digits") == pytest.approx(told)


@pytest.mark.parametrize("how", ["inverted", "noisy"])
def test_digits_that_look_otherwise_are(served: Served, wait_for: Wait, how: str) -> None:
    """The checkpoint, dropped into another model, takes what its answers are compared with along."""
    (served.checkpoints / how).mkdir()
    (best,) = [v.checkpoint.uri for v in served.client.get_model("digits").versions]
    shutil.copy(best.removeprefix("file://"), served.checkpoints / how / "copy.pt")
    wait_for(lambda: any((m.name, m.serving_version) == (how, 1) for m in served.client.list_models()))
    drift = served.ask(how, [altered(image, how) for image in served.held_out])
    assert drift.drifted and drift.confidence.drifted and drift.confidence.lower, drift
    assert drift.features.drifted and not drift.features.lower, drift
    assert served.series(how)["features"] == pytest.approx(drift.features.distance)

    shutil.rmtree(served.checkpoints / how)
    wait_for(lambda: served.series(how) == {})


def train(folder: Path, weights: Path) -> None:
    """What a job does, in this process: a version of `digits` on the labelled ones."""
    (folder / "checkpoints" / "digits" / "1").mkdir(parents=True)
    (folder / "work").mkdir()
    spec = TrainerSpec(
        model="digits",
        version=1,
        backbone="digits",
        dataset=str(folder / "labelled"),
        data_roots=(folder,),
        options=TrainingOptions(max_epochs=1),
        checkpoint_dir=folder / "checkpoints",
        work_dir=folder / "work",
        weight_files={"digits": weights},
        plugin_modules=(),
        device="cpu",
        threads=1,
        max_image_pixels=10**6,
        precision="fp32",
        cache_dir=folder / "features",
        cache_bytes=2**30,
    )
    threads = torch.get_num_threads()
    finetune(spec, lambda _: None, lambda: None)
    torch.set_num_threads(threads)


def altered(image: bytes, how: str) -> bytes:
    picture = Image.open(BytesIO(image)).convert("L")
    if how == "inverted":
        picture = ImageOps.invert(picture)
    else:
        pixels = np.asarray(picture, dtype=float)
        noise = np.random.default_rng(len(image)).normal(0, 120, pixels.shape)
        picture = Image.fromarray((pixels + noise).clip(0, 255).astype(np.uint8))
    file = BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()
