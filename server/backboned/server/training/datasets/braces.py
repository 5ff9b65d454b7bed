"""Names of many files in one, as shells and WebDataset write them: `flowers-{000..007}.tar`."""

import re
from itertools import product

from backboned.registry.errors import invalid

MOST = 10_000
_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")


def expand(pattern: str) -> list[str]:
    """All names that `pattern` means, in order: of `{000..007}` the numbers, of `{a,b}` the words.

    Raises `BackbonedError` `INVALID_ARGUMENT` for braces that mean nothing, or more than 10,000 names.
    """
    pieces = _BRACES.split(pattern)  # text, inner, text, inner, text …
    if any("{" in text or "}" in text for text in pieces[::2]):
        raise _refused(pattern, "its braces are not in pairs")
    choices = [[piece] if i % 2 == 0 else _choices(pattern, piece) for i, piece in enumerate(pieces)]
    count = 1
    for choice in choices:
        count *= len(choice)
    if count > MOST:
        raise _refused(pattern, f"it means {count} files, at most {MOST} are read")
    return ["".join(parts) for parts in product(*choices)]


def _choices(pattern: str, inner: str) -> list[str]:
    if match := _RANGE.fullmatch(inner):
        first, last = (int(n[:18]) for n in match.groups())
        if first > last or last - first >= MOST:
            raise _refused(pattern, f"{{{inner}}} must go from a number to a higher one, at most {MOST} of them")
        return [f"{n:0{len(match[1])}}" for n in range(first, last + 1)]
    words = inner.split(",")
    if len(words) < 2 or not all(words):
        raise _refused(pattern, f"{{{inner}}} is neither a range such as {{000..007}} nor a list such as {{a,b}}")
    return words


def _refused(pattern: str, reason: str) -> Exception:
    return invalid(f"dataset {pattern[:200]!r} can't be read: {reason}", field="dataset")
