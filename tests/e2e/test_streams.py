"""PredictStream: answers in order, an error that names its request, and callers who go away."""

import itertools
from collections.abc import Callable, Iterator
from io import BytesIO

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from PIL import Image

from backboned.client import Client, ClientError
from backboned.server.commands.local_daemon import LocalDaemon
from backboned.v1 import model_service_pb2 as pb
from backboned.v1.model_service_pb2_grpc import ModelServiceStub

Truth = Callable[[str, int, Image.Image], dict[str, float]]


@pytest.fixture(scope="module")
def pictures() -> list[Image.Image]:
    """Pictures of different colours and sizes."""
    return [Image.new("RGB", (20 + i, 30), (i * 36, 255 - i * 36, i * 97 % 256)) for i in range(7)]


def request(picture: Image.Image, **fields: object) -> pb.PredictRequest:
    tensor = pb.Tensor(shape=[picture.height, picture.width, 3], data=picture.tobytes())
    plain = {"model": "flowers", "images": [pb.Image(tensor=tensor)], **fields}
    return pb.PredictRequest(**plain)  # type: ignore[arg-type]


def test_answers_come_in_the_order_of_the_requests_each_from_its_version(
    stub: ModelServiceStub, truth: Truth, pictures: list[Image.Image]
) -> None:
    asked = list(itertools.islice(itertools.product(range(20), range(7), (1, 2, 3)), 400))
    expected = {(p, v): truth("flowers", v, pictures[p]) for p in range(7) for v in (1, 2, 3)}
    answers = list(stub.PredictStream(request(pictures[p], version=v) for _, p, v in asked))
    assert len(answers) == len(asked)
    for (_, picture, version), answer in zip(asked, answers, strict=True):
        assert answer.version == version
        found = {c.label: c.probability for c in answer.predictions[0].classes}
        assert found == pytest.approx(expected[picture, version], abs=1e-4)


def test_the_client_reads_its_images_as_the_stream_goes(client: Client, pictures: list[Image.Image]) -> None:
    def files() -> Iterator[bytes]:
        for picture in pictures * 30:
            file = BytesIO()
            picture.save(file, "PNG")
            yield file.getvalue()

    replies = list(client.predict_stream("flowers", files(), top_k=1, batch_size=4))
    assert [len(r.predictions) for r in replies] == [4] * 52 + [2]
    first_of_each = [p.classes[0] for r in replies for p in r.predictions]
    assert [c.label for c in first_of_each] == [c.label for c in first_of_each[:7]] * 30
    likely = [c.probability for c in first_of_each]  # to the last bit only where batches are of one size
    assert likely == pytest.approx(likely[:7] * 30, abs=1e-5)


def test_a_stream_without_requests_ends_without_answers(stub: ModelServiceStub) -> None:
    assert list(stub.PredictStream(iter(()))) == []


@pytest.mark.parametrize(
    ("bad", "told", "message"),
    [
        ({"top_k": 9}, ("INVALID_ARGUMENT", "top_k"), "top_k is 9; flowers has 5 classes"),
        ({"model": "flower"}, ("NOT_FOUND", "model"), "did you mean 'flowers'?"),
        ({"images": [pb.Image(encoded=b"no picture")]}, ("INVALID_ARGUMENT", "images[0]"), "image 0: not an image"),
    ],
)
def test_the_first_error_names_its_request_after_the_answers_before_it(
    stub: ModelServiceStub, pictures: list[Image.Image], bad: dict[str, object], told: tuple[str, str], message: str
) -> None:
    call = stub.PredictStream(iter([*[request(pictures[0])] * 5, *[request(pictures[0], **bad)] * 20]))
    answers = list(itertools.islice(call, 5))
    assert [a.version for a in answers] == [3] * 5
    with pytest.raises(grpc.RpcError) as caught:
        next(call)
    error = ClientError.of(caught.value, "")
    assert (error.code.name, error.field) == told
    assert error.message.startswith("request 5 of the stream: ") and message in error.message
    status = rpc_status.from_call(caught.value)
    assert status is not None and status.details[0].Is(error_details_pb2.ErrorInfo.DESCRIPTOR)


def test_a_caller_who_goes_away_in_the_middle_leaves_a_healthy_daemon(
    served: LocalDaemon,
    stub: ModelServiceStub,
    pictures: list[Image.Image],
    fetch: Callable[[str], str],
    wait_for: Callable[[Callable[[], object]], None],
) -> None:
    for answers_before in (0, 1, 20):
        call = stub.PredictStream(request(p) for p in itertools.cycle(pictures))  # without end
        for _ in range(answers_before):
            next(call)
        call.cancel()
        with pytest.raises(grpc.RpcError):
            list(call)
        assert call.code() is grpc.StatusCode.CANCELLED
    assert len(list(stub.PredictStream(request(p) for p in pictures))) == len(pictures)
    wait_for(lambda: "\nbackboned_predict_queue_depth 0.0\n" in fetch(f"{served.http}/metrics"))


def test_a_caller_that_vanishes_with_its_connection_leaves_a_healthy_daemon(
    served: LocalDaemon, client: Client, pictures: list[Image.Image]
) -> None:
    with grpc.insecure_channel(served.grpc) as channel:
        call = ModelServiceStub(channel).PredictStream(request(p) for p in itertools.cycle(pictures))
        next(call)
    with pytest.raises(grpc.RpcError):
        list(call)
    file = BytesIO()
    pictures[0].save(file, "PNG")
    assert client.predict("flowers", file.getvalue()).version == 3
