"""The pages that people read, and the blocks of code in them."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

_FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """Fenced code: its page, its language, its text."""

    page: Path
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page.name}: {self.text[:60]!r}"


@pytest.fixture(scope="session")
def root() -> Path:
    return Path(__file__).parents[2]


@pytest.fixture(scope="session")
def pages(root: Path) -> list[Path]:
    """Everything that is written for people."""
    return sorted([*root.glob("*.md"), *root.glob("docs/**/*.md"), *root.glob("examples/**/*.md")])


@pytest.fixture(scope="session")
def blocks(pages: list[Path]) -> list[Block]:
    """All fenced code."""
    return [Block(page, *match.groups()) for page in pages for match in _FENCED.finditer(page.read_text())]


@pytest.fixture(scope="session")
def commands(blocks: list[Block]) -> list[tuple[Path, str]]:
    """The shell commands in them, each with its page; a line that ends in a backslash goes on."""
    return [(block.page, line) for block in blocks for line in _commands(block)]


def _commands(block: Block) -> Iterator[str]:
    """In `console` blocks a command follows `$ `, and the rest is what it prints; in `sh` blocks every line is one."""
    if block.language not in ("sh", "console"):
        return
    for line in block.text.replace("\\\n", " ").splitlines():
        if block.language == "sh" or line.startswith("$ "):
            yield line.removeprefix("$ ")
