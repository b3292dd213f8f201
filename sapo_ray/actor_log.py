"""Where the lines of an actor go: a file of the run, named by what the actor is.

Ray names its workers' files by ids of its own and keeps them on the node where they ran, for as long as that node and
session live. Here an actor takes its standard output and error, its engine's and its children's with them, into
`<run>/logs/<role>.log`, wherever it runs. Errors that its methods raise are not printed lines: they reach the caller
through Ray as ever.
"""

from __future__ import annotations

import os
import platform
import sys
import time
from pathlib import Path

LOG_DIR = "SAPO_LOG_DIR"
"""Environment variable of actors: the folder. Without it their lines stay where Ray puts them."""


def log_as(role: str) -> None:
    """Write what this process prints from now on to `<SAPO_LOG_DIR>/<role>.log`, after what is there.

    role: `rollout-0`, `verifier-1`, `learner-0`, ... A folder that cannot be written to costs the file, not the actor.
    """
    folder = os.environ.get(LOG_DIR)
    if not folder:
        return
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        # Appending, so that a later attempt and processes that share the file do not overwrite each other's lines.
        file = os.open(Path(folder) / f"{role}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
    except OSError as error:
        print(f"{role}: its lines stay in Ray's own files: {error}", file=sys.stderr, flush=True)
        return
    sys.stdout.flush()
    sys.stderr.flush()
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.close(file)
    now = time.strftime("%Y-%m-%d %H:%M:%S%z")
    print(f"--- {role}: process {os.getpid()} on {platform.node()}, {now}", file=sys.stderr, flush=True)
