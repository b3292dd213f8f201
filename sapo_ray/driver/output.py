"""The trained model's way to `output.uri`, after everything else of the run has ended well.

It cannot spoil the run: a copy that fails, takes too long or is broken off by a signal is the condition
`OutputNotCopied`, and the model stays in `export/`.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Coroutine
from dataclasses import replace
from typing import Any

import fsspec

from sapo_ray.config.spec import JobSpec
from sapo_ray.driver.interrupts import Interrupts
from sapo_ray.driver.journal import Journal
from sapo_ray.driver.pulse import Pulse
from sapo_ray.driver.result import Outcome
from sapo_ray.errors import ConfigError

MOST_SAID = 2000
"""Characters of a copier's complaint that are kept."""


def check_output(spec: JobSpec) -> None:
    """Raises ConfigError unless this machine can write to the kind of place that `output.uri` names."""
    uri = spec.output.uri
    if uri is None or uri.startswith("/"):
        return
    scheme = uri.partition("://")[0]
    try:
        fsspec.get_filesystem_class(scheme)
    except (ImportError, ValueError) as error:
        raise ConfigError(
            f"output.uri {uri!r} cannot be written by the driver ({error}); install what its machine lacks, "
            "or name another place"
        ) from None


async def copied(
    run: Coroutine[Any, Any, Outcome], spec: JobSpec, journal: Journal, interrupts: Interrupts, pulse: Pulse
) -> Outcome:
    """The run's outcome, with its export copied to where the job wants it."""
    outcome = await run
    uri, limit_s = spec.output.uri, spec.deadlines.output_s
    if uri is None or outcome.export is None:
        return outcome
    journal.event("phase", phase="output")
    pulse.phase = "output"
    interrupts.go_on()
    began = time.monotonic()
    try:
        with pulse.at("output", "output", f"copying the model to {uri}"):
            said = await _copy(str(outcome.export), uri, limit_s)
    except TimeoutError:
        said = {"error": f"it was not done within deadlines.output_s ({limit_s:g} s)"}
    except asyncio.CancelledError:  # a signal: what was to be trained is trained
        said = {"error": "it was broken off"}
    finally:
        interrupts.ending()
    outcome.seconds["output"] = time.monotonic() - began
    if "error" in said:
        reason = f"the model was not copied to {uri}: {said['error']}. It is whole in {outcome.export}: fetch it there"
        journal.event("condition", condition="OutputNotCopied", reason=reason)
        return outcome
    journal.event("output", uri=uri, **said, seconds=round(outcome.seconds["output"], 2))
    return replace(outcome, output=uri)


async def _copy(folder: str, uri: str, limit_s: float) -> dict[str, Any]:
    """What the copier says. It is gone when this returns or raises (TimeoutError)."""
    child = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "sapo_ray.driver.copying", folder, uri, str(limit_s)),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        async with asyncio.timeout(limit_s):
            out, err = await child.communicate()
    finally:
        if child.returncode is None:
            child.kill()
            await child.wait()
    try:
        said: dict[str, Any] = json.loads(out.splitlines()[-1])
    except (IndexError, ValueError):
        last = err.decode(errors="replace").strip()[-MOST_SAID:]
        said = {"error": f"the copier ended with code {child.returncode} and without a word: {last}"}
    return {key: value[:MOST_SAID] if isinstance(value, str) else value for key, value in said.items()}
