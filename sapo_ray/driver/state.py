"""What the driver keeps in a checkpoint, and how the window of outstanding groups is restored from it.

    driver.json     step, version, prompt cursor, ids of outstanding groups in issue order, journal position
    groups.pkl      graded groups that were complete at the cut and not yet consumed
    payloads.pkl    their completions

Groups unfinished at the cut are issued again in their order; under the same seeds they come out as they would have.
"""

from __future__ import annotations

import asyncio
import json
import pickle
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from sapo_ray.driver.collector import GradedGroup
from sapo_ray.driver.evaluation import Evaluation, read_evaluation
from sapo_ray.driver.parts import Payloads
from sapo_ray.driver.window import Window
from sapo_ray.errors import CheckpointError
from sapo_ray.types import PolicyVersion, Prompt


@dataclass(frozen=True, kw_only=True, slots=True)
class DriverState:
    """The driver's part of a cut after a publish."""

    step: int
    version: PolicyVersion
    prompts: dict[str, Any]
    """State of the prompt source."""
    data_fingerprint: str
    spec_hash: str
    """Of what a resume may not change."""
    before: Evaluation | None
    updates: int
    """Optimizer updates made, skipped ones left out."""
    seconds: dict[str, float]
    journal_bytes: int
    """Length of the journal at the cut, for whoever audits a run."""
    name: str = ""
    """Of the checkpoint it was read from."""

    @classmethod
    def read(cls, folder: Path, data_fingerprint: str, spec_hash: str) -> DriverState:
        """Read back; raise CheckpointError if data or settings are not those that the run began with."""
        values = json.loads((folder / "driver.json").read_text())["state"]
        if values["data_fingerprint"] != data_fingerprint:
            raise CheckpointError(
                f"the training data changed since this run began: its fingerprint was {values['data_fingerprint']}, "
                f"now it is {data_fingerprint}; restore the files, or start a new job from the exported model"
            )
        if values["spec_hash"] != spec_hash:
            raise CheckpointError(
                f"the job in spec.json is not the one that wrote {folder.name}: its fingerprint was "
                f"{values['spec_hash']}, now it is {spec_hash}; restore spec.json, or start a new job"
            )
        before = None if values["before"] is None else read_evaluation(values["before"])
        return cls(**{**values, "version": PolicyVersion(*values["version"]), "before": before, "name": folder.name})


async def save_state(state: DriverState, folder: Path, window: Window, payloads: Payloads) -> None:
    """Write the driver's files of a checkpoint. The window holds nothing consumed at a cut."""
    outstanding, groups, refs = [], [], []
    for entry in window.waiting():
        done = entry.task.done() and not entry.task.cancelled() and entry.task.exception() is None
        outstanding.append({"prompt": asdict(entry.prompt), "complete": done})
        if done:
            group = entry.task.result()
            refs += [completion.payload for completion in group.completions]
            groups.append(replace(group, completions=tuple(replace(c, payload=None) for c in group.completions)))
    (folder / "driver.json").write_text(
        json.dumps({"state": asdict(state), "outstanding": outstanding}, indent=1, ensure_ascii=False)
    )
    (folder / "groups.pkl").write_bytes(pickle.dumps(groups))
    await payloads.save(folder / "payloads.pkl", refs)


async def restore_window(
    state: DriverState,
    folder: Path,
    window: Window,
    payloads: Payloads,
    collect: Callable[[Prompt], Awaitable[GradedGroup]],
) -> None:
    """Put the outstanding groups back in their order: complete ones as they are, the others issued again."""
    outstanding = json.loads((folder / "driver.json").read_text())["outstanding"]
    groups: list[GradedGroup] = pickle.loads((folder / "groups.pkl").read_bytes())
    refs = iter(await payloads.load(folder / "payloads.pkl", sum(len(group.completions) for group in groups)))
    complete = {
        group.prompt.id: replace(group, completions=tuple(replace(c, payload=next(refs)) for c in group.completions))
        for group in groups
    }
    for item in outstanding:
        values = item["prompt"]
        prompt = Prompt(**{**values, "token_ids": tuple(values["token_ids"])})
        kept = complete.get(prompt.id)

        async def resolve(prompt: Prompt = prompt, kept: GradedGroup | None = kept) -> GradedGroup:
            return kept if kept is not None else await collect(prompt)

        window.issue(prompt, lambda resolve=resolve: asyncio.create_task(resolve()))  # type: ignore[misc]
