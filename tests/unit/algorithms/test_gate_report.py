"""The table and the plot that help choosing a gate."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from sapo_ray.algorithms.gate_report import gate_rows, plot_gates


def test_the_table_says_what_each_gate_does_at_tau_1() -> None:
    rows = {row.gate: row for row in gate_rows(1.0)}
    assert [row.largest for row in rows.values()] == pytest.approx([1.575, 1.337, 1.207, 1.143], abs=5e-4)
    assert [row.half_weight_above for row in rows.values()] == pytest.approx([2.763, 2.177, 2.0, 1.766], abs=1e-3)
    # r / (1 + (r - 1)^2) is largest at r = sqrt 2.
    assert rows["arctan"].largest_at == pytest.approx(math.sqrt(2), abs=1e-4)
    assert rows["sigmoid"].value_at_infinity == pytest.approx(3.0)
    assert rows["arctan"].value_at_0 == pytest.approx(1 - math.pi / 4, abs=1e-6)
    assert rows["erf"].value_at_infinity == pytest.approx(1 + math.sqrt(math.pi / 2))


def test_matched_gates_reach_half_weight_at_the_same_ratio() -> None:
    rows = gate_rows(10.0, match_width=True)
    assert [row.half_weight_above for row in rows] == pytest.approx([1.17627] * 4, abs=1e-5)
    assert [row.tau for row in rows] == pytest.approx([10, 6.679, 5.673, 4.348], abs=1e-3)


@pytest.mark.parametrize(("suffix", "magic"), [("png", b"\x89PNG"), ("pdf", b"%PDF"), ("svg", b"<?xml")])
def test_the_plot_is_written_in_the_format_asked_for(tmp_path: Path, suffix: str, magic: bytes) -> None:
    path = tmp_path / f"gates.{suffix}"
    plot_gates(path, 10.0, match_width=True)
    assert path.read_bytes().startswith(magic)
