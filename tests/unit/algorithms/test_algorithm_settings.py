"""Defaults by loss, width matching, and the advice that sapo.md asks for."""

from __future__ import annotations

import re
import subprocess
import sys
from typing import Any

import pytest

from sapo_ray.algorithms.settings import Objective, advice, resolve
from sapo_ray.config.spec import AlgorithmSpec, JobSpec


def resolved(**settings: Any) -> Objective:
    return resolve(AlgorithmSpec(**settings), max_new_tokens=128, temperature=0.7)


def job(
    algorithm: dict[str, Any] | None = None, *, mini_batches: int = 4, epochs: int = 1, max_staleness: int = 0
) -> JobSpec:
    return JobSpec.model_validate(
        {
            "steps": 1,
            "model": {"path": "builtin:addition"},
            "data": {"train": [{"path": "builtin:addition"}]},
            "algorithm": algorithm or {},
            "learner": {"mini_batches": mini_batches, "epochs": epochs},
            "rollout": {"max_staleness": max_staleness},
        }
    )


def test_the_default_is_the_papers_sapo() -> None:
    got = resolved()
    assert (got.loss, got.gate, got.tau_pos, got.tau_neg, got.restoring) == ("sapo", "sigmoid", 1.0, 1.05, False)
    assert (got.aggregation, got.advantage) == ("sequence_mean", "group_std")
    assert (got.bypass, got.correction, got.correction_cap) == (False, "tis", 2.0)
    assert (got.clip_low, got.clip_high, got.max_new_tokens, got.temperature) == (0.2, 0.2, 128, 0.7)


@pytest.mark.parametrize(
    ("loss", "gate", "eps", "aggregation", "advantage"),
    [
        ("grpo", "clip", (0.2, 0.2), "sequence_mean", "group_std"),
        ("dr_grpo", "clip", (0.2, 0.2), "constant", "group_mean"),
        ("gspo", "clip", (3e-4, 4e-4), "sequence_mean", "group_std"),
        ("cispo", "clip", (1.0, 4.0), "token_mean", "group_std"),
    ],
)
def test_baselines_come_with_their_own_defaults(
    loss: str, gate: str, eps: tuple[float, float], aggregation: str, advantage: str
) -> None:
    got = resolved(loss=loss)
    assert (got.gate, (got.eps_low, got.eps_high)) == (gate, eps)
    assert (got.aggregation, got.advantage) == (aggregation, advantage)
    assert (got.clip_low, got.clip_high) == (0.2, 0.2)


def test_what_is_written_goes_over_defaults() -> None:
    got = resolved(
        loss="grpo", eps_low=0.1, eps_high=0.28, aggregation="token_mean", advantage="rloo", correction_cap=4
    )
    assert (got.eps_low, got.eps_high, got.clip_low, got.clip_high) == (0.1, 0.28, 0.1, 0.28)
    assert (got.aggregation, got.advantage, got.correction_cap) == ("token_mean", "rloo", 4.0)
    assert resolved(tau_preset="study", tau_neg=15).tau_pos == 10
    assert resolved(tau_preset="study", tau_neg=15).tau_neg == 15


@pytest.mark.parametrize(
    ("correction", "cap"),
    [("tis", 2.0), ("icepop", 5.0), ("sequence_mask", 1.05), ("sequence_mask_tis", 1.05), ("product_mask", 3.0)],
)
def test_each_correction_has_its_bound(correction: str, cap: float) -> None:
    assert resolved(correction=correction).correction_cap == cap


def test_bypass_corrects_nothing() -> None:
    got = resolved(old_logprobs="bypass")
    assert got.bypass
    assert got.correction == "none"


def test_width_matching_scales_tau_by_half_widths() -> None:
    got = resolved(gate="softsign", tau_preset="study", match_width=True)
    assert (got.tau_pos, got.tau_neg) == (pytest.approx(4.348, abs=1e-3), pytest.approx(5.217, abs=1e-3))
    plain = resolved(gate="softsign", tau_preset="study")
    assert (plain.tau_pos, plain.tau_neg) == (10, 12)


def test_a_sound_job_needs_no_advice() -> None:
    assert advice(job()) == []
    assert advice(job({"restoring": True}, mini_batches=16, max_staleness=2)) == []


@pytest.mark.parametrize(
    ("algorithm", "shape", "said"),
    [
        ({"tau_pos": 2.0}, {}, r"tau_neg \(1.05\) is below tau_pos \(2\)"),
        ({"old_logprobs": "bypass", "tau_preset": "study"}, {}, "numerical noise"),
        ({"old_logprobs": "bypass", "gate": "softsign", "tau_preset": None, "tau_pos": 3, "tau_neg": 3}, {}, "noise"),
        ({}, {"mini_batches": 1}, "r is 1 everywhere"),
        ({}, {"mini_batches": 1, "max_staleness": 4}, "r is 1 everywhere, however old"),
        ({"loss": "grpo"}, {"mini_batches": 1}, "plain policy gradient"),
        ({"old_logprobs": "bypass"}, {"mini_batches": 1}, "r stays 1 up to numerical noise"),
        ({"old_logprobs": "bypass"}, {"max_staleness": 2}, "up to 11 updates .* algorithm.restoring: true"),
        ({}, {"mini_batches": 8, "epochs": 2}, "up to 15 updates .* algorithm.restoring: true"),
        ({"loss": "grpo", "gate": "erf"}, {}, "algorithm.gate is not read with loss: grpo"),
        ({"loss": "gspo", "tau_pos": 3}, {}, "algorithm.tau_pos is not read"),
        ({"correction": "none", "correction_cap": 3}, {}, "algorithm.correction_cap is not read"),
    ],
)
def test_settings_that_work_against_their_purpose_are_named(
    algorithm: dict[str, Any], shape: dict[str, int], said: str
) -> None:
    got = advice(job(algorithm, **shape))
    assert len(got) == 1, got
    assert re.search(said, got[0])


def test_decoupled_staleness_alone_needs_no_restoring() -> None:
    assert advice(job(max_staleness=4)) == []
    assert advice(job({"gate": "clip", "old_logprobs": "bypass"}, max_staleness=4)) == []


def test_advice_needs_no_torch() -> None:
    code = "import sys, sapo_ray.algorithms.settings; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(("batch_s", "said"), [(1200.0, 1), (1201.0, 0)])
def test_a_batch_that_ends_before_a_slow_prompt_can_be_given_up_is_advised_against(batch_s: float, said: int) -> None:
    spec = job()
    spec = spec.model_copy(update={"deadlines": spec.deadlines.model_copy(update={"batch_s": batch_s})})
    got = advice(spec)
    assert len(got) == said
    assert all(f"deadlines.batch_s ({batch_s:g} s)" in one and "rollout.group_deadline_s (600 s)" in one for one in got)
