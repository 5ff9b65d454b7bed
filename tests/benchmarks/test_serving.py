"""The serving benchmark runs, on the smallest backbone and without compiling, and writes what it found."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_it_measures_and_writes_its_results(tmp_path: Path) -> None:
    run = subprocess.run(
        [
            sys.executable, str(ROOT / "benchmarks" / "serving.py"),
            "--quick", "--backbones=digits", "--only=callers", f"--out={tmp_path}",
        ],
        env={**os.environ, "BACKBONED_COMPILE": "off"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-2000:]
    told = json.loads((tmp_path / "results.json").read_text())
    rates = {row["name"]: row["value"] for row in told["rows"] if row["unit"] == "images/s"}
    assert rates["32 callers"] > 0
    assert (tmp_path / "results.png").stat().st_size > 1000
    assert "32 callers" in run.stdout
