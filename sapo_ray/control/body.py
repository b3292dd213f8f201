"""Bodies, cursors and preconditions of requests: strict, and read only after the caller is known."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
from collections.abc import Callable, Coroutine
from typing import Annotated, Any, NoReturn, TypeVar

from fastapi import Header, Request
from pydantic import BaseModel, ValidationError
from starlette.concurrency import run_in_threadpool

from sapo_ray.control.problems import Refused, wrong_shape

LARGEST = 2**53
"""Whole numbers beyond this are not the same in every JSON reader."""
DEEPEST = 64
"""Lists and mappings within each other. Whoever walks through stored JSON by recursion can rely on it."""
M = TypeVar("M", bound=BaseModel)


def body_of(model: type[M]) -> Callable[[Request], Coroutine[Any, Any, M]]:
    """A dependency that reads the request's JSON as `model`. Put it after the one that checks the key.

    Raises Refused: 415 for another kind of body, 400 for what is not JSON, 422 for JSON of another shape.
    """

    async def read(request: Request) -> M:
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json" and not kind.endswith("+json"):
            raise Refused(
                415,
                "unsupported_media_type",
                f"the body must be application/json, got {kind or 'no Content-Type'}",
                param="Content-Type",
                hint="send the header `Content-Type: application/json`",
            )
        raw = await request.body()
        return await run_in_threadpool(_as_model, raw, model)

    return read


def _as_model(raw: bytes, model: type[M]) -> M:
    try:
        return model.model_validate(parse(raw))
    except ValidationError as error:
        raise wrong_shape(error.errors(include_url=False), list(model.model_fields)) from None


def parse(raw: bytes) -> Any:
    """JSON by the letter: UTF-8, no key twice, no NaN, no text that cannot be stored, no number that gets lost,
    no deeper than DEEPEST.

    Raises Refused (400).
    """
    try:
        value = json.loads(raw.decode("utf-8"), object_pairs_hook=_no_key_twice, parse_constant=_no_constant)
    except UnicodeDecodeError as error:
        raise _malformed(
            f"the body is not valid UTF-8 at byte {error.start} (0x{raw[error.start]:02x})", "send UTF-8"
        ) from None
    except json.JSONDecodeError as error:
        where = f"line {error.lineno} column {error.colno}"
        raise _malformed(f"the body is not valid JSON at {where}: {error.msg}", None) from None
    except (ValueError, RecursionError) as error:
        raise _malformed(f"the body cannot be read as JSON: {str(error)[:200]}", None) from None
    _storable(value)
    return value


def parse_leniently(raw: bytes) -> Any:
    """JSON of a driver: whatever it holds is stored as well as it can be, so that one odd value stops nothing.

    What is nested too deep, or a whole number of thousands of digits, is shortened: a refused delivery would come again
    for ever, and nothing after it.
    """
    text = raw.decode("utf-8", "replace")
    try:
        try:
            value = json.loads(text)
            if _depth(value) <= DEEPEST:
                return value
        except json.JSONDecodeError:
            raise
        except (ValueError, RecursionError):  # Python's own bounds on digits and on nesting
            pass
        return json.loads(_cut(text), parse_int=_short_int)
    except (ValueError, RecursionError) as error:
        raise _malformed(f"the body cannot be read as JSON: {str(error)[:200]}", None) from None


_MARKS = re.compile(r'"(?:[^"\\]|\\.)*+"|[\[\]{}]', re.DOTALL)


def _cut(text: str) -> str:
    """JSON text with a note in place of each list or mapping that lies too deep."""
    kept: list[str] = []
    depth = begin = 0
    for mark in _MARKS.finditer(text):
        if mark[0] in "[{":
            depth += 1
            if depth == DEEPEST + 1:
                kept += [text[begin : mark.start()], '"(nested too deep)"']
        elif mark[0] in "]}":
            if depth == DEEPEST + 1:
                begin = mark.end()
            depth -= 1
    return "".join([*kept, text[begin:]])


def _short_int(digits: str) -> int | str:
    return int(digits) if len(digits) <= 300 else f"{digits[:40]}... ({len(digits)} digits)"


def _depth(value: Any) -> int:
    """How deep lists and mappings lie within each other; 0 for a plain value. Looks no further than too deep."""
    level, depth = [value], 0
    while depth <= DEEPEST:
        level = [one for one in level if isinstance(one, dict | list)]
        if not level:
            break
        depth += 1
        level = [inner for one in level for inner in (one.values() if isinstance(one, dict) else one)]
    return depth


def _no_key_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise _malformed(f"the key {twice[:60]!r} stands twice in one mapping", "keep one of them")
    return found


def _no_constant(name: str) -> NoReturn:
    raise _malformed(f"{name} is not JSON", "write a finite number, or null")


def _storable(value: Any) -> None:
    """Refuse what a database cannot keep as it is. Iterative: the nesting is the sender's choice."""
    if _depth(value) > DEEPEST:
        raise _malformed(f"the body is nested deeper than {DEEPEST} levels", "send fewer levels")
    waiting = [value]
    while waiting:
        one = waiting.pop()
        if isinstance(one, str):
            if "\0" in one or any("\ud800" <= character <= "\udfff" for character in one):
                raise Refused(
                    400,
                    "invalid_text",
                    f"text must not hold NUL or half of a surrogate pair, got {one[:40]!r}",
                    hint="remove the character",
                )
        elif isinstance(one, dict):
            waiting += [*one.keys(), *one.values()]
        elif isinstance(one, list):
            waiting += one
        elif isinstance(one, int) and abs(one) > LARGEST:
            raise _malformed("a whole number in the body is beyond 2^53", "write a smaller one")
        elif isinstance(one, float) and not math.isfinite(one):
            raise _malformed("a number in the body is beyond 1.8e308", "write a smaller one")


def _malformed(detail: str, hint: str | None) -> Refused:
    return Refused(400, "malformed_json", detail, hint=hint)


def digest(method: str, path: str, content: Any) -> str:
    """What an idempotency key stands for, beside method and path: equal for equal content, however it was written."""
    text = json.dumps([method, path, content], sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


async def idempotency_key(
    key: Annotated[
        str | None,
        Header(
            alias="Idempotency-Key",
            pattern="^[!-~]{1,255}$",
            description="Makes a repetition safe: the same key with the same request gives the first answer again, "
            "for 24 hours. 1 to 255 printable ASCII characters without spaces.",
            examples=["5f0c1f9a-submit-1"],
        ),
    ] = None,
) -> str | None:
    """Dependency: the request's idempotency key, if it has one."""
    return key


def etag(generation: int) -> str:
    """The ETag of a job that users have changed so often."""
    return f'"g{generation}"'


async def if_match(
    tags: Annotated[
        str | None,
        Header(
            alias="If-Match",
            description="Change only what still has this ETag; else 412.",
            examples=['"g1"'],
        ),
    ] = None,
) -> str | None:
    """Dependency: the ETag that the caller expects."""
    return tags


def check_match(expected: str | None, generation: int) -> None:
    """Raises Refused (412) unless `expected` is absent, `*`, or lists this generation's ETag."""
    if expected is None:
        return
    listed = [tag.strip() for tag in expected.split(",")]
    if "*" not in listed and etag(generation) not in listed:
        raise Refused(
            412,
            "stale_etag",
            f"the job's ETag is {etag(generation)}, not {expected[:60]}",
            param="If-Match",
            hint="read the job again, and decide again",
            headers={"ETag": etag(generation)},
        )


def write_cursor(kind: str, place: int) -> str:
    """An opaque place in a list."""
    return base64.urlsafe_b64encode(f"{kind}:{place}".encode()).decode().rstrip("=")


def read_cursor(kind: str, cursor: str) -> int:
    """The place that `write_cursor` wrote down. Raises Refused (400) for anything else."""
    try:
        text = base64.urlsafe_b64decode(cursor.encode("ascii") + b"=" * (-len(cursor) % 4)).decode("ascii")
        found, _, place = text.partition(":")
        if found == kind and place.isdigit() and int(place) <= LARGEST and write_cursor(kind, int(place)) == cursor:
            return int(place)
    except ValueError:
        pass
    raise bad_cursor(cursor)


def bad_cursor(cursor: str) -> Refused:
    """400: not what a page gave as its `next`."""
    return Refused(
        400,
        "bad_cursor",
        f"after={cursor[:60]!r} is not a cursor of this list",
        param="after",
        hint="pass `next` of the page before as it stands, or leave it out to begin",
    )
