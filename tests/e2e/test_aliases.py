"""Aliases: set, asked, moved with and without a guard, deleted."""

import grpc
import pytest
from PIL import Image

from backboned.client import Client, ClientError
from backboned.v1 import model_service_pb2 as pb
from backboned.v1.model_service_pb2_grpc import ModelServiceStub


def answering(stub: ModelServiceStub, alias: str) -> int:
    """The version that answers for an alias of flowers."""
    pixels = pb.Tensor(shape=[16, 16, 3], data=Image.new("RGB", (16, 16), "red").tobytes())
    return stub.Predict(pb.PredictRequest(model="flowers", alias=alias, images=[pb.Image(tensor=pixels)])).version


def test_an_alias_answers_from_where_it_points_until_it_is_deleted(client: Client, stub: ModelServiceStub) -> None:
    model = client.set_alias("flowers", "canary", 2, expected_version=0)
    assert model.aliases["canary"] == 2 and answering(stub, "canary") == 2
    client.set_alias("flowers", "canary", 3)
    assert answering(stub, "canary") == 3
    listed = {c.version: list(c.aliases) for c in client.list_checkpoints(model="flowers", filter="aliases:canary")}
    assert listed == {3: ["canary"]}
    assert "canary" not in client.delete_alias("flowers", "canary").aliases
    with pytest.raises(grpc.RpcError) as caught:
        answering(stub, "canary")
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND


def test_of_two_who_move_an_alias_at_once_one_is_told_to_read_again(client: Client, stub: ModelServiceStub) -> None:
    client.set_alias("flowers", "moved", 1)
    client.set_alias("flowers", "moved", 2, expected_version=1)
    with pytest.raises(ClientError, match="points to version 2, not to 1: read it again") as caught:
        client.set_alias("flowers", "moved", 3, expected_version=1)
    assert caught.value.code is grpc.StatusCode.ABORTED
    with pytest.raises(ClientError, match="points to version 2") as caught:
        client.delete_alias("flowers", "moved", expected_version=1)
    assert caught.value.code is grpc.StatusCode.ABORTED
    assert answering(stub, "moved") == 2
    client.delete_alias("flowers", "moved", expected_version=2)


def test_latest_is_always_the_newest_complete_version(stub: ModelServiceStub) -> None:
    assert (answering(stub, "latest"), answering(stub, "stable")) == (3, 1)
