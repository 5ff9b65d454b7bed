"""What a client makes of a refusal: an error that says all that the daemon said, or another try."""

import uuid
from typing import Any

import grpc
import pytest

from backboned.client import Client, ClientError
from backboned.registry import BackbonedError, ErrorKind
from backboned.v1 import model_service_pb2 as pb
from tests.client.answering import RunningServer, Service, answer, first_fails


def test_an_error_has_its_code_its_message_and_the_field_at_fault(service: Service, client: Client) -> None:
    def refuse(_: Any) -> None:
        raise BackbonedError(ErrorKind.INVALID_ARGUMENT, "images[2] is no image", field="images[2]")

    service.replies["Predict"] = refuse
    with pytest.raises(ClientError) as caught:
        client.predict("m", [b"x"])
    error = caught.value
    assert (error.code, error.field) == (grpc.StatusCode.INVALID_ARGUMENT, "images[2]")
    assert error.message == str(error) == "images[2] is no image"


def full(_: Any) -> None:
    raise BackbonedError(ErrorKind.RESOURCE_EXHAUSTED, "the queue is full", retry_delay_seconds=0.001)


def test_an_error_says_when_to_try_again(service: Service, client: Client) -> None:
    service.replies["Predict"] = full
    with pytest.raises(ClientError, match="the queue is full") as caught:
        client.predict("m", [b"x"])
    assert caught.value.retry_delay_seconds == 0.001
    assert len(service.requests) == 5


def test_calls_that_a_full_daemon_refuses_are_soon_neither_repeated_nor_sent(service: Service, client: Client) -> None:
    service.replies["Predict"] = full
    for _ in range(700):
        with pytest.raises(ClientError) as caught:
            client.predict("m", [b"x"])
        assert caught.value.code is grpc.StatusCode.RESOURCE_EXHAUSTED and caught.value.retry_delay_seconds == 0.001
    assert len(service.requests) < 1300  # each might have been sent five times
    assert "not sent" in caught.value.message
    service.replies["Predict"] = answer
    assert client.predict("others", [b"x"]).model == "others"


def test_an_error_that_blames_no_field_has_none(service: Service, client: Client) -> None:
    def refuse(_: Any) -> None:
        raise BackbonedError(ErrorKind.FAILED_PRECONDITION, "quarantined")

    service.replies["Predict"] = refuse
    with pytest.raises(ClientError) as caught:
        client.predict("m", [b"x"])
    assert caught.value.field is None


def test_without_a_daemon_the_error_names_the_address_and_how_to_start_one(server: RunningServer) -> None:
    server.stop()
    with Client(server.address) as client, pytest.raises(ClientError, match="backboned serve") as caught:
        next(client.list_models())
    server.start()  # for the fixture's own end
    assert server.address in caught.value.message
    assert "\n" not in caught.value.message


def test_calls_that_are_safe_to_repeat_are_retried(service: Service, client: Client) -> None:
    service.replies["Predict"] = first_fails(2, answer)
    assert client.predict("m", [b"x" * 500_000]).version == 7
    assert len(service.requests) == 3


def test_a_call_that_a_stopping_server_cancels_is_retried(service: Service, client: Client) -> None:
    service.replies["Predict"] = lambda r: answer(r) if service.requests[1:] else grpc.StatusCode.CANCELLED
    assert client.predict("m", [b"x"]).version == 7
    assert len(service.requests) == 2


def test_calls_that_are_not_safe_to_repeat_are_made_once(service: Service, client: Client) -> None:
    service.replies["SetAlias"] = first_fails(1, lambda _: pb.Model(name="m"))
    with pytest.raises(ClientError, match="not loaded yet"):
        client.set_alias("m", "production", 2, expected_version=1)
    (request,) = service.requests
    assert (request.version, request.expected_version) == (2, 1)


def test_a_retried_fine_tune_keeps_its_request_id(service: Service, client: Client) -> None:
    service.replies["FineTune"] = first_fails(1, lambda r: pb.Job(id="j", request=r))
    client.fine_tune("m", "resnet50", "/photos")
    client.fine_tune("m", "resnet50", "/photos")
    ids = [request.request_id for request in service.requests]
    assert len(ids) == 3
    assert ids[0] == ids[1] != ids[2]
    assert str(uuid.UUID(ids[0])) == ids[0]
