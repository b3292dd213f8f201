"""What the learners write into a checkpoint's folder, and how it comes back.

    learner.json        ranks, ZeRO stage, dtype, steps done, non-finite updates in a row
    deepspeed/          DeepSpeed's own files: module and optimizer, one part per rank
    random-<rank>.pt    random states of each rank

The driver makes the folder, and makes it durable and visible; here nothing but files in it is written. With the same
number of ranks a load is exact to the bit. With another number, ZeRO's partitions are first converted to DeepSpeed's
universal layout, beside the checkpoint, and removed after.
"""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sapo_ray.config.spec import JobSpec
from sapo_ray.errors import CheckpointError
from sapo_ray.learner.engine import Place

TAG = "deepspeed"
UNIVERSAL = "universal"
DESCRIPTION = "learner.json"


@dataclass(kw_only=True, slots=True)
class Progress:
    """How far training has come."""

    steps: int = 0
    """Learner steps done; the schedule's position is steps x updates per step."""
    nonfinite_in_row: int = 0


def save(engine: Any, folder: Path, place: Place, spec: JobSpec, progress: Progress) -> None:
    """Write this rank's part. Collective."""
    engine.save_checkpoint(str(folder), tag=TAG, save_latest=False)
    torch.save(_random_states(), folder / f"random-{place.rank}.pt")
    if place.rank == 0:
        about = {"ranks": place.ranks, "zero_stage": spec.learner.zero_stage, "dtype": spec.model.dtype}
        (folder / DESCRIPTION).write_text(json.dumps(about | asdict(progress), indent=1))
    torch.distributed.barrier()


def load(engine: Any, folder: Path, place: Place, spec: JobSpec) -> Progress:
    """Restore this rank's part. Collective. Raises CheckpointError."""
    about = describe(folder)
    for key, now in (("zero_stage", spec.learner.zero_stage), ("dtype", spec.model.dtype)):
        if about[key] != now:
            setting = "learner.zero_stage" if key == "zero_stage" else "model.dtype"
            raise CheckpointError(
                f"{setting} is {now}, but the checkpoint in {folder} was written with {about[key]}; "
                f"set it to {about[key]}, or start a new job from the exported model"
            )
    same_ranks = about["ranks"] == place.ranks
    if same_ranks or spec.learner.zero_stage == 0:
        _load_deepspeed(engine, folder, TAG)
    else:
        _load_converted(engine, folder, place)
    states = folder / f"random-{place.rank}.pt"
    if same_ranks:
        _set_random_states(torch.load(states, weights_only=False))
    return Progress(steps=about["steps"], nonfinite_in_row=about["nonfinite_in_row"])


def describe(folder: Path) -> dict[str, Any]:
    """learner.json of a checkpoint. Raises CheckpointError."""
    try:
        about: dict[str, Any] = json.loads((folder / DESCRIPTION).read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise CheckpointError(
            f"no learner checkpoint in {folder}: {DESCRIPTION} cannot be read ({error}); choose an earlier checkpoint"
        ) from error
    return about


def _load_deepspeed(engine: Any, folder: Path, tag: str) -> None:
    try:
        path, _ = engine.load_checkpoint(str(folder), tag=tag)
    except (OSError, RuntimeError, KeyError, ValueError, EOFError, AssertionError) as error:
        raise CheckpointError(
            f"the learner checkpoint in {folder} cannot be loaded: {error}; choose an earlier checkpoint"
        ) from error
    if path is None:
        raise CheckpointError(f"the learner checkpoint in {folder} is empty; choose an earlier checkpoint")


def _load_converted(engine: Any, folder: Path, place: Place) -> None:
    """Load a checkpoint of another number of ranks by way of the universal layout."""
    scratch = folder.parent / f".{folder.name}-for-{place.ranks}-ranks"
    if place.rank == 0:
        shutil.rmtree(scratch, ignore_errors=True)
        problem = _convert(folder / TAG, scratch / UNIVERSAL)
    outcome = [problem if place.rank == 0 else None]
    torch.distributed.broadcast_object_list(outcome, src=0)
    if outcome[0]:
        raise CheckpointError(
            f"the checkpoint in {folder} was written by {describe(folder)['ranks']} ranks and could not be converted "
            f"for learner.ranks {place.ranks}; set learner.ranks to {describe(folder)['ranks']}. {outcome[0]}"
        )
    engine._config.load_universal_checkpoint = True
    try:
        _load_deepspeed(engine, scratch, UNIVERSAL)
    finally:
        engine._config.load_universal_checkpoint = False
        torch.distributed.barrier()
        if place.rank == 0:
            shutil.rmtree(scratch, ignore_errors=True)


def _convert(source: Path, target: Path) -> str | None:
    """Run DeepSpeed's converter; returns what it said if it failed."""
    target.parent.mkdir(parents=True)
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state"]
    command += ["--num_extract_workers", "1", "--num_merge_workers", "1"]
    command += ["--input_folder", str(source), "--output_folder", str(target)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    return None if result.returncode == 0 else result.stderr[-2000:] or f"exit code {result.returncode}"


def _random_states() -> dict[str, Any]:
    states = {"python": random.getstate(), "numpy": np.random.get_state(), "torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def _set_random_states(states: dict[str, Any]) -> None:
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    torch.set_rng_state(states["torch"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
