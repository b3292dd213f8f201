"""Training jobs: submit, watch, steer, fetch what they made."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, overload
from urllib.parse import quote

from sapo_ray.api.diagnosis import Diagnosis
from sapo_ray.api.jobs import TERMINAL, Event, Job, ScaleState
from sapo_ray.client.download import Progress, RemoteFile, download
from sapo_ray.client.errors import BadReply, Conflict
from sapo_ray.client.events import EventStream
from sapo_ray.client.paging import rows
from sapo_ray.client.scaling import scaled
from sapo_ray.client.shapes import Checked, LogPart, read
from sapo_ray.client.transport import Params, Transport, new_key
from sapo_ray.config.job_file import read_job
from sapo_ray.config.spec import JobSpec
from sapo_ray.errors import ConfigError

DAY_S = 86400.0
RACES = 5
"""Changes by others that a change of ours begins anew for."""
Spec = Mapping[str, Any] | JobSpec | str | Path
Rows = list[dict[str, Any]]
Files = list[Path]


class Jobs:
    """`client.jobs`. All methods raise the errors of `sapo_ray.client.errors`."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    @overload
    def submit(
        self,
        spec: Spec,
        *,
        priority: int = ...,
        labels: Mapping[str, str] | None = ...,
        idempotency_key: str | None = ...,
        dry_run: Literal[False] = ...,
    ) -> Job: ...

    @overload
    def submit(
        self,
        spec: Spec,
        *,
        priority: int = ...,
        labels: Mapping[str, str] | None = ...,
        idempotency_key: str | None = ...,
        dry_run: Literal[True],
    ) -> Checked: ...

    def submit(
        self,
        spec: Spec,
        *,
        priority: int = 50,
        labels: Mapping[str, str] | None = None,
        idempotency_key: str | None = None,
        dry_run: bool = False,
    ) -> Job | Checked:
        """Hand in a job: a mapping, a JobSpec, or the path of a YAML file. The service validates it.

        Args:
            priority: 0 to 100; higher is launched first.
            labels: the user's own marks, for `list(label=...)`.
            idempotency_key: two submissions with the same key are one job, also across processes. Made if not given,
                so that retries within this call never make two.
            dry_run: only check; returns the resolved job.
        """
        body = {"spec": _mapping(spec), "priority": priority, "labels": dict(labels or {})}
        if dry_run:
            reply = self._transport.request(
                "POST", "/v1/jobs", params={"dry_run": "true"}, body=body, idempotency_key=new_key()
            )
            return read(Checked, reply.json())
        key = idempotency_key or new_key()
        return read(Job, self._transport.request("POST", "/v1/jobs", body=body, idempotency_key=key).json())

    def get(self, job_id: str) -> Job:
        """The job as it is now."""
        return read(Job, self._transport.request("GET", self._path(job_id)).json())

    def list(
        self, *, state: str | None = None, label: str | None = None, limit: int | None = None, page_size: int = 100
    ) -> Iterator[Job]:
        """Jobs, newest first, fetched page by page as they are asked for.

        Args:
            state: only those in this state.
            label: only those with this label, `key` or `key=value`.
            limit: at most so many.
        """
        params = {"state": state, "label": label}
        for row in rows(self._transport, "/v1/jobs", params, limit, page_size):
            yield read(Job, row)

    def wait(
        self,
        job_id: str,
        timeout: float = DAY_S,
        on_event: Callable[[Event], None] | None = None,
        *,
        through_pause: bool = False,
    ) -> Job:
        """Wait until the job has ended, or is paused (then nothing more happens by itself), and return it.

        Args:
            timeout: seconds.
            on_event: told every event of the job in order, from the first on.
            through_pause: wait on while the job is paused.

        Raises:
            DeadlineExceeded: it went on for longer.
        """
        stream = EventStream(
            self._transport,
            self._path(job_id),
            after=0,
            until=TERMINAL if through_pause else TERMINAL | {"paused"},
            deadline=time.monotonic() + timeout,
            deadline_text=f"{job_id} had not ended after {timeout:g} s; it goes on, and can be waited for again",
        )
        for event in stream.follow():
            if on_event is not None:
                on_event(event)
        return stream.ended_as or self.get(job_id)

    def events(
        self, job_id: str, after: int = 0, follow: bool = True, *, timeout: float | None = None
    ) -> Iterator[Event]:
        """Events with an id beyond `after`, each exactly once and in order.

        With `follow` as they happen, until the job has ended; the connection is made anew whenever it is lost (an
        error only after 10 minutes without the service). Else those stored by now. `timeout` in seconds bounds the
        whole; then DeadlineExceeded.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        text = f"{job_id} had not ended after {timeout:g} s of events" if timeout is not None else ""
        stream = EventStream(self._transport, self._path(job_id), after=after, deadline=deadline, deadline_text=text)
        return stream.follow() if follow else stream.stored()

    def pause(self, job_id: str) -> Job:
        """Finish the step, make a checkpoint, give all resources back. `wait` tells when it is done."""
        return self._act(job_id, "pause")

    def resume(self, job_id: str) -> Job:
        """Queue a paused job again."""
        return self._act(job_id, "resume")

    def cancel(self, job_id: str, *, discard: bool = False) -> Job:
        """End the job. What it learned so far is exported, unless `discard`: then checkpoints and export go too."""
        return self._act(job_id, "cancel", {"discard": "true"} if discard else None)

    def checkpoint(self, job_id: str) -> Job:
        """Make a checkpoint after the step under way."""
        return self._act(job_id, "checkpoint")

    def scale(
        self, job_id: str, target: int | None = None, min: int | None = None, max: int | None = None
    ) -> ScaleState:
        """Rollout workers wanted; without arguments only tell. What is not given stays, or moves as far as it must.

        `scale(id, 8)` on {min 1, max 4, target 2} gives {min 1, max 8, target 8}. What somebody else changes at the
        same moment is seen, not undone: of two who give the same thing the later one wins. Raises Conflict if others
        keep changing the job.
        """
        path = f"{self._path(job_id)}/scale"
        for left in reversed(range(RACES)):
            reply = self._transport.request("GET", path)
            now = read(ScaleState, reply.json())
            if target is None and min is None and max is None:
                break
            headers = {"If-Match": reply.headers["etag"]} if "etag" in reply.headers else {}
            body = scaled(now, target, min, max)
            try:
                return read(ScaleState, self._transport.request("PUT", path, body=body, headers=headers).json())
            except Conflict as error:
                if error.status != 412 or not left:
                    raise
        return now

    def update(
        self,
        job_id: str,
        *,
        priority: int | None = None,
        labels: Mapping[str, str] | None = None,
        name: str | None = None,
        if_match: int | str | None = None,
    ) -> Job:
        """Change priority, name or labels (the whole set).

        `if_match` is a job's `generation` (or an ETag): refused as Conflict if a user changed the job since.
        """
        given = {"priority": priority, "labels": None if labels is None else dict(labels), "name": name}
        body = {key: value for key, value in given.items() if value is not None}
        if not body:
            raise ConfigError("update changes nothing; give priority, labels or name")
        etag = f'"g{if_match}"' if isinstance(if_match, int) else if_match
        headers = {} if etag is None else {"If-Match": etag}
        return read(Job, self._transport.request("PATCH", self._path(job_id), body=body, headers=headers).json())

    def delete(self, job_id: str) -> None:
        """Remove a job that has ended, with all its files. Deleting what is gone already is no error in a retry."""
        self._transport.request("DELETE", self._path(job_id))

    def workers(self, job_id: str) -> Rows:
        """The job's workers, as last reported."""
        return _rows(self._transport, f"{self._path(job_id)}/workers")

    def diagnosis(self, job_id: str) -> Diagnosis:
        """What is the matter with the job: verdict, the part it is about, why, what to do."""
        return read(Diagnosis, self._transport.request("GET", f"{self._path(job_id)}/diagnosis").json())

    def metrics(self, job_id: str, *, from_step: int | None = None, names: Sequence[str] | None = None) -> Rows:
        """One row a step: `step` and the metrics (docs/metrics.md), all or those named."""
        params: Params = {"from_step": from_step, "names": ",".join(names) if names else None}
        return _rows(self._transport, f"{self._path(job_id)}/metrics", params)

    def samples(self, job_id: str, *, step: int | None = None, limit: int | None = None) -> Rows:
        """Texts of a few groups a step, with their rewards."""
        return _rows(self._transport, f"{self._path(job_id)}/samples", {"step": step}, limit)

    def logs(self, job_id: str) -> Rows:
        """The log files of the job's processes: `name`, `bytes`."""
        return _rows(self._transport, f"{self._path(job_id)}/logs")

    def log(self, job_id: str, name: str, offset: int = 0, limit: int | None = None) -> LogPart:
        """A part of a log file, from byte `offset` on (negative: before its end); go on at its `next_offset`."""
        path = f"{self._path(job_id)}/logs/{quote(name)}"
        headers = {"Accept": "text/plain"}
        reply = self._transport.request("GET", path, params={"offset": offset, "limit": limit}, headers=headers)
        return read(LogPart, {"data": reply.body, "next_offset": reply.headers.get("x-next-offset")})

    def checkpoints(self, job_id: str) -> Rows:
        """Whole checkpoints, oldest first."""
        return _rows(self._transport, f"{self._path(job_id)}/checkpoints")

    def config(self, job_id: str) -> dict[str, Any]:
        """The resolved job, every key of it."""
        found = self._transport.request("GET", f"{self._path(job_id)}/config").json()
        if not isinstance(found, dict):
            raise BadReply(f"{self._path(job_id)}/config is not a mapping")
        return found

    def download_export(self, job_id: str, folder: str | Path, progress: Progress | None = None) -> Files:
        """The trained model, Hugging Face format, into `folder`; returns its files.

        A download that was broken off goes on where it stopped when it is called again. Sizes and checksums are those
        that the service listed.
        """
        base = f"{self._path(job_id)}/export"
        listed = [read(RemoteFile, row) for row in _rows(self._transport, base)]
        if not listed:
            raise BadReply(f"{base} lists no file")
        return download(self._transport, f"{base}/files", listed, Path(folder), progress)

    def download_checkpoint(
        self, job_id: str, name: str, folder: str | Path, progress: Progress | None = None
    ) -> Files:
        """A checkpoint of `checkpoints`, by its name, into `folder`; as `download_export`."""
        for row in self.checkpoints(job_id):
            if row.get("name") == name:
                base = f"{self._path(job_id)}/checkpoints/{quote(name, safe='')}/files"
                listed = [read(RemoteFile, one) for one in row.get("files", [])]
                return download(self._transport, base, listed, Path(folder), progress)
        raise ConfigError(f"{job_id} has no checkpoint {name!r} (any more); `checkpoints` lists those it has")

    def _act(self, job_id: str, verb: str, params: Params | None = None) -> Job:
        path = f"{self._path(job_id)}:{verb}"
        return read(Job, self._transport.request("POST", path, params=params, idempotency_key=new_key()).json())

    def _path(self, job_id: str) -> str:
        if not job_id or "/" in job_id:
            raise ConfigError(f"a job id is `job-` and 20 characters, got {job_id!r}")
        return f"/v1/jobs/{quote(job_id, safe='')}"


def _rows(transport: Transport, path: str, params: Params | None = None, limit: int | None = None) -> Rows:
    return list(rows(transport, path, params, limit))


def _mapping(spec: Spec) -> dict[str, Any]:
    """The job as it is sent. A file is only read; whether it is a good job is for the service to say."""
    if isinstance(spec, JobSpec):
        return spec.model_dump(mode="json")
    return dict(spec) if isinstance(spec, Mapping) else read_job(spec)
