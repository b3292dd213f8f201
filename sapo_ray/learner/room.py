"""The room that the learner ranks have in the cluster, kept while ranks are replaced."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from sapo_ray.config.spec import JobSpec
from sapo_ray.diagnosis.causes import CLUSTER
from sapo_ray.diagnosis.vitals import Activity
from sapo_ray.errors import NoRoom, ResourceError
from sapo_ray.learner.reports import RankInfo
from sapo_ray.placement import label_selector, wants_gpus


class Room:
    """A placement group with one bundle a rank. Ray must be initialised."""

    def __init__(self, spec: JobSpec) -> None:
        self.gpu = False
        """Whether ranks have GPUs; known once the room is taken."""
        self._spec = spec
        self._group: PlacementGroup | None = None
        self._since: float | None = None
        """When the cluster was asked, while it has no room; Unix seconds."""

    async def take(self, end: float) -> None:
        """Wait for the room, or keep what is held already. Raises NoRoom after `end` (monotonic)."""
        self.gpu = wants_gpus(ray.cluster_resources().get("GPU", 0) > 0)
        bundle = {"CPU": 1.0, "GPU": self._gpu_share()} if self.gpu else {"CPU": 1.0}
        count, where = self._spec.learner.ranks, label_selector("learner")
        self._group = self._group or placement_group(
            [bundle] * count, strategy="PACK", bundle_label_selector=[where] * count if where else None
        )
        self._since = time.time()
        try:
            placed = await asyncio.to_thread(self._group.wait, max(1.0, end - time.monotonic()))
        finally:
            self._since = None
        if not placed:
            self.give_back()
            free = {key: amount for key, amount in ray.available_resources().items() if key in ("CPU", "GPU")}
            raise NoRoom(
                f"no room for learner.ranks: {count} within deadlines.start_s "
                f"({self._spec.deadlines.start_s:g} s): each asks for {bundle}, the cluster has {free} free; "
                "add nodes, or lower learner.ranks or rollout.workers"
            )

    def give_back(self) -> None:
        """Safe to call more than once."""
        if self._group is not None:
            remove_placement_group(self._group)
            self._group = None

    def activity(self) -> list[Activity]:
        """The cluster, while it has no room."""
        if (since := self._since) is None:
            return []
        task = f"making room for {self._spec.learner.ranks} learner ranks"
        return [Activity(name=CLUSTER, kind="place", task=task, since=since, progress=since)]

    def options(self, rank: int) -> dict[str, Any]:
        """Ray's options for the actor of a rank."""
        assert self._group is not None
        on_cpu = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
        return {
            "num_cpus": 1,
            "num_gpus": self._gpu_share() if self.gpu else 0,
            "runtime_env": {"env_vars": {"TOKENIZERS_PARALLELISM": "false"} | ({} if self.gpu else on_cpu)},
            "scheduling_strategy": PlacementGroupSchedulingStrategy(
                placement_group=self._group, placement_group_bundle_index=rank
            ),
        }

    def _gpu_share(self) -> float:
        """CUDA IPC joins processes on one GPU, so a learner leaves half of it to a rollout worker."""
        return 0.5 if self._spec.learner.transport == "ipc" else 1.0


def check_object_store(publisher: RankInfo) -> None:
    """The last published weights stay readable until the next are complete: room for two sets, else ResourceError."""
    needed = 2 * publisher.published_bytes
    node = next(node for node in ray.nodes() if node["NodeID"] == publisher.node_id)
    capacity = int(node["Resources"].get("object_store_memory", 0))
    if needed > capacity:
        raise ResourceError(
            f"Ray's object store on {publisher.host} has {capacity / 1e9:.3g} GB, but two sets of published "
            f"weights take {needed / 1e9:.3g} GB; start Ray there with --object-store-memory of at least "
            f"{needed * 1.25:.0f} bytes (and as much shared memory: /dev/shm of a container is 64 MB by default)"
        )
