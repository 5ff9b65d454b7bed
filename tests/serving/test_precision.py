"""On real photos bf16 answers what fp32 answers, for classes as a user has them."""

import logging
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from backboned.registry import Backbone, Catalogue
from backboned.registry.weights import StageWeights, WeightStore
from backboned.server.compute.device import Device, usable_cores
from backboned.server.compute.preprocess import normalise, read, stack
from backboned.server.compute.stages import LoadedStage, StageStore
from backboned.server.serving.tree import Answer, Leg, run_tree

log = logging.getLogger(__name__)

NAME = "mobilenet_v2"
BATCH = 16
TRAINED_ON = 60
"""Photos of each class, as a user might have."""

pytestmark = [pytest.mark.shared, pytest.mark.slow, pytest.mark.timeout(300)]


class Outcome(NamedTuple):
    """Logits `[photos, classes]` of the 1,000 classes of ImageNet and of the 5 flowers."""

    imagenet: Tensor
    flowers: Tensor


class Flowers(NamedTuple):
    """Prepared photos `[3, crop, crop]`, class by class."""

    train: list[Tensor]
    val: list[Tensor]
    truth: Tensor


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return Catalogue.from_entry_points().get(NAME)


@pytest.fixture(scope="module")
def weights(shared: Path) -> Mapping[str, StageWeights]:
    return WeightStore(Catalogue.from_entry_points(), {NAME: shared / "weights" / f"{NAME}.pth"}).stages(NAME)


@pytest.fixture(scope="module")
def flowers(shared: Path, backbone: Backbone) -> Flowers:
    root = shared / "data" / "flower_photos"
    folders = sorted(path.name for path in (root / "val").iterdir())
    train = [file for name in folders for file in sorted((root / "train" / name).iterdir())[:TRAINED_ON]]
    val = [sorted((root / "val" / name).iterdir()) for name in folders]

    def prepared(file: Path) -> Tensor:
        return read(file.read_bytes(), backbone.preprocessing, max_pixels=10**7)

    with ThreadPoolExecutor(usable_cores()) as pool:
        truth = torch.tensor([place for place, files in enumerate(val) for _ in files])
        files = [file for each in val for file in each]
        return Flowers(list(pool.map(prepared, train)), list(pool.map(prepared, files)), truth)


@pytest.fixture(scope="module", autouse=True)
def all_cores() -> Iterator[None]:
    """These networks are large enough for it."""
    before = torch.get_num_threads()
    torch.set_num_threads(usable_cores())
    yield
    torch.set_num_threads(before)


def answers(backbone: Backbone, photos: list[Tensor], *paths: tuple[LoadedStage, ...]) -> list[list[Answer]]:
    """What each of the models at the ends of `paths` says of each photo, with the features below its head."""
    found: list[list[Answer]] = [[] for _ in paths]
    for begin in range(0, len(photos), BATCH):
        part = photos[begin : begin + BATCH]
        x = normalise(stack(part), backbone.preprocessing, paths[0][0].key.dtype)
        legs = [Leg(row, path, len(path) - 2) for path in paths for row in range(len(part))]
        with torch.inference_mode():
            for place, answer in enumerate(run_tree(legs, x)):
                assert isinstance(answer, Answer)
                found[place // len(part)].append(answer)
    return found


def probe(features: Tensor) -> StageWeights:
    """A head for the flowers: logistic regression on the features of `TRAINED_ON` photos a class."""
    layer, truth = nn.Linear(features.shape[1], 5), torch.arange(5).repeat_interleave(TRAINED_ON)
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    optimiser = torch.optim.LBFGS(layer.parameters(), max_iter=100, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimiser.zero_grad()
        value = F.cross_entropy(layer(features), truth) + 1e-3 * layer.weight.square().sum()
        value.backward()
        return value

    optimiser.step(loss)
    return StageWeights.of({"classifier.1.weight": layer.weight.detach(), "classifier.1.bias": layer.bias.detach()})


@pytest.fixture(scope="module")
def outcome(backbone: Backbone, weights: Mapping[str, StageWeights], flowers: Flowers) -> Callable[[str], Outcome]:
    """What is answered for all photos of `val` in a precision."""
    path = StageStore(Device.choose("cpu", "fp32")).path(backbone, weights)
    (train,) = answers(backbone, flowers.train, path)
    with torch.no_grad():
        features = torch.stack([a.embedding for a in train if a.embedding is not None]).clone()
    ours = {**weights, "head": probe(features)}

    def in_precision(precision: str) -> Outcome:
        store = StageStore(Device.choose("cpu", precision))
        paths = store.path(backbone, weights), store.path(backbone, ours)
        imagenet, mine = answers(backbone, flowers.val, *paths)
        return Outcome(torch.stack([a.logits for a in imagenet]), torch.stack([a.logits for a in mine]))

    return in_precision


def test_bf16_answers_as_fp32(outcome: Callable[[str], Outcome], flowers: Flowers) -> None:
    exact, reduced = outcome("fp32"), outcome("bf16")
    assert len(flowers.val) == len(exact.flowers) == 736
    figures = {}
    for name, a, b in zip(Outcome._fields, exact, reduced, strict=True):
        differ = a.argmax(1) != b.argmax(1)
        best, second = a.softmax(1).topk(2).values.unbind(1)
        figures[name] = 1 - differ.float().mean().item()
        figures[f"{name}_deviation"] = (a.softmax(1) - b.softmax(1)).abs().max().item()
        assert ((best - second)[differ] < 0.2).all()  # those that differ were nearly undecided
    log.info("of %d photos: %s", len(flowers.val), figures)  # -o log_cli=true -o log_cli_level=INFO shows it
    assert figures["flowers"] >= 0.995, figures
    right = [(each.flowers.argmax(1) == flowers.truth).float().mean().item() for each in (exact, reduced)]
    assert right[0] > 0.8 and right == pytest.approx([right[0]] * 2, abs=0.005)
    # Of 1,000 classes, among them none of most flowers, many are nearly as likely as another: 0.954 measured.
    assert figures["imagenet"] >= 0.93, figures
