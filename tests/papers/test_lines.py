"""Lines, planes, displacements and errors that items are made of, against what they are by definition."""

from __future__ import annotations

import numpy as np
import pytest

from thermograd.papers.feng_tu import _msd
from thermograd.papers.kunin_sweeps import Cell, _pair_difference, _plane
from thermograd.papers.lines import jackknife, points


def test_the_jackknife_of_a_mean_is_its_standard_error():
    rows = np.random.default_rng(0).standard_normal((7, 3))
    value, error = jackknife(rows, lambda mean: float(mean.sum()))
    sums = rows.sum(1)
    assert value == pytest.approx(sums.mean())
    assert error == pytest.approx(sums.std(ddof=1) / np.sqrt(7))


def test_points_are_means_with_their_errors_also_after_a_turn():
    values = np.array([[1.0, 4.0], [2.0, 6.0], [3.0, 8.0]])
    plain = points("p", np.arange(2.0), values)
    np.testing.assert_allclose(plain.y, [2, 6])
    np.testing.assert_allclose(plain.error, values.std(0, ddof=1) / np.sqrt(3))
    turned = points("p", np.arange(2.0), values, lambda v: 10 * v)
    np.testing.assert_allclose(turned.y, [20, 60])
    np.testing.assert_allclose(turned.error, 10 * np.array(plain.error))


def test_squared_displacements_of_a_straight_line_and_of_a_walk():
    lags = np.array([1, 3, 10])
    np.testing.assert_allclose(_msd(2.0 * np.arange(50), lags), 4.0 * lags**2)
    walk = np.cumsum(np.random.default_rng(1).standard_normal(200_000))
    np.testing.assert_allclose(_msd(walk, lags), lags, rtol=0.05)


def test_the_plane_through_exponents_gives_back_its_slopes():
    cells = [Cell(lr, batch, beta) for lr in (0.1, 1.0, 10.0) for batch in (16, 64) for beta in (0.5, 0.8, 0.9)]
    rate, batch = (np.log10([getattr(cell, name) for cell in cells]) for name in ("lr", "batch"))
    inertia = -np.log10([1 - cell.momentum for cell in cells])
    c = -0.2 * rate - 0.3 * inertia + 0.25 * batch + 1.1
    found = _plane(cells, c)
    np.testing.assert_allclose(found[:5], [-0.2, -0.3, 0.25, 0.1, 1.0], atol=1e-9)
    assert found[5] < 0.95  # of one slope for both
    collapsed = _plane(cells, -0.2 * (rate + inertia))
    np.testing.assert_allclose(collapsed[[0, 1, 3, 5]], [-0.2, -0.2, 0.0, 1.0], atol=1e-9)


def test_pairs_of_equal_pace_are_compared_the_larger_momentum_first():
    cells = [Cell(1.0, 16, 0.5), Cell(0.2, 16, 0.9), Cell(0.2, 64, 0.9), Cell(0.7, 16, 0.9)]
    assert _pair_difference(cells, np.array([1.0, 1.3, 9.0, 9.0])) == pytest.approx(0.3)
    assert _pair_difference(cells[2:], np.array([1.0, 2.0])) == 0.0
