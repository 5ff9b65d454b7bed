"""Errors teach: what was wrong, what is near it, in a message that any transport carries."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from backboned.registry.errors import MAX_MESSAGE_BYTES, BackbonedError, ErrorKind, invalid, not_found, suggestion


@pytest.mark.parametrize(
    ("name", "known", "expected"),
    [
        ("resnet5", ["resnet50", "vgg19"], "; did you mean 'resnet50'?"),
        ("RESNET50", ["resnet50", "vgg19"], "; did you mean 'resnet50'?"),
        ("Rose", ["ROSE", "tulip"], "; did you mean 'ROSE'?"),
        ("ab", ["abc", "abd", "abe", "abf"], None),
        ("zebra", ["daisy", "rose"], "; known: daisy, rose"),
        ("x", [], "; none is known yet"),
        ("q", [f"model-{i}" for i in range(10)], ", … (10 in all)"),
        ("q", ["b", "a", "b"], "; known: a, b"),
    ],
)
def test_an_unknown_name_gets_the_nearest_or_a_short_list(name: str, known: list[str], expected: str | None) -> None:
    found = suggestion(name, known)
    if expected is None:
        assert found.startswith("; did you mean ") and found.count(" or ") == 2  # never more than three
    else:
        assert found.endswith(expected)


def test_not_found_says_what_is_unknown_and_bounds_what_it_quotes() -> None:
    error = not_found("model", "x" * 500, ["a"], field="model", hint=" (look again)")
    assert error.kind is ErrorKind.NOT_FOUND and error.field == "model"
    assert error.message == f"unknown model '{'x' * 80}'; known: a (look again)"


def test_an_error_carries_its_kind_field_and_delay() -> None:
    error = BackbonedError(ErrorKind.RESOURCE_EXHAUSTED, "full", retry_delay_seconds=0.5)
    assert (error.kind, error.message, error.field, error.retry_delay_seconds) == (
        ErrorKind.RESOURCE_EXHAUSTED,
        "full",
        None,
        0.5,
    )
    assert str(error) == "full"
    assert invalid("too small", field="options.seed").field == "options.seed"


def test_of_a_long_message_the_end_is_left_out() -> None:
    message = invalid("é" * 5000).message
    assert len(message.encode()) <= MAX_MESSAGE_BYTES
    assert message.startswith("éé") and message.endswith("…")


def test_what_is_no_text_is_escaped() -> None:
    assert invalid("the file \udcff.pt").message == "the file \\udcff.pt"


def test_a_message_is_one_line() -> None:
    assert invalid("got tensor([1,\r\n2])\n").message == "got tensor([1, 2])"


@given(st.text(st.characters(exclude_categories=()), max_size=3000))
@settings(deadline=None, max_examples=50)
def test_any_message_can_be_sent(text: str) -> None:
    message = invalid(text).message
    assert len(message.encode("utf-8")) <= MAX_MESSAGE_BYTES and len(message.splitlines()) <= 1
