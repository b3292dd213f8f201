"""How a command ends: exit codes, and the way on for a run that ended early."""

from __future__ import annotations

import asyncio
import shlex
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer
from rich.console import Console

from sapo_ray.errors import SapoRayError
from sapo_ray.terminal import printable

ENGINES = frozenset({"ray", "torch", "vllm", "deepspeed", "transformers", "tokenizers", "safetensors", "datasets"})
ENGINES |= {"numpy", "fsspec", "math_verify", "matplotlib", "tensorboard"}
"""What an environment of the control plane alone does not have."""
WHERE = "run it where the whole set is installed (`make setup`, or an image of the workers)"


class _Terminated(KeyboardInterrupt):
    """SIGTERM: ends everything in order, as Ctrl-C does."""


class Heard:
    """Listens to a run for its folder, so that whoever ends it is told the way on."""

    run_dir: Path | None = None
    not_closed: str = ""
    """The first part that could not be closed, and why; its processes may be left."""

    def listener(self, display: Callable[[dict[str, Any]], None] | None) -> Callable[[dict[str, Any]], None]:
        """Hands all events on to `display`, if there is one."""

        def hear(event: dict[str, Any]) -> None:
            if event["kind"] == "transition" and event["state"] == "starting":
                self.run_dir = Path(event["run_dir"])
            if event["kind"] == "condition" and event["condition"] == "CloseFailed" and not self.not_closed:
                self.not_closed = f"{event['part']} ({event['reason']})"
            if display is not None:
                display(event)

        return hear

    def what_is_left(self) -> str:
        """Of the processes that were started."""
        if self.not_closed:
            return f"not everything it started was ended: {self.not_closed}; look for its processes, e.g. by `ps`"
        return "everything it started was ended"

    def tell(self) -> None:
        """How to go on with the run that ended early, and where to look."""
        if self.run_dir is None:
            return
        print(f"go on with: sapo-ray resume {shlex.quote(str(self.run_dir))}", file=sys.stderr)
        if not (self.run_dir / "checkpoints" / "latest").exists():
            print("  (no checkpoint yet: it starts over; if the job must change, train again)", file=sys.stderr)
        print(f"what happened: {self.run_dir / 'journal.jsonl'}, {self.run_dir / 'logs'}", file=sys.stderr)


@contextmanager
def user_errors() -> Iterator[Heard]:
    """What the user can mend is a message and exit code 1; Ctrl-C is 130, SIGTERM 143; the rest keeps its traceback."""

    def terminate(*_: object) -> None:
        raise _Terminated

    before = signal.signal(signal.SIGTERM, terminate)
    heard = Heard()
    try:
        yield heard
    except SapoRayError as error:
        Console(stderr=True).print(f"[red]error:[/] {type(error).__name__}", highlight=False)
        print(printable(str(error)), file=sys.stderr)
        heard.tell()
        raise typer.Exit(1) from error
    except (KeyboardInterrupt, asyncio.CancelledError) as error:
        ctrl_c = isinstance(error, KeyboardInterrupt) and not isinstance(error, _Terminated)
        how = "interrupted" if ctrl_c else "terminated"
        print(f"{how}; {heard.what_is_left()}", file=sys.stderr)
        heard.tell()
        raise typer.Exit(130 if ctrl_c else 143) from error
    except (typer.Exit, typer.Abort):
        raise
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] not in ENGINES:
            raise
        print(f"error: this environment has no {error.name}, which this command needs: {WHERE}", file=sys.stderr)
        raise typer.Exit(1) from error
    except Exception:
        heard.tell()
        raise
    finally:
        signal.signal(signal.SIGTERM, before)
