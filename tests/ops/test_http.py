"""The HTTP port, over a real socket."""

import asyncio
import http.client
import signal
from collections.abc import AsyncIterator
from dataclasses import dataclass

import pytest
import pytest_asyncio
from prometheus_client import CollectorRegistry, Counter

from backboned.server.ops.http import HttpServer, application


class Readiness:
    """What the daemon would say of itself."""

    reason: str | None = "loading models"

    def __call__(self) -> str | None:
        return self.reason


@dataclass
class Port:
    """A running server and how to ask it."""

    server: HttpServer
    address: tuple[str, int]
    readiness: Readiness

    async def get(self, path: str, **headers: str) -> tuple[int, str, str]:
        """Status, content type and text."""
        return await asyncio.to_thread(self._get, path, headers)

    def _get(self, path: str, headers: dict[str, str]) -> tuple[int, str, str]:
        connection = http.client.HTTPConnection(*self.address, timeout=10)
        try:
            connection.request("GET", path, headers=headers)
            reply = connection.getresponse()
            return reply.status, reply.headers.get("content-type", ""), reply.read().decode()
        finally:
            connection.close()


@pytest_asyncio.fixture
async def port() -> AsyncIterator[Port]:
    registry = CollectorRegistry()
    Counter("backboned_things_total", "Things.", registry=registry).inc()
    readiness = Readiness()
    server = HttpServer(application(registry, readiness))
    yield Port(server, await server.start("127.0.0.1", 0), readiness)
    await server.stop()


async def test_a_free_port_is_picked_for_zero(port: Port) -> None:
    assert port.address[0] == "127.0.0.1"
    assert port.address[1] > 0


async def test_metrics_come_as_prometheus_text(port: Port) -> None:
    status, content_type, text = await port.get("/metrics")
    assert (status, content_type.partition(";")[0]) == (200, "text/plain")
    assert "backboned_things_total 1.0" in text
    assert "# EOF" not in text


async def test_metrics_come_as_openmetrics_to_those_who_ask(port: Port) -> None:
    _, content_type, text = await port.get("/metrics", Accept="application/openmetrics-text; version=1.0.0")
    assert content_type.startswith("application/openmetrics-text")
    assert text.endswith("# EOF\n")


async def test_health_is_good_while_the_daemon_is_not_ready(port: Port) -> None:
    assert (await port.get("/healthz"))[0] == 200


async def test_readiness_tells_why_not_and_then_that_it_is(port: Port) -> None:
    status, _, text = await port.get("/readyz")
    assert (status, text) == (503, "loading models\n")
    port.readiness.reason = None
    status, _, text = await port.get("/readyz")
    assert (status, text) == (200, "ready\n")


async def test_the_first_page_leads_to_the_others(port: Port) -> None:
    _, content_type, text = await port.get("/")
    assert content_type.startswith("text/html")
    for path in ("/metrics", "/healthz", "/readyz"):
        assert f'href="{path}"' in text


async def test_anything_else_is_not_found(port: Port) -> None:
    assert (await port.get("/nowhere"))[0] == 404


async def test_a_port_that_is_taken_is_an_error(port: Port) -> None:
    other = HttpServer(application(CollectorRegistry(), port.readiness))
    with pytest.raises(OSError, match="in use"):
        await other.start(*port.address)


async def test_signals_are_left_alone() -> None:
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    server = HttpServer(application(CollectorRegistry(), Readiness()))
    address = await server.start("127.0.0.1", 0)
    assert (await Port(server, address, Readiness()).get("/healthz"))[0] == 200
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
    await server.stop()


async def test_a_stopped_server_gives_its_port_back() -> None:
    server = HttpServer(application(CollectorRegistry(), Readiness()))
    address = await server.start("127.0.0.1", 0)
    await server.stop()
    again = HttpServer(application(CollectorRegistry(), Readiness()))
    assert await again.start(*address) == address
    await again.stop()


async def test_a_server_that_was_never_started_can_be_stopped() -> None:
    await HttpServer(application(CollectorRegistry(), Readiness())).stop()
