"""How results are shown: tables for people, JSON lines for programs, one line for what went wrong.

Results go to stdout, everything else to stderr. Colours and bars appear in a terminal only; piped tables aren't cut.
"""

import itertools
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


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> "Table":
    """Rows under bold headings, without lines; a column whose heading begins with `>` is set to the right.

    In a terminal that is too narrow all columns but the first are broken into lines: nothing is cut.
    """
    from rich.table import Table

    made = Table(box=None, pad_edge=False, header_style="bold")
    for i, column in enumerate(columns):
        side = "right" if column.startswith(">") else "left"
        made.add_column(column.removeprefix(">"), justify=side, no_wrap=i == 0, overflow="fold")  # type: ignore[arg-type]
    for row in rows:
        made.add_row(*row)
    return made


def show(filled: "Table") -> None:
    """Print a table; without the blanks at the ends of lines where it is piped."""
    out = console()
    if out.is_terminal:
        out.print(filled)
        return
    with out.capture() as capture:
        out.print(filled)
    sys.stdout.write("".join(f"{line.rstrip()}\n" for line in capture.get().splitlines()))


def print_table(columns: Sequence[str], rows: Iterable[Sequence[str]], *, empty: str) -> None:
    """Print a table, or the line `empty` when there is no row."""
    filled = table(columns, rows)
    if filled.row_count:
        show(filled)
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


def runs(names: Iterable[str]) -> str:
    """`stem layer1…layer4 pool`: numbered names that follow each other by their ends."""
    grouped = [list(run) for _, run in itertools.groupby(names, key=lambda name: name.rstrip("0123456789"))]
    return " ".join(f"{run[0]}…{run[-1]}" if len(run) > 2 else " ".join(run) for run in grouped)


def duration(seconds: float) -> str:
    """`8.3 s`, `2m 05s`, `1h 12m`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}h {minutes % 60:02}m" if minutes >= 60 else f"{minutes}m {rest:02}s"


def size(size_bytes: int) -> str:
    """`812 B`, `4.2 MiB`, `1.3 GiB`."""
    if size_bytes < 1024:
        return f"{size_bytes} B"
    value = float(size_bytes)
    for unit in ("KiB", "MiB", "GiB"):
        value /= 1024
        if value < 1024:
            return f"{value:.1f} {unit}"
    return f"{value / 1024:.1f} TiB"


def when(time: "Timestamp") -> str:
    """Local time to the minute, as `Nov 25 03:26` in this year; empty for a time that isn't set."""
    if not time.seconds:
        return ""
    local = datetime.fromtimestamp(time.seconds).astimezone()
    return local.strftime("%b %d %H:%M" if local.year == datetime.now().astimezone().year else "%Y-%m-%d")


def label(name: str, prefix: str) -> str:
    """An enum value's name as people read it: `JOB_STATE_RUNNING` → `running`."""
    return name.removeprefix(prefix).lower().replace("_", " ")
