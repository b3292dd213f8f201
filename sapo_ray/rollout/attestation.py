"""When a worker may be believed: the weights it should hold, the canary, and the gate before its completions."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping, Sequence

from sapo_ray.errors import SapoRayError, WeightsRefused
from sapo_ray.types import Canary, PolicyVersion, Takeover, WeightsManifest
from sapo_ray.weights.fingerprint import fingerprint

CANARY_MAX = {"float32": 1e-4, "bfloat16": 0.3}
"""Largest |difference| of canary log-probs, by rollout dtype; stale weights show at more than 0.5."""
CANARY_MEAN = {"float32": 1e-4, "bfloat16": 0.02}
NOISE_FACTOR = 3.0
"""In bfloat16, differences up to so many times those of the first takeover are noise too."""


def check_manifest(manifest: WeightsManifest, expected: Mapping[str, tuple[int, ...]], dtype: str) -> None:
    """Raise WeightsRefused unless the manifest is whole: exactly the `expected` names and shapes, in `dtype`."""
    tensors = {meta.name: meta for meta in manifest.tensors}
    missing, unknown = sorted(expected.keys() - tensors.keys()), sorted(tensors.keys() - expected.keys())
    if missing or unknown or len(tensors) != len(manifest.tensors):
        raise WeightsRefused(
            f"weights {manifest.version} are not those of the model: "
            f"{len(missing)} missing ({', '.join(missing[:3])}), {len(unknown)} unknown ({', '.join(unknown[:3])})"
        )
    for name, shape in expected.items():
        meta = tensors[name]
        if meta.shape != shape or meta.dtype != dtype:
            raise WeightsRefused(
                f"{name} of weights {manifest.version} is {meta.dtype}{list(meta.shape)}, expected {dtype}{list(shape)}"
            )
    if fingerprint(manifest.version, manifest.tensors) != manifest.fingerprint:
        raise WeightsRefused(f"fingerprint of weights {manifest.version} does not match their manifest")


def check_received(manifest: WeightsManifest, received: Iterable[Sequence[object]]) -> None:
    """Raise WeightsRefused unless `received`, (name, dtype, shape, checksum) each, is exactly the manifest's set."""
    wanted = {meta.name: (meta.dtype, list(meta.shape), meta.checksum) for meta in manifest.tensors}
    found = {str(name): (dtype, list(shape), checksum) for name, dtype, shape, checksum in received}  # type: ignore[call-overload]
    if missing := sorted(wanted.keys() - found.keys()):
        raise WeightsRefused(f"{len(missing)} tensors of weights {manifest.version} did not arrive: {missing[:3]}")
    if wrong := sorted(name for name in found if found[name] != wanted.get(name)):
        raise WeightsRefused(f"{len(wrong)} tensors of weights {manifest.version} arrived damaged: {wrong[:3]}")


def canary_differences(canary: Canary, logprobs: Sequence[Sequence[float]]) -> tuple[float, float]:
    """(max, mean) of |difference| between a worker's log-probs of the canary's tokens and the learner's."""
    pairs = [
        (mine, theirs)
        for row, reference in zip(logprobs, canary.logprobs, strict=True)
        for mine, theirs in zip(row, reference, strict=True)
    ]
    if not pairs:
        raise WeightsRefused("the canary has no tokens: set it from prompts before weights are published")
    differences = [abs(mine - theirs) for mine, theirs in pairs]
    return max(differences), sum(differences) / len(differences)


def check_canary(takeover: Takeover, dtype: str, noise: Takeover | None) -> None:
    """Raise WeightsRefused when the differences are more than engine noise (see CANARY_MAX, CANARY_MEAN).

    `noise` is the first takeover of the run; in bfloat16, three times what it showed is allowed as well.
    """
    largest, mean = CANARY_MAX[dtype], CANARY_MEAN[dtype]
    if noise is not None and dtype != "float32":
        largest = max(largest, NOISE_FACTOR * noise.canary_max)
        mean = max(mean, NOISE_FACTOR * noise.canary_mean)
    # Written so that NaN fails.
    if not (takeover.canary_max <= largest and takeover.canary_mean <= mean):
        raise WeightsRefused(
            f"{takeover.worker} failed the canary of weights {takeover.version}: log-probs differ by "
            f"max {takeover.canary_max:.2e}, mean {takeover.canary_mean:.2e} (allowed {largest:.0e}, {mean:.0e})"
        )


class Gate:
    """What was sampled under a version leaves the worker only after that version passed."""

    def __init__(self) -> None:
        self.attested: PolicyVersion | None = None
        self.refusal: SapoRayError | None = None
        self._changed = asyncio.Event()

    def attest(self, version: PolicyVersion) -> None:
        """`version` and all before it have passed."""
        self.attested = version
        self._wake()

    def refuse(self, reason: SapoRayError) -> None:
        """Nothing passes any more; the first reason stays."""
        self.refusal = self.refusal or reason
        self._wake()

    async def passes(self, version: PolicyVersion) -> None:
        """Return once `version` passed. Raises the reason once the worker was refused."""
        while self.refusal is None:
            if self.attested is not None and version.order <= self.attested.order:
                return
            await self._changed.wait()
        raise self.refusal

    async def refused(self) -> SapoRayError:
        """Return the reason once the worker was refused."""
        while self.refusal is None:
            await self._changed.wait()
        return self.refusal

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()
