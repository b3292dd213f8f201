"""The checkpoints on the disk: whole, kept, and at one with the journal."""

from __future__ import annotations

import hashlib
import json
import time
from pathlib import Path
from typing import Any

from sapo_ray.audit.books import Cut
from sapo_ray.audit.findings import Report

FORMAT = 2
"""Of checkpoints that this auditor reads."""
READ_BYTES = 1 << 20
PRUNING_S = 1.0
"""Time for a folder to be gone that was found with a file missing: a run at work prunes old checkpoints."""


def check_checkpoints(folder: Path, cuts: dict[int, Cut], report: Report) -> None:
    """Compare what lies in `folder` with its hashes, with the rules, and with the `cuts` that the journal has."""
    found = sorted(path for path in folder.glob("step-*") if path.is_dir()) if folder.is_dir() else []
    whole = [path for path in found if _is_whole(path, report)]
    report.totals["checkpoints on disk"] = len(whole)
    if leftovers := [path.name for path in folder.glob(".writing-*")]:
        report.notes.append(f"{leftovers[0]} was being written: its writer is at work or was killed; it does not count")
    if not cuts and not found:
        return
    newest = max(cuts, default=None)
    line = None if newest is None else cuts[newest].line
    report.checked["I4 checkpoints"] += 1
    pointer = folder / "latest"
    pointed = pointer.read_text(encoding="utf-8", errors="replace").strip() if pointer.is_file() else None
    if pointed is None:
        # Before the very first pointer a checkpoint may be there already; the journal says none was made then.
        if newest is not None:
            report.violated("I4 checkpoints", "there is no pointer `latest`", line)
    elif folder / pointed not in whole:
        report.violated("I4 checkpoints", f"`latest` names {pointed[:40]!r}, which is no whole checkpoint", line)
    elif newest is not None and _step(pointed) < newest:
        report.violated("I4 checkpoints", f"`latest` names {pointed}, step {newest} was made after it", line)
    if len(cuts) >= 2 and len(whole) < 2:
        lines = [cut.line for cut in cuts.values()]
        report.violated("I4 checkpoints", f"{len(whole)} whole checkpoints are kept, 2 at least must be", *lines)
    for path in whole:
        if (cut := cuts.get(_step(path.name))) is not None:
            _compare(path, cut, report)


def _step(name: str) -> int:
    number = name.removeprefix("step-")
    return int(number) if number.isdecimal() else -1


def _is_whole(folder: Path, report: Report) -> bool:
    """Whether every file is as the manifest has it; what is not is a violation."""
    problems = _problems(folder, report)
    if problems:
        time.sleep(PRUNING_S)
        if not folder.is_dir():  # its run is at work, and had no more need of it
            return False
    for problem in problems:
        report.violated("I4 checkpoints", f"{folder.name}: {problem}")
    return not problems


def _problems(folder: Path, report: Report) -> list[str]:
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        files: dict[str, Any] = manifest["files"]
        expected = {name: (int(entry["bytes"]), str(entry["blake2b"])) for name, entry in files.items()}
        number, step = manifest["format"], manifest["step"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return [f"manifest.json cannot be read ({type(error).__name__}: {error})"]
    if number != FORMAT:
        return [f"it is of format {number}, this version reads {FORMAT}: audit with the version that wrote it"]
    problems = [] if step == _step(folder.name) else [f"its manifest says step {step}"]
    unlisted = [name for name in ("driver.json", "groups.json", "payloads.npz") if name not in expected]
    problems += [f"{name} is not in the manifest" for name in unlisted]
    for name, (size, digest) in expected.items():
        report.checked["I4 checkpoints"] += 1
        path = folder / name
        try:
            if path.stat().st_size != size or _digest(path) != digest:
                problems.append(f"{name} differs from its hash")
        except OSError as error:
            problems.append(f"{name} is missing" if not path.exists() else f"{name} cannot be read ({error.strerror})")
    return problems


def _digest(path: Path) -> str:
    digest = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        while chunk := file.read(READ_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def _compare(folder: Path, cut: Cut, report: Report) -> None:
    """What the checkpoint holds as outstanding, against what the journal had at that moment."""
    report.checked["I4 cut"] += 1
    try:
        driver = json.loads((folder / "driver.json").read_text(encoding="utf-8"))
        step = int(driver["state"]["step"])
        outstanding = [(str(row["prompt"]["id"]), int(row["prompt"]["index"])) for row in driver["outstanding"]]
        complete = [str(row["prompt"]["id"]) for row in driver["outstanding"] if row["complete"]]
        kept = [str(row["prompt"]["id"]) for row in json.loads((folder / "groups.json").read_text(encoding="utf-8"))]
    except (OSError, ValueError, KeyError, TypeError) as error:
        report.violated("I4 cut", f"{folder.name}: its driver's files cannot be read ({error!r})", cut.line)
        return
    due = [(group, index) for group, index, _ in cut.outstanding]
    graded = {group for group, _, grading in cut.outstanding if grading is not None}
    if step != cut.step:
        report.violated("I4 cut", f"{folder.name} holds step {step}", cut.line)
    if outstanding != due:
        lost = [group for group, index in due if (group, index) not in outstanding]
        extra = [group for group, index in outstanding if (group, index) not in due]
        what = f"{folder.name} lacks {lost[:3]}, has {extra[:3]} too many" if lost or extra else "another order"
        report.violated("I4 cut", f"outstanding prompts differ from the journal's: {what}", cut.line)
    if complete != kept or not set(complete) <= graded:
        report.violated("I4 cut", f"{folder.name} holds the groups {kept[:3]} as graded, not {complete[:3]}", cut.line)
