"""Mori et al. on networks, at the reduced scale; with real images where they are here."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from thermograd import papers

DATA = Path(__file__).parents[3] / "shared" / "data"
pytestmark = pytest.mark.skipif(not DATA.is_dir(), reason="needs MNIST, Fashion-MNIST and CIFAR-10")


def outcome(name, tmp_path, seeds=2):
    return papers.reproduce(name, scale="reduced", seeds=seeds, seed=3, out=tmp_path, data_folder=DATA)


def test_decoupling_at_initialisation_is_nearly_exact(tmp_path):
    found = outcome("mori/fig1", tmp_path)
    distance = {row.quantity: row for row in found.rows}["decades between the spectra after 0 epochs"]
    assert distance.ours < 0.2  # residuals know nothing of the network yet, but for 300 samples
    assert len(found.panels) == 3


def by_start(outcome, start):
    return next(row for row in outcome.rows if row.quantity.startswith(start))


def test_noise_strength_along_training(tmp_path):
    found = outcome("mori/fig2", tmp_path)
    assert len(found.panels) == 2
    for panel in found.panels:
        for curve in panel.series:
            assert np.all(np.asarray(curve.y) > 0)
    late = by_start(found, "slope of log N in log L, below a tenth of its start, MLP")
    early = by_start(found, "slope of log N in log L, above a tenth of its start, MLP")
    assert abs(late.ours - 1) < 0.4 + 4 * late.stderr  # 200 images and 50 units a layer
    assert early.ours < late.ours
    assert "CNN on CIFAR-10: only 0 of 2" in found.caveats[-1]  # too few steps at this scale


def test_noise_strength_under_cross_entropy_falls_faster_than_the_loss(tmp_path):
    found = outcome("mori/fig5", tmp_path)
    small = by_start(found, "slope of log N in log L, below a hundredth of its start, MLP")
    assert 1.4 < small.ours < 2.1  # l ~ exp(-margin) and a gradient of that size: N ~ L² at the end
    assert len(found.panels) == 2


def test_curvature_and_escape_of_a_network(tmp_path):
    spectrum = outcome("mori/fig6", tmp_path)
    values = np.asarray(spectrum.panels[0].series[0].y)
    assert values[0] == 1.0
    assert np.all(np.diff(values) <= 0)
    n = by_start(spectrum, "effective")
    assert 1 <= n.ours < 400  # at most the number of samples
    escape = outcome("mori/fig3c", tmp_path)
    slope, straight = by_start(escape, "slope of log T in log c, B = 4"), by_start(escape, "R²")
    assert slope.ours > 5  # B / 0.3 and more: far from the square root of T that a free walk has
    assert straight.ours > 0.9 - 4 * straight.stderr
    assert abs(by_start(escape, "noise along").ours - 1) < 0.5  # decoupled but for a correlation of l and C_f
    assert escape.panels[0].series[1].label == "predicted slope"
