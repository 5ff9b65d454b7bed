"""A client, and the server that answers it."""

from collections.abc import Iterator

import pytest

from backboned.client import Client
from tests.client.answering import RunningServer, Service


@pytest.fixture
def service() -> Service:
    return Service()  # type: ignore[abstract]  # what isn't called needs no answer


@pytest.fixture
def server(service: Service) -> Iterator[RunningServer]:
    running = RunningServer(service)
    yield running
    running.close()


@pytest.fixture
def client(server: RunningServer) -> Iterator[Client]:
    with Client(server.address, timeout_seconds=20) as client:
        yield client
