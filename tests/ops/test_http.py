"""The HTTP port, over a real socket."""

import asyncio
import http.client
import json
import signal
from collections.abc import AsyncIterator
from dataclasses import dataclass

import pytest
import pytest_asyncio
from prometheus_client import CollectorRegistry, Counter

from backboned.server.ops.http import HttpServer, application
from backboned.server.troubles import TroubleKind, Troubles


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
    troubles: Troubles

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
    troubles = Troubles()
    server = HttpServer(application(registry, readiness, troubles))
    yield Port(server, await server.start("127.0.0.1", 0), readiness, troubles)
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


async def test_trouble_is_told_and_takes_away_no_readiness(port: Port) -> None:
    port.readiness.reason = None
    assert json.loads((await port.get("/health"))[2]) == {"ready": True, "reason": "", "troubles": []}
    port.troubles.tell(TroubleKind.LOADING, "a.pt: no\nspace", "b.pt: no space")
    port.troubles.tell(TroubleKind.DATABASE, "it is locked")
    status, _, text = await port.get("/readyz")
    assert status == 200
    assert text.splitlines() == [
        "ready",
        "trouble with loading: a.pt: no space (and 1 more)",
        "trouble with database: it is locked",
    ]
    status, content_type, text = await port.get("/health")
    assert (status, content_type) == (200, "application/json")
    loading, database = json.loads(text)["troubles"]
    assert (loading["kind"], loading["count"], loading["messages"][1]) == ("loading", 2, "b.pt: no space")
    assert database["kind"] == "database" and database["since"].endswith("+00:00")
    port.readiness.reason = "stopping"
    status, _, text = await port.get("/readyz")
    assert (status, text.splitlines()[0]) == (503, "stopping")
    port.troubles.tell(TroubleKind.LOADING)
    port.troubles.tell(TroubleKind.DATABASE)
    assert json.loads((await port.get("/health"))[2]) == {"ready": False, "reason": "stopping", "troubles": []}


async def test_the_first_page_leads_to_the_others(port: Port) -> None:
    _, content_type, text = await port.get("/")
    assert content_type.startswith("text/html")
    for path in ("/metrics", "/healthz", "/readyz", "/health"):
        assert f'href="{path}"' in text


async def test_anything_else_is_not_found(port: Port) -> None:
    assert (await port.get("/nowhere"))[0] == 404


async def test_a_port_that_is_taken_is_an_error(port: Port) -> None:
    other = HttpServer(application(CollectorRegistry(), port.readiness, Troubles()))
    with pytest.raises(OSError, match="in use"):
        await other.start(*port.address)


async def test_signals_are_left_alone() -> None:
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    server = HttpServer(application(CollectorRegistry(), Readiness(), Troubles()))
    address = await server.start("127.0.0.1", 0)
    assert (await Port(server, address, Readiness(), Troubles()).get("/healthz"))[0] == 200
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
    await server.stop()


async def test_a_stopped_server_gives_its_port_back() -> None:
    server = HttpServer(application(CollectorRegistry(), Readiness(), Troubles()))
    address = await server.start("127.0.0.1", 0)
    await server.stop()
    again = HttpServer(application(CollectorRegistry(), Readiness(), Troubles()))
    assert await again.start(*address) == address
    await again.stop()


async def test_a_server_that_was_never_started_can_be_stopped() -> None:
    await HttpServer(application(CollectorRegistry(), Readiness(), Troubles())).stop()
