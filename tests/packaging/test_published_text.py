"""What people read and install speaks of Backboned alone: of no machine on which it was made, of no package index."""

import re
from pathlib import Path

PUBLISHED = ("*.md", "*.toml", "*.lock", "Makefile", "docs", "deploy", "examples", "benchmarks")
SOURCE_ROOTS = ("proto", "registry", "plugins", "server")
FORBIDDEN = re.compile(r"\.\./shared|(?<![\w.~-])/work/|/tmp/bb\b|\bpypi\.org|pythonhosted\.org", re.IGNORECASE)


def test_no_published_text_names_a_workplace_or_a_package_index(root: Path) -> None:
    found = [
        f"{path.relative_to(root)}:{number}: {line.strip()}"
        for path in published(root)
        for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1)
        if FORBIDDEN.search(line)
    ]
    assert found == []


def published(root: Path) -> list[Path]:
    """The files that the repository shows or ships to users, whatever their kind."""
    tops = [top for pattern in PUBLISHED + SOURCE_ROOTS for top in root.glob(pattern)]
    files = [file for top in tops for file in ([top] if top.is_file() else top.rglob("*")) if file.is_file()]
    return sorted(file for file in files if "__pycache__" not in file.parts)
