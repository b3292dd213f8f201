"""Mismatch corrections by literal numbers."""

from __future__ import annotations

import math

import pytest
import torch

from sapo_ray.algorithms.corrections import Correction, correct
from sapo_ray.algorithms.presets import CORRECTION_CAP, CorrectionKind


def corrected(kind: CorrectionKind, rho: list[list[float]], mask: list[list[int]] | None = None) -> Correction:
    """Correction of tokens whose learner-to-sampler ratio is rho."""
    log_rho = torch.tensor(rho, dtype=torch.float64).log()
    kept = torch.ones_like(log_rho, dtype=torch.bool) if mask is None else torch.tensor(mask, dtype=torch.bool)
    sampler = torch.full_like(log_rho, -1.25)
    return correct(kind, CORRECTION_CAP[kind], old_logp=sampler + log_rho, rollout_logp=sampler, mask=kept)


def test_tis_truncates_at_2() -> None:
    got = corrected("tis", [[0.1, 1.0, 1.9, 2.1, 7.0]])
    assert got.factor.tolist() == [pytest.approx([0.1, 1.0, 1.9, 2.0, 2.0])]
    assert not got.rejected.any()


def test_icepop_rejects_tokens_outside_half_and_5() -> None:
    got = corrected("icepop", [[0.49, 0.51, 1.0, 4.9, 5.1]])
    assert got.factor.tolist() == [pytest.approx([0.0, 0.51, 1.0, 4.9, 0.0])]
    assert got.rejected.tolist() == [[True, False, False, False, True]]
    assert not got.rejected_sequences.any()


def test_sequence_mask_keeps_by_geometric_mean_with_weight_1() -> None:
    # Geometric means: 1.04, sqrt(1.3 / 1.25) = 1.0198, sqrt(1.2) = 1.095, 0.94
    got = corrected("sequence_mask", [[1.04, 1.04], [1.3, 0.8], [1.2, 1.0], [0.94, 0.94]])
    assert got.factor.tolist() == [[1, 1], [1, 1], [0, 0], [0, 0]]
    assert got.rejected_sequences.tolist() == [False, False, True, True]
    assert got.rejected.sum() == 4


def test_sequence_mask_tis_truncates_what_the_mask_keeps() -> None:
    got = corrected("sequence_mask_tis", [[2.5, 0.4], [1.2, 1.0]])
    assert got.factor.tolist() == [pytest.approx([2.0, 0.4]), [0.0, 0.0]]


def test_product_mask_drops_long_sequences_that_the_mean_keeps() -> None:
    rho = [[1.04] * 40, [1.04] * 20 + [1.0] * 20]
    # Products 4.80 and 2.19 against a bound of 3.
    assert corrected("product_mask", rho).rejected_sequences.tolist() == [True, False]
    assert corrected("sequence_mask", rho).rejected_sequences.tolist() == [False, False]


def test_the_mean_is_over_real_tokens_however_wide_the_batch() -> None:
    # 1.08 is too far from 1; spread over four places instead of two it would pass for 1.04.
    got = corrected("sequence_mask", [[1.08, 1.08, 1.0, 1.0]], [[1, 1, 0, 0]])
    assert got.rejected_sequences.tolist() == [True]
    assert got.rejected.tolist() == [[True, True, False, False]]


def test_no_correction_is_1_everywhere() -> None:
    got = corrected("none", [[0.01, 100.0]])
    assert got.factor.tolist() == [[1.0, 1.0]]


@pytest.mark.parametrize("kind", list(CORRECTION_CAP))
def test_padding_counts_for_nothing(kind: CorrectionKind) -> None:
    alone = corrected(kind, [[1.03, 1.02]])
    padded = corrected(kind, [[1.03, 1.02, 1e9, math.nan], [math.inf] * 4], [[1, 1, 0, 0], [0, 0, 0, 0]])
    assert torch.equal(padded.factor[:1, :2], alone.factor)
    assert torch.isfinite(padded.factor).all()
    assert padded.rejected.sum() == 0
    assert not padded.rejected_sequences.any()


def test_factors_carry_no_gradient() -> None:
    old = torch.zeros(1, 2, requires_grad=True)
    got = correct("tis", 2.0, old_logp=old, rollout_logp=torch.ones(1, 2), mask=torch.ones(1, 2, dtype=torch.bool))
    assert not got.factor.requires_grad


def test_an_unknown_correction_is_refused_by_name() -> None:
    zeros = torch.zeros(1, 1)
    with pytest.raises(ValueError, match="got 'mis'"):
        correct("mis", 2.0, old_logp=zeros, rollout_logp=zeros, mask=zeros)  # type: ignore[arg-type]
