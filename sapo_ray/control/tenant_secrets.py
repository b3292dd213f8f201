"""Secrets that the operator keeps for a tenant's jobs: one file each, `<secrets_dir>/<tenant>/<NAME>`.

A job names those that it needs, and its driver gets no others. A file is a secret if its name is one of an environment
variable (capitals, digits, underscores), anything else in the folder is passed over: notes, editors' leavings. Its
value is the file's text without the end of its last line. Values leave this module only towards a driver.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from sapo_ray.config.spec import SECRET_NAME
from sapo_ray.control.problems import Refused, unavailable

MOST_BYTES = 1 << 16
"""Largest secret: more is a mistake, and an environment has bounds."""


_LASTING = (FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError)
"""These do not pass by themselves."""


class Unusable(Exception):
    """A secret that is not there, or cannot be handed over. The message holds neither its value nor its path."""


def names(folder: Path | None, tenant: str) -> list[str]:
    """What the tenant's jobs may name; none where no folder is, or none that may be read. Raises Refused (503)."""
    place = _place(folder, tenant)
    try:
        entries = [] if place is None else list(os.scandir(place))
    except _LASTING:
        return []
    except OSError as error:
        raise _away(error) from None
    return sorted(entry.name for entry in entries if SECRET_NAME.fullmatch(entry.name) and entry.is_file())


def value(folder: Path | None, tenant: str, name: str) -> str:
    """One secret. Raises Unusable, or Refused (503) while the file's storage does not answer."""
    place = _place(folder, tenant)
    if place is None or not SECRET_NAME.fullmatch(name):
        raise Unusable("there is no such secret")
    try:
        with open(place / name, "rb") as file:
            raw = file.read(MOST_BYTES + 1)
    except FileNotFoundError:
        raise Unusable("there is no such secret") from None
    except _LASTING as error:
        raise Unusable(f"the operator's file of it cannot be read ({error.strerror})") from None
    except OSError as error:
        raise _away(error) from None
    if len(raw) > MOST_BYTES:
        raise Unusable(f"the operator's file of it has more than {MOST_BYTES} bytes")
    try:
        text = raw.decode("utf-8-sig").removesuffix("\n").removesuffix("\r")
    except UnicodeDecodeError:
        raise Unusable("the operator's file of it is not UTF-8") from None
    if not text or "\0" in text:
        raise Unusable("the operator's file of it " + ("is empty" if not text else "holds a zero byte"))
    return text


def values(folder: Path | None, tenant: str, wanted: Sequence[str]) -> dict[str, str]:
    """What a driver gets as environment variables. Raises as `value`."""
    return {name: value(folder, tenant, name) for name in wanted}


def _away(error: OSError) -> Refused:
    """Storage that is away for the moment is no secret taken away."""
    return unavailable(f"the operator's secrets cannot be read ({error.strerror or type(error).__name__})")


def _place(folder: Path | None, tenant: str) -> Path | None:
    """The tenant's folder, wherever tenants may be called `..`."""
    return None if folder is None or "/" in tenant or tenant.startswith(".") else folder / tenant
