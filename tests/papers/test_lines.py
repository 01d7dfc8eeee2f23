"""Lines, rates and errors that items share, against what they are by definition."""

from __future__ import annotations

import numpy as np
import pytest

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
