"""The weights that backbones stand on: read once, from the operator's file or from what the plugin knows."""

import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from backboned.registry import Backbone, BackbonedError, Catalogue, ErrorKind
from backboned.registry.digest import stage_digest
from backboned.registry.weights import StageWeights, WeightStore, seeded_state

MakeDigits = Callable[..., nn.Module]


class KnownWeights:
    """What a plugin can fetch: these tensors, once `allowed`, or this error."""

    url = "https://weights.example/digits-12345678.pth"

    def __init__(self, state: Mapping[str, Any], error: Exception | None = None) -> None:
        self.state, self.error = state, error
        self.calls: list[Mapping[str, Any]] = []
        self.begun, self.allowed = threading.Event(), threading.Event()
        self.allowed.set()

    def get_state_dict(self, *_: Any, **options: Any) -> Mapping[str, Any]:
        self.calls.append(options)
        self.begun.set()
        assert self.allowed.wait(30)
        if self.error is not None:
            raise self.error
        return self.state


@pytest.fixture
def file(make_digits: MakeDigits, tmp_path: Path) -> Path:
    """A file of weights."""
    torch.save(make_digits(body=1).state_dict(), tmp_path / "digits.pth")
    return tmp_path / "digits.pth"


def store_with(digits: Backbone, weights: KnownWeights) -> WeightStore:
    """A store for a catalogue in which `digits` knows weights, and `other` none."""
    catalogue = Catalogue()
    catalogue.add(replace(digits, weights=weights), "tests")
    return WeightStore(catalogue)


def why_not(store: WeightStore, name: str = "digits") -> str:
    with pytest.raises(BackbonedError) as caught:
        store.stages(name)
    assert (caught.value.kind, caught.value.field) == (ErrorKind.FAILED_PRECONDITION, "backbone")
    assert "start the daemon with --weights digits=FILE, a state_dict" in caught.value.message
    return caught.value.message


def test_a_file_is_read_by_stage(catalogue: Catalogue, digits: Backbone, make_digits: MakeDigits, file: Path) -> None:
    stages = WeightStore(catalogue, {"digits": file}).stages("digits")
    assert list(stages) == [s.name for s in digits.chain]
    found = {k: t for stage in stages.values() for k, t in stage.tensors.items()}
    expected = {k: t for k, t in make_digits(body=1).state_dict().items() if not k.endswith("num_batches_tracked")}
    assert found.keys() == expected.keys() and all(found[k].equal(t) for k, t in expected.items())
    assert all(stage.digest == stage_digest(stage.tensors) for stage in stages.values())


def test_it_is_read_once(catalogue: Catalogue, file: Path) -> None:
    store = WeightStore(catalogue, {"digits": file})
    assert store.loaded("digits") == {}
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(store.stages, ["digits"] * 16))
    file.unlink()
    assert all(f is found[0] for f in (*found, store.stages("digits"), store.loaded("digits")))


def test_narrow_types_are_widened(catalogue: Catalogue, make_digits: MakeDigits, tmp_path: Path) -> None:
    half = {k: t.half() if t.is_floating_point() else t for k, t in make_digits().state_dict().items()}
    torch.save(half, tmp_path / "half.pth")
    stages = WeightStore(catalogue, {"digits": tmp_path / "half.pth"}).stages("digits")
    assert {t.dtype for stage in stages.values() for t in stage.tensors.values()} == {torch.float32}
    assert stages["stem"].digest == stage_digest({k: t for k, t in half.items() if k.startswith("stem")})


def test_without_weights_the_error_says_what_to_do(catalogue: Catalogue, digits: Backbone, tmp_path: Path) -> None:
    assert "its plugin knows none" in why_not(WeightStore(catalogue))
    missing = tmp_path / "missing.pth"
    assert f"the file given for it, {missing}, does not exist" in why_not(WeightStore(catalogue, {"digits": missing}))


def test_a_file_that_cannot_be_used_is_told_with_the_reason(
    catalogue: Catalogue, make_digits: MakeDigits, tmp_path: Path
) -> None:
    file = tmp_path / "digits.pth"
    store = WeightStore(catalogue, {"digits": file})
    file.write_bytes(b"not weights")
    assert f"{file} can't be read: not a checkpoint" in why_not(store)
    torch.save({"fc.weight": torch.zeros(10, 256), "fc.bias": torch.zeros(10)}, file)
    assert "lacks the stages stem, layer1, layer2, layer3" in why_not(store)
    torch.save({"conv.weight": torch.zeros(1)}, file)
    assert "it has 'conv.weight', which digits has not" in why_not(store)
    torch.save(make_digits().state_dict(), file)
    assert store.stages("digits")  # a failure isn't kept


def test_what_the_plugin_knows_is_fetched_and_checked(digits: Backbone, make_digits: MakeDigits) -> None:
    weights = KnownWeights({**make_digits(body=2).state_dict(), "_metadata": {}})
    store = store_with(digits, weights)
    store.check("digits")
    assert store.source("digits") == weights.url and not weights.calls
    assert store.stages("digits")["stem"].tensors["stem.0.0.weight"].equal(weights.state["stem.0.0.weight"])
    assert weights.calls == [{"progress": False, "check_hash": True}]


def test_a_failed_download_is_told_with_the_address(digits: Backbone) -> None:
    store = store_with(digits, KnownWeights({}, OSError("Name or service not known")))
    message = why_not(store)
    assert "they could not be downloaded (OSError: Name or service not known)" in message
    assert "(the file is https://weights.example/digits-12345678.pth)" in message


def test_the_operators_file_comes_before_the_plugins(digits: Backbone, file: Path, make_digits: MakeDigits) -> None:
    weights = KnownWeights(make_digits(body=2).state_dict())
    catalogue = Catalogue()
    catalogue.add(replace(digits, weights=weights), "tests")
    store = WeightStore(catalogue, {"digits": file})
    assert store.source("digits") == str(file)
    assert store.stages("digits") and not weights.calls


def test_while_one_backbone_is_fetched_everything_else_answers_at_once(
    digits: Backbone, file: Path, make_digits: MakeDigits
) -> None:
    weights = KnownWeights(make_digits().state_dict())
    weights.allowed.clear()
    catalogue = Catalogue()
    catalogue.add(replace(digits, weights=weights), "tests")
    catalogue.add(replace(digits, name="other"), "tests")
    store = WeightStore(catalogue, {"other": file})
    with ThreadPoolExecutor(2) as pool:
        fetch = pool.submit(store.stages, "digits")
        assert weights.begun.wait(30)
        try:
            elsewhere = pool.submit(lambda: (store.loaded("digits"), store.is_local("digits"), store.stages("other")))
            loaded, local, other = elsewhere.result(timeout=30)
            assert (loaded, local, fetch.done()) == ({}, False, False) and other
        finally:
            weights.allowed.set()
        assert fetch.result(timeout=30) and store.is_local("digits")


def test_what_lies_in_torchs_own_cache_is_local(
    digits: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    store = store_with(digits, KnownWeights({}))
    assert not store.is_local("digits")
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    (tmp_path / "hub" / "checkpoints" / "digits-12345678.pth").write_bytes(b"")
    assert store.is_local("digits")


def test_an_unknown_backbone_is_not_found(catalogue: Catalogue) -> None:
    store = WeightStore(catalogue)
    for ask in (store.stages, store.check, store.source, store.is_local):
        with pytest.raises(BackbonedError, match="did you mean 'digits'"):
            ask("digit")


def test_seeded_weights_are_the_same_each_time_and_leave_the_generator_alone(digits: Backbone) -> None:
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    first, second, other = (seeded_state(digits, seed) for seed in (0, 0, 1))
    assert torch.rand(1).equal(expected)

    def equal(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
        return all(a[k].equal(b[k]) for k in a)

    assert equal(first, second) and not equal(first, other)


def test_stage_weights_keep_integers_as_they_are() -> None:
    found = StageWeights.of({"a": torch.ones(2, dtype=torch.float64), "b": torch.tensor(3)})
    assert {k: t.dtype for k, t in found.tensors.items()} == {"a": torch.float32, "b": torch.int64}
