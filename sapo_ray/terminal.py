"""Texts on a terminal. What jobs, models and logs hold is written by others: it is shown, and steers nothing."""

from __future__ import annotations

import codecs
import re

from rich.markup import escape

_COLOUR = re.compile(r"\x1b\[[0-9;:]*m")
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
"""All of C0, DEL and C1 but the newline and the tab."""
_BEGUN = re.compile(r"(\r|\x1b(\[[0-9;:]{0,32})?)\Z")
"""What only the next bytes tell the meaning of."""


def printable(text: str) -> str:
    """The text for `print`: colours left out, other control characters written as `\\x1b`, no half of a surrogate."""
    text = _COLOUR.sub("", text).replace("\r\n", "\n")
    text = _CONTROL.sub(lambda found: f"\\x{ord(found.group()):02x}", text)
    return text.encode("utf-8", "replace").decode()


def shown(text: str) -> str:
    """The text for rich, where markup in it is text too."""
    return escape(printable(text))


def json_line(text: str) -> str:
    """JSON that is what it was to every reader, and harmless on a terminal: C0 it has escaped already."""
    return _CONTROL.sub(lambda found: found.group() if found.group() < " " else f"\\u{ord(found.group()):04x}", text)


class LogText:
    """A log's bytes, in parts as they come, as text for a terminal. A lone carriage return begins a line."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._begun = ""

    def feed(self, data: bytes) -> str:
        """What can be shown by now."""
        text = self._begun + self._decoder.decode(data)
        begun = _BEGUN.search(text)
        self._begun = begun.group() if begun else ""
        return self._clean(text[: begun.start()] if begun else text)

    def rest(self) -> str:
        """What is left when nothing more comes."""
        text, self._begun = self._begun + self._decoder.decode(b"", final=True), ""
        return self._clean(text)

    @staticmethod
    def _clean(text: str) -> str:
        return printable(text.replace("\r\n", "\n").replace("\r", "\n"))
