"""Whether what became of a mutated file is right."""

import re
from collections.abc import Sequence

from tests.chaos.mutation import Expected

_UNFIT = re.compile(
    r"internal error|Traceback|the loader failed|frame #|File \"|still waited for|weights_only|Exception raised"
    r"|(?<!manifest\.json: )\b(?:Assertion|Attribute|Index|Key|Type|Recursion|Memory|Runtime|UnicodeDecode)Error\b"
)
"""What no reason says: it is for people, about their file."""


def fault(expected: Expected, served: bool, intact: bool, reasons: Sequence[str]) -> str:
    """What is wrong about it; empty if nothing is."""
    if served and expected is Expected.REFUSED:
        return "it is served"
    if served and not intact and expected is not Expected.FINITE:
        return "what is served isn't what the original would"
    if not served and expected is Expected.SERVED:
        return f"it isn't served: {list(reasons)}"
    if not served and not reasons:
        return "there is no reason"
    unfit = [r for r in reasons if not r.strip() or "\n" in r or len(r.encode()) > 1000 or _UNFIT.search(r)]
    return f"not a reason for people: {unfit[0]!r}" if unfit else ""
