"""How results are shown: tables for people, JSON lines for programs, one line for what went wrong.

Results go to stdout, everything else to stderr. Colours and bars appear in a terminal only; piped tables aren't cut.
"""

import json
import sys
from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # imported where they are used: `--help` needs neither
    from google.protobuf.message import Message
    from google.protobuf.timestamp_pb2 import Timestamp
    from rich.console import Console
    from rich.table import Table

PIPED_WIDTH = 400


def console(*, stderr: bool = False) -> "Console":
    """A console on stdout or stderr that takes text as it is: names of files and classes are no markup."""
    from rich.console import Console

    stream = sys.stderr if stderr else sys.stdout
    return Console(
        stderr=stderr, markup=False, highlight=False, emoji=False, width=None if stream.isatty() else PIPED_WIDTH
    )


def notice(message: str) -> None:
    """Tell something that isn't a result, on stderr."""
    console(stderr=True).print(message, style="dim")


def fail(message: str) -> None:
    """Tell what went wrong, in one line on stderr."""
    from rich.text import Text

    console(stderr=True).print(Text.assemble(("error: ", "bold red"), message), soft_wrap=True)


def table(columns: Sequence[str], rows: Iterable[Sequence[str]], *, title: str | None = None) -> "Table":
    """Rows under bold headings, without lines. A column whose heading begins with `>` is set to the right."""
    from rich.table import Table

    made = Table(box=None, pad_edge=False, header_style="bold", title=title, title_justify="left", title_style="bold")
    for column in columns:
        made.add_column(
            column.removeprefix(">"), justify="right" if column.startswith(">") else "left", overflow="fold"
        )
    for row in rows:
        made.add_row(*row)
    return made


def print_table(columns: Sequence[str], rows: Iterable[Sequence[str]], *, empty: str) -> None:
    """Print a table, or the line `empty` when there is no row."""
    filled = table(columns, rows)
    if filled.row_count:
        console().print(filled)
    else:
        notice(empty)


def print_json(value: "Message | dict[str, Any]") -> None:
    """Print one JSON object as one line."""
    sys.stdout.write(json.dumps(value if isinstance(value, dict) else as_dict(value), ensure_ascii=False) + "\n")
    sys.stdout.flush()


def as_dict(message: "Message") -> dict[str, Any]:
    """A message in the JSON mapping of proto3 (64-bit integers are strings), with the API's field names."""
    from google.protobuf.json_format import MessageToDict

    return MessageToDict(message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True)


def size(size_bytes: int) -> str:
    """`82.1 kB`, `97.8 MB`."""
    amount = float(size_bytes)
    for unit in ("B", "kB", "MB", "GB"):
        if amount < 1000 or unit == "GB":
            break
        amount /= 1000
    return f"{amount:.0f} {unit}" if unit == "B" else f"{amount:.1f} {unit}"


def duration(seconds: float) -> str:
    """`8.3 s`, `2 min 5 s`, `1 h 12 min`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes = round(seconds) // 60
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min {round(seconds) % 60} s"


def when(time: "Timestamp") -> str:
    """Local time, to the minute; empty for a time that isn't set."""
    return datetime.fromtimestamp(time.seconds).astimezone().strftime("%Y-%m-%d %H:%M") if time.seconds else ""


def label(name: str, prefix: str) -> str:
    """An enum value's name as people read it: `JOB_STATE_RUNNING` → `running`."""
    return name.removeprefix(prefix).lower().replace("_", " ")
