"""Traces, densities and dimensions.

Statistical tests compare with the truth at 4.5 standard errors (false alarm 7e-6 each for Gaussian errors; seeds are
fixed, so a pass stays a pass).
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from thermograd.errors import InputError, NonFiniteError
from thermograd.landscape import (
    all_eigenpairs,
    diagonal,
    effective_dimension,
    eigenpairs,
    hessian,
    spectral_density,
    subspace_overlap,
    trace,
    trace_of_square,
)

from .networks import make, teacher
from .test_spectrum import Diagonal


def spectrum(size: int = 600) -> torch.Tensor:
    values = torch.logspace(1, -3, size, dtype=torch.float64)
    values[-50:] *= -1
    return values


def test_exact_when_small() -> None:
    H = hessian(make("mlp-mse").problem())
    dense = H.dense()
    assert trace(H, probes=1000).value == pytest.approx(float(dense.trace()), rel=1e-12)
    assert trace_of_square(H, probes=1000).value == pytest.approx(float(dense.square().sum()), rel=1e-12)
    torch.testing.assert_close(diagonal(H, probes=1000).value, dense.diagonal())
    assert trace(H, probes=1000).stderr == 0


def test_estimates_lie_within_their_errors_and_these_are_honest() -> None:
    values = spectrum()
    truth, squares = float(values.sum()), float(values.square().sum())
    A = Diagonal(values)
    scores = []
    for seed in range(40):
        t, s = trace(A, 45, seed), trace_of_square(A, 45, seed)
        assert 0 < t.stderr < 0.1 * abs(truth)
        scores.append([(t.value - truth) / t.stderr, (s.value - squares) / s.stderr])
    z = np.array(scores)  # [40, 2], Student with 14 degrees of freedom: variance 14/12
    assert np.abs(z).max() < 7
    assert (np.abs(z.mean(0)) < 4.5 * np.sqrt(14 / 12 / 40)).all()
    # mean square of 40 such scores: expectation 1.17, standard deviation 0.3 (kurtosis of Student's t)
    assert ((z**2).mean(0) > 0.4).all()
    assert ((z**2).mean(0) < 2.6).all()


def test_diagonal_within_errors() -> None:
    A = Diagonal(spectrum())
    true = A.dense().diagonal()
    found = diagonal(A, 90)
    z = ((found.value - true) / found.stderr).numpy()
    assert np.mean(np.abs(z) < 2.05) > 0.85  # 95 % for Student with 29 degrees of freedom, elements correlated
    assert trace(A, 90).value == pytest.approx(float(true.sum()), rel=0.05)


def test_density_of_known_spectrum() -> None:
    values = torch.cat([torch.linspace(0, 1, 950, dtype=torch.float64), torch.full((50,), 3.0, dtype=torch.float64)])
    rho = spectral_density(Diagonal(values), probes=8, steps=40, width=0.05)
    assert np.trapezoid(rho.density, rho.grid) == pytest.approx(1, abs=1e-3)
    exact = spectral_density(torch.diag(values), grid=rho.grid, width=0.05)
    assert exact.stderr.max() == 0
    inside = exact.density > 0.02
    z = (rho.density - exact.density)[inside] / rho.stderr[inside]
    assert np.mean(np.abs(z) < 3) > 0.9  # Student with 7 degrees of freedom: 98 %, points correlated
    outlier = np.trapezoid(np.where(rho.grid > 2, rho.density, 0), rho.grid)
    assert outlier == pytest.approx(0.05, abs=0.02)  # 8 probes: standard error sqrt(2 * .05 * .95 / 1000 / 8) = .0034
    mean = rho.expectation(lambda a: a)
    assert abs(mean.value - float(values.mean())) < 6 * mean.stderr  # Student, 7 degrees of freedom: 5e-4


def test_density_of_a_network_is_exact_when_small() -> None:
    H = hessian(make("relu-cross-entropy").problem())
    rho = spectral_density(H)
    np.testing.assert_allclose(rho.nodes[0], np.sort(all_eigenpairs(H).eigenvalues.numpy()), atol=1e-12)
    assert rho.plot().get_xlabel() == "eigenvalue"


def test_a_krylov_space_that_ends_early() -> None:
    rho = spectral_density(Diagonal(torch.ones(500, dtype=torch.float64)), probes=2, steps=10, width=0.1)
    assert np.trapezoid(rho.density, rho.grid) == pytest.approx(1, abs=1e-6)
    assert rho.expectation(np.square).value == pytest.approx(1, abs=1e-12)


@settings(max_examples=60, deadline=None)
@given(
    values=st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=20),
    scale=st.floats(1e-6, 1e6),
    copies=st.integers(1, 5),
)
def test_effective_dimensions_scale_and_count(values: list[float], scale: float, copies: int) -> None:
    a = np.array(values)
    one = effective_dimension(a)
    for name in ("participation_ratio", "entropy", "stable_rank", "intrinsic"):
        base = getattr(one, name)
        assert 1 - 1e-9 <= base <= len(a) * (1 + 1e-9)
        assert getattr(effective_dimension(scale * a), name) == pytest.approx(base, rel=1e-9)
        assert getattr(effective_dimension(np.tile(a, copies)), name) == pytest.approx(copies * base, rel=1e-9)
    assert one.stable_rank <= one.intrinsic * (1 + 1e-9)


def test_effective_dimension_of_eigenpairs_and_refusals() -> None:
    pairs = eigenpairs(torch.diag(torch.tensor([4.0, 2.0, 0.0, -1.0])), k=4)
    n = effective_dimension(pairs)
    assert n.participation_ratio == pytest.approx(25 / 21)
    assert n.stable_rank == pytest.approx(21 / 16)
    assert n.entropy == pytest.approx(np.exp(-(2 / 3 * np.log(2 / 3) + 1 / 3 * np.log(1 / 3))))
    assert (n.positive, n.negative) == (2, 1)
    with pytest.raises(InputError):
        effective_dimension([-1.0, 0.0])
    with pytest.raises(InputError):
        effective_dimension([])
    with pytest.raises(NonFiniteError):
        effective_dimension([1.0, np.nan])


def test_overlaps() -> None:
    angle = 1e-9
    U = np.eye(5)[:, :2]
    V = np.stack([np.cos(angle) * np.eye(5)[0] + np.sin(angle) * np.eye(5)[2], np.eye(5)[3], np.eye(5)[4]], axis=1)
    found = subspace_overlap(U, 3 * V)
    np.testing.assert_allclose(found.angles, [angle, np.pi / 2], rtol=1e-6)  # the cosine alone would give 0
    assert found.overlap == pytest.approx(0.5)
    assert found.chance == pytest.approx(3 / 5)
    with pytest.raises(InputError):
        subspace_overlap(np.ones((4, 2)), np.eye(4))
    with pytest.raises(InputError):
        subspace_overlap(np.eye(3), np.eye(4))


def test_random_subspaces_overlap_by_chance() -> None:
    random = np.random.default_rng(0)
    overlaps = [subspace_overlap(random.normal(size=(60, 5)), random.normal(size=(60, 12))).overlap for _ in range(100)]
    error = np.std(overlaps) / 10
    assert abs(np.mean(overlaps) - 12 / 60) < 4.5 * error


def test_too_few_probes() -> None:
    H = hessian(teacher(samples=20, hidden=4))
    with pytest.raises(InputError):
        trace(H, probes=5)
    with pytest.raises(InputError):
        spectral_density(H, probes=1)
    with pytest.raises(InputError):
        spectral_density(H, width=-1.0)
