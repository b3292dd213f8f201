"""Gates against 50-digit references, their own literals, and the properties that make a gate admissible."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sapo_ray.algorithms.gates import HALF_WIDTH, SMOOTH_GATES, TAU_PRESETS, GateValue, evaluate, matched_tau

# gate, tau, log r, f(r), f'(r), r f'(r): 40-digit arithmetic, f' by numerical differentiation of f.
LITERALS = [
    ("sigmoid", 1, 0.5, 1.626888984484337, 0.9017525502830491, 1.48673861055975),
    ("sigmoid", 1.05, -1.5, 0.2635213616687677, 0.8505007837120389, 0.1897723760760323),
    ("sigmoid", 1, 3, 2.9999999794261, 2.057389963786246e-8, 4.132378208302438e-7),
    ("sigmoid", 10, 0.05, 1.050176708927567, 0.9370574470299552, 0.9851014097064991),
    ("sigmoid", 12, -0.2, 0.8673323041730711, 0.3663741694230454, 0.2999617996400501),
    ("erf", 1, 0.5, 1.605954132416223, 0.8102441608985773, 1.335866782534061),
    ("erf", 1.05, -1.5, 0.3013240540099294, 0.7169894734477782, 0.1599819760351411),
    ("erf", 10, 0.05, 1.04911067339364, 0.8768351574110945, 0.9217914572726049),
    ("erf", 12, -0.2, 0.8986500016541372, 0.09387277495992684, 0.07685652773646082),
    ("arctan", 1, 0.5, 1.575475764310166, 0.7038093675394153, 1.160385474780238),
    ("arctan", 1.05, -1.5, 0.3483342160073773, 0.6004605869866996, 0.1339808669371625),
    ("arctan", 1, 3, 2.518448498939062, 0.002737792923221975, 0.05499004084741688),
    ("arctan", 10, 0.05, 1.047376459441656, 0.7918455539857855, 0.8324443436991168),
    ("arctan", 12, -0.2, 0.9050093634036799, 0.1744704464342442, 0.1428443199989604),
    ("softsign", 1, 0.5, 1.544233986866481, 0.5904492351184386, 0.9734862132083909),
    ("softsign", 1.05, -1.5, 0.3980082846011174, 0.4652932579524604, 0.1038209591629172),
    ("softsign", 1, 3, 1.998630165314857, 0.0001432520662383527, 0.002877294665753358),
    ("softsign", 10, 0.05, 1.045623946126373, 0.704629341851743, 0.7407564607471981),
    ("softsign", 12, -0.2, 0.9242844525742274, 0.07287571160413499, 0.05966558624274726),
]

gates = st.sampled_from(SMOOTH_GATES)
taus = st.floats(0.1, 50)


def one(gate: str, log_ratio: float, tau: float, dtype: torch.dtype = torch.float64, **options: object) -> GateValue:
    return evaluate(gate, torch.tensor(log_ratio, dtype=dtype), tau, **options)  # type: ignore[arg-type]


def assert_within_float32(got: GateValue, value: float, weight: float, coefficient: float) -> None:
    assert abs(got.value.item() - value) <= 5e-6 * abs(value)
    assert abs(got.weight.item() - weight) <= 5e-7 + 3e-6 * weight
    assert abs(got.coefficient.item() - coefficient) <= 5e-7 + 3e-6 * coefficient


@pytest.mark.parametrize(("gate", "tau", "log_ratio", "value", "weight", "coefficient"), LITERALS)
def test_gates_have_their_literal_values(
    gate: str, tau: float, log_ratio: float, value: float, weight: float, coefficient: float
) -> None:
    exact = one(gate, log_ratio, tau)
    assert exact.value.item() == pytest.approx(value, rel=1e-12)
    assert exact.weight.item() == pytest.approx(weight, rel=1e-12)
    assert exact.coefficient.item() == pytest.approx(coefficient, rel=1e-12)
    assert_within_float32(one(gate, log_ratio, tau, torch.float32), value, weight, coefficient)


def test_gates_agree_with_the_reference_vectors(shared: Path) -> None:
    rows = json.loads((shared / "vectors" / "gates.json").read_text())
    assert len(rows) == 400
    for row in rows:
        expected = (row["value"], row["weight"], row["coefficient"])
        exact = one(row["gate"], row["log_ratio"], row["tau"])
        for got, want in zip(exact, expected, strict=True):
            assert abs(got.item() - want) <= 1e-12 * abs(want), row
        assert_within_float32(one(row["gate"], row["log_ratio"], row["tau"], torch.float32), *expected)


PAPER_FORMS = {
    "sigmoid": lambda r, tau: 4 / tau * torch.sigmoid(tau * (r - 1)) - 2 / tau + 1,
    "erf": lambda r, tau: 1 + math.sqrt(math.pi / 2) / tau * torch.special.erf(tau * (r - 1) / math.sqrt(2)),
    "arctan": lambda r, tau: 1 + torch.arctan(tau * (r - 1)) / tau,
    "softsign": lambda r, tau: 1 + (r - 1) / torch.sqrt(1 + (tau * (r - 1)) ** 2),
}


@given(gates, taus, st.floats(-6, 3))
def test_the_coefficient_is_the_derivative_of_the_value_in_log_r(gate: str, tau: float, log_ratio: float) -> None:
    lr = torch.tensor(log_ratio, dtype=torch.float64, requires_grad=True)
    f = PAPER_FORMS[gate](torch.exp(lr), tau)
    (derivative,) = torch.autograd.grad(f, lr)
    got = evaluate(gate, lr, tau)
    assert got.value.item() == pytest.approx(f.item(), rel=1e-9, abs=1e-12)
    assert got.coefficient.item() == pytest.approx(derivative.item(), rel=1e-9, abs=1e-12)
    assert not got.value.requires_grad
    assert not got.coefficient.requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("restoring", [False, True])
@pytest.mark.parametrize("positive", [False, True])
@pytest.mark.parametrize("tau", [0.5, 1.0, 12.0, 1000.0])
@pytest.mark.parametrize("gate", [*SMOOTH_GATES, "clip"])
def test_log_ratios_of_500_give_the_finite_values_at_20(
    gate: str, tau: float, positive: bool, restoring: bool, dtype: torch.dtype
) -> None:
    restoring = restoring and gate != "clip"
    far = evaluate(
        gate,
        torch.tensor([500.0, -500.0, math.inf, -math.inf], dtype=dtype),
        tau,
        positive=positive,
        restoring=restoring,
    )
    near = evaluate(gate, torch.tensor([20.0, -20.0] * 2, dtype=dtype), tau, positive=positive, restoring=restoring)
    for got, want in zip(far, near, strict=True):
        assert torch.isfinite(got).all()
        assert torch.equal(got, want)


@given(gates, taus)
def test_every_gate_is_1_with_slope_1_at_r_1(gate: str, tau: float) -> None:
    for restoring in (False, True):
        assert [part.item() for part in one(gate, 0.0, tau, restoring=restoring)] == [1.0, 1.0, 1.0]


@given(gates, taus, st.floats(-8, 8), st.floats(1e-3, 2))
def test_weights_fall_on_both_sides_of_r_1(gate: str, tau: float, log_ratio: float, further: float) -> None:
    here = one(gate, log_ratio, tau).weight.item()
    beyond = one(gate, log_ratio + math.copysign(further, log_ratio), tau).weight.item()
    assert 0 <= beyond <= here <= 1


@given(gates, taus)
def test_the_coefficient_vanishes_as_r_grows(gate: str, tau: float) -> None:
    assert one(gate, 20.0, tau).coefficient.item() < 1e-6


@pytest.mark.parametrize(
    ("gate", "half_width", "largest"),
    [("sigmoid", 1.763, 1.575), ("erf", 1.177, 1.337), ("arctan", 1.000, 1.207), ("softsign", 0.766, 1.143)],
)
def test_half_widths_and_largest_coefficients_are_those_of_the_table(
    gate: str, half_width: float, largest: float
) -> None:
    assert HALF_WIDTH[gate] == pytest.approx(half_width, abs=5e-4)
    for tau in (1.0, 10.0):
        assert one(gate, math.log1p(HALF_WIDTH[gate] / tau), tau).weight.item() == pytest.approx(0.5, rel=1e-12)
    grid = torch.linspace(-3, 3, 60001, dtype=torch.float64)
    assert evaluate(gate, grid, 1.0).coefficient.max().item() == pytest.approx(largest, abs=5e-4)


@pytest.mark.parametrize(("gate", "factor"), [("sigmoid", 1.0), ("erf", 0.668), ("arctan", 0.567), ("softsign", 0.435)])
def test_matched_temperatures_meet_the_sigmoid_at_half_weight(gate: str, factor: float) -> None:
    assert matched_tau(gate, 1.0) == pytest.approx(factor, abs=5e-4)
    at = math.log1p(HALF_WIDTH["sigmoid"] / 10)
    assert one(gate, at, matched_tau(gate, 10.0)).weight.item() == pytest.approx(0.5, rel=1e-12)


def test_presets_are_those_of_the_papers() -> None:
    assert TAU_PRESETS == {"qwen": (1.0, 1.05), "study": (10.0, 12.0)}


@pytest.mark.parametrize(
    ("positive", "ratio", "value", "weight"),
    [
        (True, 0.3, 0.3, 1),
        (True, 1.27, 1.27, 1),
        (True, 1.29, 1.28, 0),
        (False, 0.79, 0.8, 0),
        (False, 0.81, 0.81, 1),
        (False, 5.0, 5.0, 1),
    ],
)
def test_clip_cuts_moves_away_from_1_and_never_the_way_back(
    positive: bool, ratio: float, value: float, weight: float
) -> None:
    got = one("clip", math.log(ratio), 1.0, positive=positive, eps_low=0.2, eps_high=0.28)
    assert got.value.item() == pytest.approx(value, rel=1e-14)
    assert got.weight.item() == weight
    assert got.coefficient.item() == pytest.approx(weight * ratio, rel=1e-14)


@given(gates, taus, st.floats(-20, 20), st.booleans(), st.floats(1, 10))
def test_restoring_keeps_slope_r_on_the_way_back_and_the_gate_elsewhere(
    gate: str, tau: float, log_ratio: float, positive: bool, cap: float
) -> None:
    plain, ratio = one(gate, log_ratio, tau), math.exp(log_ratio)
    got = one(gate, log_ratio, tau, positive=positive, restoring=True, restoring_cap=cap)
    if positive and log_ratio < 0:
        assert got.value.item() == got.coefficient.item() == pytest.approx(ratio, rel=1e-14)
        assert got.weight.item() == 1
    elif not positive and log_ratio > 0:
        assert got.coefficient.item() == pytest.approx(min(ratio, cap), rel=1e-14)
        assert got.weight.item() == pytest.approx(min(1, cap / ratio), rel=1e-13)
    else:
        assert [part.item() for part in got] == [part.item() for part in plain]
    sign = 1 if positive else -1
    if ratio <= cap:
        assert sign * got.value.item() == pytest.approx(min(sign * ratio, sign * plain.value.item()), rel=1e-9)


@given(gates, taus, st.floats(-3, 5), st.booleans(), st.floats(1, 5))
def test_a_restoring_coefficient_is_the_slope_of_its_value(
    gate: str, tau: float, log_ratio: float, positive: bool, cap: float
) -> None:
    step = 1e-6
    ends = torch.tensor([log_ratio - step, log_ratio + step], dtype=torch.float64)
    value, _, slopes = evaluate(gate, ends, tau, positive=positive, restoring=True, restoring_cap=cap)
    slope = (value[1] - value[0]).item() / (2 * step)
    assert slopes.min().item() - 1e-3 <= slope <= slopes.max().item() + 1e-3


def test_a_restoring_value_goes_on_linearly_in_log_r_beyond_the_cap() -> None:
    got = one("sigmoid", math.log(3) + 2, 1.0, positive=False, restoring=True, restoring_cap=3.0)
    assert got.value.item() == pytest.approx(3 + 3 * 2, rel=1e-14)
    assert got.coefficient.item() == pytest.approx(3)
    assert got.weight.item() == pytest.approx(math.exp(-2), rel=1e-14)


@pytest.mark.parametrize("gate", [*SMOOTH_GATES, "clip"])
def test_tensors_of_tau_and_sign_choose_per_token(gate: str) -> None:
    log_ratio = torch.tensor([-0.4, 0.3, -0.4, 0.3])
    positive = torch.tensor([True, True, False, False])
    tau = torch.tensor([1.0, 1.0, 1.5, 1.5])
    got = evaluate(gate, log_ratio, tau, positive=positive, restoring=gate != "clip")
    for i in range(4):
        alone = evaluate(gate, log_ratio[i], tau[i].item(), positive=bool(positive[i]), restoring=gate != "clip")
        assert [part[i].item() for part in got] == pytest.approx([part.item() for part in alone], rel=1e-6)


def test_half_precision_is_computed_in_float32() -> None:
    got = evaluate("sigmoid", torch.tensor(0.5, dtype=torch.bfloat16), 1.0)
    assert got.value.dtype is torch.float32
    assert got.value.item() == pytest.approx(1.626888984484337, rel=1e-6)


def test_an_unknown_gate_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="gate must be one of sigmoid, erf, arctan, softsign, clip, got 'tanh'"):
        one("tanh", 0.0, 1.0)
