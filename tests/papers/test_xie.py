"""Xie et al. at the reduced scale: measured numbers against exact ones within standard errors."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from thermograd import SGD, Problem, models, papers
from thermograd.papers import xie, xie_kramers, xie_styblinski
from thermograd.papers.lines import fitted, rate
from thermograd.simulate import networks_first_passage
from thermograd.theory import first_passage, kramers


def _found(name, tmp_path, seeds=3, seed=3):
    return papers.reproduce(name, scale="reduced", seeds=seeds, seed=seed, out=tmp_path, data_folder=tmp_path)


def _exact_within_errors(outcome, errors=6.0, share=0.03):
    """Few seeds: six standard errors, and 3% for what is no linear function of the rates."""
    checked = [row for row in outcome.rows if row.theory is not None]
    for row in checked:
        assert abs(row.ours - row.theory) <= errors * row.stderr + share * abs(row.theory), row
    return len(checked)


def test_lines_and_rates():
    x = np.array([1.0, 2.0, 4.0])
    assert fitted(x, 3 - 2 * x) == (-2.0, 3.0, -1.0)
    assert rate(np.array([1.0, np.nan, 3.0]), np.array([1.0, 10.0, 3.0])) == (2, 14.0)


def test_white_noise(tmp_path):
    outcome = _found("xie/white-noise", tmp_path)
    assert _exact_within_errors(outcome) == 3
    assert len(outcome.panels) == 2


def test_sgd_noise(tmp_path):
    outcome = _found("xie/sgd-noise", tmp_path, seeds=2)
    assert _exact_within_errors(outcome, share=0.05) == 6
    prefactor = next(row for row in outcome.rows if "Theorem 3.2, 2π" in row.quantity)
    assert prefactor.ours < 0.8 - 4 * prefactor.stderr  # the Ito equation has 2π / H_a


def test_the_kernel_of_the_path_tends_to_the_quadrature():
    """As the learning rate goes to zero at fixed B / lr the chain becomes the Ito equation."""
    curvature, ratios = 2.0, []
    a = xie_kramers._minimum(curvature)

    def loss(x):
        rise = xie_kramers._BARRIER * xie_kramers._SHARE
        left = curvature / 2 * (x - a) ** 2
        return np.where(x < xie_kramers._JOIN, left, 2 * rise - x**2 / 2)

    for lr, batch in ((0.04, 16), (0.01, 4), (0.0025, 1)):
        sgd = SGD(lr=lr, batch_size=batch, sampling="replacement")
        exact = first_passage.quadrature(
            loss,
            lambda x, t=lr / (2 * batch): t * np.where(x < xie_kramers._JOIN, curvature, 1.0),
            a,
            -xie_kramers._JOIN,
            breaks=[xie_kramers._JOIN],
        )
        ratios.append(xie_kramers._path_exact(sgd, curvature) / exact)
    gaps = np.abs(np.log(ratios))
    assert gaps[0] > gaps[1] > gaps[2]
    assert gaps[2] < 0.15
    assert exact == pytest.approx(float(kramers.escape_time_sgd(sgd, 0.04, curvature, -1.0)), rel=0.1)


def test_styblinski_tang(tmp_path):
    outcome = _found("xie/styblinski-tang", tmp_path)
    assert _exact_within_errors(outcome) == 3
    assert outcome.verdict == "reproduced with a caveat"  # straight lines, but not Theorem 3.2's


def test_cubic_of_a_normal_number():
    u = np.random.default_rng(0).normal(-2.0, 1.0, 200_000)
    slope = 2 * u**3 - 16 * u + 2.5
    for c in (-80.0, -5.0, 2.0, 15.0, 60.0):
        share = float(xie_styblinski._slope_above(np.array(c), np.array(-2.0)))
        assert abs((slope >= c).mean() - share) < 5 * (share * (1 - share) / u.size) ** 0.5 + 1e-5


def _write_table(folder, name, X, y):
    folder.mkdir()
    rows = np.column_stack([X, y])
    np.savetxt(folder / f"{name}.csv.gz", rows, delimiter=",", fmt=["%.6f"] * X.shape[1] + ["%d"])


def test_noise_follows_the_hessian_of_a_well_specified_model(tmp_path):
    """Labels drawn from a softmax of the inputs: C is the Fisher matrix, which is H, once that is learned."""
    rng = np.random.default_rng(1)
    X = rng.normal(size=(400, 6))
    scores = X @ rng.normal(size=(6, 3))
    y = np.argmax(scores + rng.gumbel(size=scores.shape), axis=1)
    _write_table(tmp_path / "UCI", "avila_train", X, y)
    outcome = _found("xie/fig2", tmp_path, seeds=2)
    rows = {row.quantity: row for row in outcome.rows}
    near = rows["sum of B C over sum of H, avila, trained weights"]
    assert abs(near.ours - 1) < 0.35
    assert rows["correlation of log C with log H, avila, trained weights"].ours > 0.85
    assert len(outcome.panels) == 1


def test_network_escape_counts_censored_runs(tmp_path):
    rng = np.random.default_rng(0)
    y = rng.integers(0, 2, 200)
    X = rng.normal(size=(200, 4)) + y[:, None]
    y = np.where(rng.random(200) < 0.2, 1 - y, y)  # labels that cannot be fitted keep the noise, and escapes, up
    _write_table(tmp_path / "UCI", "banknote", X, y)
    outcome = _found("xie/banknote", tmp_path, seeds=2)
    assert all(abs(row.ours) <= 1 for row in outcome.rows[:2])
    assert len(outcome.panels) == 2
    missing = _found("xie/avila", tmp_path, seeds=2)
    assert missing.verdict == "cannot be run here"


def test_sharpness_of_a_network_is_a_learning_rate():
    """L(sqrt(k) theta) at lr is L at k lr, exit step by exit step."""
    X, y = torch.randn(40, 3, generator=torch.Generator().manual_seed(0)), torch.arange(40) % 2
    problem = xie._network(X, y, [3, 4, 2], 0)
    plain = {"sgd": SGD(lr=0.5, batch_size=2, sampling="replacement"), "replicas": 6, "max_steps": 300, "seed": 1}

    class Scaled(torch.nn.Module):
        def __init__(self):
            super().__init__()
            with torch.random.fork_rng():
                torch.manual_seed(0)
                self.inner = models.mlp([3, 4, 2])
            with torch.no_grad():
                for value in self.inner.parameters():
                    value /= 2

        def forward(self, x):
            return torch.func.functional_call(self.inner, {n: 2 * p for n, p in self.inner.named_parameters()}, (x,))

    scaled = Problem(Scaled(), torch.nn.CrossEntropyLoss(), (X, y))
    level = 1.15 * float(problem.loss())
    first = networks_first_passage(problem, level, lr=2.0, **plain)
    second = networks_first_passage(scaled, level, lr=0.5, **plain)
    assert int(first.events[0]) > 0
    assert np.array_equal(first.time, second.time, equal_nan=True)
