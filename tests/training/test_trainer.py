import errno
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from backboned.registry.errors import invalid
from backboned.server.training.events import EpochDone, JobEventPayload, JobState, StateChanged, from_json
from backboned.server.training.reason import reason
from backboned.server.training.spec import TrainerSpec

MakeSpec = Callable[..., TrainerSpec]

TALKATIVE_PLUGIN = """
import os
print("a plugin prints")
os.system("echo so does its child")
from backboned.plugins.digits import DigitsNet, digits
from backboned.registry import register
from dataclasses import replace

@register
def talkative():
    return replace(digits(), name="talkative")
"""


@contextmanager
def trainer(spec: TrainerSpec, **environment: str) -> Iterator[subprocess.Popen[str]]:
    """A trainer process that has its spec."""
    with subprocess.Popen(
        [sys.executable, "-P", "-m", "backboned.server.training.trainer_alone"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | environment,
        start_new_session=True,
    ) as process:
        assert process.stdin is not None
        process.stdin.write(spec.to_json() + "\n")
        process.stdin.flush()
        try:
            yield process
        finally:
            process.kill()


def events(process: subprocess.Popen[str]) -> Iterator[JobEventPayload]:
    assert process.stdout is not None
    return map(from_json, process.stdout)


@pytest.fixture
def colours(tmp_path: Path, paint: Callable[..., Path]) -> Path:
    return paint(tmp_path / "data" / "colours", {"red": 6, "blue": 6})


def test_nothing_but_events_is_told_and_an_error_is_the_last_one(
    colours: Path, make_spec: MakeSpec, tmp_path: Path, weights_file: Path
) -> None:
    (tmp_path / "talkative_plugin.py").write_text(TALKATIVE_PLUGIN, encoding="utf-8")
    for image in (colours / "red").iterdir():
        image.write_bytes(b"not an image")
    spec = replace(
        make_spec(colours),
        backbone="talkative",
        plugin_modules=("talkative_plugin",),
        weight_files={"talkative": weights_file},
    )
    with trainer(spec, PYTHONPATH=str(tmp_path)) as process:
        *_, last = events(process)
        assert process.wait(60) == 0
        assert isinstance(last, StateChanged)
        assert last.state is JobState.FAILED
        assert last.error.startswith("no training image of class 'red' can be read")
        assert process.stderr is not None
        said = process.stderr.read()
    assert "a plugin prints\n" in said
    assert "so does its child\n" in said


def test_it_yields_to_others_and_ends_when_the_daemon_does(colours: Path, make_spec: MakeSpec) -> None:
    with trainer(make_spec(colours, max_epochs=10_000, patience=0)) as process:
        told = events(process)
        assert any(isinstance(e, EpochDone) for e in told)
        assert os.getpriority(os.PRIO_PROCESS, process.pid) >= 10
        assert os.sched_getscheduler(process.pid) == os.SCHED_BATCH
        group = Path(f"/proc/{process.pid}/autogroup")  # where there is one, niceness counts only within it
        assert not group.exists() or int(group.read_text().split()[-1]) >= 10
        assert process.stdin is not None
        process.stdin.close()
        *_, last = told
        assert last == StateChanged(JobState.CANCELLED)
        assert process.wait(60) == 0


def test_a_spec_survives_as_one_line(colours: Path, make_spec: MakeSpec) -> None:
    spec = make_spec(colours, trainable_stages=("layer3",))
    assert "\n" not in spec.to_json()
    assert TrainerSpec.from_json(spec.to_json()) == spec


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (invalid("what was wrong"), "what was wrong"),
        (OSError(errno.ENOSPC, "No space left on device", "/data/x"), "disk full (/data/x)"),
        (MemoryError(), "out of memory: lower batch_size"),
        (torch.OutOfMemoryError("CUDA out of memory"), "out of memory: lower batch_size"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "out of memory: lower batch_size"),
        (ValueError("two\nlines"), "ValueError: two lines"),
    ],
)
def test_whatever_goes_wrong_is_said_in_one_line(error: Exception, says: str) -> None:
    assert reason(error).startswith(says)
    assert "\n" not in reason(error)
