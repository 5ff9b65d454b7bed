"""Listings are filtered, ordered and paged as their little language says; its mistakes are told with their place."""

import base64
import json
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from backboned.registry.errors import BackbonedError, ErrorKind
from backboned.registry.query import Field, Page, paginate, parse_filter, parse_order


@dataclass(frozen=True)
class Record:
    """Something to list."""

    model: str = "flowers"
    version: int = 1
    val_loss: float | None = None
    best: bool = False
    state: str = "AVAILABLE"
    create_time: datetime = datetime(2026, 1, 31, 12, tzinfo=UTC)
    classes: tuple[str, ...] = ("daisy", "tulip")


FIELDS: list[Field[Record]] = [
    Field("model", "string", lambda r: r.model),
    Field("version", "number", lambda r: r.version),
    Field("val_loss", "number", lambda r: r.val_loss),
    Field("best", "boolean", lambda r: r.best),
    Field("state", "enum", lambda r: r.state, ("AVAILABLE", "SERVING"), "CHECKPOINT_STATE_"),
    Field("create_time", "time", lambda r: r.create_time),
    Field("classes", "strings", lambda r: r.classes),
]


def passes(text: str, record: Record) -> bool:
    return parse_filter(text, FIELDS)(record)


def filter_error(text: str) -> str:
    with pytest.raises(BackbonedError) as caught:
        parse_filter(text, FIELDS)
    assert (caught.value.kind, caught.value.field) == (ErrorKind.INVALID_ARGUMENT, "filter")
    return caught.value.message


@pytest.mark.parametrize("text", ["", "  \n "])
def test_an_empty_filter_takes_everything(text: str) -> None:
    assert passes(text, Record())


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("model = flowers", True),
        ("model=flowers", True),
        ("model != flowers", False),
        ('model = "old flowers"', False),
        ("model < g", True),
        ("model : low", True),
        ("model:Low", False),
        ("version = 3", True),
        ("version >= 3.5", False),
        ("version < 1e3", True),
        ("version > -1", True),
        ("version = 9223372036854775807", False),
        ("val_loss <= .25", True),
        ("val_loss > 0.25", False),
        ("best = true", True),
        ("best != TRUE", False),
        ("state = SERVING", True),
        ("state = CHECKPOINT_STATE_SERVING", True),
        ("state = serving", True),
        ("state != AVAILABLE", True),
        ("create_time > 2026-01-31T11:59:59.5Z", True),
        ("create_time = 2026-01-31T13:00:00+01:00", True),
        ('create_time < "2026-01-31t12:00:00z"', False),
        ("classes : daisy", True),
        ("classes : dais", False),
        ("version = 3 AND best = true", True),
        ("version = 3 AND best = false", False),
        ('model="flowers"AND version=3 and best=true', True),
    ],
)
def test_a_comparison_means_what_it_says(text: str, expected: bool) -> None:
    record = Record(version=3, val_loss=0.25, best=True, state="SERVING")
    assert passes(text, record) is expected


def test_large_integers_are_compared_exactly() -> None:
    assert not passes("version = 9007199254740992", Record(version=9007199254740993))


@pytest.mark.parametrize("value", [None, float("nan")])
def test_a_record_without_the_value_passes_only_unequal(value: float | None) -> None:
    record = Record(val_loss=value)
    assert [passes(f"val_loss {op} 0.5", record) for op in ("=", "<", "<=", ">", ">=", "!=")] == [False] * 5 + [True]


@given(st.text(max_size=100), st.sampled_from("\"'"))
@settings(deadline=None)
def test_any_string_can_be_quoted(text: str, quote: str) -> None:
    quoted = quote + text.replace("\\", "\\\\").replace(quote, "\\" + quote) + quote
    assert passes(f"model = {quoted}", Record(model=text))
    assert not passes(f"model = {quoted}", Record(model=text + "x"))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("val_los < 1", "filter, at character 1: unknown field 'val_los'; did you mean 'val_loss'?"),
        ("version = 1 AND modell = x", "filter, at character 17: unknown field 'modell'; did you mean 'model'?"),
        ("version ~ 1", "filter, at character 9: expected an operator after 'version' (= != < <= > >=), got '~ 1'"),
        ("version", "filter, at character 8: expected an operator after 'version' (= != < <= > >=), got the end"),
        ("version : 1", "filter, at character 9: 'version' can't be compared by ':', only by = != < <= > >="),
        ("classes = daisy", "filter, at character 9: 'classes' can't be compared by '=', only by :"),
        ("best > true", "filter, at character 6: 'best' can't be compared by '>', only by = !="),
        ("version = ", "filter, at character 11: expected a value for 'version', got the end"),
        ("version = one", "filter, at character 11: 'version' is compared with a number, got 'one'"),
        ("version = nan", "filter, at character 11: 'version' is compared with a number, got 'nan'"),
        ("best = 1", "filter, at character 8: 'best' is compared with true or false, got '1'"),
        ("state = GONE", "filter, at character 9: 'state' is compared with one of AVAILABLE, SERVING, got 'GONE'"),
        (
            "create_time > 2026-01-31",
            "filter, at character 15: 'create_time' is compared with a time such as 2026-01-31T12:00:00Z, "
            "got '2026-01-31'",
        ),
        ("version = 1 OR best = true", "filter, at character 13: expected AND before the next comparison, got 'OR'"),
        ("version = 1 (", "filter, at character 13: expected AND before the next comparison, got '('"),
        ("model = 'x", "filter, at character 9: expected a value for 'model', got \"'x\""),
    ],
)
def test_a_mistake_in_a_filter_is_told_with_its_place(text: str, expected: str) -> None:
    assert filter_error(text) == expected


@pytest.mark.parametrize("text", ["= 3", "version = 1 AND", "version = 1 AND (", "AND", "version = 1 AND AND"])
def test_a_missing_field_lists_those_there_are(text: str) -> None:
    assert "known: best, classes, create_time" in filter_error(text)


@pytest.mark.parametrize(
    "time", ["2026-02-30T00:00:00Z", "2026-01-01T25:00:00Z", "0001-01-01T00:00:00+23:00", "2026-01-01T00:00:00"]
)
def test_a_time_that_is_none_is_refused(time: str) -> None:
    assert "a time such as" in filter_error(f"create_time = {time}")


def test_a_filter_has_a_greatest_length() -> None:
    assert passes("model != " + "x" * 2039, Record())
    assert "at most 2048 characters, got 2049" in filter_error("model != " + "x" * 2040)


FRAGMENTS = st.one_of(
    st.sampled_from(["model", "version", "val_loss", "best", "state", "create_time", "classes", "AND", "OR", "(", ")"]),
    st.sampled_from(
        ["=", "!=", "<", ">=", ":", '"', "'", "\\", "1", "true", "SERVING", "2026-01-31T12:00:00Z", "1e999"]
    ),
    st.text(max_size=5),
)


@given(
    st.one_of(st.text(), st.lists(FRAGMENTS, max_size=12).map(" ".join), st.lists(FRAGMENTS, max_size=12).map("".join))
)
@settings(deadline=None)
def test_any_text_is_a_filter_or_a_typed_error(text: str) -> None:
    try:
        assert passes(text, Record(val_loss=0.5)) in (True, False)
    except BackbonedError as error:
        assert (error.kind, error.field) == (ErrorKind.INVALID_ARGUMENT, "filter")
        assert "\n" not in error.message


def ordered(text: str, records: list[Record], default: str = "model") -> list[Record]:
    return parse_order(text, FIELDS, default=default).sort(records)


def test_records_are_ordered_by_the_first_field_then_the_next() -> None:
    a, b, c = Record(model="b", version=1), Record(model="a", version=1), Record(model="b", version=2)
    assert ordered("model, version desc", [a, b, c]) == [b, c, a]
    assert ordered("version DESC,model asc", [a, b, c]) == [c, b, a]
    assert ordered("", [a, b, c], default="version desc, model") == [c, b, a]


@pytest.mark.parametrize("direction", ["asc", "desc"])
def test_records_without_a_value_come_last_either_way(direction: str) -> None:
    losses = [None, 0.5, float("nan"), 0.1]
    got = [r.val_loss for r in ordered(f"val_loss {direction}", [Record(val_loss=v) for v in losses])]
    assert got[:2] == ([0.1, 0.5] if direction == "asc" else [0.5, 0.1])
    assert got[2] is None, "records without a value keep their order"


@pytest.mark.parametrize("direction", ["asc", "desc"])
def test_equal_records_keep_their_order(direction: str) -> None:
    records = [Record(model="x", version=v) for v in (3, 1, 2)]
    assert ordered(f"model {direction}", records) == records


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("val_los", "can't order by 'val_los'; did you mean 'val_loss'?"),
        ("model,", "can't order by ''"),
        ("classes", "can't order by 'classes'"),
        ("model down", "expected asc, desc or a comma after 'model', got 'down'"),
        ("model desc asc", "expected asc, desc or a comma after 'model', got 'desc asc'"),
    ],
)
def test_a_mistake_in_an_order_is_told(text: str, expected: str) -> None:
    with pytest.raises(BackbonedError) as caught:
        ordered(text, [])
    assert (caught.value.kind, caught.value.field) == (ErrorKind.INVALID_ARGUMENT, "order_by")
    assert expected in caught.value.message


@given(st.one_of(st.text(), st.lists(FRAGMENTS, max_size=6).map(",".join)))
@settings(deadline=None)
def test_any_text_is_an_order_or_a_typed_error(text: str) -> None:
    try:
        assert len(ordered(text, [Record(), Record(val_loss=1.0)])) == 2
    except BackbonedError as error:
        assert (error.kind, error.field) == (ErrorKind.INVALID_ARGUMENT, "order_by")


def page(records: list[str], size: int, token: str = "", query: tuple[str, ...] = ("", "")) -> Page[str]:
    return paginate(records, size, token, identity=str, query=query)


@given(st.lists(st.text(), unique=True, max_size=40), st.integers(1, 15))
@settings(deadline=None)
def test_pages_joined_are_the_whole_list(records: list[str], size: int) -> None:
    joined, token = [], ""
    while True:
        got = page(records, size, token)
        joined += got.items
        assert got.total == len(records) and len(got.items) <= size
        if not (token := got.next_page_token):
            break
        assert len(got.items) == size
    assert joined == records


@given(st.lists(st.integers(0, 99), unique=True, min_size=2).map(sorted), st.sets(st.integers(0, 99)), st.data())
@settings(deadline=None)
def test_records_added_meanwhile_repeat_none_and_hide_none(
    before: list[int], added: set[int], data: st.DataObject
) -> None:
    size = data.draw(st.integers(1, len(before) - 1))
    first = paginate(before, size, "", identity=str)
    after = sorted({*before, *added})
    rest = paginate(after, 1000, first.next_page_token, identity=str).items
    assert rest == [n for n in after if n > first.items[-1]]


def test_a_page_goes_on_where_its_last_record_was_when_that_has_gone() -> None:
    token = page(list("abcdef"), 3).next_page_token
    assert page(list("abdef"), 3, token).items == list("def")
    assert page(["a"], 3, token).items == []


def test_a_page_size_of_zero_is_the_default() -> None:
    records = [str(n) for n in range(150)]
    assert len(page(records, 0).items) == 100
    assert len(paginate(records, 0, "", identity=str, default=50).items) == 50
    assert len(page(records, 1000).items) == 150


@pytest.mark.parametrize("size", [-1, 1001])
def test_a_page_size_out_of_range_is_refused(size: int) -> None:
    with pytest.raises(BackbonedError, match=rf"page_size must be 1…1000, or 0 for 100, got {size}") as caught:
        page([], size)
    assert (caught.value.kind, caught.value.field) == (ErrorKind.INVALID_ARGUMENT, "page_size")


def test_a_token_is_refused_with_another_query() -> None:
    token = page(list("abc"), 2, query=("model = x", "version")).next_page_token
    assert page(list("abc"), 2, token, ("model = x", "version")).items == ["c"]
    for other in (("model = y", "version"), ("model = x", ""), ("model = xversion", ""), ()):
        with pytest.raises(BackbonedError, match="another filter") as caught:
            page(list("abc"), 2, token, other)
        assert (caught.value.kind, caught.value.field) == (ErrorKind.INVALID_ARGUMENT, "page_token")


def test_a_token_is_safe_in_a_url_and_shows_no_record() -> None:
    token = page(["secret/ü", "b"], 1).next_page_token
    assert token.replace("-", "").replace("_", "").isalnum() and token.isascii()
    assert b"secret" not in base64.urlsafe_b64decode(token + "==")


def forged(content: object) -> str:
    return base64.urlsafe_b64encode(json.dumps(content).encode()).decode()


@given(
    st.one_of(
        st.text(min_size=1),
        st.binary(min_size=1).map(lambda b: base64.urlsafe_b64encode(b).decode()),
        st.lists(st.one_of(st.none(), st.integers(), st.text(), st.lists(st.integers())), max_size=4).map(forged),
    )
)
@settings(deadline=None)
def test_a_made_up_token_is_a_typed_error(token: str) -> None:
    with pytest.raises(BackbonedError) as caught:
        page(list("abc"), 1, token)
    assert (caught.value.kind, caught.value.field) == (ErrorKind.INVALID_ARGUMENT, "page_token")


def test_times_far_apart_are_ordered() -> None:
    times = [datetime.min.replace(tzinfo=UTC), datetime.max.replace(tzinfo=UTC), datetime(2026, 1, 1, tzinfo=UTC)]
    got = [r.create_time for r in ordered("create_time desc", [Record(create_time=t) for t in times])]
    assert got == sorted(times, reverse=True)
    assert got[0] - got[1] > timedelta(days=365)
