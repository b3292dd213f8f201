"""All that can be told from this machine."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator
from dataclasses import replace
from importlib.util import find_spec
from urllib.parse import urlsplit

from sapo_ray.control.settings import Settings
from sapo_ray.doctor.findings import Check, Finding
from sapo_ray.doctor.machine import check_gpu, check_shm, gpus
from sapo_ray.doctor.network import Dashboard, check_clock, check_dns, check_ray
from sapo_ray.doctor.own_clusters import check_kubernetes
from sapo_ray.doctor.ping import check_nccl_here
from sapo_ray.doctor.storage import check_storage
from sapo_ray.doctor.versions import check_ray_version
from sapo_ray.placement import ACCELERATOR


def look(settings: Settings, checks: Collection[Check]) -> Iterator[Finding]:
    """Run those checks here, one after the other, as they end."""
    if "dns" in checks:
        yield from check_dns(hosts(settings))
    yield from _of_the_cluster(settings, checks)
    if "storage" in checks:
        yield _storage(settings)
    of_engines: dict[Check, Callable[[], Finding]] = {
        "shm": check_shm,
        "gpu": lambda: check_gpu(1 if os.environ.get(ACCELERATOR) == "gpu" else None),
        "nccl": lambda: check_nccl_here(_count()),
    }
    for check, run in of_engines.items():
        if check not in checks:
            continue
        if find_spec("ray") is None:
            yield Finding(check=check, status="skipped", detail="no engine runs here; --cluster looks at Ray's nodes")
        else:
            yield run()


def hosts(settings: Settings) -> dict[str, str]:
    """Hosts that the settings name, and what for."""
    found: dict[str, str] = {}
    named = (
        (settings.ray_jobs_url if _names_a_cluster(settings) else "", "SAPO_RAY_JOBS_URL"),
        (settings.control_url, "SAPO_CONTROL_URL"),
        (settings.database_url, "SAPO_DATABASE_URL"),
    )
    for url, name in named:
        host = urlsplit(url).hostname
        if host:
            found.setdefault(host, name)
    return found


def token(settings: Settings) -> str | None:
    """The cluster's token."""
    return settings.ray_auth_token.get_secret_value() if settings.ray_auth_token else None


def _storage(settings: Settings) -> Finding:
    """Of the data folder; before the first start on a machine, where nobody named one, of where `serve` makes it."""
    folder, nobodys = settings.data_dir, Settings.model_fields["data_dir"].default.absolute()
    if folder != nobodys or folder.exists():
        return check_storage(folder, settings.min_free_gb)
    found = check_storage(folder.parent, settings.min_free_gb)
    return replace(found, detail=f"{folder} is not there yet, `sapo-ray serve` makes it; {found.detail}")


def _names_a_cluster(settings: Settings) -> bool:
    return settings.shared_cluster and "ray_jobs_url" in settings.model_fields_set


def _of_the_cluster(settings: Settings, checks: Collection[Check]) -> Iterator[Finding]:
    wanted: list[Check] = [one for one in ("ray", "versions", "clock") if one in checks]
    if not wanted:
        return
    told: Dashboard | None = None
    why = "the service starts a Ray of its own: no SAPO_RAY_JOBS_URL, no --ray-jobs-url"
    if not settings.shared_cluster:
        why = "each job has a Ray of its own, which is there while it runs"
        if "ray" in wanted:
            yield check_kubernetes(settings)
            wanted.remove("ray")
    elif _names_a_cluster(settings):
        found, told = check_ray(settings.ray_jobs_url, token(settings))
        why = "Ray cannot be asked"
        if "ray" in wanted:
            yield found
            wanted.remove("ray")
    for check in wanted:
        if told is None:
            yield Finding(check=check, status="skipped", detail=why)
        else:
            yield check_ray_version(told.version) if check == "versions" else check_clock(told)


def _count() -> int:
    try:
        return len(gpus())
    except OSError:
        return 0  # check_gpu says what is wrong
