from __future__ import annotations

import asyncio

import pytest

from sapo_ray.driver.waits import bounded
from sapo_ray.errors import DeadlineExceeded


async def test_a_wait_that_runs_out_says_for_what_and_how_things_stood() -> None:
    with pytest.raises(DeadlineExceeded, match=r"^waited 0\.01 s for rain; the sky is blue$"):
        async with bounded(0.01, "rain", lambda: "; the sky is blue"):
            await asyncio.sleep(60)


async def test_a_timeout_from_inside_keeps_its_own_words() -> None:
    with pytest.raises(TimeoutError, match=r"^the socket$") as caught:
        async with bounded(60, "rain", lambda: ""):
            raise TimeoutError("the socket")
    assert not isinstance(caught.value, DeadlineExceeded)
