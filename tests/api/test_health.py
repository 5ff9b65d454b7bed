"""Health for watchers; the rest is asked over a real channel in the end-to-end tests."""

import asyncio
from typing import Any, cast

import grpc
from grpc_health.v1 import health_pb2

from backboned.server.api.health import Health

SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING
NO_CONTEXT = cast(grpc.aio.ServicerContext[Any, Any], None)  # Watch has no use for one


async def test_a_watcher_that_leaves_takes_nothing_from_the_others() -> None:
    health = Health("pictures")
    health.set_serving(True)
    leaves, stays = (health.Watch(health_pb2.HealthCheckRequest(service="pictures"), NO_CONTEXT) for _ in range(2))
    assert (await anext(leaves)).status == (await anext(stays)).status == SERVING
    news = asyncio.ensure_future(anext(stays))
    await asyncio.sleep(0)
    await leaves.aclose()  # type: ignore[attr-defined]  # it is a generator
    health.set_serving(False)
    assert (await news).status == NOT_SERVING


async def test_watchers_have_the_last_news_before_they_end() -> None:
    health = Health("pictures")
    health.set_serving(True)
    watch = health.Watch(health_pb2.HealthCheckRequest(), NO_CONTEXT)
    assert (await anext(watch)).status == SERVING
    health.set_serving(False)
    health.end()
    assert [answer.status async for answer in watch] == [NOT_SERVING]
