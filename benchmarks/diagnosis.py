"""Does the diagnosis name the right part within a minute?

Faults are injected into real runs, by tests/integration/test_stall_diagnosis.py: processes stopped and killed, a full
disk, damaged files, a reward function that hangs or raises, ... The seconds are from the fault, or from the beginning
of an attempt that has it from there on, to the first diagnosis that says that something is wrong. `right` is whether
that one names the part that the fault is in, within 60 s.

    python benchmarks/diagnosis.py [--only "killed or stopped"]     as pytest -k; the other rows stay as they were
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from report import RESULTS, report

TESTS = Path(__file__).parents[1] / "tests" / "integration" / "test_stall_diagnosis.py"
PROMISED_S = 60.0


def measure(only: str) -> list[dict[str, Any]]:
    """Rows of the faults that were injected; a fault of which nothing was named within the test's bound has none."""
    with tempfile.TemporaryDirectory() as folder:
        lines = Path(folder) / "rows.jsonl"
        lines.touch()
        command = [sys.executable, "-m", "pytest", "-q", str(TESTS), *(["-k", only] if only else [])]
        subprocess.run(command, env={**os.environ, "DIAGNOSIS_RESULTS": str(lines)}, check=False)
        return [json.loads(line) for line in lines.read_text().splitlines()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="an expression for pytest -k")
    only = parser.parse_args().only
    rows = {}
    if only and (RESULTS / "diagnosis.json").exists():
        rows = {row["fault"]: row for row in json.loads((RESULTS / "diagnosis.json").read_text())["rows"]}
    for row in measure(only):
        right = row["named"] == row["part"] and row["seconds"] <= PROMISED_S
        rows[row["fault"]] = row | {"right": right}
    slowest = max(row["seconds"] for row in rows.values())
    share = sum(row["right"] for row in rows.values()) / len(rows)
    report("diagnosis", list(rows.values()), {"right within 60 s, share of faults": share, "slowest, s": slowest})


if __name__ == "__main__":
    main()
