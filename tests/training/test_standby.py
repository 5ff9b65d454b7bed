from collections.abc import AsyncIterator

import pytest

from backboned.server.training.standby import Standby


@pytest.fixture
async def standby() -> AsyncIterator[Standby]:
    standby = Standby(())
    yield standby
    await standby.close()


async def test_the_process_that_waits_is_the_one_that_is_taken(standby: Standby) -> None:
    await standby.prepare()
    await standby.prepare()  # one is enough
    process = await standby.take()
    other = await standby.take()
    assert process.runs and other.runs
    assert process.pid != other.pid
    for taken in (process, other):
        taken.kill()
        await taken.ended()


async def test_one_that_has_died_meanwhile_is_not_given_out(standby: Standby) -> None:
    await standby.prepare()
    process = await standby.take()
    process.kill()
    await process.ended()
    standby._ready = process
    other = await standby.take()
    assert other.runs
    other.kill()
    await other.ended()


async def test_none_waits_once_it_is_closed() -> None:
    standby = Standby(())
    await standby.prepare()
    process = standby._ready
    assert process is not None
    await standby.close()
    assert not process.runs
    await standby.prepare()
    assert standby._ready is None
