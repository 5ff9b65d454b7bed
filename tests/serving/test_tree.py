"""Batches through models that share stages: every row is answered as its model alone would."""

import gc
from collections.abc import Callable, Mapping

import pytest
import torch
from torch import Tensor, nn

from backboned.registry import Backbone, Head, Preprocessing, Stage
from backboned.registry.manifest import Epoch, Manifest
from backboned.registry.task import Task
from backboned.registry.weights import StageWeights, seeded_state
from backboned.server.compute.device import Device
from backboned.server.compute.stages import StageStore
from backboned.server.serving.snapshot import LoadedModel
from backboned.server.serving.tree import Answer, Leg, pool, run_tree


def _build() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 5, 3), nn.Linear(5, 7))


BACKBONE = Backbone(
    "small",
    _build,
    (Stage.of("first", "0", "1", "2"), Stage.of("second", "3"), Stage.of("pool", lambda x: x.mean((2, 3)))),
    Head.at("4"),
    5,
    Preprocessing(8, 8),
)


def weights(seed: int, outputs: int = 7) -> dict[str, StageWeights]:
    state = seeded_state(BACKBONE, seed)
    generator = torch.Generator().manual_seed(seed)
    state["4.weight"], state["4.bias"] = torch.randn(outputs, 5, generator=generator), torch.zeros(outputs)
    return {name: StageWeights.of(tensors) for name, tensors in BACKBONE.split(state).items()}


def load(store: StageStore, stages: Mapping[str, StageWeights]) -> LoadedModel:
    epoch = Epoch(1, "epoch-0001.pt", "", 0, 0.0)
    manifest = Manifest(
        model="m",
        version=1,
        backbone="small",
        task=Task.SINGLE_LABEL,
        classes=("a", "b"),
        stages={},
        preprocessing=BACKBONE.preprocessing,
        epochs=(epoch,),
        best_epoch=1,
        complete=True,
    )
    return LoadedModel(manifest, store.path(BACKBONE, stages), ())


@pytest.fixture
def store() -> StageStore:
    return StageStore(Device.choose("cpu", "fp32"))


def whole(stages: Mapping[str, StageWeights]) -> nn.Module:
    model = BACKBONE.module(len(stages["head"].tensors["4.weight"]))
    model.load_state_dict({k: t for s in stages.values() for k, t in s.tensors.items()})
    return model.eval()


def legs(*models: LoadedModel) -> list[Leg]:
    """A row for each model."""
    return [Leg(row, model.path) for row, model in enumerate(models)]


Counted = list[tuple[str, int]]


@pytest.fixture
def count(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Counted]:
    """Lists the stages of models that run, with the images that they run on."""

    def counted_stages(*models: LoadedModel) -> Counted:
        calls: Counted = []
        for stage in {s for m in models for s in m.path}:
            forward = stage._forward

            def counted(model: nn.Module, x: Tensor, stage=stage, forward=forward) -> Tensor:  # type: ignore[no-untyped-def]
                calls.append((stage.key.stage, len(x)))
                out: Tensor = forward(model, x)
                return out

            monkeypatch.setattr(stage, "_forward", counted)
        return calls

    return counted_stages


def variants(base: Mapping[str, StageWeights]) -> list[Mapping[str, StageWeights]]:
    """Stages of models that share all of `base`, all but the head, the first stage, and nothing."""
    return [
        base,
        {**base, "head": weights(1, outputs=3)["head"]},
        {**base, "second": weights(2)["second"], "head": weights(2)["head"]},
        weights(3),
        {**base, "head": weights(4, outputs=2)["head"]},
    ]


@torch.inference_mode()
def test_each_row_is_answered_as_its_model_alone_would(store: StageStore) -> None:
    chosen = variants(weights(0))
    models = [load(store, stages) for stages in chosen]
    order = [4, 0, 1, 2, 3, 0, 2, 4, 1]
    x = torch.randn(len(order), 3, 8, 8)
    answers = run_tree(legs(*(models[i] for i in order)), x)
    for i, image, answer in zip(order, x, answers, strict=True):
        assert isinstance(answer, Answer)
        expected = BACKBONE.forward(whole(chosen[i]), image[None])[0]
        torch.testing.assert_close(answer.logits, expected, atol=1e-5, rtol=1e-5)
        assert answer.embedding is None


@torch.inference_mode()
def test_an_image_that_several_models_look_at_runs_once_through_what_they_share(
    store: StageStore, count: Callable[..., Counted]
) -> None:
    chosen = variants(weights(0))
    models = [load(store, stages) for stages in chosen]
    calls = count(*models)
    x = torch.randn(2, 3, 8, 8)
    answers = run_tree([Leg(row, model.path) for row in range(2) for model in models], x)
    for (row, i), answer in zip([(row, i) for row in range(2) for i in range(5)], answers, strict=True):
        assert isinstance(answer, Answer)
        expected = BACKBONE.forward(whole(chosen[i]), x[row : row + 1])[0]
        torch.testing.assert_close(answer.logits, expected, atol=1e-5, rtol=1e-5)
    assert sorted(calls) == sorted([*[("first", 2)] * 2, *[("second", 2)] * 3, *[("pool", 2)] * 3, *[("head", 2)] * 5])


@torch.inference_mode()
def test_a_tap_brings_the_pooled_output_of_its_stage_to_its_own_leg(store: StageStore) -> None:
    chosen = variants(weights(0))
    models = [load(store, stages) for stages in chosen]
    x = torch.randn(2, 3, 8, 8)
    taps = [0, 1, 2, None, 0]
    answers = run_tree(
        [Leg(i % 2, model.path, tap) for i, (model, tap) in enumerate(zip(models, taps, strict=True))], x
    )
    for i, (tap, answer) in enumerate(zip(taps, answers, strict=True)):
        assert isinstance(answer, Answer)
        image, network = x[i % 2 : i % 2 + 1], whole(chosen[i])
        torch.testing.assert_close(answer.logits, BACKBONE.forward(network, image)[0], atol=1e-5, rtol=1e-5)
        if tap is None:
            assert answer.embedding is None
            continue
        for stage in BACKBONE.chain[: tap + 1]:
            image = stage.forward(network, image)
        assert answer.embedding is not None
        expected = image[0].mean((1, 2)) if image.dim() == 4 else image[0]
        torch.testing.assert_close(answer.embedding, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("shape", "mean_over"), [((2, 5), None), ((2, 7, 5), 1), ((2, 5, 3, 4), (2, 3)), ((2, 5, 2, 3, 4), (2, 3, 4))]
)
def test_pooling_averages_over_positions(shape: tuple[int, ...], mean_over: int | tuple[int, ...] | None) -> None:
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    expected = x.float() if mean_over is None else x.float().mean(mean_over)
    assert pool(x).shape == (2, 5) and pool(x).dtype == torch.float32
    torch.testing.assert_close(pool(x), expected)


@torch.inference_mode()
def test_a_shared_stage_runs_once_a_batch(store: StageStore, count: Callable[..., Counted]) -> None:
    base = weights(0)
    models = [load(store, base | {"head": weights(seed)["head"]}) for seed in range(6)]
    calls = count(*models)
    run_tree(legs(*models), torch.randn(6, 3, 8, 8))
    assert calls == [("first", 6), ("second", 6), ("pool", 6), *[("head", 1)] * 6]


@torch.inference_mode()
def test_a_stage_that_fails_costs_its_own_rows_alone(store: StageStore, monkeypatch: pytest.MonkeyPatch) -> None:
    base = weights(0)
    good, bad = load(store, base), load(store, base | {"head": weights(9)["head"]})

    def fail(model: nn.Module, x: Tensor) -> Tensor:
        raise MemoryError

    monkeypatch.setattr(bad.path[-1], "_forward", fail)
    answers = run_tree(legs(good, bad, good), torch.randn(3, 3, 8, 8))
    assert [isinstance(answer, Exception) for answer in answers] == [False, True, False]


def test_equal_stages_are_one_object_and_are_freed_with_their_last_holder(store: StageStore) -> None:
    base = weights(0)
    first, second = load(store, base), load(store, weights(0) | {"head": weights(1)["head"]})
    assert first.path[0] is second.path[0] and first.path[-1] is not second.path[-1]
    stages, size = store.loaded()
    assert stages == 5
    del second
    gc.collect()
    assert store.loaded()[0] == 4 and store.loaded()[1] < size
    del first
    gc.collect()
    assert store.loaded() == (0, 0)


def test_on_the_cpu_a_loaded_stage_shares_the_weights_memory(store: StageStore) -> None:
    base = weights(0)
    model = load(store, base)
    pointers = {t.data_ptr() for t in base["first"].tensors.values() if t.is_floating_point()}
    loaded = {t.data_ptr() for t in model.path[0]._module.state_dict().values() if t.is_floating_point()}
    assert loaded == pointers
