"""The training benchmark runs, on the smallest backbone and made photos, and writes what it found."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.skipif("BACKBONED_BENCHMARKS" not in os.environ, reason="a minute or two; set BACKBONED_BENCHMARKS=1")
@pytest.mark.timeout(300)
def test_the_three_ways_to_train_are_timed(tmp_path: Path) -> None:
    run = subprocess.run(
        [
            sys.executable, str(ROOT / "benchmarks" / "training.py"),
            "--quick", "--full", "--backbones=digits", "--only=speed", f"--out={tmp_path}",
        ],
        env={**os.environ, "BACKBONED_COMPILE": "off"},
        capture_output=True,
        text=True,
        timeout=290,
        check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-2000:]
    told = json.loads((tmp_path / "training.json").read_text())
    names = {row["name"] for row in told["rows"] if row["value"] > 0}
    assert names >= {"tutorial loop", "good loop", "ours, new photos", "ours, same photos again"}
    assert (tmp_path / "training.png").stat().st_size > 1000
