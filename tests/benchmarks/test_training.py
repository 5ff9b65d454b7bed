"""The training benchmark runs, on the smallest backbone and made photos, and writes what it found."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


def test_the_three_ways_to_train_are_timed(tmp_path: Path) -> None:
    told, output = measured(tmp_path, "speed,accuracy")
    names = {row["name"] for row in told["rows"] if row["value"] > 0}
    assert names >= {"tutorial loop", "good loop", "ours, new photos", "ours, same photos again"}
    assert "skipped: accuracy: it needs --photos" in output
    assert (tmp_path / "training.png").stat().st_size > 1000


def test_callers_are_measured_alone_and_beside_a_job(tmp_path: Path) -> None:
    told, _ = measured(tmp_path, "interference")
    names = {row["name"] for row in told["rows"] if row["value"] > 0}
    assert names >= {"32 callers", "32 callers, p99", "30 % of the best, p99", "features meanwhile"}


def measured(out: Path, parts: str) -> tuple[dict[str, Any], str]:
    run = subprocess.run(
        [
            sys.executable, str(ROOT / "benchmarks" / "training.py"),
            "--quick", "--full", "--backbones=digits", "--served=digits", f"--only={parts}", f"--out={out}",
        ],
        env={**os.environ, "BACKBONED_COMPILE": "off"},
        capture_output=True,
        text=True,
        timeout=290,
        check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-2000:]
    return json.loads((out / "training.json").read_text()), run.stdout
