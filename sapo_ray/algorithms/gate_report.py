"""What the gates look like: a table and a plot, for choosing one."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch

from sapo_ray.algorithms.gates import HALF_WIDTH, SMOOTH_GATES, evaluate, matched_tau

TAIL = {"sigmoid": "exp(-|u|)", "erf": "exp(-u^2/2)", "arctan": "u^-2", "softsign": "|u|^-3"}
"""How the weight falls for large |u|."""

_GRID = 400_001


@dataclass(frozen=True, kw_only=True, slots=True)
class GateRow:
    """One gate at one temperature."""

    gate: str
    tau: float
    tail: str
    half_weight_below: float
    """Ratio r < 1 at which the weight is 1/2; negative where no ratio is small enough."""
    half_weight_above: float
    """Ratio r > 1 at which the weight is 1/2."""
    largest: float
    """Maximum of r w(r), what a token's gradient is multiplied with at most."""
    largest_at: float
    """Ratio where that is."""
    value_at_0: float
    """f(r) as r goes to 0."""
    value_at_infinity: float
    """f(r) as r grows without bound."""


def gate_rows(tau: float, *, match_width: bool = False) -> list[GateRow]:
    """The smooth gates at a temperature; match_width gives all of them the sigmoid's half-width at `tau`."""
    return [_row(gate, matched_tau(gate, tau) if match_width else tau) for gate in SMOOTH_GATES]


def _row(gate: str, tau: float) -> GateRow:
    log_ratio = torch.linspace(-5.0, 20.0, _GRID, dtype=torch.float64)
    coefficient = evaluate(gate, log_ratio, tau).coefficient
    best = int(coefficient.argmax())
    ends = evaluate(gate, torch.tensor([-20.0, 20.0], dtype=torch.float64), tau).value
    reach = HALF_WIDTH[gate] / tau
    return GateRow(
        gate=gate,
        tau=tau,
        tail=TAIL[gate],
        half_weight_below=1.0 - reach,
        half_weight_above=1.0 + reach,
        largest=float(coefficient[best]),
        largest_at=math.exp(float(log_ratio[best])),
        value_at_0=float(ends[0]),
        value_at_infinity=float(ends[1]),
    )


def plot_gates(path: Path, tau: float, *, match_width: bool = False, eps: float = 0.2) -> None:
    """Write a figure of f(r), w(r) and r w(r) of every gate for A > 0, hard clipping at `eps` beside them.

    The format follows the suffix of `path` (png, pdf, svg).
    """
    from matplotlib.figure import Figure

    ratio = torch.linspace(0.01, 1.0 + max(3.0 / tau, 3.0 * eps), 2000, dtype=torch.float64)
    figure = Figure(figsize=(13, 4), layout="constrained")
    panels = figure.subplots(1, 3)
    for gate in (*SMOOTH_GATES, "clip"):
        gate_tau = matched_tau(gate, tau) if match_width else tau
        curves = evaluate(gate, ratio.log(), gate_tau, eps_low=eps, eps_high=eps)
        label = f"clip {eps:g}" if gate == "clip" else f"{gate}, tau {gate_tau:.3g}"
        for panel, curve in zip(panels, curves, strict=True):
            panel.plot(ratio.numpy(), curve.numpy(), label=label, linestyle="--" if gate == "clip" else "-")
    for panel, title in zip(panels, ("value f(r)", "weight w(r)", "coefficient r w(r)"), strict=True):
        panel.set_title(title)
        panel.set_xlabel("probability ratio r")
        panel.axvline(1.0, color="0.8", linewidth=1, zorder=0)
    panels[0].legend()
    figure.savefig(path)
