"""From the job's algorithm section to the numbers that losses use, and advice on settings that work against it."""

from __future__ import annotations

from dataclasses import dataclass

from sapo_ray.algorithms.advantages import AdvantageKind, Aggregation
from sapo_ray.algorithms.presets import (
    CORRECTION_CAP,
    HALF_WIDTH,
    SMOOTH_GATES,
    TAU_PRESETS,
    CorrectionKind,
    LossKind,
    matched_tau,
)
from sapo_ray.config.spec import AlgorithmSpec, Gate, JobSpec

CISPO_EPS_HIGH = 4.0
COUNTERFACTUAL_EPS = 0.2
NOISY_TAU = 5.0
"""Sigmoid temperature from which engine noise in r alone visibly lowers the gate's weight."""
FAR_UPDATES = 8
"""Updates between the policy that r compares with and the one being trained, from which r is far from 1."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Objective:
    """The algorithm with every default filled in."""

    loss: LossKind
    gate: Gate
    """`clip` for grpo, dr_grpo, gspo; unused by cispo."""
    tau_pos: float
    """Where A > 0; after width matching."""
    tau_neg: float
    """Where A <= 0; after width matching."""
    restoring: bool
    restoring_cap: float
    eps_low: float
    """1 means no lower bound, as r >= 0."""
    eps_high: float
    dual_clip: float | None
    clip_low: float
    """Clip distances of the metrics that ask what hard clipping of the token ratio would have cut."""
    clip_high: float
    aggregation: Aggregation
    advantage: AdvantageKind
    bypass: bool
    """r is taken against the sampler's log-probs."""
    correction: CorrectionKind
    """`none` with bypass."""
    correction_cap: float
    mask_truncated: bool
    overlong_buffer: int
    max_new_tokens: int
    temperature: float
    """Log-probs are log_softmax(logits / temperature)."""


def taus(spec: AlgorithmSpec) -> tuple[float, float]:
    """(tau_pos, tau_neg): the preset's unless given, matched to the sigmoid's half-width on request."""
    preset = TAU_PRESETS.get(spec.tau_preset or "", (0.0, 0.0))
    pos = preset[0] if spec.tau_pos is None else spec.tau_pos
    neg = preset[1] if spec.tau_neg is None else spec.tau_neg
    assert min(pos, neg) > 0, "AlgorithmSpec asks for a preset or both temperatures"
    return (matched_tau(spec.gate, pos), matched_tau(spec.gate, neg)) if spec.match_width else (pos, neg)


def resolve(spec: AlgorithmSpec, max_new_tokens: int, temperature: float) -> Objective:
    """Fill in the defaults that depend on the loss and the correction."""
    pos, neg = taus(spec)
    low, high = {"gspo": (3e-4, 4e-4), "cispo": (1.0, CISPO_EPS_HIGH)}.get(spec.loss, (0.2, 0.2))
    low = low if spec.eps_low is None else spec.eps_low
    high = high if spec.eps_high is None else spec.eps_high
    token_clip = spec.loss not in ("gspo", "cispo")
    aggregations: dict[str, Aggregation] = {"cispo": "token_mean", "dr_grpo": "constant"}
    bypass = spec.old_logprobs == "bypass"
    correction: CorrectionKind = "none" if bypass else spec.correction
    return Objective(
        loss=spec.loss,
        gate=spec.gate if spec.loss == "sapo" else "clip",
        tau_pos=pos,
        tau_neg=neg,
        restoring=spec.restoring,
        restoring_cap=spec.restoring_cap,
        eps_low=low,
        eps_high=high,
        dual_clip=spec.dual_clip,
        clip_low=low if token_clip else COUNTERFACTUAL_EPS,
        clip_high=high if token_clip else COUNTERFACTUAL_EPS,
        aggregation=spec.aggregation or aggregations.get(spec.loss, "sequence_mean"),
        advantage=spec.advantage or ("group_mean" if spec.loss == "dr_grpo" else "group_std"),
        bypass=bypass,
        correction=correction,
        correction_cap=spec.correction_cap or CORRECTION_CAP[correction],
        mask_truncated=spec.mask_truncated,
        overlong_buffer=spec.overlong_buffer,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
    )


def advice(spec: JobSpec) -> list[str]:
    """Warnings on settings that are allowed but defeat their purpose; empty when there is nothing to say."""
    return [*_gate_advice(spec.algorithm), *_ratio_advice(spec), *_unused(spec.algorithm), *_deadline_advice(spec)]


def _is_soft(algorithm: AlgorithmSpec) -> bool:
    return algorithm.loss == "sapo" and algorithm.gate in SMOOTH_GATES


def _gate_advice(algorithm: AlgorithmSpec) -> list[str]:
    if not _is_soft(algorithm):
        return []
    said: list[str] = []
    pos, neg = taus(algorithm)
    if neg < pos:
        said.append(
            f"algorithm.tau_neg ({neg:g}) is below tau_pos ({pos:g}): the SAPO paper saw such training become unstable;"
            " use tau_neg >= tau_pos"
        )
    as_sigmoid = max(pos, neg) * HALF_WIDTH["sigmoid"] / HALF_WIDTH[algorithm.gate]
    if algorithm.old_logprobs == "bypass" and as_sigmoid >= NOISY_TAU:
        said.append(
            f"algorithm.old_logprobs: bypass with a narrow gate (as wide as a sigmoid at tau {as_sigmoid:.3g}): the"
            " numerical noise between sampler and learner alone lowers gate weights; use decoupled, or a smaller tau"
        )
    return said


def _ratio_advice(spec: JobSpec) -> list[str]:
    """Whether r can leave 1 at all, and whether it leaves so far that a plain soft gate is known to fail."""
    algorithm, updates = spec.algorithm, spec.updates_per_step
    bypass = algorithm.old_logprobs == "bypass"
    stale_updates = spec.rollout.max_staleness * updates if bypass else 0
    if updates == 1 and not stale_updates:
        extent = "r stays 1 up to numerical noise" if bypass else "r is 1 everywhere, however old the rollouts are"
        return [
            f"one update per step (learner.mini_batches x learner.epochs = 1) with old_logprobs:"
            f" {algorithm.old_logprobs}: {extent}, so every loss and gate is plain policy gradient;"
            " raise learner.mini_batches or learner.epochs for the gate to matter"
        ]
    if _is_soft(algorithm) and not algorithm.restoring and (stale_updates or updates > FAR_UPDATES):
        return [
            f"up to {stale_updates + updates - 1} updates lie between the policy that r compares with and the one in"
            " training: plain soft gates switch off the pull back to r = 1 there and have been seen to collapse;"
            " consider algorithm.restoring: true, gate: clip, fewer updates per step, or old_logprobs: decoupled"
        ]
    return []


def _deadline_advice(spec: JobSpec) -> list[str]:
    batch, group = spec.deadlines.batch_s, spec.rollout.group_deadline_s
    if batch > 2 * group:
        return []
    return [
        f"deadlines.batch_s ({batch:g} s) is not above twice rollout.group_deadline_s ({group:g} s): one slow prompt"
        " ends the run before it is repeated and quarantined; raise the former or lower the latter"
    ]


def _unused(algorithm: AlgorithmSpec) -> list[str]:
    """Settings away from their defaults that the chosen loss or mode never reads."""
    unused: list[str] = []
    if algorithm.loss != "sapo":
        where = f"loss: {algorithm.loss}"
        default = AlgorithmSpec()
        names = ("gate", "tau_preset", "tau_pos", "tau_neg", "match_width")
        unused += [
            f"algorithm.{name} is not read with {where}; remove it"
            for name in names
            if getattr(algorithm, name) != getattr(default, name)
        ]
    if algorithm.correction_cap is not None and (algorithm.correction == "none" or algorithm.old_logprobs == "bypass"):
        unused.append(
            f"algorithm.correction_cap is not read with correction: {algorithm.correction},"
            f" old_logprobs: {algorithm.old_logprobs}; remove it"
        )
    return unused
