"""Reads a Parquet file through, in a process of its own: `python -m sapo_ray.control.parquet FILE` prints JSON."""

from __future__ import annotations

import json
import sys
from typing import Any

BATCH = 1024


def examine(path: str) -> dict[str, Any]:
    """`{rows, columns}`, or `{error, hint}`."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        return {
            "error": "this service cannot read Parquet: pyarrow is not installed where it runs",
            "hint": "upload JSONL, or have the operator install pyarrow",
        }
    rows = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            columns = list(file.schema_arrow.names)
            for batch in file.iter_batches(BATCH):
                rows += batch.num_rows
    except (OSError, pyarrow.ArrowException) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        return {"error": f"not readable as Parquet after {rows} rows: {first.replace(path, 'the file')[:300]}"}
    return {"rows": rows, "columns": columns}


if __name__ == "__main__":
    sys.stdout.write(json.dumps(examine(sys.argv[1])))
