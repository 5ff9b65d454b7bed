"""Mutated files by the hundred before a real loader: each is refused with its reason, or serves what it always did.

`make chaos` has ten thousand of them. A failure names KIND:SEED; the same file comes again by

    BACKBONED_CHAOS=KIND:SEED make test TESTS=tests/chaos/test_mutated_files.py
"""

import json
import logging
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.chaos.mutation import Expected
from tests.chaos.verdict import fault

_logger = logging.getLogger(__name__)
ROOT = Path(__file__).parents[2]
CHAOS = os.environ.get("BACKBONED_CHAOS", "208")
COUNT = int(CHAOS) if CHAOS.isdecimal() else 1
SECONDS = 120.0 + 0.5 * COUNT
MORE_BYTES = 512 * 2**20
"""So much more memory than loading the good files may mutated ones take: one file alone makes 300 MB at most."""


@pytest.mark.timeout(SECONDS + 60)
def test_a_mutated_file_is_refused_with_a_reason_or_serves_what_it_always_did(tmp_path: Path) -> None:
    only = [] if CHAOS.isdecimal() else CHAOS.split(",")
    command = [sys.executable, "-B", "-m", "tests.chaos.trial", str(tmp_path), str(COUNT), *only]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=SECONDS, check=False)
    last = (tmp_path / "last-opened").read_bytes().decode(errors="replace").strip()
    assert ended.returncode == 0, f"the process ended with {ended.returncode} at {last}:\n{ended.stderr[-4000:]}"

    *outcomes, told = [json.loads(line) for line in ended.stdout.splitlines()]
    assert len(outcomes) == (len(only) or COUNT)
    grown = told["peak_bytes"] - told["baseline_bytes"]
    _logger.warning("%d mutated files, %d MB beyond good ones at most", len(outcomes), grown >> 20)
    for kind, count in sorted(Counter(o["kind"] for o in outcomes).items()):
        served = sum(o["served"] for o in outcomes if o["kind"] == kind)
        _logger.warning("%-40s %5d, %5d of them served", kind, count, served)
    faults = {f"{o['kind']}:{o['seed']}": why for o in outcomes if (why := judged(o))}
    assert not faults, "\n".join(f"{mutation} {why}" for mutation, why in faults.items())
    assert not told["mark"] and not told["heard"], f"something ran: {told['heard']}"
    assert grown < MORE_BYTES


def judged(outcome: dict[str, Any]) -> str:
    return fault(Expected(outcome["expected"]), outcome["served"], outcome["intact"], outcome["reasons"])
