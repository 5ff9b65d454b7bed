"""A job that was ended anywhere, and goes on, writes what it would have written."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from backboned.registry.manifest import Manifest
from backboned.registry.payload import read_payload
from backboned.server.training.events import CheckpointWritten, EpochDone, Evaluation, FeatureProgress, JobEventPayload
from backboned.server.training.finetune import finetune
from backboned.server.training.resume import NAME
from backboned.server.training.spec import TrainerSpec

Paint = Callable[..., Path]
MakeSpec = Callable[..., TrainerSpec]
KINDS: dict[str, dict[str, object]] = {
    "head": {},
    "rate": {"learning_rate": 1e-2},
    "stages": {"trainable_stages": ("layer3",)},
    "auto": {"trainable_stages": ("auto",)},
}


@dataclass(frozen=True)
class Whole:
    """An uninterrupted job: its spec, its judgement, and how often it looked whether to end."""

    spec: TrainerSpec
    judged: Evaluation
    checks: int


class Ends:
    """A check that ends a job when it is called for the `last`th time."""

    def __init__(self, last: int) -> None:
        self.calls, self._last = 0, last

    def __call__(self) -> None:
        self.calls += 1
        if self.calls == self._last:
            raise InterruptedError("enough")


@pytest.fixture
def colours(tmp_path: Path, paint: Paint) -> Path:
    return paint(tmp_path / "data" / "colours", {"red": 12, "green": 12, "blue": 12})


@pytest.fixture
def make_fresh(make_spec: MakeSpec, colours: Path, tmp_path: Path) -> Callable[[str], TrainerSpec]:
    """Specs of equal jobs, each with an empty cache of its own."""

    def make(kind: str) -> TrainerSpec:
        spec = make_spec(colours, max_epochs=3, batch_size=8, **KINDS[kind])
        return replace(spec, cache_dir=tmp_path / f"cache-{spec.version}")

    return make


def judged(events: list[JobEventPayload]) -> Evaluation:
    (found,) = (e for e in events if isinstance(e, Evaluation))
    return found


def whole_job(spec: TrainerSpec) -> Whole:
    events: list[JobEventPayload] = []
    check = Ends(0)
    finetune(spec, events.append, check)
    return Whole(spec, judged(events), check.calls)


def folder(spec: TrainerSpec) -> Path:
    return spec.checkpoint_dir / spec.model / str(spec.version)


def assert_same_versions(spec: TrainerSpec, whole: Whole) -> None:
    mine, theirs = Manifest.read(folder(spec)), Manifest.read(folder(whole.spec))
    assert mine.complete
    assert mine.best_epoch == theirs.best_epoch
    assert [(e.epoch, e.metrics) for e in mine.epochs] == [(e.epoch, e.metrics) for e in theirs.epochs]
    for epoch in theirs.epochs:
        kept, expected = (read_payload(folder(s) / epoch.file).tensors for s in (spec, whole.spec))
        assert set(kept) == set(expected)
        assert all(torch.equal(t, expected[k]) for k, t in kept.items())


@pytest.mark.parametrize("kind", KINDS)
def test_wherever_it_was_ended_it_comes_to_the_same(kind: str, make_fresh: Callable[[str], TrainerSpec]) -> None:
    whole = whole_job(make_fresh(kind))
    for part in (0.02, 0.3, 0.6, 0.95):
        spec = make_fresh(kind)
        with pytest.raises(InterruptedError, match="enough"):
            finetune(spec, lambda _: None, Ends(1 + int(part * whole.checks)))
        torch.manual_seed(99)
        events: list[JobEventPayload] = []
        finetune(spec, events.append, lambda: None)
        assert_same_versions(spec, whole)
        assert judged(events) == whole.judged


@pytest.mark.parametrize("kind", ["head", "auto"])
def test_it_may_be_ended_again_and_again(kind: str, make_fresh: Callable[[str], TrainerSpec]) -> None:
    whole, spec = whole_job(make_fresh(kind)), make_fresh(kind)
    for _ in range(20):
        try:
            finetune(spec, lambda _: None, Ends(9 * whole.checks // 10))
            break
        except InterruptedError:
            continue
    assert_same_versions(spec, whole)


@pytest.mark.parametrize("told", [FeatureProgress, EpochDone, CheckpointWritten])
@pytest.mark.parametrize("kind", ["head", "auto"])
def test_a_listener_that_goes_away_does_no_harm(
    kind: str, told: type[JobEventPayload], make_fresh: Callable[[str], TrainerSpec]
) -> None:
    whole, spec, seen = whole_job(make_fresh(kind)), make_fresh(kind), 0

    def emit(event: JobEventPayload) -> None:
        nonlocal seen
        seen += isinstance(event, told)
        if isinstance(event, told) and seen == 2:  # an epoch may be on disk, and not yet in the state
            raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        finetune(spec, emit, lambda: None)
    finetune(spec, lambda _: None, lambda: None)
    assert_same_versions(spec, whole)


def test_finished_epochs_and_features_are_not_computed_again(make_fresh: Callable[[str], TrainerSpec]) -> None:
    spec = make_fresh("stages")
    before: list[JobEventPayload] = []
    with pytest.raises(InterruptedError, match="enough"):
        finetune(spec, before.append, Stop(folder(spec) / "epoch-0002.pt"))
    events: list[JobEventPayload] = []
    finetune(spec, events.append, lambda: None)
    epochs = [e for e in events if isinstance(e, EpochDone)]
    assert [e.epoch for e in epochs] == [1, 2, 3]
    assert epochs[:2] == [e for e in before if isinstance(e, EpochDone)]  # told again, with the speed of then
    (*_, features) = (e for e in events if isinstance(e, FeatureProgress))
    assert features.cached == features.total


class Stop:
    """A check that ends a job once a file is there."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def __call__(self) -> None:
        if self._file.exists():
            raise InterruptedError("enough")


@pytest.mark.parametrize("damage", ["state", "manifest", "cache"])
def test_what_was_damaged_meanwhile_is_made_anew(damage: str, make_fresh: Callable[[str], TrainerSpec]) -> None:
    whole, spec = whole_job(make_fresh("stages")), make_fresh("stages")
    with pytest.raises(InterruptedError, match="enough"):
        finetune(spec, lambda _: None, Stop(folder(spec) / "epoch-0002.pt"))
    files = {
        "state": [spec.work_dir / NAME],
        "manifest": [],
        "cache": list(spec.cache_dir.glob("*/*.rows")),
    }[damage]
    assert files or damage == "manifest"
    for file in files:
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 0xFF
        file.write_bytes(content)
    if damage == "manifest":
        (spec.work_dir / NAME).unlink()
        (folder(spec) / "manifest.json").write_text("{", encoding="utf-8")
    finetune(spec, lambda _: None, lambda: None)
    assert_same_versions(spec, whole)
