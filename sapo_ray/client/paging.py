"""Lists of the API: `{"data": [...], "has_more": bool, "next": cursor}`, page after page."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from sapo_ray.client.errors import BadReply
from sapo_ray.client.transport import Params, Transport


def rows(
    transport: Transport,
    path: str,
    params: Params | None = None,
    limit: int | None = None,
    page_size: int | None = None,
) -> Iterator[dict[str, Any]]:
    """All rows of a list, or the first `limit`. Pages are fetched as their rows are asked for."""
    left = limit
    after: str | None = None
    while left is None or left > 0:
        sizes = [size for size in (page_size, left) if size is not None]
        page = transport.request(
            "GET", path, params={**(params or {}), "limit": min(sizes, default=None), "after": after}
        ).json()
        if not isinstance(page, dict) or not isinstance(page.get("data"), list):
            raise BadReply(f"{path} did not answer with a list")
        found = page["data"] if left is None else page["data"][:left]
        yield from found
        left = None if left is None else left - len(found)
        before, after = after, page.get("next")
        if not page.get("has_more"):
            return
        if after is None or after == before:
            raise BadReply(f"{path} says that there is more, but not where")
