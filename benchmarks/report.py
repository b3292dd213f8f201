"""What every benchmark ends with: a table on the screen, and JSON with the machine named."""

from __future__ import annotations

import json
import platform
import time
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table

RESULTS = Path(__file__).parent / "results"


def machine() -> dict[str, Any]:
    """The machine that a number belongs to, and how busy it was with other things."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    return {
        "cpu": model,
        "cores": psutil.cpu_count(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "load_at_end": round(psutil.getloadavg()[0], 1),
        "python": platform.python_version(),
    }


def report(name: str, rows: list[dict[str, Any]], ratios: dict[str, float], *, whole: bool = True) -> None:
    """Print rows and ratios; write both to results/<name>.json, unless it was not the whole benchmark that ran."""
    console = Console(width=140)
    table = Table(*(rows[0]), title=name, title_justify="left")
    for row in rows:
        table.add_row(*(f"{value:.4g}" if isinstance(value, float) else str(value) for value in row.values()))
    console.print(table)
    for what, value in ratios.items():
        console.print(f"{what}: {value:.3f}", highlight=False)
    if not whole:
        return
    RESULTS.mkdir(exist_ok=True)
    content = {"rows": rows, "ratios": ratios, "machine": machine(), "date": time.strftime("%Y-%m-%d")}
    (RESULTS / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n")
