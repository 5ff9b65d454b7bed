"""Stages are compiled aside, the ones that are worth it, and answer as before; without a compiler eager code serves."""

import json
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from backboned.registry import Catalogue
from backboned.registry.weights import StageWeights, seeded_state
from backboned.server.compute.artefacts import ArtefactStore
from backboned.server.compute.compiler import StageCompiler
from backboned.server.compute.device import Device
from backboned.server.compute.reuse import reuse
from backboned.server.compute.stages import LoadedStage, StageStore, run_path
from backboned.server.compute.toolchain import missing_for_compiling

MakeNetwork = Callable[..., nn.Module]
StagesOf = Callable[[nn.Module], dict[str, StageWeights]]
Path_ = tuple[LoadedStage, ...]

PATIENCE_SECONDS = 110.0
IMAGES = torch.rand(9, 3, 16, 16, generator=torch.Generator().manual_seed(0))
PLUGIN = '''
"""A backbone of two small convolutions."""
from torch import nn

from backboned.registry import Backbone, Head, Preprocessing, Stage, register


def build():
    """Untrained."""
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, 2), nn.Linear(8, 4))


def mean(x):
    """Over the picture."""
    return x.mean((2, 3))


def tiny(name="tiny", *stages):
    """A backbone of these stages, on the same network."""
    return Backbone(name, build, stages, Head.at("3"), 8, Preprocessing(16, 16))


@register
def one():
    """All convolutions in one stage."""
    return tiny("one", Stage.of("body", "0", "1", "2"), Stage.of("pool", mean))


@register
def two():
    """A stage for each convolution."""
    return tiny("two", Stage.of("first", "0", "1"), Stage.of("second", "2", mean))
'''
compiles = pytest.mark.skipif(bool(missing_for_compiling()), reason=missing_for_compiling() or "nothing")


def run(path: Sequence[LoadedStage], x: Tensor = IMAGES) -> Tensor:
    with torch.inference_mode():
        return run_path(path, x.contiguous(memory_format=torch.channels_last))


@dataclass(frozen=True)
class Tiny:
    """Backbones in a plugin module that a process apart can import."""

    catalogue: Catalogue
    plugins: tuple[str, ...]

    def weights(self, name: str, seed: int = 0) -> Mapping[str, StageWeights]:
        backbone = self.catalogue.get(name)
        parts = backbone.split(seeded_state(backbone, seed) | _head(seed))
        return {stage: StageWeights.of(tensors) for stage, tensors in parts.items()}

    def load(self, name: str, seed: int = 0) -> Path_:
        """A path that has been called once, as the loader does."""
        path = StageStore(Device.choose("cpu", "fp32")).path(self.catalogue.get(name), self.weights(name, seed))
        run(path)
        return path

    def compiler(self, folder: Path, *, enabled: bool = True) -> StageCompiler:
        return StageCompiler(
            Device.choose("cpu", "fp32"),
            ArtefactStore(folder, limit_bytes=2**30),
            plugins=self.plugins,
            concurrency=2,
            largest_batch=2,
            enabled=enabled,
        )


def _head(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {"3.weight": torch.randn(4, 8, generator=generator), "3.bias": torch.randn(4, generator=generator)}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tiny]:
    folder = tmp_path_factory.mktemp("plugin")
    (folder / "tiny_backbones_to_compile.py").write_text(PLUGIN)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        patch.setenv("PYTHONPATH", str(folder), prepend=os.pathsep)
        plugins = ("tiny_backbones_to_compile",)
        yield Tiny(Catalogue.installed(plugins), plugins)


@contextmanager
def running(compiler: StageCompiler) -> Iterator[StageCompiler]:
    compiler.start()
    try:
        yield compiler
    finally:
        compiler.stop()


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)


@pytest.fixture(scope="module")
def artefacts(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What came of compiling the backbone `one` for batches of 1 and 2."""
    folder, path = tmp_path_factory.mktemp("compiled"), tiny.load("one")
    with running(tiny.compiler(folder)) as compiler:
        compiler.consider([path])
        assert compiler.pending() == 1 and compiler.compiled() == 0
        wait_for(lambda: compiler.pending() == 0)
        assert compiler.compiled() == 1 and path[0].compiled is not None
    return folder


@compiles
@pytest.mark.slow
def test_compiled_stages_answer_as_eager_ones_from_several_threads_at_once(tiny: Tiny, artefacts: Path) -> None:
    eager, path = tiny.load("one"), tiny.load("one")
    tiny.compiler(artefacts).consider([path])
    assert [stage.compiled is not None for stage in path] == [True, False, False]
    inputs = [IMAGES[:size] for size in (1, 2, 3, 5, 8, 9)]
    expected = [run(eager, x) for x in inputs]
    begin = threading.Barrier(2)

    def ask(turn: int) -> list[Tensor]:
        begin.wait(10)
        order = inputs if turn else inputs[::-1]
        return [run(path, x) for _ in range(20) for x in order]

    with ThreadPoolExecutor(2) as pool:
        forwards, backwards = pool.map(ask, (1, 0))
    for x, y in zip(expected * 20, forwards, strict=True):
        torch.testing.assert_close(y, x, atol=1e-5, rtol=1e-5)
    for x, y in zip(expected[::-1] * 20, backwards, strict=True):
        torch.testing.assert_close(y, x, atol=1e-5, rtol=1e-5)


@compiles
@pytest.mark.slow
def test_weights_lie_on_pages_of_their_own_and_all_sizes_are_timed(artefacts: Path) -> None:
    libraries = sorted(artefacts.glob("*.so"))
    assert len(libraries) == 2
    for library in libraries:
        imported = library.read_bytes()
        assert b"\0valloc\0" in imported and b"\0malloc\0" not in imported
        told = json.loads(library.with_suffix(".json").read_text())
        assert 0 < told["seconds"] < 1


@compiles
@pytest.mark.slow
def test_what_is_compiled_on_disk_serves_at_once(tiny: Tiny, artefacts: Path) -> None:
    path = tiny.load("one")
    compiler = tiny.compiler(artefacts)  # not started: there is no thread, and no process
    compiler.consider([path])
    assert compiler.compiled() == 1 and compiler.pending() == 0
    assert path[0].compiled is not None
    assert sum(path[0].pieces(3)) == 3 and sum(path[0].compiled.pieces(3)) in (3, 4)


@compiles
@pytest.mark.slow
def test_what_is_compiled_is_reused_in_the_size_that_is_wanted(tiny: Tiny, artefacts: Path, tmp_path: Path) -> None:
    cpu = Device.choose("cpu", "fp32")

    def reused(images: int, folder: Path = artefacts) -> Path_:
        path = tiny.load("one")
        reuse(path, ArtefactStore(folder, limit_bytes=2**30), cpu, images=images, concurrency=2)
        return path

    single, pair, nothing = reused(1), reused(2), reused(2, tmp_path)
    assert [stage.compiled is not None for stage in single] == [True, False, False]
    assert single[0].pieces(3) == (1, 1, 1)  # no other size is loaded
    assert pair[0].compiled is not None and nothing[0].compiled is None
    torch.testing.assert_close(run(pair), run(nothing), atol=1e-5, rtol=1e-5)


@compiles
@pytest.mark.slow
def test_what_is_damaged_is_not_reused(tiny: Tiny, artefacts: Path, tmp_path: Path) -> None:
    for file in artefacts.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes()[:-1])
    path = tiny.load("one")
    store = ArtefactStore(tmp_path, limit_bytes=2**30)
    reuse(path, store, Device.choose("cpu", "fp32"), images=2, concurrency=2)
    assert path[0].compiled is None
    torch.testing.assert_close(run(path), run(tiny.load("one")))


@compiles
@pytest.mark.slow
def test_other_weights_and_other_inputs_run_eagerly(tiny: Tiny, artefacts: Path) -> None:
    other, path = tiny.load("one", seed=1), tiny.load("one")
    compiler = tiny.compiler(artefacts)
    compiler.consider([other])
    assert other[0].compiled is None and compiler.pending() == 1
    compiler.consider([path, path, other])  # most models stand on the one that is known
    assert compiler.pending() == 0 and compiler.compiled() == 1
    larger = torch.rand(2, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(run(path, larger), run(tiny.load("one"), larger))
    assert path[0].compiled is not None


@compiles
@pytest.mark.slow
def test_a_compiled_stage_is_freed_with_its_last_holder(tiny: Tiny, artefacts: Path) -> None:
    path = tiny.load("one")
    compiler = tiny.compiler(artefacts)
    compiler.consider([path])
    assert compiler.compiled() == 1
    stage, compiled = weakref.ref(path[0]), weakref.ref(path[0].compiled or path[0])
    del path
    assert compiler.compiled() == 0
    assert stage() is None and compiled() is None


@compiles
@pytest.mark.slow
def test_a_damaged_library_is_not_run_and_is_made_again(
    tiny: Tiny, artefacts: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for file in artefacts.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    for library in tmp_path.glob("*.so"):
        content = bytearray(library.read_bytes())
        content[len(content) // 2] ^= 0xFF
        library.write_bytes(content)
    path = tiny.load("one")
    compiler = tiny.compiler(tmp_path)
    compiler.consider([path])
    assert path[0].compiled is None and compiler.pending() == 1
    assert "is damaged; it will be compiled again" in caplog.text
    torch.testing.assert_close(run(path), run(tiny.load("one")))


@compiles
@pytest.mark.slow
def test_a_stop_ends_it_at_once_and_leaves_nothing(tiny: Tiny, tmp_path: Path) -> None:
    path = tiny.load("two")
    with running(tiny.compiler(tmp_path)) as compiler:
        compiler.consider([path])
        wait_for(lambda: compiler._process is not None)
        process = compiler._process
    assert process is not None and process.poll() is not None
    assert not compiler._thread.is_alive() and list(tmp_path.iterdir()) == []
    assert run(path).equal(run(tiny.load("two")))


@compiles
@pytest.mark.slow
def test_a_stop_is_no_warning(tiny: Tiny, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tiny.load("two")
    with running(tiny.compiler(tmp_path)) as compiler:
        compiler.consider([path])
        wait_for(lambda: compiler._process is not None)
    assert not [record for record in caplog.records if record.levelname != "INFO"]


@compiles
@pytest.mark.slow
def test_a_process_that_is_killed_costs_one_stage_alone(tiny: Tiny, tmp_path: Path) -> None:
    path = tiny.load("two")
    with running(tiny.compiler(tmp_path)) as compiler:
        compiler.consider([path])
        wait_for(lambda: compiler._process is not None)
        killed = compiler._process
        assert killed is not None
        killed.kill()
        wait_for(lambda: compiler.pending() == 0 or compiler._process not in (None, killed))
        assert compiler.pending() == 1


# Where nothing is compiled


def test_without_a_compiler_eager_code_serves_and_it_is_told(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CXX", "no-such-compiler")
    path = tiny.load("one")
    with running(tiny.compiler(tmp_path / "compiled")) as compiler:
        compiler.consider([path])
        assert compiler.pending() == compiler.compiled() == 0
        assert "lacks a C++ compiler" in compiler.unavailable and "apt install g++" in compiler.unavailable
        assert compiler.unavailable in caplog.text
        assert not compiler._thread.is_alive()
    assert run(path).equal(run(tiny.load("one"))) and not (tmp_path / "compiled").exists()


def test_what_is_switched_off_says_and_does_nothing(
    tiny: Tiny, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with running(tiny.compiler(tmp_path, enabled=False)) as compiler:
        compiler.consider([tiny.load("one")])
        assert compiler.pending() == compiler.compiled() == 0 and not compiler._thread.is_alive()
    assert caplog.text == ""


def test_what_is_dropped_before_its_turn_is_not_compiled(tiny: Tiny, tmp_path: Path) -> None:
    compiler, path = tiny.compiler(tmp_path), tiny.load("two")
    compiler.unavailable = ""
    compiler.consider([path])
    assert compiler.pending() == 2
    del path
    assert compiler.pending() == 0
    compiler.consider([])
    assert compiler.pending() == 0
