"""What validation has taught about answers lies in the checkpoint, and nothing else passes for it."""

import io
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from backboned.registry import BackbonedError, Catalogue, ErrorKind, Preprocessing
from backboned.registry.answers import Answers
from backboned.registry.directory import CheckpointDirectory
from backboned.registry.manifest import EpochMetrics, Manifest
from backboned.registry.recognise import Recogniser
from backboned.registry.reference import Reference
from backboned.registry.task import Task
from backboned.registry.version import VersionReader, VersionWriter
from backboned.registry.weights import StageWeights, WeightStore

CLASSES = ("ant", "bee", "wasp")
FEATURES = 256


def make(k: int = 3, d: int = FEATURES) -> Answers:
    generator = torch.Generator().manual_seed(k)
    centres, scale = torch.randn(k, d, generator=generator).half(), torch.rand(d, generator=generator) + 1
    return Answers(1.25, 0.7, 1.5, centres, scale, Reference.of([0.5, 0.75, 1.0], [1.0, 1.25, 1.5]))


def same(a: Answers | None, b: Answers) -> bool:
    assert a is not None
    told = [(x.temperature, x.uncertain_below, x.unfamiliar_beyond, x.reference) for x in (a, b)]
    return told[0] == told[1] and a.centres.equal(b.centres) and a.scale.equal(b.scale)


def test_a_distance_is_that_to_the_nearest_centre_in_deviations_a_value() -> None:
    answers = Answers(1.0, 0.5, 1.0, torch.tensor([[2.0, 0.0], [0.0, 1.0]]).half(), torch.tensor([2.0, 1.0]))
    # Of length 1 and scaled: [2, 0], which is the first centre; [0, 1], the second; [1.2, 0.8], nearer to the first.
    found = answers.distances(torch.tensor([[5.0, 0.0], [0.0, 0.1], [3.0, 4.0]]))
    assert found.tolist() == pytest.approx([0.0, 0.0, ((0.8**2 + 0.8**2) / 2) ** 0.5], abs=1e-3)


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 5), st.integers(1, 40), st.integers(0, 2**20))
def test_distances_are_those_of_the_definition(k: int, d: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    answers = make(k, d)
    features = torch.randn(7, d, generator=generator)
    unit = features / features.norm(dim=1, keepdim=True)
    difference = unit[:, None] * answers.scale - answers.centres.float()
    expected = difference.square().mean(dim=2).min(dim=1).values.sqrt()
    assert torch.allclose(answers.distances(features), expected, atol=2e-3)


def test_features_that_are_zero_have_a_distance_too() -> None:
    assert make().distances(torch.zeros(1, FEATURES)).isfinite().all()


def test_what_is_written_is_read_again_by_torch_alone() -> None:
    file = io.BytesIO()
    torch.save(make().to_payload(), file)
    file.seek(0)
    assert same(Answers.from_payload(torch.load(file, weights_only=True), classes=3, feature_size=FEATURES), make())


def test_a_checkpoint_of_before_there_was_a_reference_is_read_without_one() -> None:
    old = {key: value for key, value in make().to_payload().items() if key != "validation"}
    found = Answers.from_payload(old, classes=3, feature_size=FEATURES)
    assert found.reference is None and found.to_payload().keys() == old.keys()


HOSTILE: list[tuple[object, str]] = [
    (["no", "mapping"], "are a list"),
    ({"temperature": 0.0}, "temperature 0.0, which is no number in 0.05…20"),
    ({"temperature": float("nan")}, "temperature nan"),
    ({"temperature": True}, "temperature True"),
    ({"temperature": "1"}, "temperature 1"),
    ({"temperature": None}, "temperature None"),
    ({"uncertain_below": 1.5}, "uncertain_below 1.5"),
    ({"unfamiliar_beyond": -1.0}, "unfamiliar_beyond -1.0"),
    ({"unfamiliar_beyond": float("inf")}, "unfamiliar_beyond inf"),
    ({"centres": [[1.0]]}, "no centres"),
    ({"centres": torch.zeros(3, FEATURES, dtype=torch.long)}, "no centres"),
    ({"centres": torch.zeros(3, 7)}, "centres [3, 7]"),
    ({"centres": torch.zeros(5, FEATURES)}, "centres [5, 256]"),
    ({"centres": torch.zeros(0, FEATURES)}, "centres [0, 256]"),
    ({"centres": torch.full((3, FEATURES), torch.nan)}, "not finite"),
    ({"centres": torch.full((3, FEATURES), 1e6)}, "float16 can't hold"),
    ({"centres": torch.zeros(1).expand(3, FEATURES)}, "its bytes don't hold"),
    ({"centres": torch.zeros(3, FEATURES).to_sparse()}, "only plain dense ones"),
    ({"scale": torch.zeros(FEATURES)}, "a scale that isn't above 0"),
    ({"scale": torch.ones(3)}, "scale [3]"),
    ({"validation": None}, "NoneType for `validation`"),
    ({"validation": {"certainty": {"edges": [0.5], "counts": [1, 1]}}}, "no distance of validation"),
]


@pytest.mark.parametrize(("damage", "told"), HOSTILE, ids=lambda v: v if isinstance(v, str) else "")
def test_what_no_fine_tune_has_written_is_refused(damage: object, told: str) -> None:
    values = make().to_payload() | damage if isinstance(damage, dict) else damage
    with pytest.raises(BackbonedError) as caught:
        Answers.from_payload(values, classes=3, feature_size=FEATURES)
    assert told in caught.value.message and caught.value.kind is ErrorKind.DATA_LOSS


class Shelf:
    """A checkpoint directory with a version of `flowers` whose file has answers."""

    def __init__(self, root: Path, catalogue: Catalogue, recogniser: Recogniser, network: nn.Module) -> None:
        torch.save(network.state_dict(), root / "digits.pth")
        self.folder = root / "checkpoints" / "flowers"
        (self.folder / "1").mkdir(parents=True)
        self.directory = CheckpointDirectory(root / "checkpoints")
        self.store = WeightStore(catalogue, {"digits": root / "digits.pth"})
        self.reader = VersionReader(self.directory, recogniser, self.store)
        self.preprocessing = catalogue.get("digits").preprocessing

    def write(self, head: Mapping[str, Tensor], answers: Answers | None) -> Manifest:
        manifest = Manifest(
            model="flowers",
            version=1,
            backbone="digits",
            task=Task.SINGLE_LABEL,
            classes=CLASSES,
            stages={},
            preprocessing=self.preprocessing,
            epochs=(),
            best_epoch=0,
            complete=False,
        )
        writer = VersionWriter(self.folder / "1", manifest)
        own = {"head": StageWeights.of(head).digest}
        writer.write(
            1,
            head,
            stages={n: w.digest for n, w in self.store.stages("digits").items()} | own,
            optimizer_state={},
            loss=0.5,
            metrics=EpochMetrics(),
            best=True,
            answers=answers,
        )
        return writer.manifest

    def adopt(self) -> Answers | None:
        (drop,) = self.directory.scan().drops.values()
        version = self.reader.adopt(drop)
        assert version is not None
        return version.answers


@pytest.fixture
def head(make_digits: Callable[..., nn.Module]) -> dict[str, Tensor]:
    return {k: t for k, t in make_digits(3).state_dict().items() if k.startswith("fc.")}


@pytest.fixture
def shelf(tmp_path: Path, catalogue: Catalogue, recogniser: Recogniser, make_digits: Callable[..., nn.Module]) -> Shelf:
    return Shelf(tmp_path, catalogue, recogniser, make_digits())


def test_a_version_keeps_its_answers_and_one_without_has_none(shelf: Shelf, head: dict[str, Tensor]) -> None:
    assert same(shelf.reader.read(shelf.write(head, make())).answers, make())
    assert shelf.reader.read(shelf.write(head, None)).answers is None


def test_a_copy_of_our_own_file_keeps_them_when_it_is_dropped(shelf: Shelf, head: dict[str, Tensor]) -> None:
    shelf.write(head, make())
    shutil.copy(shelf.folder / "1" / "epoch-0001.pt", shelf.folder / "mine.pt")
    assert same(shelf.adopt(), make())


@pytest.mark.parametrize("told", [{"task": "multi_label"}, {"preprocessing": Preprocessing(20, 16).to_dict()}])
def test_they_hold_no_more_where_a_person_tells_otherwise(
    shelf: Shelf, head: dict[str, Tensor], told: dict[str, Any]
) -> None:
    shelf.write(head, make())
    shutil.copy(shelf.folder / "1" / "epoch-0001.pt", shelf.folder / "mine.pt")
    (shelf.folder / "mine.json").write_text(json.dumps(told))
    assert shelf.adopt() is None


def test_a_dropped_file_with_damaged_answers_is_refused_and_leaves_nothing(
    shelf: Shelf, head: dict[str, Tensor]
) -> None:
    shelf.write(head, replace(make(), temperature=1e9))
    shutil.move(shelf.folder / "1" / "epoch-0001.pt", shelf.folder / "mine.pt")
    with pytest.raises(BackbonedError, match="temperature"):
        shelf.adopt()
    assert sorted(p.name for p in shelf.folder.iterdir()) == ["1", "mine.pt"]
