"""The client: one object for one service and one key."""

from __future__ import annotations

from types import TracebackType
from typing import Any

from sapo_ray.api.problems import Problem
from sapo_ray.client.errors import BadReply, Unavailable
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
        """What `/readyz` says, asked once: `status` is ready, or degraded (cluster or disk are down). Needs no key.

        Raises:
            Unavailable: the database is down; the message tells what else is.
            ConnectionFailed: nobody answers.
        """
        with self._transport.stream("GET", "/readyz", public=True, also=frozenset({503})) as response:
            reply = self._transport.whole(response)
        found = reply.json()
        if not isinstance(found, dict) or "status" not in found:
            raise BadReply(f"{self.base_url}/readyz does not say whether it is ready; is that a sapo-ray service?")
        if reply.status == 503:
            down = ", ".join(name for name, state in found.get("checks", {}).items() if state != "ok")
            said = f"the service at {self.base_url} is not ready{f': {down} down' if down else ''}"
            raise Unavailable(said, Problem(title="Not ready", status=503, code="not_ready", detail=said))
        return found

    def close(self) -> None:
        """Close all connections."""
        self._transport.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
