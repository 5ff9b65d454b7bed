"""Features of images: found, computed and kept, and always the same bits."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from backboned.registry import Backbone, BackbonedError, Catalogue, Preprocessing
from backboned.registry.weights import StageWeights, WeightStore, seeded_state
from backboned.server.compute.decode import decode
from backboned.server.compute.device import Device
from backboned.server.compute.preprocess import normalise, prepare
from backboned.server.compute.stages import LoadedStage, StageStore
from backboned.server.training.datasets import Record, inspect
from backboned.server.training.feature_cache import FeatureCache
from backboned.server.training.features import Features, Images, Prepared
from backboned.server.training.frozen_stages import Frozen

Open = Callable[..., Features]
VIEWS = 2


def frozen_by(
    backbone: Backbone, weights: Mapping[str, StageWeights], preprocessing: Preprocessing, device: Device
) -> Frozen:
    """All stages but the head."""
    digests = {stage.name: weights[stage.name].digest for stage in backbone.chain[:-1]}
    return Frozen(backbone, digests, lambda: StageStore(device).path(backbone, weights)[:-1], preprocessing, device)


@pytest.fixture
def frozen(catalogue: Catalogue, weights_file: Path) -> Frozen:
    backbone = catalogue.get("digits")
    weights = WeightStore(catalogue, {"digits": weights_file}).stages("digits")
    device = Device.choose("cpu", "fp32")
    return frozen_by(backbone, weights, backbone.preprocessing, device)


@pytest.fixture
def paths(tmp_path: Path, paint: Callable[[Path, dict[str, int]], Path]) -> list[Path]:
    return sorted(paint(tmp_path / "photos", {"red": 14, "blue": 9}).glob("*/*.png"))


@pytest.fixture
def open_features(tmp_path: Path, frozen: Frozen) -> Open:
    """Features of files, in the cache that all of a test's features share; `cache` is the name of another one."""

    def make(
        paths: list[Path],
        *,
        views: int = VIEWS,
        limit_bytes: int = 2**24,
        workers: int = 2,
        cache: str = "cache",
        below: Frozen = frozen,
    ) -> Features:
        images = Images(lambda i: paths[i].read_bytes(), len(paths), views, below.preprocessing, max_pixels=10**6)
        return Features(images, below, FeatureCache(tmp_path / cache, limit_bytes=limit_bytes), workers=workers)

    return make


def nothing(done: Prepared) -> None:
    pass


def all_rows(features: Features, count: int, views: int = VIEWS) -> Tensor:
    """`[count, views, …]`."""
    images = torch.arange(count).repeat_interleave(views)
    rows = features.batch(images, torch.arange(views).repeat(count))
    return rows.view(count, views, *rows.shape[1:])


def test_features_are_what_the_frozen_stages_make_of_the_served_image(
    open_features: Open, frozen: Frozen, paths: list[Path]
) -> None:
    features = open_features(paths)
    done = features.prepare(nothing)
    assert (done.unreadable, done.cached, done.computed) == ({}, 0, 23 * VIEWS)
    chosen = torch.tensor([0, 17, 22])
    pixels = torch.stack(
        [prepare(decode(paths[i].read_bytes(), max_pixels=10**6), frozen.preprocessing) for i in chosen]
    )
    expected = normalise(pixels, frozen.preprocessing)
    for stage in frozen.path:
        expected = stage(expected)
    torch.testing.assert_close(features.batch(chosen, torch.zeros_like(chosen)), expected)


def test_what_is_cached_has_the_bits_of_what_is_computed_when_it_is_read(
    open_features: Open, paths: list[Path]
) -> None:
    kept, computed = open_features(paths), open_features(paths, limit_bytes=0, cache="none")
    for features in (kept, computed):
        features.prepare(nothing)
    assert kept.cached
    assert not computed.cached
    assert torch.equal(all_rows(kept, 23), all_rows(computed, 23))
    assert torch.equal(all_rows(kept, 23), all_rows(open_with_rows(open_features, paths), 23))


def test_stages_are_loaded_once_and_only_where_rows_are_missing(
    open_features: Open, frozen: Frozen, paths: list[Path]
) -> None:
    loads = []

    def load() -> Sequence[LoadedStage]:
        loads.append(1)
        return frozen.load()

    def below() -> Frozen:
        return replace(frozen, load=load)

    expected = open_features(paths[:20], below=below())
    expected.prepare(nothing)
    rows = all_rows(expected, 20)
    assert loads == [1]
    cached = open_features(paths[:20], below=below())
    cached.prepare(nothing)
    assert torch.equal(all_rows(cached, 20), rows)
    assert loads == [1]
    more = open_features(paths, below=below())
    assert more.prepare(nothing).computed == 3 * VIEWS
    assert loads == [1, 1]


def open_with_rows(open_features: Open, paths: list[Path]) -> Features:
    """Features over the cache as an earlier pass has left it, nothing computed."""
    features = open_features(paths)
    done = features.prepare(nothing)
    assert (done.cached, done.computed) == (len(paths) * VIEWS, 0)
    return features


def test_pixels_are_cached_where_every_stage_trains(open_features: Open, frozen: Frozen, paths: list[Path]) -> None:
    features = open_features(paths, below=replace(frozen, digests={}))
    features.prepare(nothing)
    again = open_features(paths, below=replace(frozen, digests={}))
    assert again.prepare(nothing).computed == 0
    image = prepare(decode(paths[4].read_bytes(), max_pixels=10**6), frozen.preprocessing)
    served = again.batch(torch.tensor([4]), torch.tensor([0]))
    assert torch.equal(served, normalise(image[None], frozen.preprocessing))


@pytest.mark.parametrize("name", ["digits", "mobilenet_v2", "resnet18"])
def test_a_row_has_the_same_bits_in_any_batch(
    open_features: Open, frozen: Frozen, paths: list[Path], name: str
) -> None:
    backbone = Catalogue.installed().get(name)
    parts = backbone.split(seeded_state(backbone, seed=3))
    weights = {stage: StageWeights.of(tensors) for stage, tensors in parts.items()}
    preprocessing = replace(backbone.preprocessing, resize_size=64, crop_size=64)
    below = frozen_by(backbone, weights, preprocessing, frozen.device)
    at_once = open_features(paths, below=below)
    at_once.prepare(nothing)
    scattered = open_features(paths[1::3], below=below, cache="scattered")
    scattered.prepare(nothing)
    rest = open_features(paths[::-1], below=below, cache="scattered")
    done = rest.prepare(nothing)
    assert done.cached == len(paths[1::3]) * VIEWS
    assert done.computed == len(paths) * VIEWS - done.cached
    expected = all_rows(at_once, 23)
    assert expected.isfinite().all()
    assert expected.std() > 0
    assert torch.equal(all_rows(rest, 23).flip(0), expected)


@pytest.mark.parametrize("workers", [1, 3])
def test_features_are_the_same_bits_with_any_number_of_workers(
    open_features: Open, paths: list[Path], workers: int
) -> None:
    two, other = open_features(paths), open_features(paths, workers=workers, cache="other")
    for features in (two, other):
        features.prepare(nothing)
    assert torch.equal(all_rows(two, 23), all_rows(other, 23))


def test_only_the_bytes_of_a_file_count(open_features: Open, paths: list[Path], tmp_path: Path) -> None:
    open_features(paths).prepare(nothing)
    renamed = []
    for number, path in enumerate(paths):
        renamed.append(path.rename(tmp_path / f"{number}.jpg"))
    with_rows = open_with_rows(open_features, renamed)
    before = all_rows(with_rows, 23)
    renamed[5].write_bytes(renamed[5].read_bytes() + b"\0")  # the same picture, and other bytes
    features = open_features(renamed)
    assert features.prepare(nothing).computed == VIEWS
    after = all_rows(features, 23)
    assert torch.equal(after[5, 0], before[5, 0])
    assert not torch.equal(after[5, 1], before[5, 1])  # another file has other random views
    assert torch.equal(after[:5], before[:5])


def test_an_image_that_is_there_twice_has_the_same_rows_for_both(open_features: Open, paths: list[Path]) -> None:
    paths[7].write_bytes(paths[2].read_bytes())
    features = open_features(paths)
    features.prepare(nothing)
    rows = all_rows(features, 23)
    assert torch.equal(rows[7], rows[2])
    assert torch.equal(rows[7], all_rows(open_with_rows(open_features, paths), 23)[2])


def test_views_differ_and_are_the_same_however_many_there_are(open_features: Open, paths: list[Path]) -> None:
    few, many = open_features(paths[:4], cache="few"), open_features(paths[:4], views=4)
    for features in (few, many):
        features.prepare(nothing)
    rows = all_rows(many, 4, views=4)
    assert torch.equal(rows[:, :VIEWS], all_rows(few, 4))
    for first in range(4):
        for second in range(first):
            assert not torch.allclose(rows[:, first], rows[:, second])


def test_more_views_compute_only_those_that_are_new(open_features: Open, paths: list[Path]) -> None:
    open_features(paths).prepare(nothing)
    done = open_features(paths, views=3).prepare(nothing)
    assert (done.cached, done.computed) == (23 * VIEWS, 23)


def test_images_that_cannot_be_read_are_told_by_index_and_reason(open_features: Open, paths: list[Path]) -> None:
    paths[3].write_bytes(paths[3].read_bytes()[:100])
    paths[20].write_bytes(b"text")
    paths[21].unlink()
    for limit_bytes in (2**24, 0):
        features = open_features(paths, limit_bytes=limit_bytes, cache=str(limit_bytes))
        reasons = features.prepare(nothing).unreadable
        assert sorted(reasons) == [3, 20, 21]
        assert "truncated" in reasons[3] or "damaged" in reasons[3]
        assert "not an image" in reasons[20]
        assert reasons[21] == "can't be read: No such file or directory"
        assert features.batch(torch.tensor([19, 22]), torch.zeros(2, dtype=torch.int64)).abs().sum() > 0
        assert features.cached == bool(limit_bytes)


def test_a_damaged_segment_is_computed_again(open_features: Open, paths: list[Path], tmp_path: Path) -> None:
    features = open_features(paths)
    features.prepare(nothing)
    expected = all_rows(features, 23)
    for segment in (tmp_path / "cache").glob("*/*.rows"):
        content = bytearray(segment.read_bytes())
        content[len(content) // 2] ^= 1
        segment.write_bytes(content)
    again = open_features(paths)
    assert again.prepare(nothing).computed == 23 * VIEWS
    assert torch.equal(all_rows(again, 23), expected)
    open_with_rows(open_features, paths)


def test_records_are_those_of_the_images_and_outlive_the_job(
    open_features: Open, frozen: Frozen, paths: list[Path]
) -> None:
    def record(path: Path) -> Record:
        data = path.read_bytes()
        return inspect(data, prepare(decode(data, max_pixels=10**6), frozen.preprocessing))

    expected = {i: record(path) for i, path in enumerate(paths)}
    assert open_features(paths).prepare(nothing).records == expected
    assert open_features(paths).prepare(nothing).records == expected


def test_what_is_not_cached_can_be_trained_on(open_features: Open, paths: list[Path], tmp_path: Path) -> None:
    features = open_features(paths, limit_bytes=0)
    features.prepare(nothing)
    assert not features.cached
    assert list((tmp_path / "cache").glob("*/*.rows")) == []
    rows = features.batch(torch.tensor([0, 9]), torch.tensor([0, 1]))
    weight = torch.ones(rows.shape[1], requires_grad=True)
    (rows @ weight).sum().backward()
    assert weight.grad is not None
    assert torch.equal(weight.grad, rows.sum(0))


def test_all_rows_are_reported(open_features: Open, paths: list[Path]) -> None:
    seen: list[int] = []
    open_features(paths).prepare(lambda done: seen.append(done.computed))
    assert seen == sorted(seen)
    assert seen[-1] == 23 * VIEWS


def test_what_the_progress_raises_ends_the_work_and_what_was_computed_stays(
    open_features: Open, paths: list[Path]
) -> None:
    expected = open_features(paths, cache="whole")
    expected.prepare(nothing)

    def stop(done: Prepared) -> None:
        if done.computed >= 16:
            raise InterruptedError("enough")

    with pytest.raises(InterruptedError, match="enough"):
        open_features(paths).prepare(stop)
    features = open_features(paths)
    done = features.prepare(nothing)
    assert (done.cached, done.computed) == (16, 23 * VIEWS - 16)
    assert torch.equal(all_rows(features, 23), all_rows(expected, 23))


def test_a_file_that_is_changed_while_it_is_read_does_not_pass_for_what_it_was(
    open_features: Open, paths: list[Path]
) -> None:
    first, other = paths[3].read_bytes(), paths[20].read_bytes()
    calls = iter(range(1000))

    def change(done: Prepared) -> None:
        if next(calls) == 1:  # every digest is known, and nothing computed
            paths[3].write_bytes(other)

    done = open_features(paths).prepare(change)
    assert done.unreadable == {3: "it was changed while it was read"}
    paths[3].write_bytes(first)
    again = open_features(paths)
    assert again.prepare(nothing).computed == VIEWS
    assert torch.equal(all_rows(again, 23), all_rows(open_features_of(open_features, paths), 23))


def open_features_of(open_features: Open, paths: list[Path]) -> Features:
    """Features that a cache of their own holds."""
    features = open_features(paths, cache="another")
    features.prepare(nothing)
    return features


def test_an_image_that_is_lost_while_nothing_is_cached_is_said(open_features: Open, paths: list[Path]) -> None:
    features = open_features(paths, limit_bytes=0)
    features.prepare(nothing)
    paths[2].unlink()
    with pytest.raises(BackbonedError, match="an image is lost: can't be read: No such file"):
        features.batch(torch.arange(4), torch.zeros(4, dtype=torch.int64))
