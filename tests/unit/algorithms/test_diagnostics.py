"""Diagnostics by literal numbers, and that they merge and stay small."""

from __future__ import annotations

import math
import pickle
from typing import Any

import numpy as np
import pytest
import torch

from sapo_ray.algorithms.diagnostics import Tokens, TokenStats
from sapo_ray.algorithms.histogram import Histogram
from sapo_ray.algorithms.losses import token_loss
from sapo_ray.algorithms.settings import resolve
from sapo_ray.config.spec import AlgorithmSpec


def summary_of(
    log_ratio: list[list[float]],
    advantages: list[float],
    *,
    log_rho: list[list[float]] | None = None,
    settings: dict[str, Any] | None = None,
    **extra: torch.Tensor,
) -> dict[str, float]:
    """Summary of one micro-batch without padding; every token has loss weight 0.5."""
    logp = torch.full((len(log_ratio), len(log_ratio[0])), -1.0, dtype=torch.float64)
    old_logp = logp - torch.tensor(log_ratio, dtype=torch.float64)
    rho = torch.zeros_like(logp) if log_rho is None else torch.tensor(log_rho, dtype=torch.float64)
    result = token_loss(
        resolve(AlgorithmSpec(**({"correction": "none"} | (settings or {}))), max_new_tokens=8, temperature=1.0),
        logp=logp.requires_grad_(),
        old_logp=old_logp,
        rollout_logp=old_logp - rho,
        advantages=torch.tensor(advantages, dtype=torch.float64),
        mask=torch.ones_like(logp, dtype=torch.bool),
        loss_weights=torch.full((len(log_ratio),), 0.5, dtype=torch.float64),
        **extra,
    )
    return result.stats.summary()


LOG2 = math.log(2.0)


def test_gate_weights_are_reported_by_sign_of_the_advantage() -> None:
    # arctan, tau 1: w = 1/(1 + (r-1)^2): r = 1 -> 1, r = 3/2 -> 4/5, r = 3 -> 1/5,
    # r = 1/2 -> 4/5.
    got = summary_of(
        [[0.0, math.log(1.5)], [math.log(3.0), -LOG2]],
        [1.0, -2.0],
        settings={"gate": "arctan", "tau_pos": 1, "tau_neg": 1},
    )
    assert got["gate/weight_mean_pos"] == pytest.approx(0.9)
    assert got["gate/weight_mean_neg"] == pytest.approx(0.5)
    assert got["gate/below_half_pos"] == 0.0
    assert got["gate/below_half_neg"] == 0.5
    assert got["gate/below_half"] == 0.25
    assert got["gate/weight_p01_neg"] == pytest.approx(0.2, abs=1e-3)
    assert got["gate/weight_p99_neg"] == pytest.approx(0.8, abs=1e-3)
    assert got["log_ratio/p99_neg"] == pytest.approx(math.log(3.0), rel=0.01)
    assert got["log_ratio/min_neg"] == pytest.approx(-LOG2)
    assert got["log_ratio/max_pos"] == pytest.approx(math.log(1.5))


def test_clip_metrics_ask_what_hard_clipping_would_have_cut() -> None:
    # A = 1: r = 2 is cut, r = 1/2 is not. A = -2: r = 1/2 is cut, r = 3 is not. |A| r w at tau 1, arctan:
    # 1 x 2 x 1/2 = 1, 1 x 1/2 x 4/5 = 0.4, 2 x 0.4 = 0.8, 2 x 3 x 1/5 = 1.2.
    got = summary_of(
        [[LOG2, -LOG2], [-LOG2, math.log(3.0)]], [1.0, -2.0], settings={"gate": "arctan", "tau_pos": 1, "tau_neg": 1}
    )
    assert got["clip/would_cut_tokens"] == 0.5
    assert got["clip/would_cut_gradient"] == pytest.approx(1.8 / 3.4)


def test_tokens_of_zero_advantage_have_no_sign() -> None:
    got = summary_of([[LOG2, 0.0]], [0.0])
    assert not [name for name in got if name.endswith(("_pos", "_neg"))]
    assert "clip/would_cut_tokens" not in got
    assert got["tokens/with_loss"] == 2


def test_mismatch_is_measured_against_the_sampler() -> None:
    # rho - 1 - log rho: 2 - 1 - 0.6931 = 0.3069 and 0.5 - 1 + 0.6931 = 0.1931.
    got = summary_of([[0.0, 0.0]], [1.0], log_rho=[[LOG2, -LOG2]])
    assert got["mismatch/kl"] == pytest.approx(0.25)
    assert got["mismatch/abs_mean"] == pytest.approx(LOG2)
    assert got["mismatch/abs_max"] == pytest.approx(LOG2)


def test_clamped_capped_and_rejected_tokens_are_counted() -> None:
    ratios = [[25.0, -21.0, 0.0], [25.0, 1.0, 2.0]]
    got = summary_of(ratios, [1.0, -1.0], settings={"restoring": True})
    assert got["gate/clamped_tokens"] == 3
    # Beyond log 3 = 1.0986 with A < 0.
    assert got["restoring/capped_tokens"] == 2
    rejected = summary_of(
        [[0.0, 0.0], [0.0, 0.0]], [1.0, 1.0], log_rho=[[0.0, 2.0], [0.0, 0.0]], settings={"correction": "icepop"}
    )
    assert rejected["correction/rejected_tokens"] == 1
    assert rejected["correction/rejected_sequences"] == 0
    assert rejected["correction/factor_mean"] == 0.75


def test_effective_update_ratio_is_a_mean_over_groups() -> None:
    # arctan weights: group 7 has 1 and 1/2, in two completions, mean 3/4; group 9 has 1/5 and 1/5.
    ratios = [[0.0], [LOG2], [math.log(3.0)], [math.log(3.0)]]
    got = summary_of(
        ratios,
        [1.0, -1.0, 1.0, -1.0],
        settings={"gate": "arctan", "tau_pos": 1, "tau_neg": 1},
        groups=torch.tensor([7, 7, 9, 9]),
    )
    assert got["gate/effective_update_ratio"] == pytest.approx((0.75 + 0.2) / 2)


def test_policy_age_is_counted_per_token() -> None:
    got = summary_of([[0.0, 0.0, 0.0]], [1.0], ages=torch.tensor([[2, 1, 0]]), entropy=torch.tensor([[1.0, 2.0, 6.0]]))
    assert got["age/token_mean"] == 1.0
    assert got["age/token_max"] == 2.0
    assert got["policy/entropy"] == 3.0


def random_tokens(count: int, seed: int = 0) -> Tokens:
    rng = np.random.default_rng(seed)
    return Tokens(
        active=rng.random(count) < 0.9,
        advantage=rng.normal(size=count).round(1),
        weight=rng.random(count),
        log_ratio=rng.normal(size=count) * 0.3,
        mass=rng.random(count),
        clamped=rng.random(count) < 0.01,
        hard_clipped=rng.random(count) < 0.2,
        capped=rng.random(count) < 0.05,
        rejected=rng.random(count) < 0.05,
        correction=rng.random(count) + 0.5,
        log_rho=rng.normal(size=count) * 0.1,
        group=rng.integers(0, 12, count),
        age=rng.integers(0, 4, count),
        entropy=rng.random(count) * 3,
    )


def test_merged_stats_equal_those_of_all_tokens_at_once() -> None:
    tokens = random_tokens(5000)
    whole, merged = TokenStats(), TokenStats()
    whole.add(tokens)
    for part in np.array_split(np.arange(5000), 7):
        rank = TokenStats()
        rank.add(tokens[part])
        merged.merge(pickle.loads(pickle.dumps(rank)))
    expected, got = whole.summary(), merged.summary()
    assert got.keys() == expected.keys()
    assert len(got) > 30
    for name, value in expected.items():
        assert got[name] == pytest.approx(value, rel=1e-12), name
    for name in ("tokens/with_loss", "gate/clamped_tokens", "gate/weight_p01_pos", "log_ratio/p99_neg"):
        assert got[name] == expected[name]


def test_stats_do_not_grow_with_tokens() -> None:
    stats = TokenStats()
    stats.add(random_tokens(1000))
    small = len(pickle.dumps(stats))
    for seed in range(10):
        stats.add(random_tokens(50_000, seed))
    assert len(pickle.dumps(stats)) <= small + 64
    assert small < 100_000


def test_non_finite_tokens_are_counted_and_spoil_nothing() -> None:
    tokens = random_tokens(1000)
    clean, dirty = TokenStats(), TokenStats()
    keep = np.arange(1000) >= 3
    clean.add(tokens[keep])
    tokens.log_ratio[0], tokens.weight[1], tokens.log_rho[2] = math.inf, math.nan, -math.inf
    dirty.add(tokens)
    assert dirty.summary() == clean.summary() | {"tokens/nonfinite": 3.0}


def test_an_empty_summary_claims_nothing() -> None:
    got = TokenStats().summary()
    assert set(got.values()) == {0.0}
    assert not [name for name in got if "mean" in name or "/p" in name]


@pytest.mark.parametrize(
    ("scale", "values"),
    [
        ("unit", np.random.default_rng(0).beta(5, 0.5, 20_000)),
        ("signed", np.random.default_rng(1).normal(size=20_000)),
        ("signed", np.random.default_rng(2).normal(size=20_000) * 1e-3),
    ],
)
def test_histogram_quantiles_are_within_a_bin_of_exact_ones(scale: Any, values: np.ndarray) -> None:
    histogram = Histogram(scale)
    histogram.add(values)
    for q in (0.0, 0.01, 0.5, 0.99, 1.0):
        exact = float(np.quantile(values, q))
        assert histogram.quantile(q) == pytest.approx(exact, rel=0.015, abs=5e-4 if scale == "unit" else 2e-5)


def test_quantiles_never_leave_what_was_seen() -> None:
    histogram = Histogram("unit")
    histogram.add(np.ones(5))
    assert [histogram.quantile(q) for q in (0.0, 0.01, 0.5, 1.0)] == [1.0] * 4
    outside = Histogram("signed")
    outside.add(np.array([-300.0, 0.0, 300.0]))
    assert outside.quantile(1.0) <= 300
    assert (outside.low, outside.high) == (-300.0, 300.0)
