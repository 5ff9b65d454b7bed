"""What load balancers, orchestrators and grpcurl ask: health, readiness and reflection."""

from collections.abc import Callable, Iterator

import grpc
import pytest
from google.protobuf.descriptor_pool import DescriptorPool
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from backboned.server.commands.local_daemon import LocalDaemon

SERVICE = "backboned.v1.ModelService"
SERVING = health_pb2.HealthCheckResponse.SERVING


@pytest.fixture(scope="module")
def channel(served: LocalDaemon) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(served.grpc) as channel:
        yield channel


def question(service: str) -> health_pb2.HealthCheckRequest:
    return health_pb2.HealthCheckRequest(service=service)


@pytest.mark.parametrize("service", ["", SERVICE])
def test_the_server_and_its_service_are_healthy(channel: grpc.Channel, service: str) -> None:
    health = health_pb2_grpc.HealthStub(channel)
    assert health.Check(question(service)).status == SERVING
    watch = health.Watch(question(service))
    assert next(watch).status == SERVING
    watch.cancel()


def test_an_unknown_service_is_not_found_and_can_be_waited_for(channel: grpc.Channel) -> None:
    health = health_pb2_grpc.HealthStub(channel)
    with pytest.raises(grpc.RpcError) as caught:
        health.Check(question("backboned.v2.ModelService"))
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND and SERVICE in str(caught.value.details())
    watch = health.Watch(question("backboned.v2.ModelService"))
    assert next(watch).status == health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
    watch.cancel()


def test_reflection_tells_the_services_and_their_messages(channel: grpc.Channel) -> None:
    database = ProtoReflectionDescriptorDatabase(channel)
    assert {SERVICE, "grpc.health.v1.Health"} <= set(database.get_services())
    service = DescriptorPool(database).FindServiceByName(SERVICE)
    fields = {f.name for f in service.methods_by_name["Predict"].input_type.fields}
    assert {"model", "version", "alias", "images", "top_k"} <= fields


def test_the_http_port_says_alive_and_ready(served: LocalDaemon, fetch: Callable[[str], str]) -> None:
    assert fetch(f"{served.http}/healthz") == "alive\n"
    assert fetch(f"{served.http}/readyz") == "ready\n"
    assert "/metrics" in fetch(served.http)
