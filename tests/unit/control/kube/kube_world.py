"""A namespace with KubeRay, and launchers in it: what the tests of jobs' own clusters talk to."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import yaml
from fake_kube import NAMESPACE, FakeKube, serving
from fake_operator import RAYCLUSTERS, Heads, Operator

from sapo_ray.config.load import resolve
from sapo_ray.control.kube import KubeClient, KubeClusters
from sapo_ray.control.kube.making import Options
from sapo_ray.control.launcher import LaunchRequest

PAGE = Path(__file__).parents[4] / "docs" / "kubernetes.md"
JOB = "job-" + "a" * 20
SPEC = resolve({"preset": "quickstart", "learner": {"ranks": 2}, "verifier": {"workers": 1}}).model_dump(mode="json")


def documented(head: str) -> dict[str, Any]:
    """The YAML block of docs/kubernetes.md that begins with `head`."""
    blocks = re.findall(r"```yaml\n(.*?)```", PAGE.read_text(), re.S)
    return next(yaml.safe_load(block) for block in blocks if block.startswith(head))


class KubeWorld:
    """API server, operator and heads, and the files by which a service finds them."""

    def __init__(self, kube: FakeKube, folder: Path, closing: ExitStack) -> None:
        self.kube, self.operator = kube, Operator(kube)
        self.heads = Heads(self.operator)
        closing.callback(self.heads.close)
        self._closing = closing
        self.ahead = 0.0
        """Seconds by which the launchers' clocks are ahead."""
        self.template = folder / "cluster.yaml"
        self.folders = (folder / "datasets", folder / "cache")
        self.write(documented("apiVersion"))
        self.account = folder / "account"
        self.account.mkdir()
        (self.account / "token").write_text("sesame\n")
        (self.account / "namespace").write_text(NAMESPACE)
        kube.put("apps/v1/deployments", {"metadata": {"name": "sapo", "uid": "uid-of-the-deployment"}})

    def write(self, template: dict[str, Any]) -> None:
        self.template.write_text(yaml.safe_dump(template))

    def launcher(self, **over: Any) -> KubeClusters:
        """A process of the service; every call makes another one."""
        given = {
            "template": self.template,
            "secret": "s" * 64,
            "owner": "sapo",
            "network_policy": True,
            "look_every_s": 0.0,
        }
        options = Options(**given | {"tenant_folders": self.folders} | over)
        clusters = KubeClusters(
            KubeClient(self.kube.url, self.account),
            options,
            address=self.heads.address,
            clock=lambda: time.time() + self.ahead,
        )
        return self._closing.enter_context(clusters)

    def clusters(self) -> dict[str, dict[str, Any]]:
        return self.kube.of(RAYCLUSTERS)

    def group(self, cluster: str, name: str) -> dict[str, Any]:
        groups = self.clusters()[cluster]["spec"]["workerGroupSpecs"]
        return next(one for one in groups if one["groupName"] == name)


def request(attempt: int = 1, job: str = JOB, **over: Any) -> LaunchRequest:
    """What the reconciler asks for: two workers, one of which is enough to begin."""
    given = {"tenant": "team-a", "spec": SPEC, "workers": 8, "least_workers": 4} | over
    return LaunchRequest(
        submission_id=f"sapo-{job}-{attempt}",
        job_id=job,
        attempt=attempt,
        control_url="http://control:8800",
        token_file=Path(f"/data/runs/{job}/.token-{attempt}"),
        metadata={"sapo_job": job},
        **given,
    )


@contextmanager
def kube_world(folder: Path) -> Iterator[KubeWorld]:
    """With exactly the rights that docs/kubernetes.md lists."""
    with ExitStack() as closing:
        yield KubeWorld(closing.enter_context(serving(documented("rules")["rules"])), folder, closing)
