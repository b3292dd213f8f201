"""The client: one object for one service and one key."""

from __future__ import annotations

from types import TracebackType
from typing import Any

from sapo_ray.client.jobs import Jobs
from sapo_ray.client.resources import Datasets, Keys, Models
from sapo_ray.client.transport import TIMEOUT_S, Transport


class Client:
    """A sapo-ray service.

        from sapo_ray import Client

        client = Client()                                   # SAPO_URL and SAPO_API_KEY
        job = client.jobs.submit("configs/quickstart.yaml")
        job = client.jobs.wait(job.id, timeout=3600, on_event=print)
        client.jobs.download_export(job.id, "trained")

    Requests that fail for a passing reason are made again where that cannot do harm; submissions carry an idempotency
    key, so that none becomes two jobs. What goes wrong for good is an error of `sapo_ray.client.errors`. May be used
    by several threads.

    Args:
        base_url: SAPO_URL if not given, http://127.0.0.1:8800 if that is not set either.
        api_key: SAPO_API_KEY if not given.
        timeout: seconds for the answer to one request; not for waiting for jobs, which have timeouts of their own.
    """

    def __init__(self, base_url: str | None = None, api_key: str | None = None, timeout: float = TIMEOUT_S) -> None:
        self._transport = Transport(base_url, api_key, timeout=timeout)
        self.jobs = Jobs(self._transport)
        """Training jobs."""
        self.datasets = Datasets(self._transport)
        """Uploaded data."""
        self.models = Models(self._transport)
        """What jobs may start from."""
        self.keys = Keys(self._transport)
        """API keys, for admins."""

    @property
    def base_url(self) -> str:
        """Address of the service."""
        return self._transport.base_url

    def ready(self) -> dict[str, Any]:
        """What `/readyz` says, once: the service can do its work. Needs no key.

        Raises:
            Unavailable: something it stands on is down; `problem` tells what.
            ConnectionFailed: nobody answers.
        """
        with self._transport.stream("GET", "/readyz", public=True) as response:
            reply = self._transport.whole(response)
        found = reply.json()
        return found if isinstance(found, dict) else {"status": found}

    def close(self) -> None:
        """Close all connections."""
        self._transport.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
