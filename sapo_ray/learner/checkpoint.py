"""What the learners write into a checkpoint's folder, and how it comes back.

    learner.json        ranks, ZeRO stage, dtype, steps done, non-finite updates in a row
    deepspeed/          DeepSpeed's own files: module and optimizer, one part per rank
    random-<rank>.pt    random states of each rank

The driver makes the folder, and makes it durable and visible; here nothing but files in it is written. A load is exact
to the bit; it takes the same number of ranks, ZeRO stage and dtype.

The files are pickles, read by torch's restricted loader, which builds tensors, plain containers and SAFE_GLOBALS and
refuses everything else: a checkpoint from somebody else can hold wrong numbers, but no code.
"""

from __future__ import annotations

import copyreg
import json
import os
import pickle
import pkgutil
import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sapo_ray.config.spec import JobSpec
from sapo_ray.errors import CheckpointError
from sapo_ray.learner.engine import Place

TAG = "deepspeed"
WEIGHTS_ONLY = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
DESCRIPTION = "learner.json"
SAFE_GLOBALS = (
    "deepspeed.runtime.fp16.loss_scaler:LossScaler",
    "deepspeed.runtime.zero.config:ZeroStageEnum",
    "deepspeed.utils.tensor_fragment:fragment_address",
)
"""What DeepSpeed's own files hold beyond tensors and plain containers: three records of plain values."""
ENUMS = ("deepspeed.runtime.zero.config:ZeroStageEnum",)
"""Those of them that are enumerations. Python 3.11.2, which is Debian 12's, has their members pickled as a call of
`getattr`, which no loader should allow: here they are pickled by their value, as other releases do."""
UNWRITABLE = (OSError, RuntimeError)
"""What torch raises where a file cannot be written."""
UNREADABLE = (OSError, RuntimeError, KeyError, ValueError, EOFError, AssertionError, pickle.UnpicklingError)
"""What a damaged or foreign file raises when it is loaded."""


@dataclass(kw_only=True, slots=True)
class Progress:
    """How far training has come."""

    steps: int = 0
    """Learner steps done; the schedule's position is steps x updates per step."""
    nonfinite_in_row: int = 0


def save(engine: Any, folder: Path, place: Place, spec: JobSpec, progress: Progress) -> str:
    """Write this rank's part. Collective.

    Returns what could not be written, mostly for a full disk, and why; empty if all was. It is not raised, because the
    other ranks would be left in a collective, and with them the weights.
    """
    refused: list[str] = []
    _pickle_by_value()

    def attempt(write: Callable[[], Any]) -> None:
        try:
            write()
        except UNWRITABLE as error:
            refused.append(f"{type(error).__name__}: {error}".partition("\n")[0])

    with ExitStack() as stack:
        for owner, name in ((engine.checkpoint_engine, "save"), (engine, "_copy_recovery_script")):
            stack.enter_context(_through(attempt, owner, name))
        engine.save_checkpoint(str(folder), tag=TAG, save_latest=False)
    attempt(lambda: torch.save(_random_states(), folder / f"random-{place.rank}.pt"))
    if place.rank == 0:
        about = {"ranks": place.ranks, "zero_stage": spec.learner.zero_stage, "dtype": spec.model.dtype}
        attempt(lambda: (folder / DESCRIPTION).write_text(json.dumps(about | asdict(progress), indent=1)))
    torch.distributed.barrier()
    return "; ".join(refused)


def load(engine: Any, folder: Path, place: Place, spec: JobSpec) -> Progress:
    """Restore this rank's part. Collective. Raises CheckpointError."""
    about = describe(folder)
    now = {"learner.ranks": place.ranks, "learner.zero_stage": spec.learner.zero_stage, "model.dtype": spec.model.dtype}
    for setting, value in now.items():
        if (then := about[setting.partition(".")[2]]) != value:
            raise CheckpointError(
                f"{setting} is {value}, but the checkpoint in {folder} was written with {then}; "
                f"set it to {then}, or start a new job from the exported model"
            )
    with _restricted(folder):
        path, _ = engine.load_checkpoint(str(folder), tag=TAG)
        states = torch.load(folder / f"random-{place.rank}.pt")
    if path is None:
        raise CheckpointError(f"the learner checkpoint in {folder} is empty; choose an earlier checkpoint")
    _set_random_states(states)
    return Progress(steps=about["steps"], nonfinite_in_row=about["nonfinite_in_row"])


def _pickle_by_value() -> None:
    """In this process, from now on."""
    for name in ENUMS:
        copyreg.pickle(pkgutil.resolve_name(name), lambda member: (type(member), (member.value,)))


@contextmanager
def _through(attempt: Callable[[Callable[[], Any]], None], owner: Any, name: str) -> Iterator[None]:
    """Whatever calls a method that writes files calls it through `attempt` meanwhile."""
    write = getattr(owner, name)
    setattr(owner, name, lambda *args, **named: attempt(lambda: write(*args, **named)))
    try:
        yield
    finally:
        delattr(owner, name)


def describe(folder: Path) -> dict[str, Any]:
    """learner.json of a checkpoint. Raises CheckpointError."""
    try:
        about: dict[str, Any] = json.loads((folder / DESCRIPTION).read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise CheckpointError(
            f"no learner checkpoint in {folder}: {DESCRIPTION} cannot be read ({error}); choose an earlier checkpoint"
        ) from error
    return about


@contextmanager
def _restricted(folder: Path) -> Iterator[None]:
    """Whatever is unpickled meanwhile, by DeepSpeed too, is read by the restricted loader. Raises CheckpointError."""
    before = os.environ.get(WEIGHTS_ONLY)
    os.environ[WEIGHTS_ONLY] = "1"  # DeepSpeed asks for the unrestricted loader; this overrules it
    try:
        with torch.serialization.safe_globals([pkgutil.resolve_name(name) for name in SAFE_GLOBALS]):
            yield
    except UNREADABLE as error:
        raise CheckpointError(
            f"the learner checkpoint in {folder} cannot be loaded: {error}; choose an earlier checkpoint"
        ) from error
    finally:
        if before is None:
            del os.environ[WEIGHTS_ONLY]
        else:
            os.environ[WEIGHTS_ONLY] = before


def _random_states() -> dict[str, Any]:
    """Tensors and plain values only, so that the restricted loader reads them."""
    name, keys, *rest = np.random.get_state()
    states = {
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(np.asarray(keys, dtype=np.int64)), *rest),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def _set_random_states(states: dict[str, Any]) -> None:
    name, keys, *rest = states["numpy"]
    random.setstate(states["python"])
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(states["torch"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
