"""docs/settings.md from the settings themselves: `python -m sapo_ray.control.settings_reference > docs/settings.md`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import SecretStr

from sapo_ray.control.settings import Settings

HEAD = """# Settings of the service

<!-- Written by `make docs` from sapo_ray/control/settings.py; edit there. -->

Each is an environment variable of `sapo-ray serve`; lists are written with commas, or as JSON. Some are options of the
command too (`sapo-ray serve --help`), which then count.

| variable | default | meaning |
|---|---|---|
"""


def page() -> str:
    """The whole page."""
    rows = []
    for name, field in Settings.model_fields.items():
        meaning = (field.description or "").replace("\n", " ").replace("|", "\\|")
        rows.append(f"| `SAPO_{name.upper()}` | {_default(field.default)} | {meaning} |")
    return HEAD + "\n".join(rows) + "\n"


def _default(value: Any) -> str:
    if value is None or value == "" or value == [] or isinstance(value, SecretStr):
        return "none"
    if isinstance(value, list):
        return f"`{','.join(value)}`"
    return f"`{value}`" if isinstance(value, str | Path) else f"`{json.dumps(value)}`"


if __name__ == "__main__":
    print(page(), end="")
