"""The control plane's lock file from the project's own dependencies; prints it.

    .venv/bin/python scripts/control_lock.py > requirements/control.lock

Run in the environment of the CPU set. The versions are those that are installed there, so that the control plane runs
what was tested; packages that only engines need are left out.
"""

import tomllib
from importlib.metadata import distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
HEAD = "# The control plane's set: no engine; written by scripts/control_lock.py (requirements/README.md)."


def closure(wanted: list[str]) -> dict[str, str]:
    """Name and installed version of what these requirements need, themselves included."""
    found: dict[str, str] = {}
    seen: set[tuple[str, frozenset[str]]] = set()
    ahead = [Requirement(one) for one in wanted]
    while ahead:
        one = ahead.pop()
        name, extras = canonicalize_name(one.name), frozenset(one.extras)
        if (name, extras) in seen:
            continue
        seen.add((name, extras))
        installed = distribution(name)
        found[name] = installed.version
        for line in installed.requires or []:
            further = Requirement(line)
            if further.marker is None or any(further.marker.evaluate({"extra": extra}) for extra in extras or {""}):
                ahead.append(further)
    return found


def page() -> str:
    """The whole file."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = sorted(f"{name}=={version}" for name, version in closure(project["dependencies"]).items())
    return "\n".join([HEAD, *lines]) + "\n"


if __name__ == "__main__":
    print(page(), end="")
