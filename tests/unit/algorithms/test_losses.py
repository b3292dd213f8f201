"""Losses against the papers' own forms under float64 autograd, against literals, and at the extremes."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from sapo_ray.algorithms.losses import TokenLoss, token_loss
from sapo_ray.algorithms.settings import Objective, resolve
from sapo_ray.config.spec import AlgorithmSpec

GATES = ["sigmoid", "erf", "arctan", "softsign", "clip"]
VARIANTS: list[dict[str, Any]] = [
    *({"loss": "sapo", "gate": gate} for gate in GATES),
    *({"loss": "sapo", "gate": gate, "tau_preset": "study"} for gate in GATES),
    *({"loss": "sapo", "gate": gate, "restoring": True} for gate in GATES[:-1]),
    *({"loss": loss} for loss in ("grpo", "dr_grpo", "gspo", "cispo")),
    {"loss": "grpo", "dual_clip": 3.0},
]


def objective(**settings: Any) -> Objective:
    return resolve(AlgorithmSpec(**({"correction": "none"} | settings)), max_new_tokens=16, temperature=1.0)


class Batch:
    """Random completions of uneven length, float64. Padding holds NaN, so that any look at it shows."""

    def __init__(self, *, rows: int = 4, width: int = 6, spread: float = 0.4, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        self.lengths = torch.tensor([width - row % 3 for row in range(rows)])
        self.mask = torch.arange(width) < self.lengths.unsqueeze(1)
        logp = -1.5 + normal(rows, width)
        self.logp = torch.where(self.mask, logp, math.nan).requires_grad_()
        self.old_logp = torch.where(self.mask, logp - spread * normal(rows, width), math.nan)
        self.rollout_logp = torch.where(self.mask, self.old_logp - 0.1 * normal(rows, width), math.nan)
        self.advantages = normal(rows)
        self.loss_weights = 1 / (self.lengths * rows).double()

    def loss(self, aim: Objective, **changed: Any) -> TokenLoss:
        arguments = {
            "logp": self.logp,
            "old_logp": self.old_logp,
            "rollout_logp": self.rollout_logp,
            "advantages": self.advantages,
            "mask": self.mask,
            "loss_weights": self.loss_weights,
        }
        return token_loss(aim, **(arguments | changed))

    def gradient(self, aim: Objective, **changed: Any) -> Tensor:
        (gradient,) = torch.autograd.grad(self.loss(aim, **changed).loss, self.logp)
        return gradient

    def ratio(self) -> Tensor:
        return torch.exp(torch.where(self.mask, self.logp, 0.0) - torch.where(self.mask, self.old_logp, 0.0))

    def weighted(self) -> Tensor:
        """A x loss weight, [B, T], 0 on padding."""
        return torch.where(self.mask, (self.advantages * self.loss_weights).unsqueeze(1), 0.0)


@pytest.mark.parametrize("settings", VARIANTS, ids=str)
def test_at_r_1_the_gradient_is_minus_advantage_times_weight(settings: dict[str, Any]) -> None:
    batch = Batch()
    gradient = batch.gradient(objective(**settings), old_logp=batch.logp.detach())
    torch.testing.assert_close(gradient, -batch.weighted(), rtol=1e-14, atol=0)


@pytest.mark.parametrize("tau_pair", [(1.0, 1.05), (10.0, 12.0), (2.0, 0.5)])
def test_sapo_equals_the_papers_sigmoid_up_to_its_constant(tau_pair: tuple[float, float]) -> None:
    batch = Batch()
    aim = objective(tau_pos=tau_pair[0], tau_neg=tau_pair[1])
    pos, neg = torch.tensor(tau_pair, dtype=torch.float64)
    tau = torch.where(batch.advantages > 0, pos, neg).unsqueeze(1)
    paper = -(batch.weighted() * 4 / tau * torch.sigmoid(tau * (batch.ratio() - 1))).sum()
    (expected,) = torch.autograd.grad(paper, batch.logp)
    constant = -(batch.weighted() * (2 / tau - 1)).sum()
    torch.testing.assert_close(batch.gradient(aim), expected, rtol=1e-12, atol=1e-15)
    assert batch.loss(aim).loss.item() == pytest.approx((paper - constant).item(), rel=1e-12)


def clipped(ratio: Tensor, weighted: Tensor, low: float, high: float) -> Tensor:
    return torch.minimum(ratio * weighted, ratio.clamp(1 - low, 1 + high) * weighted)


def test_grpo_equals_the_clipped_surrogate() -> None:
    batch = Batch()
    expected = -clipped(batch.ratio(), batch.weighted(), 0.2, 0.28).sum()
    (gradient,) = torch.autograd.grad(expected, batch.logp)
    aim = objective(loss="grpo", eps_high=0.28)
    assert batch.loss(aim).loss.item() == pytest.approx(expected.item(), rel=1e-12)
    torch.testing.assert_close(batch.gradient(aim), gradient, rtol=1e-12, atol=1e-15)
    assert (gradient[batch.mask] == 0).any(), "nothing was clipped: the test sees too little"


def test_dual_clip_bounds_the_loss_of_a_bad_token_at_three_times_its_advantage() -> None:
    logp = torch.tensor([[math.log(5.0), math.log(2.0)]], dtype=torch.float64, requires_grad=True)
    zeros = torch.zeros(1, 2, dtype=torch.float64)
    result = token_loss(
        objective(loss="grpo", dual_clip=3.0),
        logp=logp,
        old_logp=zeros,
        rollout_logp=zeros,
        advantages=torch.tensor([-1.5]).double(),
        mask=torch.ones(1, 2, dtype=torch.bool),
        loss_weights=torch.tensor([0.5]).double(),
    )
    assert result.loss.item() == pytest.approx(1.5 * 0.5 * (3 + 2))
    result.loss.backward()
    assert logp.grad is not None
    assert logp.grad.tolist() == [[0.0, pytest.approx(1.5 * 0.5 * 2)]]


def test_gspo_equals_the_clipped_ratio_of_sequences() -> None:
    batch = Batch(spread=0.002)
    sequence_ratio = torch.exp(batch.ratio().log().sum(1) / batch.lengths)
    expected = -clipped(sequence_ratio, batch.advantages / 4, 3e-4, 4e-4).sum()
    (gradient,) = torch.autograd.grad(expected, batch.logp)
    aim = objective(loss="gspo")
    assert batch.loss(aim).loss.item() == pytest.approx(expected.item(), rel=1e-12)
    torch.testing.assert_close(batch.gradient(aim), gradient, rtol=1e-12, atol=1e-15)
    cut = (gradient.abs().sum(1) == 0).sum().item()
    assert 0 < cut < 4, "all or none clipped: the test sees too little"


def test_cispo_weighs_log_probs_by_the_cut_ratio_and_loses_no_token() -> None:
    batch = Batch(spread=2.0)
    weight = batch.ratio().detach().clamp(max=5.0)
    logp = torch.where(batch.mask, batch.logp, 0.0)
    (expected,) = torch.autograd.grad(-(weight * batch.weighted() * logp).sum(), batch.logp)
    gradient = batch.gradient(objective(loss="cispo"))
    torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-15)
    assert (weight == 5.0).any()
    assert (gradient[batch.mask] != 0).all()


@pytest.mark.parametrize("correction", ["tis", "icepop", "sequence_mask", "sequence_mask_tis", "product_mask", "none"])
@pytest.mark.parametrize("settings", VARIANTS, ids=str)
def test_log_ratios_of_500_give_finite_loss_and_gradient(settings: dict[str, Any], correction: str) -> None:
    logp = torch.tensor([[-500.0, 0.0, -1.0], [-1.0, -500.0, 0.0]], requires_grad=True)
    result = token_loss(
        objective(**settings, correction=correction),
        logp=logp,
        old_logp=torch.tensor([[0.0, -500.0, -1.0], [-500.0, -1.0, -500.0]]),
        rollout_logp=torch.tensor([[-500.0, 0.0, -1.0], [-500.0, 0.0, -1.0]]),
        advantages=torch.tensor([1.0, -1.0]),
        mask=torch.ones(2, 3, dtype=torch.bool),
        loss_weights=torch.tensor([1 / 6, 1 / 6]),
    )
    result.loss.backward()
    assert math.isfinite(result.loss.item())
    assert logp.grad is not None
    assert torch.isfinite(logp.grad).all()
    assert all(math.isfinite(value) for value in result.stats.summary().values())


def test_an_unclamped_exponential_would_have_given_nan_there() -> None:
    """Why the gate is computed as it is: the textbook form, same input."""
    logp = torch.tensor([0.0], requires_grad=True)
    ratio = torch.exp(logp + 500.0)
    (4 * torch.sigmoid(ratio - 1)).sum().backward()
    assert logp.grad is not None
    assert logp.grad.isnan().all()


@pytest.mark.parametrize("settings", VARIANTS, ids=str)
@pytest.mark.parametrize("junk", [math.nan, math.inf, -math.inf, 1e30])
def test_padding_is_never_looked_at(settings: dict[str, Any], junk: float) -> None:
    batch = Batch()
    aim = objective(**settings, correction="tis")
    clean, expected = batch.loss(aim).loss.item(), batch.gradient(aim)
    dirty = torch.full_like(batch.old_logp, junk)
    changed = {
        "old_logp": torch.where(batch.mask, batch.old_logp, -dirty),
        "rollout_logp": torch.where(batch.mask, batch.rollout_logp, dirty),
        "advantages": torch.where(batch.mask, batch.advantages.unsqueeze(1), dirty),
        "loss_weights": torch.where(batch.mask, batch.loss_weights.unsqueeze(1), dirty),
    }
    result, gradient = batch.loss(aim, **changed), batch.gradient(aim, **changed)
    assert result.loss.item() == clean
    assert torch.equal(gradient, expected)
    assert (gradient[~batch.mask] == 0).all()
    assert result.stats.summary()["tokens/all"] == batch.mask.sum()


def test_a_micro_batch_of_padding_alone_has_loss_0_and_can_go_backward() -> None:
    batch = Batch()
    nothing = torch.zeros_like(batch.mask)
    result = batch.loss(objective(), mask=nothing)
    assert result.loss.item() == 0
    assert torch.equal(batch.gradient(objective(), mask=nothing), torch.zeros_like(batch.logp))
    assert result.stats.summary()["tokens/all"] == 0


@pytest.mark.parametrize("settings", VARIANTS, ids=str)
def test_the_loss_is_the_sum_over_any_split_into_micro_batches(settings: dict[str, Any]) -> None:
    batch = Batch(rows=5)
    aim = objective(**settings, correction="sequence_mask_tis")
    whole = batch.loss(aim).loss.item()
    parts = 0.0
    for rows in (slice(0, 1), slice(1, 4), slice(4, 5)):
        names = ("logp", "old_logp", "rollout_logp", "advantages", "mask", "loss_weights")
        parts += batch.loss(aim, **{name: getattr(batch, name)[rows] for name in names}).loss.item()
    assert parts == pytest.approx(whole, rel=1e-12)


def test_the_correction_multiplies_the_gradient_and_has_none_itself() -> None:
    batch = Batch()
    old_logp = batch.old_logp.clone().requires_grad_()
    result = batch.loss(objective(correction="tis"), old_logp=old_logp)
    gradients = torch.autograd.grad(result.loss, (batch.logp, old_logp), allow_unused=True)
    assert gradients[1] is None
    rho = torch.where(batch.mask, torch.exp(batch.old_logp - batch.rollout_logp), 0.0)
    assert rho.max() < 2
    torch.testing.assert_close(gradients[0], rho * batch.gradient(objective()), rtol=1e-12, atol=1e-15)


def test_a_rejected_completion_stays_in_the_denominator() -> None:
    logp = torch.zeros(2, 2, dtype=torch.float64, requires_grad=True)
    result = token_loss(
        objective(correction="sequence_mask"),
        logp=logp,
        old_logp=torch.zeros(2, 2).double(),
        rollout_logp=torch.tensor([[0.0, 0.01], [0.2, 0.0]]).double(),
        advantages=torch.tensor([1.0, 1.0]).double(),
        mask=torch.ones(2, 2, dtype=torch.bool),
        loss_weights=torch.tensor([0.25, 0.25]).double(),
    )
    result.loss.backward()
    assert logp.grad is not None
    assert logp.grad.tolist() == [[-0.25, -0.25], [0.0, 0.0]]
    assert result.loss.item() == -0.5
    assert result.stats.summary()["correction/rejected_sequences"] == 1
    assert result.stats.summary()["correction/rejected_tokens"] == 2


def test_bypass_takes_the_ratio_against_the_sampler_and_needs_no_old_logp() -> None:
    batch = Batch()
    bypass = objective(old_logprobs="bypass")
    expected = batch.gradient(objective(), old_logp=batch.rollout_logp)
    assert torch.equal(batch.gradient(bypass, old_logp=None), expected)
    assert not torch.equal(batch.gradient(objective()), expected)


def test_positive_advantages_take_tau_pos_and_negative_ones_tau_neg() -> None:
    logp = torch.full((2, 1), 0.5, dtype=torch.float64, requires_grad=True)
    zeros = torch.zeros(2, 1, dtype=torch.float64)
    loss = token_loss(
        objective(tau_pos=1.0, tau_neg=2.0),
        logp=logp,
        old_logp=zeros,
        rollout_logp=zeros,
        advantages=torch.tensor([1.0, -1.0]).double(),
        mask=torch.ones(2, 1, dtype=torch.bool),
        loss_weights=torch.tensor([1.0, 1.0]).double(),
    ).loss
    loss.backward()
    assert logp.grad is not None
    r = math.exp(0.5)
    # sech^2(u/2) with u = 0.6487 and 1.2974
    expected = [-1.48673861055975, r / math.cosh(r - 1) ** 2]
    assert logp.grad.squeeze(1).tolist() == pytest.approx(expected, rel=1e-12)


def test_a_weight_of_0_takes_a_completion_out_of_loss_and_gate_statistics() -> None:
    batch = Batch()
    weights = batch.loss_weights.clone()
    weights[1] = 0
    result = batch.loss(objective(), loss_weights=weights)
    assert (batch.gradient(objective(), loss_weights=weights)[1] == 0).all()
    summary = result.stats.summary()
    assert summary["tokens/all"] - summary["tokens/with_loss"] == batch.lengths[1]


def test_decoupled_mode_without_old_logp_is_a_programming_error() -> None:
    with pytest.raises(AssertionError, match="old_logp"):
        Batch().loss(objective(), old_logp=None)
