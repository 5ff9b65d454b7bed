"""Trainers are forks of a process that waits; where there can be none, they are started one by one."""

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
import pytest_asyncio

from backboned.server.training.events import JobState, StateChanged
from backboned.server.training.spec import TrainerSpec
from backboned.server.training.standby import Standby
from backboned.server.training.trainer_process import TrainerProcess

PLUGIN_WITH_A_THREAD = """
import threading
threading.Thread(target=threading.Event().wait, daemon=True).start()
"""


def parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def wait_until_gone(pid: int) -> None:
    while Path(f"/proc/{pid}").exists():
        time.sleep(0.01)


async def kill(process: TrainerProcess) -> str:
    process.kill()
    return await process.ended()


pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def standby() -> AsyncIterator[Standby]:
    """Torch is imported once, unless a test ends the process that did."""
    standby = Standby(())
    yield standby
    standby.close()


def wait_for_session(pid: int) -> None:
    deadline = time.monotonic() + 30
    while os.getsid(pid) != pid:
        assert time.monotonic() < deadline, "it has no session of its own"
        time.sleep(0.01)


async def test_trainers_are_forks_of_one_process(standby: Standby) -> None:
    first, second = await asyncio.gather(standby.take(), standby.take())
    assert first.runs and second.runs and first.pid != second.pid
    assert parent_of(first.pid) == parent_of(second.pid) != os.getpid()
    await asyncio.to_thread(wait_for_session, first.pid)  # a signal of the terminal's is not for it
    assert os.getpriority(os.PRIO_PROCESS, first.pid) >= 10
    how = [await kill(process) for process in (first, second)]
    assert all(text.startswith("the trainer process was killed by SIGKILL") for text in how)
    assert first.was_killed and not first.runs
    first.kill()  # again, of a process that is gone: nothing happens


async def test_a_fork_runs_a_job(
    standby: Standby, tmp_path: Path, paint: Callable[..., Path], make_spec: Callable[..., TrainerSpec]
) -> None:
    colours = paint(tmp_path / "data" / "colours", {"red": 6, "blue": 6})
    process = await standby.take()
    process.begin(make_spec(colours, max_epochs=1))
    told = [event async for event in process.events()]
    assert told[-1] == StateChanged(JobState.SUCCEEDED)
    assert await process.ended() == "the trainer process ended with code 0"


async def test_a_fork_outlives_the_process_that_it_is_of_and_the_next_one_is_of_another(standby: Standby) -> None:
    process = await standby.take()
    parent = parent_of(process.pid)
    os.kill(parent, signal.SIGKILL)
    other = await standby.take()
    assert process.runs and parent_of(other.pid) != parent
    assert (await kill(process)).startswith("the trainer process ended with code 255")
    await kill(other)


@pytest.mark.parametrize("noticed", [False, True])
async def test_a_fork_that_is_killed_before_it_gets_its_job_is_one_that_was_killed(
    standby: Standby, tmp_path: Path, make_spec: Callable[..., TrainerSpec], noticed: bool
) -> None:
    process = await standby.take()
    os.kill(process.pid, signal.SIGKILL)
    if noticed:
        await process.ended()
    else:
        wait_until_gone(process.pid)  # the event loop doesn't learn of it
    process.begin(make_spec(tmp_path))
    assert [event async for event in process.events()] == []
    await process.ended()
    assert process.was_killed


async def test_a_fork_ends_with_its_standard_input(standby: Standby) -> None:
    process = await standby.take()
    assert process._process.stdin is not None
    process._process.stdin.close()
    assert (await process.ended()).startswith("the trainer process ended with code 0")


async def test_what_cannot_be_forked_is_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "plugin_with_a_thread.py").write_text(PLUGIN_WITH_A_THREAD)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    standby = Standby(("plugin_with_a_thread",))
    for _ in range(2):
        process = await standby.take()
        assert parent_of(process.pid) == os.getpid()
        await kill(process)
    standby.close()


@pytest.mark.parametrize("enabled", [False, True])
async def test_once_it_is_closed_or_where_it_is_off_trainers_are_started(enabled: bool) -> None:
    standby = Standby((), enabled=enabled)
    if enabled:
        fork = await standby.take()
        standby.rest()
        standby.close()
        await kill(fork)
    process = await standby.take()
    assert parent_of(process.pid) == os.getpid()
    await kill(process)
