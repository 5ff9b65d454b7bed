"""From a call to an answer: the version that was asked for, the network's own probabilities, or what to do."""

import asyncio
import gc
import math
import time
from io import BytesIO
from typing import Any

import pytest
import torch
from PIL import Image

from backboned.registry import BackbonedError, ErrorKind
from backboned.server.serving.calls import Pixels, Target
from backboned.server.serving.predictor import MAX_IMAGES
from tests.serving.desk import CLASSES, LEAVES, Desk, World, logits, picture, png, view


async def test_answers_are_the_networks_own(desk: Desk, world: World) -> None:
    result = await desk.ask("flowers", png(0), png(1))
    assert (result.model, result.version, len(result.predictions)) == ("flowers", 2, 2)
    for seed, prediction in enumerate(result.predictions):
        expected = logits(world.networks["flowers", 2], picture(seed)).softmax(0)
        found = dict(prediction.classes)
        assert [found[name] for name in CLASSES] == pytest.approx(expected.tolist(), abs=1e-5)
        ranked = [probability for _, probability in prediction.classes]
        assert ranked == sorted(ranked, reverse=True)
    assert len({p.id for p in result.predictions}) == 2


async def test_binary_and_multi_label_models_answer_for_every_class(desk: Desk, world: World) -> None:
    (prediction,) = (await desk.ask("binary", png(0))).predictions
    positive = logits(world.networks["binary", 1], picture(0)).sigmoid().item()
    assert dict(prediction.classes) == pytest.approx({"bee": positive, "not bee": 1 - positive}, abs=1e-5)
    (prediction,) = (await desk.ask("labels", png(0))).predictions
    each = logits(world.networks["labels", 1], picture(0)).sigmoid().tolist()
    assert dict(prediction.classes) == pytest.approx(dict(zip(CLASSES, each, strict=True)), abs=1e-5)


async def test_raw_pixels_answer_as_the_file_they_are_of(desk: Desk) -> None:
    pixels = Pixels(picture(0).tobytes(), (20, 24, 3))
    result = await desk.ask("flowers", png(0), pixels)
    first, second = (dict(prediction.classes) for prediction in result.predictions)
    assert first == pytest.approx(second)


async def test_top_k_and_embedding(desk: Desk) -> None:
    for top_k, expected in ((0, 3), (1, 1), (3, 3)):
        (prediction,) = (await desk.ask("flowers", png(0), top_k=top_k)).predictions
        assert len(prediction.classes) == expected and prediction.embedding == ()
    (prediction,) = (await desk.ask("flowers", png(0), embedding=True)).predictions
    assert len(prediction.embedding) == 256


@pytest.mark.parametrize(
    ("call", "version"),
    [({}, 2), ({"version": 1}, 1), ({"version": 2}, 2), ({"alias": "stable"}, 1), ({"alias": "latest"}, 2)],
)
async def test_the_version_that_was_asked_for_answers(
    desk: Desk, world: World, call: dict[str, Any], version: int
) -> None:
    result = await desk.ask("flowers", png(0), **call)
    assert result.version == version
    expected = logits(world.networks["flowers", version], picture(0)).softmax(0)
    assert dict(result.predictions[0].classes)["ant"] == pytest.approx(expected[0].item(), abs=1e-5)


@pytest.mark.parametrize(
    ("model", "call", "expected"),
    [
        ("flower", {}, (ErrorKind.NOT_FOUND, "model", "unknown model 'flower'; did you mean 'flowers'?")),
        ("refused", {}, (ErrorKind.NOT_FOUND, "model", "(mine.pt is there but QUARANTINED: not a checkpoint")),
        ("../etc", {}, (ErrorKind.INVALID_ARGUMENT, "model", "model name '../etc' can't be used")),
        ("flowers", {"version": 9}, (ErrorKind.NOT_FOUND, "version", "unknown version of flowers '9'; known: 1, 2, 3")),
        ("flowers", {"alias": "stabel"}, (ErrorKind.NOT_FOUND, "alias", "did you mean 'stable'?")),
        ("flowers", {"version": 3}, (ErrorKind.FAILED_PRECONDITION, "version", "3 is quarantined: epoch-0000.pt is ")),
        ("flowers", {"alias": "broken"}, (ErrorKind.FAILED_PRECONDITION, "version", "version 3 is quarantined")),
        ("flowers", {"top_k": 4}, (ErrorKind.INVALID_ARGUMENT, "top_k", "top_k is 4; flowers has 3 classes")),
        ("flowers", {"top_k": -1}, (ErrorKind.INVALID_ARGUMENT, "top_k", "top_k is -1")),
        ("flowers", {"labels": ("ant", "bee")}, (ErrorKind.INVALID_ARGUMENT, "labels", "2 labels for 1 images")),
        ("flowers", {"labels": ("be",)}, (ErrorKind.INVALID_ARGUMENT, "labels[0]", "did you mean 'bee'?")),
        ("labels", {"labels": ("ant|be",)}, (ErrorKind.INVALID_ARGUMENT, "labels[0]", "unknown label 'be'")),
    ],
)
async def test_what_cannot_be_answered_is_told(
    desk: Desk, model: str, call: dict[str, Any], expected: tuple[ErrorKind, str, str]
) -> None:
    kind, field, message = expected
    error = await desk.refusal(model, png(0), **call)
    assert (error.kind, error.field) == (kind, field)
    assert message in error.message
    known = model if model in ("flowers", "labels") else ""
    assert desk.telemetry.done == [(known, kind.name)]


async def test_an_image_that_cannot_be_used_is_told_by_its_index(desk: Desk) -> None:
    error = await desk.refusal("flowers", png(0), b"no image", png(1))
    assert (error.kind, error.field) == (ErrorKind.INVALID_ARGUMENT, "images[1]")
    assert error.message.startswith("image 1: ")
    error = await desk.refusal("flowers", Pixels(b"123", (2, 2, 3)))
    assert error.field == "images[0]"
    large = BytesIO()
    Image.new("RGB", (101, 100)).save(large, "PNG")
    assert "image 0: " in (await desk.refusal("flowers", large.getvalue())).message
    assert "at least one image" in (await desk.refusal("flowers")).message
    assert f"send at most {MAX_IMAGES}" in (await desk.refusal("flowers", *[b""] * (MAX_IMAGES + 1))).message


async def test_labels_make_a_serving_loss(desk: Desk, world: World) -> None:
    await desk.ask("flowers", png(0), png(1), labels=("ant", "wasp"), top_k=1)
    for i, (label, told) in enumerate(zip(("ant", "wasp"), desk.telemetry.losses, strict=True)):
        row = logits(world.networks["flowers", 2], picture(i)).log_softmax(0)
        index = CLASSES.index(label)
        assert told == ("flowers", "serving", pytest.approx(-row[index].item(), abs=1e-4), row.argmax().item() == index)


async def test_labels_of_binary_and_multi_label_models_do_too(desk: Desk, world: World) -> None:
    await desk.ask("binary", png(0), labels=("not bee",))
    positive = logits(world.networks["binary", 1], picture(0)).sigmoid().item()
    assert desk.telemetry.losses.pop() == (
        "binary",
        "serving",
        pytest.approx(-math.log(1 - positive), abs=1e-4),
        positive < 0.5,
    )
    row = logits(world.networks["labels", 1], picture(0))
    right = "|".join(name for name, value in zip(CLASSES, row, strict=True) if value > 0)
    await desk.ask("labels", png(0), labels=(right,))
    loss = torch.nn.functional.binary_cross_entropy_with_logits(row, (row > 0).float()).item()
    assert desk.telemetry.losses.pop() == ("labels", "serving", pytest.approx(loss, abs=1e-4), True)


async def test_calls_for_several_models_at_once_each_get_their_own_answer(desk: Desk, world: World) -> None:
    asked = [("flowers", 1), ("flowers", 2), ("binary", 1), ("labels", 1)] * 15
    results = await asyncio.gather(
        *(desk.ask(model, png(i % 7), version=version) for i, (model, version) in enumerate(asked))
    )
    for i, ((model, version), result) in enumerate(zip(asked, results, strict=True)):
        row = logits(world.networks[model, version], picture(i % 7))
        first = row.softmax(0)[0] if model == "flowers" else row.sigmoid()[0]
        name = "bee" if model == "binary" else "ant"
        assert (result.model, result.version) == (model, version)
        assert dict(result.predictions[0].classes)[name] == pytest.approx(first.item(), abs=1e-5)
    assert desk.telemetry.done.count(("flowers", "OK")) == 30
    assert sum(desk.telemetry.batches) == 60
    assert desk.telemetry.phases.count("decode") == desk.telemetry.phases.count("total") == 60


async def test_several_models_and_versions_answer_one_call(desk: Desk, world: World) -> None:
    asked = [
        Target("flowers", 1),
        Target("binary"),
        Target("flowers", alias="latest"),
        Target("labels"),
        Target("binary"),
    ]
    results = await desk.ask_several(asked, png(0), png(1))
    versions = [("flowers", 1), ("binary", 1), ("flowers", 2), ("labels", 1), ("binary", 1)]
    assert [(r.model, r.version) for r in results] == versions
    for key, result in zip(versions, results, strict=True):
        for seed, prediction in enumerate(result.predictions):
            row = logits(world.networks[key], picture(seed))
            first = row.softmax(0)[0] if key[0] == "flowers" else row.sigmoid()[0]
            name = "bee" if key[0] == "binary" else "ant"
            assert dict(prediction.classes)[name] == pytest.approx(first.item(), abs=1e-5)
    assert len({p.id for r in results for p in r.predictions}) == 10
    assert sum(desk.telemetry.batches) == 2 and len(desk.telemetry.done) == 5


async def test_models_of_other_backbones_and_preprocessing_answer_the_same_call(desk: Desk, world: World) -> None:
    asked = [Target("leaves"), Target("flowers", 1), Target("leaves"), Target("flowers", 2)]
    results = await desk.ask_several(asked, png(0), png(1), png(2), embedding_stage="layer1")
    assert [(r.model, r.version) for r in results] == [("leaves", 1), ("flowers", 1), ("leaves", 1), ("flowers", 2)]
    for result in results:
        network = world.networks[result.model, result.version]
        for seed, prediction in enumerate(result.predictions):
            leaves = result.model == "leaves"
            x = view(picture(seed), LEAVES.preprocessing if leaves else None)
            below = ("0", "1", "2") if leaves else ("stem", "layer1")
            with torch.inference_mode():
                for name in below:
                    x = network.get_submodule(name)(x)
                row = network.get_submodule("3")(x.mean((2, 3)))[0] if leaves else logits(network, picture(seed))
            assert prediction.embedding == pytest.approx(x[0].mean((1, 2)).tolist(), abs=1e-5)
            assert sorted(p for _, p in prediction.classes) == pytest.approx(sorted(row.softmax(0).tolist()), abs=1e-5)
    assert sum(desk.telemetry.batches) == 6  # an image goes through each backbone once
    assert desk.telemetry.done == [(name, "OK") for name in ("leaves", "flowers", "leaves", "flowers")]


async def test_a_stage_that_one_of_several_backbones_lacks_is_told_by_name(desk: Desk) -> None:
    with pytest.raises(BackbonedError) as caught:
        await desk.ask_several([Target("leaves"), Target("flowers")], png(0), embedding_stage="first")
    assert caught.value.field == "embedding_stage"
    assert caught.value.message == (
        "flowers has no stage 'first' to embed: it stands on digits, which has stem, layer1, layer2, layer3, pool"
    )
    assert desk.telemetry.done == [("leaves", "INVALID_ARGUMENT"), ("flowers", "INVALID_ARGUMENT")]


async def test_of_errors_in_several_groups_one_is_told_and_none_is_left_unseen(
    desk: Desk, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(BackbonedError, match="image 1: "):
        await desk.ask_several([Target("leaves"), Target("flowers")], png(0), b"bad", png(1), b"worse", b"worst")
    assert len((await desk.ask("leaves", png(0))).predictions) == 1
    gc.collect()
    await asyncio.sleep(0)
    assert "never retrieved" not in caplog.text and caplog.text == ""


async def test_a_call_that_is_cancelled_while_it_is_computed_leaves_no_word(
    desk: Desk, caplog: pytest.LogCaptureFixture
) -> None:
    targets = [Target("leaves"), Target("flowers")]
    for yields in range(12):
        asked = asyncio.create_task(desk.ask_several(targets, png(0), b"bad", *[png(1)] * 6))
        for _ in range(yields):
            await asyncio.sleep(0)
        asked.cancel()
        with pytest.raises((asyncio.CancelledError, BackbonedError)):
            await asked
    assert len((await desk.ask("leaves", png(0))).predictions) == 1
    deadline = time.monotonic() + 30
    while desk.engine.depth() and time.monotonic() < deadline:  # what was cancelled goes when a lane comes to it
        await desk.ask("leaves", png(0))
    assert desk.engine.depth() == 0
    gc.collect()
    assert caplog.text == ""


async def test_a_label_counts_for_every_model_that_answers(desk: Desk) -> None:
    await desk.ask_several([Target("flowers", 1), Target("flowers", 2)], png(0), png(1), labels=("ant", "bee"))
    assert [(model, role) for model, role, *_ in desk.telemetry.losses] == [("flowers", "serving")] * 4


@pytest.mark.parametrize(
    ("targets", "call", "expected"),
    [
        ([Target("flowers"), Target("flower")], {}, "did you mean 'flowers'?"),
        ([Target("flowers"), Target("binary")], {"top_k": 3}, "top_k is 3; binary has 2 classes"),
        ([Target("flowers"), Target("binary")], {"labels": ("ant",)}, "unknown label 'ant'"),
        ([Target("flowers")], {"embedding_stage": "layer9"}, "which has stem, layer1, layer2, layer3, pool"),
        ([Target("flowers")], {"embedding_stage": "head"}, "which has stem, layer1, layer2, layer3, pool"),
    ],
)
async def test_what_one_of_several_models_cannot_answer_is_told(
    desk: Desk, targets: list[Target], call: dict[str, Any], expected: str
) -> None:
    with pytest.raises(BackbonedError) as caught:
        await desk.ask_several(targets, png(0), **call)
    assert expected in caught.value.message
    assert not desk.telemetry.batches


async def test_every_stage_can_be_embedded(desk: Desk) -> None:
    for stage, size in {"stem": 16, "layer1": 16, "layer2": 32, "layer3": 64, "pool": 256}.items():
        (prediction,) = (await desk.ask("flowers", png(0), embedding_stage=stage)).predictions
        assert len(prediction.embedding) == size


async def test_the_first_image_that_is_wrong_is_told_and_the_others_are_forgotten(desk: Desk) -> None:
    error = await desk.refusal("flowers", png(0), b"first", png(1), b"second", *[png(2)] * 20)
    assert error.field == "images[1]"
    assert len((await desk.ask("flowers", png(0))).predictions) == 1
