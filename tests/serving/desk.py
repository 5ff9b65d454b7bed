"""A desk where calls are answered, in a world of models whose networks are known."""

import asyncio
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision import transforms

from backboned.registry import Backbone, BackbonedError, Catalogue, Head, Preprocessing, Stage
from backboned.registry.directory import CheckpointDirectory
from backboned.registry.weights import WeightStore
from backboned.server.compute.device import Device
from backboned.server.compute.stages import StageStore
from backboned.server.database import open_database
from backboned.server.serving.admission import Admission
from backboned.server.serving.calls import Call, Pixels, Result, Target
from backboned.server.serving.choose import Chooser
from backboned.server.serving.engine import Engine
from backboned.server.serving.loader import Loader, LoaderSettings
from backboned.server.serving.outcomes import Outcomes
from backboned.server.serving.plan import Limits
from backboned.server.serving.predictor import Predictor
from backboned.server.serving.prepare import prepare
from backboned.server.serving.records import Records
from backboned.server.serving.remembered import Memory
from backboned.server.serving.snapshot import State
from backboned.server.troubles import Troubles

TIMEOUT_SECONDS = 30.0
CLASSES = ("ant", "bee", "wasp")
LEAVES = Backbone(
    "leaves",
    lambda: nn.Sequential(nn.Conv2d(3, 5, 3, 2), nn.BatchNorm2d(5), nn.Conv2d(5, 6, 3), nn.Linear(6, 9)),
    (Stage.of("first", "0", "1"), Stage.of("layer1", "2"), Stage.of("pool", lambda x: x.mean((2, 3)))),
    Head.at("3"),
    6,
    Preprocessing(20, 18, (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)),
)
"""Another backbone than `digits`, which sees images otherwise."""


@dataclass(frozen=True)
class World:
    """A loader that serves `networks`: three classes under `flowers`, a binary model, and one of many labels."""

    loader: Loader
    records: Records
    memory: Memory
    networks: Mapping[tuple[str, int], nn.Module]


@contextmanager
def open_world(root: Path, digits: Backbone, make_network: Callable[..., nn.Module]) -> Iterator[World]:
    """A world on an empty folder."""
    networks = {
        ("flowers", 1): make_network(head=1),
        ("flowers", 2): make_network(head=2),
        ("binary", 1): make_network(1, head=3),
        ("labels", 1): make_network(head=4),
        ("leaves", 1): leaves_network(),
    }
    catalogue = Catalogue()
    catalogue.add(digits, "tests")
    catalogue.add(LEAVES, "tests")
    directory = CheckpointDirectory(root / "checkpoints")
    with ExitStack() as stack:
        database = open_database(root / "state.sqlite")
        stack.callback(database.dispose)
        records = Records.of(database)
        records.aliases.set("flowers", "stable", 1)
        records.aliases.set("flowers", "broken", 3)
        loader = Loader(
            directory,
            catalogue,
            WeightStore(catalogue),
            StageStore(Device.choose("cpu", "fp32")),
            telemetry=_Silent(),
            records=records,
            troubles=Troubles(),
            settings=LoaderSettings(scan_interval_seconds=0.2, limits=Limits(settle_seconds=0.5)),
        )
        for (model, version), network in networks.items():
            (directory.root / model).mkdir(parents=True, exist_ok=True)
            torch.save(network.state_dict(), directory.root / model / f"{version}.pt")
        (directory.root / "flowers" / "classes.txt").write_text("\n".join(CLASSES))
        (directory.root / "binary" / "classes.txt").write_text("bee")
        (directory.root / "labels" / "1.json").write_text('{"classes": ["ant", "bee", "wasp"], "task": "multi_label"}')
        (directory.root / "refused").mkdir()
        (directory.root / "refused" / "mine.pt").write_bytes(b"no checkpoint")
        loader.start()
        stack.callback(loader.stop)
        _wait(loader, lambda: sum(len(m.versions) for m in loader.snapshot.models.values()) == len(networks))
        _damaged_copy(directory.root / "flowers" / "2", 3)
        _wait(loader, lambda: 3 in loader.snapshot.models["flowers"].versions)
        _wait(loader, lambda: all(f.state is State.QUARANTINED for f in loader.snapshot.refused))
        yield World(loader, records, Memory(database, 2**20, Troubles()), networks)


def leaves_network() -> nn.Module:
    """Random weights, large enough that images get clearly different answers."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        network = LEAVES.module(3).eval()
        for parameter in network.get_submodule("3").parameters():
            nn.init.normal_(parameter)
    return network


class _Silent:
    """A telemetry that nobody listens to."""

    def __getattr__(self, _: str) -> Callable[..., None]:
        return lambda *_: None


def _wait(loader: Loader, condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        loader.refresh().result(TIMEOUT_SECONDS)


def _damaged_copy(version: Path, number: int) -> None:
    copy = version.parent / str(number)
    shutil.copytree(version, copy, ignore=shutil.ignore_patterns("manifest.json"))
    (copy / "epoch-0000.pt").write_bytes(b"damaged")
    manifest = (version / "manifest.json").read_text()
    (copy / "manifest.json").write_text(manifest.replace(f'"version": {version.name}', f'"version": {number}'))


@dataclass(frozen=True)
class Desk:
    """Where calls are answered: a predictor, with the engine behind it, and what they tell."""

    predictor: Predictor
    engine: Engine
    telemetry: Any

    async def ask(self, model: str, *images: bytes | Pixels, **call: Any) -> Result:
        target = Target(model, call.pop("version", None), call.pop("alias", None))
        (result,) = await self.ask_several([target], *images, **call)
        return result

    async def ask_several(self, targets: Sequence[Target], *images: bytes | Pixels, **call: Any) -> tuple[Result, ...]:
        asked = Call(tuple(targets), images, **call)
        return await asyncio.wait_for(self.predictor.predict(asked), TIMEOUT_SECONDS)

    async def refusal(self, model: str, *images: bytes | Pixels, **call: Any) -> BackbonedError:
        with pytest.raises(BackbonedError) as caught:
            await self.ask(model, *images, **call)
        return caught.value


def make_desk(world: World, telemetry: Any, max_queued_images: int = 1000, max_queued_bytes: int = 10**8) -> Desk:
    """A desk whose engine isn't started yet."""
    engine = Engine(Device.choose("cpu", "fp32"), telemetry, partial(prepare, max_pixels=10_000), threads=1)
    admission = Admission(max_queued_images, max_queued_bytes, engine.seconds_to_clear)
    outcomes = Outcomes(world.memory, lambda: world.loader.snapshot, telemetry)
    predictor = Predictor(Chooser(world.loader, world.records, telemetry), engine, admission, outcomes, telemetry)
    return Desk(predictor, engine, telemetry)


def picture(seed: int, width: int = 24, height: int = 20) -> Image.Image:
    generator = torch.Generator().manual_seed(seed)
    return Image.fromarray(torch.randint(0, 256, (height, width, 3), generator=generator, dtype=torch.uint8).numpy())


def png(seed: int) -> bytes:
    file = BytesIO()
    picture(seed).save(file, "PNG")
    return file.getvalue()


def logits(network: nn.Module, image: Image.Image) -> Tensor:
    """What the script that trained it would get: torchvision's own transforms, and the network."""
    with torch.inference_mode():
        return torch.as_tensor(network(view(image)))[0]


def view(image: Image.Image, preprocessing: Preprocessing | None = None) -> Tensor:
    """`[1, 3, crop, crop]`, as torchvision makes it; as `digits` sees it unless told otherwise."""
    seen = preprocessing or Preprocessing(16, 16, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    steps = transforms.Compose(
        [
            transforms.Resize(seen.resize_size),
            transforms.CenterCrop(seen.crop_size),
            transforms.ToTensor(),
            transforms.Normalize(seen.mean, seen.std),
        ]
    )
    return torch.as_tensor(steps(image))[None]
