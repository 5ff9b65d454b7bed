"""HTML from plain text: whatever came from outside is escaped here, and nowhere else."""

import html
from collections.abc import Iterable, Sequence

SPACE = "\u00a0"
"""One at which no line is broken."""


def text(value: object) -> str:
    """`value` as text of a page or of an attribute. What can't be printed is replaced, also what turns text round."""
    plain = str(value).encode("utf-8", "replace").decode()
    return html.escape("".join(c if c.isprintable() or c == SPACE else "\ufffd" for c in plain))


def name(value: str) -> str:
    """A name from outside, kept apart from the direction of the text around it."""
    return f"<bdi>{text(value)}</bdi>"


def section(title: str, *content: str, note: str = "") -> str:
    """A part of the page under a heading; `note` and `content` are HTML."""
    under = f'<p class="note">{note}</p>' if note else ""
    return f"<section><h2>{text(title)}</h2>{under}{''.join(content)}</section>"


def table(columns: Sequence[str], rows: Iterable[Sequence[str]], *, caption: str, kind: str = "") -> str:
    """A table with headings, in which the first cell of each row heads it; cells are HTML, headings plain text.

    A heading that begins with `>` sets its column to the right.
    """
    sides = [' class="r"' if c.startswith(">") else "" for c in columns]
    head = "".join(f'<th scope="col"{s}>{text(c.removeprefix(">"))}</th>' for c, s in zip(columns, sides, strict=True))
    body = []
    for first, *others in rows:
        cells = "".join(f"<td{s}>{cell}</td>" for cell, s in zip(others, sides[1:], strict=True))
        body.append(f'<tr><th scope="row">{first}</th>{cells}</tr>')
    return (
        f'<div class="scroll" tabindex="0"><table class="{kind}"><caption>{text(caption)}</caption>'
        f"<thead><tr>{head}</tr></thead>"
        f"<tbody>{''.join(body)}</tbody></table></div>"
    )


def percent(part: float, digits: int = 1) -> str:
    """`91.3 %`, with a space that doesn't break."""
    return f"{100 * part:.{digits}f}{SPACE}%"
