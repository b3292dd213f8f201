"""Prometheus metrics: what the process counts itself, and what the store says at the time of a scrape."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from sqlalchemy import func, select

from sapo_ray.api.jobs import LIVE, TERMINAL, State
from sapo_ray.control.store import JobRow, Store, StoreUnavailable

MOST_JOBS = 500
"""Live jobs with series of their own; the newest are shown."""
RECENT_S = 24 * 3600.0
"""Queue waits are of jobs that began within this time."""
_WAITS = (1, 5, 15, 60, 300, 900, 3600, 4 * 3600, 24 * 3600)
_FIGURES = {
    "reward": "Mean training reward of the newest step.",
    "staleness": "Mean age of trained samples in policy versions.",
    "verifier_error_rate": "Share of gradings that ended in an error.",
    "tokens_per_second": "Sampled tokens per second of step time.",
}
_STATES: tuple[str, ...] = State.__args__  # type: ignore[attr-defined]


class Telemetry:
    """The metrics of one application; `registry` is what /metrics shows."""

    def __init__(self, store: Store, open_streams: Callable[[], int], disk_usable: Callable[[], bool]) -> None:
        self.registry = CollectorRegistry()
        self._requests = Histogram(
            "sapo_http_request_seconds",
            "Seconds from a request's arrival to the end of its answer; event streams are left out.",
            ["method", "route", "status"],
            registry=self.registry,
            buckets=(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10),
        )
        self.link_events = Counter(
            "sapo_link_events", "Events of drivers stored by this process.", registry=self.registry
        )
        self.link_deliveries = Counter(
            "sapo_link_deliveries", "Deliveries of drivers by their outcome.", ["outcome"], registry=self.registry
        )
        streams = Gauge("sapo_event_streams", "Event streams open on this process.", registry=self.registry)
        streams.set_function(open_streams)
        disk = Gauge(
            "sapo_disk_up",
            "Whether the data folder could be reached at this scrape, and has SAPO_MIN_FREE_GB.",
            registry=self.registry,
        )
        disk.set_function(disk_usable)
        self.registry.register(_FromTheStore(store))

    def observe(self, method: str, route: str, status: int, seconds: float) -> None:
        """Count one request. Its route is a template, so that there are as many series as routes."""
        if not route.endswith("/events") or seconds < 1:
            self._requests.labels(
                method if method.isalpha() and len(method) < 10 else "other", route, str(status)
            ).observe(seconds)


class _FromTheStore(Collector):
    """Asks the store at each scrape, so that all replicas tell the same of jobs."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def describe(self) -> list[Metric]:
        return []  # known before the first scrape, so that registering does not ask the store

    def collect(self) -> Iterator[Metric]:
        up = GaugeMetricFamily("sapo_store_up", "Whether the job store answered this scrape.")
        try:
            found = list(self._collect())
        except StoreUnavailable:
            up.add_metric([], 0)
            yield up
            return
        up.add_metric([], 1)
        yield up
        yield from found

    def _collect(self) -> Iterator[Metric]:
        now = time.time()
        with self._store.read() as session:
            by_state = session.execute(select(JobRow.state, func.count()).group_by(JobRow.state))
            counts: dict[str, int] = {row[0]: row[1] for row in by_state}
            oldest = session.scalar(select(func.min(JobRow.since)).where(JobRow.state == "queued"))
            waits = session.execute(
                select(JobRow.created_at, JobRow.started_at).where(JobRow.started_at > now - RECENT_S)
            ).all()
            columns = (JobRow.id, JobRow.tenant, JobRow.summary, JobRow.last_heard, JobRow.step)
            newest = select(*columns).where(JobRow.state.in_(LIVE)).order_by(JobRow.created_at.desc()).limit(MOST_JOBS)
            live = session.execute(newest).all()
        yield _jobs_by_state(counts)
        queued = GaugeMetricFamily("sapo_queue_oldest_seconds", "How long the longest-queued job has been queued.")
        queued.add_metric([], max(0.0, now - oldest) if oldest is not None else 0.0)
        yield queued
        yield _queue_wait([max(0.0, started - created) for created, started in waits if started is not None])
        lag = GaugeMetricFamily("sapo_driver_lag_seconds", "Since a driver last reported.", labels=["job", "tenant"])
        step = GaugeMetricFamily("sapo_job_step", "Steps taken.", labels=["job", "tenant"])
        figures = {
            name: GaugeMetricFamily(f"sapo_job_{name}", text, labels=["job", "tenant"])
            for name, text in _FIGURES.items()
        }
        for job_id, tenant, summary, last_heard, taken in live:
            if last_heard is not None:
                lag.add_metric([job_id, tenant], max(0.0, now - last_heard))
            step.add_metric([job_id, tenant], taken)
            for name, family in figures.items():
                value = (summary or {}).get(name)
                if isinstance(value, int | float):
                    family.add_metric([job_id, tenant], value)
        yield from (lag, step, *figures.values())


def _jobs_by_state(counts: dict[str, int]) -> Metric:
    family = GaugeMetricFamily("sapo_jobs", "Jobs by state.", labels=["state", "ended"])
    for state in _STATES:
        family.add_metric([state, "yes" if state in TERMINAL else "no"], counts.get(state, 0))
    return family


def _queue_wait(waits: list[float]) -> Metric:
    """Waits from submission to first launch, of the last day."""
    family = HistogramMetricFamily(
        "sapo_queue_wait_seconds", "From submission to first launch, of jobs launched within the last day."
    )
    buckets = [(str(float(bound)), float(sum(wait <= bound for wait in waits))) for bound in _WAITS]
    family.add_metric([], buckets=[*buckets, ("+Inf", float(len(waits)))], sum_value=sum(waits))
    return family
