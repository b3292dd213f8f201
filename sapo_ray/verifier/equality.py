"""Are two answers mathematically the same? math-verify, on the main thread of a process that may be killed.

math-verify's own timeouts are SIGALRM: they raise off the main thread, and cannot interrupt an integer power in C.
Here they are on but far beyond the deadline of the parent process, so that its SIGKILL is what decides.
An allocation that fails deep inside SymPy is swallowed there and reads as "not equal" or "not parseable".
"""

from __future__ import annotations

import logging
import re
from collections import OrderedDict
from collections.abc import Callable
from string import ascii_lowercase
from typing import Any, Generic, TypeVar

from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify
from math_verify.errors import TimeoutException

from sapo_ray.verifier.answers import OwnBoundExceeded, extract_answer, plain_form

V = TypeVar("V")
_INTEGER = re.compile(r"[-+]?\d{1,18}")
# Words of four letters and more: `Monday` would parse as a product of six symbols, equal to every anagram.
# Of shorter ones see Gold.is_short_word.
_WORDS = re.compile(r"(?=(?:.*?[^\W\d_]){4})[^\W\d_]+(?:[ \-'][^\W\d_]+)*", re.DOTALL)
_VOWELS = frozenset("aeiouy")
_EXTRACTION = (LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig())

# Its warnings quote answers of the policy at length; verdicts carry what matters.
logging.getLogger("math_verify").setLevel(logging.ERROR)
logging.getLogger("latex2sympy2_extended").setLevel(logging.ERROR)


class Bounded(Generic[V]):
    """A cache of at most `size` entries; the least recently used goes first. Size 0 keeps nothing."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._entries: OrderedDict[Any, V] = OrderedDict()

    def get_or_make(self, key: object, make: Callable[[], V]) -> V:
        """The entry of `key`, made if it is not there. What `make` raises is not kept."""
        if key in self._entries:
            self._entries.move_to_end(key)
            return self._entries[key]
        value = make()
        if self._size:
            self._entries[key] = value
            if len(self._entries) > self._size:
                self._entries.popitem(last=False)
        return value


class Gold:
    """A reference answer; parsed once, and only if an answer needs it."""

    def __init__(self, text: str, max_chars: int) -> None:
        reference = extract_answer(text, "auto") or text.strip()
        self.too_long = len(reference) > max_chars
        self.plain = "" if self.too_long else plain_form(reference)
        self.parsed: list[Any] | None = None

    @property
    def is_integer(self) -> bool:
        return _INTEGER.fullmatch(self.plain) is not None

    @property
    def is_words(self) -> bool:
        return _WORDS.fullmatch(self.plain) is not None

    @property
    def is_short_word(self) -> bool:
        """Whether the reference is a word too, of two or three letters, so that an answer in letters must spell it.

        Three letters are a word (`cat`, `DNE`, `Mon`) unless they are written as variables are multiplied: lower-case,
        and either neighbours in the alphabet (`abc`, `xyz`) or without a vowel (`mgh`, `prt`). Two letters are a
        product (`xy`, `AB`), but a word in a script without case. Where the rule takes a product for a word (`axy`),
        it is the order of its letters that counts from then on; an answer with any other sign (`a \\cdot x y`) is
        still compared as mathematics.
        """
        text = self.plain
        if not text.isalpha() or len(text) not in (2, 3):
            return False
        if text.lower() == text.upper():
            return True
        return len(text) == 3 and not (text.islower() and (text in ascii_lowercase or _VOWELS.isdisjoint(text)))


class Comparer:
    """Compares answers with a reference.

    Args:
        timeout_s: math-verify's own bound for one parse or one comparison, whole seconds, beyond the parent's.
        shortcuts: equal text, integers as integers, and caches; off only to measure what they are worth.
        announce: called with `gold` before a reference is parsed and `answer` after it, so that whoever kills this
            process knows which of the two hung.
    """

    def __init__(
        self, *, timeout_s: int, max_chars: int, shortcuts: bool = True, announce: Callable[[str], None] | None = None
    ) -> None:
        self._timeout_s = timeout_s
        self._max_chars = max_chars
        self._shortcuts = shortcuts
        self._announce = announce or (lambda phase: None)
        self._golds: Bounded[Gold] = Bounded(2048 if shortcuts else 0)
        self._equal: Bounded[bool | None] = Bounded(8192 if shortcuts else 0)

    def gold(self, text: str) -> Gold:
        """The reference of `text`: after `####` or in `\\boxed{}` if there, else all of it."""
        return self._golds.get_or_make(text, lambda: Gold(text, self._max_chars))

    def is_usable(self, gold: Gold) -> bool:
        """Does the reference parse?"""
        if gold.too_long or not gold.plain:
            return False
        if gold.is_words or gold.is_short_word or (self._shortcuts and gold.is_integer):
            return True
        return bool(self._parsed_gold(gold))

    def equal(self, gold: Gold, answer: str) -> bool | None:
        """Is `answer` (raw) the same as the reference? None where the answer does not parse.

        Raises:
            OwnBoundExceeded: nobody killed this process in time.
            MemoryError: the process is at its memory limit.
        """
        plain = plain_form(answer)
        if self._shortcuts:
            if plain == gold.plain:
                return True
            if gold.is_integer and _INTEGER.fullmatch(plain):
                return int(plain) == int(gold.plain)
        return self._equal.get_or_make((gold.plain, plain), lambda: self._compare(gold, plain))

    def _compare(self, gold: Gold, plain: str) -> bool | None:
        if gold.is_words:
            return " ".join(plain.casefold().split()) == " ".join(gold.plain.casefold().split())
        if gold.is_short_word and len(plain) > 1 and plain.isalpha():
            return plain.casefold() == gold.plain.casefold()
        reference = self._parsed_gold(gold)
        parsed = self._parse(plain)
        return self._verify(reference, parsed) if parsed else None

    def _parsed_gold(self, gold: Gold) -> list[Any]:
        """Parsed; unless it is a number by then, also compared with 0.

        Because a reference may parse and yet have no value in any bearable time: better that is known as its fault.
        (Not compared with a large number, which is itself poison beside a logarithm.)
        """
        if gold.parsed is None:
            self._announce("gold")
            gold.parsed = self._parse(gold.plain)
            if not all(getattr(form, "is_Number", False) for form in gold.parsed):
                self._verify(gold.parsed, self._parse("0"))
            self._announce("answer")
        return gold.parsed

    def _verify(self, reference: list[Any], parsed: list[Any]) -> bool:
        try:
            return bool(verify(reference, parsed, timeout_seconds=self._timeout_s, raise_on_error=True))
        except MemoryError:
            raise
        except TimeoutException as error:
            raise OwnBoundExceeded from error
        except Exception:  # noqa: BLE001 - SymPy raises anything; what it cannot compare is not shown to be equal
            return False

    def _parse(self, plain: str) -> list[Any]:
        """SymPy forms of an answer; empty where it has none. Raises as `equal` does."""
        if not _balanced(plain):
            return []
        try:
            return list(
                parse(
                    f"\\boxed{{{plain}}}",
                    _EXTRACTION,
                    fallback_mode="no_fallback",
                    parsing_timeout=self._timeout_s,
                    raise_on_error=True,
                )
            )
        except MemoryError:
            raise
        except TimeoutException as error:
            raise OwnBoundExceeded from error
        except Exception:  # noqa: BLE001 - the parser raises anything; what it cannot read has no form
            return []


def _balanced(text: str) -> bool:
    depth = 0
    for token in re.finditer(r"\\.|[{}]", text, re.DOTALL):
        depth += {"{": 1, "}": -1}.get(token.group(), 0)
        if depth < 0:
            return False
    return depth == 0
