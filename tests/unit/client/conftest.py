"""A service whose answers a test writes down, and a client of it that does not wait long between tries."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from scripted_service import Service, serving

from sapo_ray.client import Client
from sapo_ray.client.retry import Backoff


@pytest.fixture
def service() -> Iterator[Service]:
    with serving(Service()) as running:
        yield running


@pytest.fixture
def client(service: Service) -> Iterator[Client]:
    with Client(service.url, "sapo_" + "k" * 43, timeout=5.0) as one:
        one._transport.backoff = Backoff(first_s=0.01, longest_s=0.05)
        yield one
