"""FineTune requests that can't be done are told so at once; a photo that can't be read is told of, and left out."""

import math
from collections.abc import Callable, Iterator

import pytest
from google.protobuf.message import Message
from grpc import StatusCode

from backboned.client import Client, ClientError, TrainingOptions
from backboned.v1 import model_service_pb2 as pb

Refusal = Callable[[str, Message], ClientError]


def finetune(**fields: object) -> pb.FineTuneRequest:
    """A good request, apart from `fields`."""
    return pb.FineTuneRequest(**{"model": "new", "backbone": "digits", "dataset": "squares", **fields})  # type: ignore[arg-type]


@pytest.fixture(scope="module", autouse=True)
def nothing_started(client: Client) -> Iterator[None]:
    """No wrong request leaves a job or a version behind."""
    yield
    assert not list(client.list_jobs(model="new"))
    with pytest.raises(ClientError, match="unknown model 'new'"):
        client.get_model("new")


@pytest.mark.parametrize(
    ("fields", "code", "field", "message"),
    [
        ({"backbone": "digit"}, "NOT_FOUND", "backbone", "did you mean 'digits'?"),
        ({"backbone": "resnet-18"}, "NOT_FOUND", "backbone", "'resnet18'"),
        ({"backbone": ""}, "NOT_FOUND", "backbone", "known: "),
        ({"backbone": "weightless"}, "FAILED_PRECONDITION", "backbone", "with --weights weightless=FILE, a state_dict"),
        ({"dataset": ""}, "INVALID_ARGUMENT", "dataset", "give a folder below one of the daemon's data roots"),
        ({"dataset": "square"}, "NOT_FOUND", "dataset", "did you mean 'squares'?"),
        ({"dataset": "/etc"}, "PERMISSION_DENIED", "dataset", "outside the data roots"),
        ({"dataset": "/no/such/folder"}, "PERMISSION_DENIED", "dataset", "--data-root DIR"),
        ({"dataset": "../../etc"}, "PERMISSION_DENIED", "dataset", "outside the data roots"),
        ({"dataset": "file:///etc"}, "PERMISSION_DENIED", "dataset", "outside the data roots"),
        ({"dataset": "leads-out"}, "PERMISSION_DENIED", "dataset", "outside the data roots"),
        ({"dataset": "http://host/photos"}, "PERMISSION_DENIED", "dataset", "--remote-data"),
        ({"dataset": "photo.png"}, "INVALID_ARGUMENT", "dataset", "is a file: give the folder"),
        ({"dataset": "no-classes"}, "INVALID_ARGUMENT", "dataset", "make a folder of images for each class"),
        ({"dataset": "empty-class"}, "INVALID_ARGUMENT", "dataset", "class folder 'green' has no images: add some, or"),
        ({"dataset": "one-class"}, "INVALID_ARGUMENT", "dataset", "one class only (red): add images of something else"),
        ({"dataset": "single-image"}, "INVALID_ARGUMENT", "dataset", "class 'blue' has 1 image"),
        ({"request_id": "x" * 129}, "INVALID_ARGUMENT", "request_id", "128 characters"),
    ],
)
def test_a_wrong_finetune_names_the_field_and_what_would_do(
    refusal: Refusal, fields: dict[str, object], code: str, field: str, message: str
) -> None:
    error = refusal("FineTune", finetune(**fields))
    assert (error.code, error.field) == (StatusCode[code], field)
    assert message in error.message, error.message


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        ({"max_epochs": 0}, "INVALID_ARGUMENT", "max_epochs is 0, which is out of range: 1…10000"),
        ({"max_epochs": 10_001}, "INVALID_ARGUMENT", "1…10000"),
        ({"batch_size": 0}, "INVALID_ARGUMENT", "1…4096"),
        ({"batch_size": 5000}, "INVALID_ARGUMENT", "batch_size is 5000, which is out of range: 1…4096"),
        ({"learning_rate": 0.0}, "INVALID_ARGUMENT", "above 0 and at most 10"),
        ({"learning_rate": -1.0}, "INVALID_ARGUMENT", "learning_rate is -1.0, which is out of range"),
        ({"learning_rate": math.nan}, "INVALID_ARGUMENT", "above 0 and at most 10"),
        ({"learning_rate": math.inf}, "INVALID_ARGUMENT", "above 0 and at most 10"),
        ({"weight_decay": 1.5}, "INVALID_ARGUMENT", "0…1"),
        ({"weight_decay": math.nan}, "INVALID_ARGUMENT", "0…1"),
        ({"patience": -1}, "INVALID_ARGUMENT", "0…10000"),
        ({"validation_fraction": 0.0}, "INVALID_ARGUMENT", "0.01…0.9"),
        ({"validation_fraction": 0.95}, "INVALID_ARGUMENT", "0.01…0.9"),
        ({"seed": -1}, "INVALID_ARGUMENT", "0…2^63-1"),
        ({"views": 0}, "INVALID_ARGUMENT", "1…64"),
        ({"views": 65}, "INVALID_ARGUMENT", "1…64"),
        ({"warm_start_version": 0}, "INVALID_ARGUMENT", "1 or more"),
        ({"warm_start_version": 3}, "NOT_FOUND", "new has no version 3"),
        ({"trainable_stages": ["layer9"]}, "INVALID_ARGUMENT", "digits has no stage 'layer9'; did you mean 'layer3'"),
        ({"task": 17}, "INVALID_ARGUMENT", "task is 17, which is no Task"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_an_option_out_of_range_is_named_with_its_range(
    refusal: Refusal, options: dict[str, object], code: str, message: str
) -> None:
    (name,) = options
    error = refusal("FineTune", finetune(options=pb.TrainingOptions(**options)))  # type: ignore[arg-type]
    assert (error.code, error.field) == (StatusCode[code], f"options.{name}")
    assert message in error.message, error.message


def test_backbones_without_weights_are_listed_as_such(client: Client) -> None:
    weights = {b.name: b.weights for b in client.list_backbones().backbones}
    assert weights["weightless"] == "" and weights["digits"].endswith("digits.pth")


def test_a_warm_start_from_another_backbone_is_refused(refusal: Refusal) -> None:
    error = refusal("FineTune", finetune(model="scenes", options=pb.TrainingOptions(warm_start_version=1)))
    assert (error.code, error.field) == (StatusCode.INVALID_ARGUMENT, "options.warm_start_version")
    assert "version 1 is of squeezenet1_1, not of digits" in error.message


def test_a_corrupt_photo_among_good_ones_is_named_and_left_out(client: Client, trained: pb.Job) -> None:
    reports = [e.dataset_report for e in client.watch(trained.id) if e.HasField("dataset_report")]
    last = reports[-1]
    ((path, reason),) = [(f.path, f.reason) for f in last.unreadable]
    assert path == "red/broken.jpg" and "JPEG" in reason and last.unreadable_count == 1
    assert [(f.path, f.reason) for f in last.skipped] == [("red/notes.txt", "not an image: its name ends in '.txt'")]
    assert {c.label: c.train_images + c.validation_images for c in last.classes} == {"red": 12, "blue": 12}
    assert (last.train_images + last.validation_images, trained.best.val_accuracy) == (24, 1.0)


def test_a_request_sent_twice_is_one_job_and_its_id_is_for_no_other(
    client: Client, refusal: Refusal, trained: pb.Job
) -> None:
    options = TrainingOptions(max_epochs=2)
    again = client.fine_tune("squares", "digits", "mixed", request_id="squares-1", **options)
    assert (again.id, again.version, again.state) == (trained.id, trained.version, pb.JOB_STATE_SUCCEEDED)
    assert len(list(client.list_jobs(model="squares"))) == 1
    for other in (
        finetune(request_id="squares-1"),
        pb.FineTuneRequest(model="squares", backbone="digits", dataset="mixed", request_id="squares-1"),
    ):
        error = refusal("FineTune", other)
        assert (error.code, error.field) == (StatusCode.ALREADY_EXISTS, "request_id")
        assert "give each request one of its own" in error.message
