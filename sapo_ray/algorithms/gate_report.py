"""What the gates look like: a table and a plot, for choosing one."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from rich import box
from rich.table import Table

from sapo_ray.algorithms.gates import HALF_WIDTH, SMOOTH_GATES, evaluate, matched_tau
from sapo_ray.errors import ConfigError

TAIL = {"sigmoid": "exp(-|u|)", "erf": "exp(-u^2/2)", "arctan": "u^-2", "softsign": "|u|^-3"}
"""How the weight falls for large |u|."""

RATIOS = (0.5, 0.8, 0.9, 1.0, 1.1, 1.25, 1.5, 2.0, 3.0)
"""Probability ratios at which gates are compared."""
PLOT_KINDS = (".png", ".svg", ".pdf")

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


@dataclass(frozen=True, kw_only=True, slots=True)
class CurveRow:
    """One gate, hard clipping among them, at the ratios of RATIOS."""

    gate: str
    tau: float | None
    """None for clip, which has none."""
    ratio: list[float]
    value: list[float]
    """f(r)"""
    weight: list[float]
    """w(r)"""
    coefficient: list[float]
    """r w(r), what a token's gradient is multiplied with."""


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


def curve_rows(
    tau: float, *, match_width: bool = False, positive: bool = True, restoring: bool = False
) -> list[CurveRow]:
    """The smooth gates and clip (at 0.2) at RATIOS, for advantages of one sign, plain or restoring."""
    log_ratio = torch.tensor(RATIOS, dtype=torch.float64).log()
    rows = []
    for gate in (*SMOOTH_GATES, "clip"):
        gate_tau = None if gate == "clip" else matched_tau(gate, tau) if match_width else tau
        curves = evaluate(gate, log_ratio, gate_tau or 1.0, positive=positive, restoring=restoring and gate != "clip")
        value, weight, coefficient = (curve.tolist() for curve in curves)
        rows.append(
            CurveRow(gate=gate, tau=gate_tau, ratio=list(RATIOS), value=value, weight=weight, coefficient=coefficient)
        )
    return rows


def gate_table(rows: list[GateRow]) -> Table:
    """What holds for a gate as a whole; fits 80 columns."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for header in ("gate", "tau", "w=1/2 at r<1", "r>1", "max r w", "at r", "f(0)", "f(inf)", "tail"):
        table.add_column(header, justify="left" if header in ("gate", "tail") else "right")
    for row in rows:
        below = "-" if row.half_weight_below < 0 else f"{row.half_weight_below:.3f}"
        numbers = (row.half_weight_above, row.largest, row.largest_at, row.value_at_0, row.value_at_infinity)
        table.add_row(row.gate, f"{row.tau:.3g}", below, *(f"{number:.4g}" for number in numbers), row.tail)
    return table


def curve_table(rows: list[CurveRow]) -> Table:
    """f, w and r w of every gate, a ratio a column; fits 80 columns."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("gate")
    table.add_column("r")
    for ratio in RATIOS:
        table.add_column(f"{ratio:g}", justify="right")
    for row in rows:
        for name, curve in (("f", row.value), ("w", row.weight), ("r w", row.coefficient)):
            label = row.gate if name == "f" else ""
            table.add_row(label, name, *(f"{number:.3f}" for number in curve), end_section=name == "r w")
    return table


def plot_gates(path: Path, tau: float, *, match_width: bool = False, eps: float = 0.2) -> None:
    """Write a figure of f(r), w(r) and r w(r) of every gate for A > 0, hard clipping at `eps` beside them.

    The format follows the suffix of `path` (png, pdf, svg).

    Raises:
        ConfigError: another suffix, no such folder, or the file cannot be written.
    """
    if path.suffix.lower() not in PLOT_KINDS:
        raise ConfigError(f"--plot must end in {', '.join(PLOT_KINDS)}, got {str(path)!r}; name such a file")
    if not path.absolute().parent.is_dir():
        raise ConfigError(f"--plot {path}: there is no folder {path.absolute().parent}; make it, or name another")
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
    try:
        figure.savefig(path)
    except OSError as error:
        raise ConfigError(f"--plot {path} cannot be written: {error.strerror}; name another file") from error
