from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from backboned.registry import Catalogue
from backboned.registry.weights import WeightStore
from backboned.server.compute.decode import decode
from backboned.server.compute.device import Device
from backboned.server.compute.preprocess import prepare
from backboned.server.compute.stages import StageStore
from backboned.server.training.datasets import Access, Sample, read_dataset
from backboned.server.training.features import Frozen, Images, MappedFeatures
from backboned.server.training.options import TrainingOptions

Open = Callable[..., MappedFeatures]


@pytest.fixture
def frozen(catalogue: Catalogue, weights_file: Path) -> Frozen:
    backbone = catalogue.get("digits")
    weights = WeightStore(catalogue, {"digits": weights_file}).stages("digits")
    device = Device.choose("cpu")
    return Frozen(StageStore(device).path(backbone, weights)[:-1], backbone.preprocessing, device)


@pytest.fixture
def paths(tmp_path: Path, paint: Callable[[Path, dict[str, int]], Path]) -> list[Path]:
    return sorted(paint(tmp_path / "photos", {"red": 30, "blue": 20}).glob("*/*.png"))


@pytest.fixture
def open_features(tmp_path: Path, frozen: Frozen) -> Open:
    def make(paths: list[Path], *, views: int = 1, budget_bytes: int = 2**20, workers: int = 2) -> MappedFeatures:
        root = paths[0].parents[1]
        dataset = read_dataset(root, TrainingOptions(), Access([root]))
        samples = [Sample(path.relative_to(root).as_posix(), (0,)) for path in paths]
        images = Images(dataset, samples, views, frozen.preprocessing, seed=0, max_pixels=10**6)
        return MappedFeatures(images, frozen, tmp_path / "features", budget_bytes=budget_bytes, workers=workers)

    return make


def nothing(rows: int) -> None:
    pass


def test_features_are_what_the_frozen_stages_make_of_the_served_image(
    open_features: Open, frozen: Frozen, paths: list[Path]
) -> None:
    features = open_features(paths)
    assert features.prepare(nothing) == {}
    chosen = torch.tensor([0, 17, 49])
    pixels = [prepare(decode(paths[i].read_bytes(), max_pixels=10**6), frozen.preprocessing) for i in chosen]
    assert features.keeps_activations
    torch.testing.assert_close(features.batch(chosen, torch.zeros_like(chosen)), frozen(torch.stack(pixels)))


def test_what_is_too_large_is_computed_each_time_and_is_the_same(open_features: Open, paths: list[Path]) -> None:
    images, views = torch.arange(50), torch.arange(50) % 3
    kept = open_features(paths, views=3)
    kept.prepare(nothing)
    expected = kept.batch(images, views).clone()
    computed = open_features(paths, views=3, budget_bytes=100)
    computed.prepare(nothing)
    assert not computed.keeps_activations
    torch.testing.assert_close(computed.batch(images, views), expected)
    (computed.batch(images, views) @ torch.nn.Parameter(torch.ones(expected.shape[1]))).sum().backward()


def test_features_are_the_same_bits_with_any_number_of_workers(open_features: Open, paths: list[Path]) -> None:
    images, views = torch.arange(50), torch.zeros(50, dtype=torch.int64)
    rows = []
    for workers in (1, 3):
        features = open_features(paths, workers=workers)
        features.prepare(nothing)
        rows.append(features.batch(images, views).clone())
    assert torch.equal(*rows)


def test_views_differ_and_are_repeatable(open_features: Open, paths: list[Path]) -> None:
    def rows(views: int) -> torch.Tensor:
        features = open_features(paths[:4], views=views)
        features.prepare(nothing)
        return torch.stack([features.batch(torch.arange(4), torch.full((4,), v)) for v in range(views)])

    first = rows(3)
    assert torch.equal(rows(3), first)
    assert torch.allclose(rows(1)[0], first[0])
    assert not torch.allclose(first[0], first[1])
    assert not torch.allclose(first[1], first[2])


def test_images_that_cannot_be_read_are_told_by_index_and_reason(open_features: Open, paths: list[Path]) -> None:
    paths[3].write_bytes(paths[3].read_bytes()[:100])
    paths[20].write_bytes(b"text")
    paths[21].unlink()
    features = open_features(paths)
    reasons = features.prepare(nothing)
    assert sorted(reasons) == [3, 20, 21]
    assert "truncated" in reasons[3] or "damaged" in reasons[3]
    assert "not an image" in reasons[20]
    assert reasons[21] == "can't be read: No such file or directory"
    assert features.batch(torch.tensor([19, 22]), torch.zeros(2, dtype=torch.int64)).abs().sum() > 0


def test_all_rows_are_reported(open_features: Open, paths: list[Path]) -> None:
    done: list[int] = []
    open_features(paths, views=2).prepare(done.append)
    assert sum(done) == 100


def test_what_the_progress_raises_ends_the_work(open_features: Open, paths: list[Path]) -> None:
    def stop(rows: int) -> None:
        raise InterruptedError("enough")

    with pytest.raises(InterruptedError, match="enough"):
        open_features(paths).prepare(stop)
