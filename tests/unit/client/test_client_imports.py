"""What importing costs."""

from __future__ import annotations

import subprocess
import sys

HEAVY = ("httpx", "torch", "ray", "numpy", "fastapi", "sqlalchemy", "transformers")


def loaded(code: str) -> set[str]:
    script = f"{code}\nimport sys; print(*sorted(set({HEAVY!r}) & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    return set(done.stdout.split())


def test_the_package_alone_loads_nothing_and_the_client_only_its_http_library() -> None:
    assert loaded("import sapo_ray") == set()
    assert loaded("from sapo_ray import Client") == {"httpx"}
    assert loaded("import sapo_ray; sapo_ray.Client") == {"httpx"}
