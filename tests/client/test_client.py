"""The client against a real gRPC server, whose service answers as each test tells it to."""

import asyncio
import threading
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import grpc
import pytest

from backboned.client import DEFAULT_ADDRESS, Client, ClientError
from backboned.registry import BackbonedError, ErrorKind
from backboned.server.api.errors import ErrorInterceptor
from backboned.server.commands import options
from backboned.v1 import model_service_pb2 as pb
from backboned.v1.model_service_pb2_grpc import ModelServiceServicer, add_ModelServiceServicer_to_server

UNAVAILABLE = BackbonedError(ErrorKind.UNAVAILABLE, "not loaded yet")


def answered(name: str) -> Any:
    """A method that answers what the test says under its `name`."""

    async def call(service: "Service", request: Any, context: Any) -> Any:
        service.requests.append(request)
        service.metadata = dict(context.invocation_metadata())
        reply = service.replies[name](request)
        if isinstance(reply, grpc.StatusCode):
            await context.abort(reply)
        return reply

    return call


class Service(ModelServiceServicer):
    """Answers from `replies`, a function a method, and keeps every request, and the last call's metadata."""

    FineTune = answered("FineTune")
    GetJob = answered("GetJob")
    ListJobs = answered("ListJobs")
    ListCheckpoints = answered("ListCheckpoints")
    ListModels = answered("ListModels")
    Predict = answered("Predict")
    SetAlias = answered("SetAlias")

    def __init__(self) -> None:
        self.replies: dict[str, Callable[[Any], Any]] = {}
        self.requests: list[Any] = []
        self.metadata: dict[str, str | bytes] = {}

    async def PredictStream(self, requests: AsyncIterator[Any], _: Any) -> AsyncIterator[Any]:  # noqa: N802
        async for request in requests:
            self.requests.append(request)
            yield self.replies["Predict"](request)

    async def WatchJob(self, request: Any, _: Any) -> AsyncIterator[Any]:  # noqa: N802
        self.requests.append(request)
        for event in self.replies["WatchJob"](request):
            if isinstance(event, BackbonedError):
                raise event
            yield event


class RunningServer:
    """A grpc.aio server in a thread of its own; `restart` brings it back on the same port."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()
        self.port = 0
        self.start()

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def start(self) -> None:
        self._run(self._start()).result(10)

    def stop(self) -> None:
        self._run(self._server.stop(None)).result(10)

    def close(self) -> None:
        self.stop()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    def _run(self, work: Any) -> "Future[Any]":
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    async def _start(self) -> None:
        self._server = grpc.aio.server(interceptors=[ErrorInterceptor()], options=[("grpc.so_reuseport", 0)])
        add_ModelServiceServicer_to_server(self._service, self._server)
        self.port = self._server.add_insecure_port(f"127.0.0.1:{self.port}")
        await self._server.start()


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


def answer(request: pb.PredictRequest) -> pb.PredictResponse:
    """A prediction an image, whose best class is the image's bytes."""
    predictions = [pb.Prediction(classes=[pb.ClassProbability(label=i.encoded.decode())]) for i in request.images]
    return pb.PredictResponse(model=request.model, version=7, predictions=predictions)


def first_fails(times: int, then: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """A reply that fails as unavailable so often before it succeeds."""
    left = [None] * times

    def reply(request: Any) -> Any:
        if left:
            left.pop()
            raise UNAVAILABLE
        return then(request)

    return reply


def test_predict_takes_bytes_and_paths(service: Service, client: Client, tmp_path: Path) -> None:
    service.replies["Predict"] = answer
    (tmp_path / "b.jpg").write_bytes(b"second")
    (tmp_path / "c.jpg").write_bytes(b"third")
    reply = client.predict("m", [b"first", tmp_path / "b.jpg", str(tmp_path / "c.jpg")])
    assert [p.classes[0].label for p in reply.predictions] == ["first", "second", "third"]
    assert reply.version == 7


def test_predict_takes_one_image_alone(service: Service, client: Client, tmp_path: Path) -> None:
    service.replies["Predict"] = answer
    (tmp_path / "a.jpg").write_bytes(b"only")
    assert len(client.predict("m", str(tmp_path / "a.jpg")).predictions) == 1


def test_predict_says_what_is_asked_and_of_whom(service: Service, client: Client) -> None:
    service.replies["Predict"] = answer
    client.predict("m", [b"x"], version=3, top_k=2, labels=["cat"], return_embedding=True)
    client.predict("m", [b"x"], alias="production")
    client.predict("m", [b"x"])
    by_version, by_alias, by_default = service.requests
    assert (by_version.version, by_version.top_k, list(by_version.labels)) == (3, 2, ["cat"])
    assert by_version.return_embedding
    assert by_alias.alias == "production"
    assert by_default.WhichOneof("target") is None


def test_a_version_and_an_alias_together_are_refused(client: Client) -> None:
    with pytest.raises(ClientError, match="not both"):
        client.predict("m", [b"x"], version=1, alias="production")


def each_answers(request: pb.PredictRequest) -> pb.PredictResponse:
    """A result for each model, numbered in their order."""
    return pb.PredictResponse(
        results=[
            pb.ModelPredictions(model=m.model, version=i, predictions=answer(request).predictions)
            for i, m in enumerate(request.models)
        ]
    )


def test_several_models_are_named_with_versions_and_aliases_and_answer_in_order(
    service: Service, client: Client
) -> None:
    service.replies["Predict"] = each_answers
    names = ["b@12", "a", "b@stable", "b@1_000", "b@", f"b@{2**70}"]
    results = client.predict_models(names, [b"x", b"y"], top_k=2, labels=["x", "y"])
    assert [(r.model, r.version) for r in results] == [("b", 0), ("a", 1), ("b", 2), ("b", 3), ("b", 4), ("b", 5)]
    assert [[p.classes[0].label for p in r.predictions] for r in results] == [["x", "y"]] * 6
    (request,) = service.requests
    assert [(m.WhichOneof("target"), m.version, m.alias) for m in request.models] == [
        ("version", 12, ""),
        (None, 0, ""),
        ("alias", 0, "stable"),
        ("alias", 0, "1_000"),
        ("alias", 0, ""),
        ("alias", 0, str(2**70)),
    ]
    assert (request.model, request.top_k, list(request.labels)) == ("", 2, ["x", "y"])


def test_one_model_alone_can_be_asked_like_several(service: Service, client: Client) -> None:
    service.replies["Predict"] = each_answers
    (result,) = client.predict_models("flowers@3", b"x")
    assert result.model == "flowers"


def test_no_model_at_all_is_refused(client: Client) -> None:
    with pytest.raises(ClientError, match="at least one model") as caught:
        client.predict_models([], [b"x"])
    assert caught.value.field == "models"


def test_the_stage_of_an_embedding_is_sent_by_every_way_to_predict(service: Service, client: Client) -> None:
    service.replies["Predict"] = answer
    client.predict("m", b"x", embedding_stage="layer3")
    client.predict_models(["m"], b"x", embedding_stage="layer3", return_embedding=True)
    list(client.predict_stream("m", [b"x"], embedding_stage="layer3"))
    assert [(r.embedding_stage, r.return_embedding) for r in service.requests] == [
        ("layer3", False),
        ("layer3", True),
        ("layer3", False),
    ]


def test_an_image_that_is_not_there_is_named_with_its_index(client: Client, tmp_path: Path) -> None:
    with pytest.raises(ClientError, match=r"nowhere\.jpg: No such file") as caught:
        client.predict("m", [b"x", tmp_path / "nowhere.jpg"])
    assert caught.value.field == "images[1]"


def test_a_stream_cuts_images_and_labels_into_requests_in_order(service: Service, client: Client) -> None:
    service.replies["Predict"] = answer
    replies = client.predict_stream(
        "m", (str(i).encode() for i in range(7)), labels=map(str, range(7)), top_k=1, batch_size=3
    )
    assert [p.classes[0].label for reply in replies for p in reply.predictions] == list("0123456")
    assert [list(request.labels) for request in service.requests] == [list("012"), list("345"), ["6"]]
    assert {request.top_k for request in service.requests} == {1}


def test_a_stream_keeps_requests_below_the_message_limit(service: Service, server: RunningServer) -> None:
    service.replies["Predict"] = lambda request: pb.PredictResponse(version=len(request.images))
    with Client(server.address, max_message_bytes=100_000) as client:
        replies = client.predict_stream("m", [b"x" * 20_000] * 5, batch_size=100)
        assert [reply.version for reply in replies] == [2, 2, 1]


def test_a_stream_ends_at_an_image_that_is_not_there(service: Service, client: Client, tmp_path: Path) -> None:
    service.replies["Predict"] = answer
    with pytest.raises(ClientError, match=r"nowhere\.jpg") as caught:
        list(client.predict_stream("m", [b"x", tmp_path / "nowhere.jpg"], batch_size=1))
    assert caught.value.field == "images[1]"


def test_more_labels_than_images_are_refused(service: Service, client: Client) -> None:
    service.replies["Predict"] = answer
    with pytest.raises(ClientError, match="only 1 images"):
        list(client.predict_stream("m", [b"x"], labels=["a", "b"]))


def test_a_stream_passes_on_what_the_server_refuses(service: Service, client: Client) -> None:
    def refuse(_: Any) -> None:
        raise BackbonedError(ErrorKind.NOT_FOUND, "unknown model 'm'", field="model")

    service.replies["Predict"] = refuse
    with pytest.raises(ClientError, match="unknown model") as caught:
        list(client.predict_stream("m", [b"x"]))
    assert (caught.value.code, caught.value.field) == (grpc.StatusCode.NOT_FOUND, "model")


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


def test_predict_tells_in_its_metadata_which_model_it_is_for(service: Service, client: Client) -> None:
    service.replies["Predict"] = lambda request: each_answers(request) if request.models else answer(request)
    client.predict("flowers", [b"x"])
    assert service.metadata["backboned-model"] == "flowers"
    client.predict_models(["pets@3", "flowers"], [b"x"])
    assert service.metadata["backboned-model"] == "pets"
    for name in ("", "blümchen", "a\nb"):
        assert client.predict(name, [b"x"]).model == name
        assert service.metadata.get("backboned-model", "") == ""


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


def test_lists_go_through_all_pages(service: Service, client: Client) -> None:
    def page(request: pb.ListCheckpointsRequest) -> pb.ListCheckpointsResponse:
        number = int(request.page_token or 0)
        return pb.ListCheckpointsResponse(
            checkpoints=[pb.Checkpoint(epoch=2 * number + i) for i in range(2)],
            next_page_token=str(number + 1) if number < 2 else "",
        )

    service.replies["ListCheckpoints"] = page
    found = client.list_checkpoints(model="m", filter="epoch > 1", order_by="epoch", page_size=2)
    assert [checkpoint.epoch for checkpoint in found] == [0, 1, 2, 3, 4, 5]
    assert {(r.model, r.filter, r.order_by, r.page_size) for r in service.requests} == {("m", "epoch > 1", "epoch", 2)}


def test_a_page_is_fetched_only_when_it_is_needed(service: Service, client: Client) -> None:
    service.replies["ListJobs"] = lambda _: pb.ListJobsResponse(jobs=[pb.Job(id="a")], next_page_token="1")  # noqa: S106
    assert next(client.list_jobs()).id == "a"
    assert len(service.requests) == 1


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


def test_fine_tune_sends_its_options_and_leaves_out_the_rest(service: Service, client: Client) -> None:
    service.replies["FineTune"] = lambda r: pb.Job(id="j", request=r)
    request = client.fine_tune(
        "m", "resnet50", Path("/photos"), request_id="mine", task="TASK_BINARY", trainable_stages=["layer4"], patience=0
    ).request
    assert (request.dataset, request.request_id, request.options.task) == ("/photos", "mine", pb.TASK_BINARY)
    assert list(request.options.trainable_stages) == ["layer4"]
    assert request.options.HasField("patience")
    assert not request.options.HasField("max_epochs")


def test_an_unknown_training_option_is_named_with_those_that_there_are(client: Client) -> None:
    with pytest.raises(TypeError, match=r"epochs.*max_epochs"):
        client.fine_tune("m", "resnet50", "/photos", epochs=3)  # type: ignore[call-arg]


EVENTS = [pb.JobEvent(sequence=i, log=str(i)) for i in range(1, 5)]
END = pb.JobEvent(sequence=5, state=pb.JOB_STATE_SUCCEEDED)


def test_a_watch_ends_with_the_jobs_last_event(service: Service, client: Client) -> None:
    service.replies["WatchJob"] = lambda _: [*EVENTS, END]
    service.replies["GetJob"] = lambda request: pb.Job(id=request.job_id, state=pb.JOB_STATE_SUCCEEDED)
    assert [event.sequence for event in client.watch("j")] == [1, 2, 3, 4, 5]
    assert client.wait("j").state == pb.JOB_STATE_SUCCEEDED


def test_a_watch_goes_on_where_it_was_when_the_daemon_comes_back(
    service: Service, server: RunningServer, client: Client
) -> None:
    def events(request: pb.WatchJobRequest) -> list[Any]:
        left = [event for event in [*EVENTS, END] if event.sequence > request.after_sequence]
        return left if request.after_sequence >= 2 else [*left[:2], UNAVAILABLE]

    service.replies["WatchJob"] = events
    seen = []
    for event in client.watch("j"):
        seen.append(event.sequence)
        if event.sequence == 2:
            server.stop()
            threading.Timer(0.3, server.start).start()
    assert seen == [1, 2, 3, 4, 5]


def test_a_watch_gives_up_when_the_daemon_stays_away(service: Service, client: Client) -> None:
    service.replies["WatchJob"] = lambda request: (
        [EVENTS[0], UNAVAILABLE] if not request.after_sequence else [UNAVAILABLE]
    )
    watch = client.watch("j", reconnect_seconds=0.3)
    assert next(watch).sequence == 1
    with pytest.raises(ClientError, match="not loaded yet"):
        next(watch)


def test_a_watch_from_behind_the_last_event_ends_at_once(service: Service, client: Client) -> None:
    service.replies["WatchJob"] = lambda _: []
    service.replies["GetJob"] = lambda request: pb.Job(id=request.job_id, state=pb.JOB_STATE_CANCELLED)
    assert list(client.watch("j", after_sequence=5)) == []


def test_a_watch_of_an_unknown_job_says_so(service: Service, client: Client) -> None:
    service.replies["WatchJob"] = lambda _: [BackbonedError(ErrorKind.NOT_FOUND, "unknown job 'j'")]
    with pytest.raises(ClientError, match="unknown job"):
        next(client.watch("j"))


def test_the_command_line_has_the_clients_default_address() -> None:
    assert options.DEFAULT_ADDRESS == DEFAULT_ADDRESS
