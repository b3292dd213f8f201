"""What the driver keeps in a checkpoint, and how the window of outstanding groups is restored from it.

    driver.json     step, prompt cursor, outstanding prompts in issue order
    groups.json     graded groups that were complete at the cut and not yet consumed
    payloads.npz    their completions: arrays of numbers, see payloads.py

All are data alone: reading a checkpoint of somebody else runs none of their code. Groups unfinished at the cut are
issued again in their order; under the same seeds they come out as they would have.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sapo_ray.driver.collector import GradedCompletion, GradedGroup
from sapo_ray.driver.evaluation import Evaluation, read_evaluation
from sapo_ray.driver.parts import Payloads, Ref
from sapo_ray.driver.window import Window
from sapo_ray.errors import CheckpointError
from sapo_ray.types import CompletionMeta, DropReason, Grading, PolicyVersion, Prompt, Verdict, VersionSpan


@dataclass(frozen=True, kw_only=True, slots=True)
class DriverState:
    """The driver's part of a cut after a publish."""

    step: int
    prompts: dict[str, Any]
    """State of the prompt source."""
    data_fingerprint: str
    spec_hash: str
    """Of what a resume may not change."""
    before: Evaluation | None
    updates: int
    """Optimizer updates made, skipped ones left out."""
    seconds: dict[str, float]
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
        return cls(**{**values, "before": before, "name": folder.name})


def complete_groups(folder: Path) -> frozenset[str]:
    """Prompts whose groups a checkpoint holds complete."""
    outstanding = json.loads((folder / "driver.json").read_text())["outstanding"]
    return frozenset(item["prompt"]["id"] for item in outstanding if item["complete"])


async def save_state(state: DriverState, folder: Path, window: Window, payloads: Payloads) -> None:
    """Write the driver's files of a checkpoint. The window holds nothing consumed at a cut."""
    outstanding, groups, refs = [], [], []
    for entry in window.waiting():
        done = entry.task.done() and not entry.task.cancelled() and entry.task.exception() is None
        outstanding.append({"prompt": asdict(entry.prompt), "complete": done})
        if done:
            group = entry.task.result()
            refs += [completion.payload for completion in group.completions]
            groups.append(_group_as_dict(group))
    # In ASCII: texts come back as they were, also those that UTF-8 cannot hold.
    (folder / "driver.json").write_text(json.dumps({"state": asdict(state), "outstanding": outstanding}, indent=1))
    (folder / "groups.json").write_text(json.dumps(groups, indent=1))
    await payloads.save(folder / "payloads.npz", refs)


async def restore_window(
    state: DriverState,
    folder: Path,
    window: Window,
    payloads: Payloads,
    collect: Callable[[Prompt], Awaitable[GradedGroup]],
) -> None:
    """Put the outstanding groups back in their order: complete ones as they are, the others issued again."""
    outstanding = json.loads((folder / "driver.json").read_text())["outstanding"]
    rows = json.loads((folder / "groups.json").read_text())
    refs = iter(await payloads.load(folder / "payloads.npz", sum(len(row["completions"]) for row in rows)))
    try:
        groups = [_read_group(row, refs) for row in rows]
        prompts = [_read_prompt(item["prompt"]) for item in outstanding]
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{folder} holds no groups that can be read ({error!r}); was it edited?") from error
    complete = {group.prompt.id: group for group in groups}
    for prompt in prompts:
        kept = complete.get(prompt.id)

        async def resolve(prompt: Prompt = prompt, kept: GradedGroup | None = kept) -> GradedGroup:
            return kept if kept is not None else await collect(prompt)

        window.issue(prompt, lambda resolve=resolve: asyncio.create_task(resolve()))  # type: ignore[misc]


def _group_as_dict(group: GradedGroup) -> dict[str, Any]:
    """All of a group but its payloads, which go to a file of their own in the same order."""
    return {
        "prompt": asdict(group.prompt),
        "reissues": group.reissues,
        "failed": group.failed,
        "completions": [{"meta": asdict(c.meta), "grading": asdict(c.grading)} for c in group.completions],
    }


def _read_group(row: dict[str, Any], refs: Iterator[Ref]) -> GradedGroup:
    return GradedGroup(
        prompt=_read_prompt(row["prompt"]),
        completions=tuple(
            GradedCompletion(meta=_read_meta(c["meta"]), payload=next(refs), grading=_read_grading(c["grading"]))
            for c in row["completions"]
        ),
        reissues=row["reissues"],
        failed=None if row["failed"] is None else DropReason(row["failed"]),
    )


def _read_prompt(row: dict[str, Any]) -> Prompt:
    return Prompt(**{**row, "token_ids": tuple(row["token_ids"])})


def _read_meta(row: dict[str, Any]) -> CompletionMeta:
    spans = tuple(VersionSpan(**{**span, "version": PolicyVersion(*span["version"])}) for span in row["spans"])
    return CompletionMeta(**{**row, "spans": spans})


def _read_grading(row: dict[str, Any]) -> Grading:
    return Grading(**{**row, "verdict": Verdict(row["verdict"])})
