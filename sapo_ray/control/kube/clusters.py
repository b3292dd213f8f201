"""A launcher that makes a RayCluster for each driver, and starts the driver there through Ray's Jobs API.

    submit --> RayCluster `sapo-<job>-<attempt>` made or found --> its pods ready? --> Ray's Jobs API --> driver
                            |                                         | no: NotStarted, asked again next round
                            +-- its Secret, see making.py             | too late: LaunchRefused

Everything that is to be known lies in the cluster's object and in the job store: a service that dies between any two of
these steps takes them again, and finds what is there. Clusters belong to the service's Deployment and go with it;
those whose driver is over are removed by the reconciler.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from types import TracebackType
from typing import NoReturn, Self

import structlog

from sapo_ray.control.kube import identity, rights
from sapo_ray.control.kube import pods as of
from sapo_ray.control.kube.client import EVENTS, PODS, QUOTA, RAYCLUSTERS, Conflict, KubeClient, Object, Rejected
from sapo_ray.control.kube.identity import Identity
from sapo_ray.control.kube.making import Making, Options
from sapo_ray.control.kube.scaling import plan
from sapo_ray.control.kube.template import ClusterTemplate
from sapo_ray.control.launcher import (
    ClusterUnavailable,
    LauncherUnavailable,
    LaunchRefused,
    LaunchRequest,
    LaunchStatus,
    NotStarted,
    OwnCluster,
    RayJobs,
)

log = structlog.get_logger("sapo_ray.control.kube")

UNANSWERED_S = 300.0
"""A head that is ready for Kubernetes and does not answer for so long counts as gone, if its driver is silent too."""


class KubeClusters:
    """Clusters of one service in one namespace; see ClusterLauncher.

    `ping` may be called by any thread, everything else by one.
    """

    def __init__(
        self,
        api: KubeClient,
        options: Options,
        *,
        address: Callable[[Object], str] = identity.address,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Raises ConfigError if the template is not as it must be."""
        ClusterTemplate.load(options.template)
        self._api, self._options, self._address, self._clock = api, options, address, clock
        self._identity = Identity(service=options.owner or "sapo-ray", secret=options.secret)
        self._making = Making(api, options, self._identity)
        self._jobs: dict[str, RayJobs] = {}
        """By cluster, whose head was found once; it is asked without a detour."""
        self._answered: dict[str, float] = {}
        """When a cluster's Jobs API answered last; not there if it never did."""
        self._waits: dict[str, tuple[float, str]] = {}
        """By cluster that is not ready: when it was looked at, and what it waits for."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for jobs in self._jobs.values():
            jobs.close()
        self._api.close()

    def ping(self) -> None:
        """Return if the API server answers, and lets us see our clusters."""
        self._api.find(RAYCLUSTERS, limit="1")

    def lacking(self) -> list[str]:
        """Rights that the service needs for clusters and does not have."""
        return rights.lacking(self._api, self._options)

    def submit(self, request: LaunchRequest) -> None:
        """Bring a driver one step nearer to its start; see Launcher."""
        name = request.submission_id
        looked, told = self._waits.get(name, (0.0, ""))
        if 0 <= self._clock() - looked < self._options.look_every_s:
            raise NotStarted(told)
        try:
            self._nearer(request)
        except NotStarted as waiting:
            self._waits[name] = self._clock(), str(waiting)
            raise
        self._waits.pop(name, None)
        self._answered[name] = self._clock()

    def _nearer(self, request: LaunchRequest) -> None:
        name = request.submission_id
        cluster = self._api.get(RAYCLUSTERS, name) or self._create(request)
        if not identity.is_of(cluster, request.job_id):
            raise LaunchRefused(f"there is a RayCluster {name} that is not this service's; delete it")
        if identity.is_going(cluster):
            raise NotStarted("the cluster is being deleted, and is made anew then")
        if not self._identity.knows_token(cluster):
            self.remove(name)
            raise NotStarted("the service's token was changed: the cluster is made anew")
        self._making.belongings(cluster)
        pods = self._pods(name)
        if late := self._late(name, pods, identity.needed(cluster)):
            self._wait(cluster, late)
        try:
            self._open(cluster).submit(request)
        except LauncherUnavailable as error:
            self._wait(cluster, "its head does not answer yet", str(error))

    def status(self, submission_id: str) -> LaunchStatus:
        """What became of a driver. UNKNOWN too if its head is gone, as its driver is then; see Launcher."""
        if submission_id in self._jobs:
            with suppress(LauncherUnavailable):
                found = self._ask(submission_id, self._jobs[submission_id])
                if found.state != "UNKNOWN":
                    return found
        cluster, why = self._reachable(submission_id)
        if cluster is None:
            return LaunchStatus(state="UNKNOWN", message=why)
        try:
            return self._ask(submission_id, self._open(cluster))
        except LauncherUnavailable as error:
            last = self._answered.get(submission_id)
            if last is None or self._clock() - last > UNANSWERED_S:
                return LaunchStatus(state="UNKNOWN", message="its cluster's head does not answer")
            raise ClusterUnavailable(str(error)) from error

    def stop(self, submission_id: str) -> None:
        """Ask a driver to end; where its cluster cannot be asked, end that."""
        cluster, _ = self._reachable(submission_id)
        if cluster is not None:
            try:
                self._open(cluster).stop(submission_id)
                return
            except LauncherUnavailable as error:
                log.warning("cluster_ended", cluster=submission_id, reason=str(error))
        self.remove(submission_id)

    def logs(self, submission_id: str) -> str:
        """What the driver printed; empty if its cluster cannot be asked any more."""
        cluster, _ = self._reachable(submission_id)
        return "" if cluster is None else self._open(cluster).logs(submission_id)

    def clusters(self) -> list[OwnCluster]:
        """Those of this service."""
        found = self._api.find(RAYCLUSTERS, labelSelector=self._identity.selector())
        there = [identity.own(one) for one in found if not identity.is_going(one)]
        names = {one.submission_id for one in there}
        self._waits = {name: wait for name, wait in self._waits.items() if name in names}
        return there

    def remove(self, submission_id: str) -> None:
        """Delete a cluster; Kubernetes deletes its pods, services and secret."""
        self._api.delete(RAYCLUSTERS, submission_id)
        self._answered.pop(submission_id, None)
        self._waits.pop(submission_id, None)
        jobs = self._jobs.pop(submission_id, None)
        if jobs is not None:
            jobs.close()

    def scale(self, submission_id: str, workers: int, busy: Collection[str] | None) -> str | None:
        """Bring the rollout group to the nodes that so many workers need; see ClusterLauncher."""
        cluster = self._api.get(RAYCLUSTERS, submission_id)
        if cluster is None or identity.is_going(cluster):
            return None
        per_node = int(identity.annotation(cluster, identity.WORKERS_PER_NODE))
        groups = cluster["spec"]["workerGroupSpecs"]
        group = next(one for one in groups if one["groupName"] == "rollout")
        pods = self._pods(submission_id)
        change = plan(group, of.of_group(pods, "rollout"), -(-workers // per_node), busy)
        if change is None:
            return self._late(submission_id, pods, {"rollout": int(group["replicas"])}) or None
        group |= {"replicas": change.replicas, "scaleStrategy": {"workersToDelete": change.delete}}
        version = cluster["metadata"]["resourceVersion"]
        body = {"metadata": {"resourceVersion": version}, "spec": {"workerGroupSpecs": groups}}
        try:
            self._api.patch(RAYCLUSTERS, submission_id, body)
        except Conflict:
            log.info("scaling_again", cluster=submission_id)  # read anew and decided anew at the next look
        except Rejected as error:
            raise LauncherUnavailable(str(error)) from error
        else:
            log.info("scaled", cluster=submission_id, replicas=change.replicas, delete=change.delete)
        return None

    def _create(self, request: LaunchRequest) -> Object:
        """Make the cluster, after those of the job's earlier attempts: they may hold the nodes that it needs."""
        mine = self._api.find(RAYCLUSTERS, labelSelector=self._identity.selector(request.job_id))
        for other in map(identity.own, mine):
            if other.attempt > request.attempt:
                raise NotStarted(f"attempt {other.attempt} has begun")
            self.remove(other.submission_id)
        return self._making.cluster(request)

    def _wait(self, cluster: Object, why: str, detail: str = "") -> NoReturn:
        """Raise NotStarted; after the deadline LaunchRefused, without leaving nodes behind."""
        name = cluster["metadata"]["name"]
        if cluster["spec"].get("suspend"):
            raise NotStarted("the cluster waits in a queue of Kubernetes (it is suspended)")
        if self._clock() - identity.began(cluster) > self._options.deadline_s:
            self.remove(name)
            told = f"its cluster was not ready within {self._options.deadline_s:.0f} s: {why}"
            raise LaunchRefused(f"{name}: {told} {detail}", told=told)
        raise NotStarted(f"the job's cluster is being made: {why}")

    def _late(self, name: str, pods: list[Object], wanted: Mapping[str, int]) -> str:
        """Which nodes are not ready and why, by Kubernetes' warnings where pods tell nothing; empty if all are."""
        late = of.lacking(pods, wanted)
        about = of.told_elsewhere(pods, wanted) if late else None
        if about is None:
            return late
        kind, other = about
        complaint = self._complaint(kind, other or name)
        return f"{late} ({complaint})" if complaint else late

    def _complaint(self, kind: str, name: str) -> str:
        """The newest warning about a cluster or pod, in words for a tenant: a template that is not taken, a quota..."""
        selector = f"involvedObject.kind={kind},involvedObject.name={name},type=Warning"
        events = self._api.find(EVENTS, fieldSelector=selector)
        if not events:
            return ""
        newest = max(events, key=lambda one: str(one.get("lastTimestamp") or one.get("eventTime") or ""))
        reason, message = str(newest.get("reason")), str(newest.get("message"))
        log.warning("kubernetes_warns", kind=kind, name=name, reason=reason, message=message)
        return f"{reason}: {of.QUOTA}" if QUOTA in message else reason

    def _ask(self, name: str, jobs: RayJobs) -> LaunchStatus:
        found = jobs.status(name)
        self._answered[name] = self._clock()
        return found

    def _reachable(self, name: str) -> tuple[Object | None, str]:
        """The cluster if its head can be asked; else why not."""
        cluster = self._api.get(RAYCLUSTERS, name)
        if cluster is None or identity.is_going(cluster):
            return None, "its cluster is gone"
        if not self._identity.knows_token(cluster):
            return None, "its cluster has another token than the service's now"
        if not self._address(cluster) or not any(of.is_ready(pod) for pod in of.heads(self._pods(name))):
            return None, "its cluster's head is not ready"
        return cluster, ""

    def _open(self, cluster: Object) -> RayJobs:
        name, url = cluster["metadata"]["name"], self._address(cluster)
        if not url:
            raise ClusterUnavailable(f"{name} has no head service yet")
        if name not in self._jobs:
            self._jobs[name] = RayJobs(url, python=self._options.python, token=self._identity.token(name))
        return self._jobs[name]

    def _pods(self, name: str) -> list[Object]:
        return self._api.find(PODS, labelSelector=f"{of.CLUSTER}={name}")
