"""The child: a process that grades, answers item by item, and may be killed at any moment.

    python -m sapo_ray.verifier.process '{"parent": pid, "shortcuts": true, "spec": {...}}'

It speaks frames (4 bytes of length, big-endian, then JSON) over the pipes it finds as its standard input and output.
Before anything else runs it moves both away and leaves the null device in their place, so that a reward function may
read and print as it likes; what it prints is lost, what it writes to standard error goes to the actor's log. JSON is
written in ASCII: completions with lone surrogates survive.

    parent -> child   [id, "grade", completion, gold, prompt], [id, "gold", "", gold, ""] or [id, "ping", "", "", ""]
    child -> parent   {"ready": true} or {"failed": kind, "message": text} once, then per request, in order,
                      any number of {"phase": "gold" | "answer"} and one {"id": id, ...}; "tired": true asks to be
                      replaced after the requests that are already here

It ends when the parent closes the pipe or dies (PR_SET_PDEATHSIG), and with EXIT_MEMORY when memory runs out.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import signal
import struct
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, BinaryIO

if TYPE_CHECKING:
    from sapo_ray.verifier.grader import Grader

EXIT_MEMORY = 77
LENGTH = struct.Struct(">I")
PR_SET_PDEATHSIG = 1
TIRED_EVERY = 32


def frame(message: object) -> bytes:
    """One message as bytes."""
    body = json.dumps(message, separators=(",", ":")).encode("ascii")
    return LENGTH.pack(len(body)) + body


class Channel:
    """The child's end of the pipes."""

    def __init__(self) -> None:
        requests, self._responses = os.dup(0), os.dup(1)  # not inheritable: a grandchild does not hold them
        null = os.open(os.devnull, os.O_RDWR)
        os.dup2(null, 0)
        os.dup2(null, 1)
        os.close(null)
        self._requests: BinaryIO = os.fdopen(requests, "rb")

    def receive(self) -> Any:
        """The next message, or None when the parent has closed its end."""
        head = self._requests.read(LENGTH.size)
        if len(head) < LENGTH.size:
            return None
        (size,) = LENGTH.unpack(head)
        body = self._requests.read(size)
        return json.loads(body) if len(body) == size else None

    def send(self, message: object) -> None:
        """Written at once: the parent's clock of the next item starts with it."""
        data = memoryview(frame(message))
        while data:
            data = data[os.write(self._responses, data) :]


def die_with_parent(parent: int) -> None:
    """SIGKILL to this process when the parent's thread that started it ends."""
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before prctl
        os._exit(0)


def limit_resources(memory_mb: int) -> None:
    """Address space, and no core files: a segmentation fault must not fill the disk."""
    limit = memory_mb << 20
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    resource.setrlimit(resource.RLIMIT_AS, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


class Weariness:
    """Tells when this process has grown so much that it should be replaced before it fails."""

    def __init__(self, memory_mb: int) -> None:
        base = self._address_space()
        self._limit = base + ((memory_mb << 20) - base) // 2
        self._count = 0

    def is_tired(self) -> bool:
        self._count += 1
        return self._count % TIRED_EVERY == 0 and self._address_space() > self._limit

    @staticmethod
    def _address_space() -> int:
        with open("/proc/self/statm", "rb") as statm:
            return int(statm.read().split()[0]) * resource.getpagesize()


def start_grader(channel: Channel, settings: dict[str, Any]) -> Grader | None:
    """The grader, checked; None when the parent was told why there is none."""
    from sapo_ray.errors import ConfigError

    memory_mb = settings["spec"]["memory_mb"]
    try:
        from sapo_ray.config.sections import VerifierSpec  # the whole job would take longer to load
        from sapo_ray.verifier.grader import Grader

        spec = VerifierSpec.model_validate(settings["spec"])
        Grader(spec).self_check()  # one of its own: the parent wants to hear `ready` before anything else
        grader = Grader(spec, shortcuts=settings["shortcuts"], announce=lambda phase: channel.send({"phase": phase}))
    except ConfigError as error:
        channel.send({"failed": "config", "message": str(error)})
    except MemoryError:
        channel.send({"failed": "memory", "message": f"out of memory at verifier.memory_mb = {memory_mb}"})
    except ImportError as error:
        channel.send({"failed": "import", "message": f"{error} (verifier.memory_mb = {memory_mb})"})
    else:
        return grader
    return None


def serve(channel: Channel, grader: Grader, memory_mb: int) -> None:
    """Until the parent closes the pipe."""
    weariness = Weariness(memory_mb)
    channel.send({"ready": True})
    while (request := channel.receive()) is not None:
        number, kind, completion, gold, prompt = request
        if kind == "ping":
            channel.send({"id": number})
            continue
        if kind == "gold":
            channel.send({"id": number, "usable": grader.gold_is_usable(gold)})
            continue
        answer = asdict(grader.grade(completion, gold, prompt))
        if weariness.is_tired():
            answer["tired"] = True
        channel.send({"id": number, **answer})


def main() -> None:
    settings = json.loads(sys.argv[1])
    die_with_parent(settings["parent"])
    channel = Channel()
    memory_mb = settings["spec"]["memory_mb"]
    limit_resources(memory_mb)
    try:
        if (grader := start_grader(channel, settings)) is not None:
            serve(channel, grader, memory_mb)
    except MemoryError:
        os._exit(EXIT_MEMORY)
    except BrokenPipeError:
        pass  # the parent is gone, and nobody else wants the answer


if __name__ == "__main__":
    main()
