"""What a dataset holds, and what of it can't be used: a table and lines, for people."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from backboned.server.commands.output import table
from backboned.v1 import model_service_pb2 as pb

if TYPE_CHECKING:
    from rich.table import Table

SHOWN_CLASSES = 20
SHOWN_FILES = 5


def class_table(report: pb.DatasetReport) -> "Table":
    """Images by class and part; those that test are a column where there are any."""
    parts = ["train", "validation", *(["test"] if report.test_images else [])]
    rows = [[c.label, *(str(getattr(c, f"{part}_images")) for part in parts)] for c in report.classes[:SHOWN_CLASSES]]
    if (more := len(report.classes) - SHOWN_CLASSES) > 0:
        rows.append([f"… {more} more", *("" for _ in parts)])
    rows.append(["all", *(str(getattr(report, f"{part}_images")) for part in parts)])
    return table(["class", *(f">{part}" for part in parts)], rows)


def report_lines(report: pb.DatasetReport) -> Iterator[str]:
    """What a person should know besides the counts, a line each."""
    for what, files, count in (
        ("unreadable", report.unreadable, report.unreadable_count),
        ("skipped", report.skipped, report.skipped_count),
    ):
        for file in files[:SHOWN_FILES]:
            yield f"{what}: {file.path}: {file.reason}"
        if (more := count - SHOWN_FILES) > 0:
            yield f"{what}: {more} more"
    if report.duplicates:
        yield duplicates_line(report)
    yield from report.warnings


def duplicates_line(report: pb.DatasetReport) -> str:
    """How many groups of images show the same, and two of one of them."""
    exact = sum(group.exact for group in report.duplicates)
    first, second = report.duplicates[0].paths[:2]
    count = report.duplicates_count
    groups = "1 group of images shows" if count == 1 else f"{count} groups of images show"
    all_listed = count == len(report.duplicates)
    equal = f", {exact} of them the very same bytes" if all_listed and exact else ""
    return f"duplicates: {groups} the same or nearly so{equal}; among them {first} and {second}"
