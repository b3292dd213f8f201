"""The file through which a driver gets its token: in the run directory, for its owner's eyes alone."""

from __future__ import annotations

import os
from pathlib import Path


def token_file(run_dir: Path, attempt: int) -> Path:
    """Where the token of an attempt lies."""
    return run_dir / f".token-{attempt}"


def write_token(run_dir: Path, attempt: int, token: str) -> Path:
    """Write the token durably and whole, mode 0600."""
    run_dir.mkdir(parents=True, exist_ok=True)
    path = token_file(run_dir, attempt)
    # A name of this process's own: two replicas may write at the same time, and the last rename wins whole.
    draft = run_dir / f".token-{attempt}.{os.getpid()}.{os.urandom(4).hex()}"
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "w") as file:
            file.write(token)
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise
    directory = os.open(run_dir, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
    return path


def read_token(run_dir: Path, attempt: int) -> str | None:
    """The token as it was written, or None."""
    try:
        return token_file(run_dir, attempt).read_text().strip() or None
    except FileNotFoundError:
        return None


def remove_tokens(run_dir: Path, attempt: int) -> None:
    """Remove the token of an attempt that is over, and drafts of it that a killed process left."""
    for path in [token_file(run_dir, attempt), *run_dir.glob(f".token-{attempt}.*")]:
        path.unlink(missing_ok=True)
