"""The little language of listings: a filter, an order, and pages that stay put while records are added.

    filter    state = SERVING AND val_accuracy >= 0.9 AND model != "old"
    order     val_loss, create_time desc

Which fields there are, and of what kind, is told by `Field`; the records themselves may be anything.
"""

import base64
import binascii
import hashlib
import json
import math
import operator
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Generic, Literal, NoReturn, TypeVar

from backboned.registry.errors import invalid, suggestion

T = TypeVar("T")
Kind = Literal["string", "number", "boolean", "time", "enum", "strings"]

MAX_FILTER_LENGTH = 2048
MAX_PAGE_SIZE = 1000

_SPACE = re.compile(r"\s*")
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.]*")
_OPERATOR = re.compile(r"<=|>=|!=|=|<|>|:")
_QUOTED = re.compile(r'"((?:[^"\\]|\\.)*)"|\'((?:[^\'\\]|\\.)*)\'', re.DOTALL)
_BARE = re.compile(r"[^\s\"'=<>!()]+")
_NUMBER = re.compile(r"[+-]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]+)?")
_TIME = re.compile(r"\d{4}-\d\d-\d\d[Tt ]\d\d:\d\d:\d\d(\.\d+)?([Zz]|[+-]\d\d:\d\d)", re.ASCII)

_EQUALITY = {"=": operator.eq, "!=": operator.ne}
_COMPARISON = _EQUALITY | {"<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge}
_OPERATORS: dict[Kind, dict[str, Callable[[Any, Any], bool]]] = {
    "string": _COMPARISON | {":": operator.contains},
    "number": _COMPARISON,
    "boolean": _EQUALITY,
    "time": _COMPARISON,
    "enum": _EQUALITY,
    "strings": {":": operator.contains},
}


@dataclass(frozen=True)
class Field(Generic[T]):
    """A field of a record: its name, its kind, and how to get it.

    `get` returns, by kind, a `str`, an `int` or `float`, a `bool`, a `datetime` with a time zone, one of `values`
    (enum), or several `str`; or None where the record has no value. NaN counts as no value. A filter may write an
    enum's value with `prefix` before it (`CHECKPOINT_STATE_SERVING`) or without (`SERVING`).
    """

    name: str
    kind: Kind
    get: Callable[[T], Any]
    values: tuple[str, ...] = ()
    prefix: str = ""

    def of(self, record: T) -> Any:
        """The value in `record`, None where there is none."""
        value = self.get(record)
        return None if isinstance(value, float) and math.isnan(value) else value


def parse_filter(text: str, fields: Sequence[Field[T]]) -> Callable[[T], bool]:
    r"""The predicate that a filter stands for; an empty one takes every record.

    Comparisons `FIELD OPERATOR VALUE` are joined by AND. Operators are = != < <= > >= and `:`: a string contains the
    value, or a list has it as an element. A value with spaces or any of `"'=<>!()` is quoted, by " or ', with \
    before a quote or a \. A record without a value for the field passes `!=` alone.

    Raises `BackbonedError` `INVALID_ARGUMENT` with the field "filter", saying where it is wrong.
    """
    if len(text) > MAX_FILTER_LENGTH:
        raise invalid(f"filter: at most {MAX_FILTER_LENGTH} characters, got {len(text)}", field="filter")
    comparisons = _FilterParser(text, fields).parse()
    return lambda record: all(comparison(record) for comparison in comparisons)


class _FilterParser(Generic[T]):
    """Reads a filter from left to right; `at` is where it stands."""

    def __init__(self, text: str, fields: Sequence[Field[T]]) -> None:
        self.text = text
        self.fields = {f.name: f for f in fields}
        self.at = 0

    def parse(self) -> list[Callable[[T], bool]]:
        self.take(_SPACE)
        if self.at == len(self.text):
            return []
        comparisons = [self.comparison()]
        while self.at < len(self.text):
            if (word := self.take(_NAME)) is None or word.group().upper() != "AND":
                found = word.group() if word else self.text[self.at :]
                self.fail(f"expected AND before the next comparison, got {_short(found)}", word)
            comparisons.append(self.comparison())
        return comparisons

    def comparison(self) -> Callable[[T], bool]:
        name = self.take(_NAME)
        if name is None:
            self.fail(f"expected a field, got {self.rest()}{suggestion('', self.fields)}")
        field = self.fields.get(name.group())
        if field is None:
            self.fail(f"unknown field {_short(name.group())}{suggestion(name.group(), self.fields)}", name)
        symbol = self.take(_OPERATOR)
        if symbol is None:
            self.fail(f"expected an operator after {field.name!r} ({_listed(field)}), got {self.rest()}")
        compare = _OPERATORS[field.kind].get(symbol.group())
        if compare is None:
            self.fail(f"{field.name!r} can't be compared by {symbol.group()!r}, only by {_listed(field)}", symbol)
        wanted = self.value(field)
        unset_passes = symbol.group() == "!="

        def holds(record: T) -> bool:
            value = field.of(record)
            return unset_passes if value is None else compare(value, wanted)

        return holds

    def value(self, field: Field[T]) -> Any:
        found = self.take(_QUOTED) or self.take(_BARE)
        if found is None:
            self.fail(f"expected a value for {field.name!r}, got {self.rest()}")
        text = found.group()
        if found.re is _QUOTED:
            text = re.sub(r"\\(.)", r"\1", text[1:-1], flags=re.DOTALL)
        try:
            return _literal(text, field)
        except ValueError as error:
            self.fail(f"{field.name!r} is compared with {error}, got {_short(text)}", found)

    def take(self, pattern: re.Pattern[str]) -> re.Match[str] | None:
        """What stands here if it is a `pattern`; then the place is after it and any space."""
        found = pattern.match(self.text, self.at)
        if found:
            space = _SPACE.match(self.text, found.end())
            self.at = space.end() if space else found.end()
        return found

    def rest(self) -> str:
        return _short(self.text[self.at :]) if self.at < len(self.text) else "the end"

    def fail(self, message: str, at: re.Match[str] | None = None) -> NoReturn:
        place = at.start() if at else self.at
        raise invalid(f"filter, at character {place + 1}: {message}", field="filter")


def _literal(text: str, field: Field[T]) -> Any:
    """The value that `text` stands for. Raises `ValueError` with what was expected."""
    match field.kind:
        case "number":
            if not _NUMBER.fullmatch(text):
                raise ValueError("a number")
            return int(text) if text.lstrip("+-").isdigit() else float(text)
        case "boolean":
            if text.lower() not in ("true", "false"):
                raise ValueError("true or false")
            return text.lower() == "true"
        case "time":
            try:
                if _TIME.fullmatch(text):
                    return datetime.fromisoformat(text.upper()).astimezone(UTC)
            except (ValueError, OverflowError):
                pass
            raise ValueError("a time such as 2026-01-31T12:00:00Z")
        case "enum":
            values = {v.upper(): v for v in field.values}
            upper = text.upper()
            value = values.get(upper) or values.get(upper.removeprefix(field.prefix.upper()))
            if value is None:
                raise ValueError(f"one of {', '.join(field.values)}")
            return value
        case _:
            return text


@dataclass(frozen=True)
class Order(Generic[T]):
    """Fields to sort by, the first counting most, each with whether it descends."""

    keys: tuple[tuple[Field[T], bool], ...]

    def sort(self, records: Iterable[T]) -> list[T]:
        """The records in this order. Those without a value come last either way; equal ones keep their order."""
        ordered = list(records)
        for field, descending in reversed(self.keys):
            ordered.sort(key=lambda r: _sort_key(field.of(r), descending), reverse=descending)
        return ordered


def parse_order(text: str, fields: Sequence[Field[T]], *, default: str) -> Order[T]:
    """The order that `text` stands for, or `default` where it is empty: fields, each with an optional `asc` or `desc`.

    Raises `BackbonedError` `INVALID_ARGUMENT` with the field "order_by".
    """
    known = {f.name: f for f in fields if f.kind != "strings"}
    keys: list[tuple[Field[T], bool]] = []
    for part in (text.strip() or default).split(","):
        name, *direction = part.split() or [""]
        if name not in known:
            raise invalid(f"order_by: can't order by {_short(name)}{suggestion(name, known)}", field="order_by")
        if [d.lower() for d in direction] not in ([], ["asc"], ["desc"]):
            raise invalid(
                f"order_by: expected asc, desc or a comma after {name!r}, got {_short(' '.join(direction))}",
                field="order_by",
            )
        keys.append((known[name], [d.lower() for d in direction] == ["desc"]))
    return Order(tuple(keys))


@dataclass(frozen=True)
class Page(Generic[T]):
    """Some of the records, the token of the next page (empty on the last), and how many there are in all."""

    items: list[T]
    next_page_token: str
    total: int


def paginate(
    records: Sequence[T],
    page_size: int,
    page_token: str,
    *,
    identity: Callable[[T], str],
    query: Sequence[str] = (),
    default: int = 100,
) -> Page[T]:
    """The page of the ordered `records` that `page_token` asks for, or the first; `page_size` 0 means `default`.

    A token remembers the last record of its page, by `identity`, which tells records apart. So the next page goes on
    right after it, whatever was added or removed meanwhile; if that record itself has gone, at its place. A token
    holds only for the `query` (filter, order and so on, as sent) that it was made for.

    Raises `BackbonedError` `INVALID_ARGUMENT` with the field "page_size" or "page_token".
    """
    if not 0 <= page_size <= MAX_PAGE_SIZE:
        raise invalid(f"page_size must be 1…{MAX_PAGE_SIZE}, or 0 for {default}, got {page_size}", field="page_size")
    begin = _begin(records, page_token, identity, _mark(*query)) if page_token else 0
    end = begin + (page_size or default)
    items = list(records[begin:end])
    token = _token(_mark(*query), end, _mark(identity(items[-1]))) if end < len(records) else ""
    return Page(items, token, len(records))


def _begin(records: Sequence[T], page_token: str, identity: Callable[[T], str], query: str) -> int:
    made_for, offset, last = _read_token(page_token)
    if made_for != query:
        raise invalid(
            "page_token was made for another filter, order or model; send those of the call that gave it, "
            "or begin without a token",
            field="page_token",
        )
    # Most often nothing has changed, and the record is where it was.
    if 0 < offset <= len(records) and _mark(identity(records[offset - 1])) == last:
        return offset
    places = (i for i, record in enumerate(records) if _mark(identity(record)) == last)
    return next((place + 1 for place in places), min(offset - 1, len(records)))


def _token(query: str, offset: int, last: str) -> str:
    return base64.urlsafe_b64encode(json.dumps([query, offset, last]).encode()).decode().rstrip("=")


def _read_token(token: str) -> tuple[str, int, str]:
    try:
        content = json.loads(base64.b64decode(token + "=" * (-len(token) % 4), altchars="-_", validate=True))
        match content:
            case [str(query), int(offset), str(last)] if offset > 0:
                return query, offset, last
    except (ValueError, RecursionError, binascii.Error):
        pass
    raise invalid(
        f"page_token {_short(token)} is none that this server gave; send next_page_token of the page before",
        field="page_token",
    )


def _mark(*texts: str) -> str:
    return hashlib.sha256(json.dumps(texts).encode()).hexdigest()[:16]


def _sort_key(value: Any, descending: bool) -> tuple[bool, Any]:
    return ((value is None) != descending, value)


def _listed(field: Field[T]) -> str:
    return " ".join(_OPERATORS[field.kind])


def _short(text: str) -> str:
    return repr(text if len(text) <= 40 else text[:39] + "…")
