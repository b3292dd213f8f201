"""Server-sent events, read from bytes (WHATWG HTML, section 9.2.6).

Lines end at CR, LF or CRLF only: JSON may hold U+2028 and the like, at which `str.splitlines` would cut.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from sapo_ray.client.errors import BadReply

MAX_MESSAGE_BYTES = 32 << 20
"""More than any event of a job comes to."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Message:
    """One event of a stream."""

    id: str | None
    """The stream's newest id, where there was one."""
    event: str
    """`message` where the stream names none."""
    data: str


def messages(chunks: Iterable[bytes]) -> Iterator[Message | None]:
    """The messages of a stream; None for a sign of life (a comment), so that the caller can look at the clock.

    A message that was begun but not ended by an empty line is left out, as the standard says.

    Raises:
        BadReply: a message of more than 32 MiB, or not UTF-8.
    """
    newest: str | None = None
    event, data = "", list[str]()
    for line in _lines(chunks):
        if line == "":
            if data:
                yield Message(id=newest, event=event or "message", data="\n".join(data))
            event, data = "", []
            continue
        if line.startswith(":"):
            yield None
            continue
        name, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if name == "data":
            data.append(value)
            if sum(map(len, data)) > MAX_MESSAGE_BYTES:
                raise BadReply("the stream of events holds a message of more than 32 MiB")
        elif name == "event":
            event = value
        elif name == "id" and "\0" not in value:
            newest = value


def _lines(chunks: Iterable[bytes]) -> Iterator[str]:
    """Whole lines without their ends. What stands after the last end is left out."""
    rest = bytearray()
    for chunk in chunks:
        searched = len(rest)
        rest += chunk
        while True:
            at = _line_end(rest, max(0, searched - 1))
            if at is None:
                break
            yield _text(rest[: at[0]])
            del rest[: at[1]]
            searched = 0
        if len(rest) > MAX_MESSAGE_BYTES:
            raise BadReply("the stream of events holds a line of more than 32 MiB")


def _line_end(buffer: bytearray, start: int) -> tuple[int, int] | None:
    """(end of the first line, begin of the next). A CR as the last byte waits for the LF that may follow."""
    ends = [at for at in (buffer.find(b"\n", start), buffer.find(b"\r", start)) if at >= 0]
    if not ends:
        return None
    at = min(ends)
    if buffer[at] == 0x0D:
        if at + 1 == len(buffer):
            return None
        return (at, at + 2) if buffer[at + 1] == 0x0A else (at, at + 1)
    return at, at + 1


def _text(line: bytearray) -> str:
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadReply(f"the stream of events is not UTF-8 text ({error})") from None
