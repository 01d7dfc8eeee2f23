"""Eigenpairs against matrices whose spectrum is known."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from thermograd.errors import InputError, StoreError, ThermogradWarning
from thermograd.landscape import Operator, all_eigenpairs, eigenpairs, hessian

from .networks import make, teacher


class Diagonal(Operator):
    """A diagonal matrix that counts its products and may be rotated by reflections, which mix all coordinates."""

    def __init__(self, values: Tensor, interrupt_after: int | None = None):
        super().__init__(len(values), values.dtype)
        self.values, self.products, self.interrupt_after = values, 0, interrupt_after
        mirror = torch.randn(len(values), generator=torch.Generator().manual_seed(7), dtype=torch.float64)
        self.mirror = (mirror / mirror.norm()).to(values.dtype)

    def _reflect(self, block: Tensor) -> Tensor:
        return block - 2 * self.mirror[:, None] * (self.mirror @ block)

    def _product(self, block: Tensor) -> Tensor:
        self.products += block.shape[1]
        if self.interrupt_after is not None and self.products > self.interrupt_after:
            raise KeyboardInterrupt
        return self._reflect(self.values[:, None] * self._reflect(block))


def wanted(values: Tensor, k: int, which: str) -> Tensor:
    down = values.sort(descending=True)[0]
    if which == "LA":
        return down[:k]
    if which == "SA":
        return down[-k:]
    if which == "LM":
        return values[values.abs().argsort(descending=True)[:k]].sort(descending=True)[0]
    return torch.cat([down[: (k + 1) // 2], down[len(down) - k // 2 :]])


def check(values: Tensor, k: int, which: str = "LA", tol: float = 1e-6, gap: float = 0.1) -> None:
    """Compare with the truth; an eigenvalue's error is at most residual^2 / gap to the unwanted ones."""
    operator = Diagonal(values)
    pairs = eigenpairs(operator, k, which=which, tol=tol)
    V, a = pairs.eigenvectors, pairs.eigenvalues
    true = wanted(values, k, which)
    scale = float(values.abs().max()) or 1.0
    assert V.shape == (len(values), k)
    assert bool((a.diff() <= 0).all())
    torch.testing.assert_close(a, true, rtol=tol**2 / gap + 1e-12, atol=1e-11 * scale)
    torch.testing.assert_close(V.T @ V, torch.eye(k, dtype=V.dtype), atol=1e-12, rtol=0)
    residual = (operator @ V - V * a).norm(dim=0)
    assert bool((residual <= torch.clamp(1.0001 * tol * a.abs(), min=1e-13 * scale)).all())
    assert bool(pairs.converged.all())
    resolved = a.abs() > 1e-6 * scale  # below, rounding stands in for |a| by definition
    torch.testing.assert_close(pairs.residuals[resolved], (residual / a.abs())[resolved], rtol=0.1, atol=1e-12)


P = 1600  # above every size at which the matrix would be decomposed in full


def bulk(seed: int = 0) -> Tensor:
    return torch.rand(P, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("which", ["LA", "SA", "LM", "BE"])
def test_indefinite(which: str) -> None:
    check(torch.linspace(-1, 1.2, P, dtype=torch.float64) ** 3, 9, which)


@pytest.mark.parametrize("copies", [2, 9, 15])
def test_degenerate_clusters_above_a_bulk(copies: int) -> None:
    values = bulk()
    values[:copies] = 7.0
    values[copies : copies + 3] = 5.0
    check(values, copies + 3)


def test_nearly_degenerate_outliers_of_a_classifier() -> None:
    values = 0.01 * bulk()
    values[:9] = 1 + 1e-9 * torch.arange(9)
    check(values, 9, tol=1e-8)


def test_rank_deficient_with_fewer_directions_than_asked() -> None:
    values = torch.zeros(P, dtype=torch.float64)
    values[:5] = torch.arange(1.0, 6.0)
    check(values, 10)


@pytest.mark.parametrize("level", [0.0, 1.0, -2.5])
def test_multiples_of_the_identity(level: float) -> None:
    check(torch.full((P,), level, dtype=torch.float64), 6)


def test_power_law_spectrum_and_many_pairs() -> None:
    check(torch.logspace(0, -6, P, dtype=torch.float64), 60)


@pytest.mark.parametrize("seed", range(6))
def test_one_pair(seed: int) -> None:
    """Eigenvalues lie 6e-4 apart on average: what converges first may be a neighbour of the largest."""
    check(bulk(seed), 1, tol=1e-4, gap=1e-4)


@pytest.mark.parametrize("seed", [3, 4, 5])
def test_few_pairs_of_a_bulk_without_gaps(seed: int) -> None:
    check(bulk(seed), 5, tol=1e-3, gap=1e-3)


@pytest.mark.parametrize("seed", range(3))
def test_triple_just_above_a_bulk(seed: int) -> None:
    values = bulk(seed)
    values[:3], values[3:5] = 1.02, 1.01
    check(values, 5, tol=1e-4, gap=0.01)


def test_outliers_take_little_more_than_one_krylov_space_must() -> None:
    values = 0.5 * bulk() ** 3
    values[:10] = torch.linspace(1, 0.55, 10, dtype=torch.float64)
    operator, tol = Diagonal(values), 1e-3
    space = torch.randn(P, 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    needed, worst = 0, 1.0
    while worst > tol:  # plain Rayleigh-Ritz on the Krylov space of one random vector
        space = torch.linalg.qr(torch.cat([space, operator @ space[:, -1:]], dim=1))[0]
        needed = space.shape[1]
        image = operator @ space
        a, turn = torch.linalg.eigh(space.T @ image)
        residual = (image @ turn - space @ turn * a).norm(dim=0)
        worst = float((residual / a.abs())[-10:].max()) if needed > 10 else 1.0
    pairs = eigenpairs(operator, 10, tol=tol)
    assert needed - 4 <= pairs.products <= needed + 8  # two start vectors, so that double eigenvalues are seen


@pytest.mark.parametrize("which", ["LA", "BE"])
@pytest.mark.parametrize("after", [2, 13, 40, 77])
def test_interrupted_and_resumed_equals_uninterrupted(after: int, which: Any, tmp_path: Path) -> None:
    values = bulk(3)
    values[:9] = 7.0  # so that the search for copies is interrupted as well
    values[20:24] = -2.0
    whole = eigenpairs(Diagonal(values), 11, which, tol=1e-5)
    with pytest.warns(ThermogradWarning, match="interrupted"):
        part = eigenpairs(Diagonal(values, interrupt_after=after), 11, which, tol=1e-5)
    assert part.products <= after < whole.products
    for state in (part, part.state):
        rest = eigenpairs(Diagonal(values), 11, which, tol=1e-5, resume=state)
        assert rest.products == whole.products
        assert torch.equal(rest.eigenvalues, whole.eigenvalues)
        assert torch.equal(rest.eigenvectors, whole.eigenvectors)
        assert torch.equal(rest.residuals, whole.residuals)
    file = tmp_path / "pairs.pt"
    with pytest.warns(ThermogradWarning, match="interrupted"):
        eigenpairs(Diagonal(values, interrupt_after=after), 11, which, tol=1e-5, checkpoint=file)
    assert file.exists()
    saved = eigenpairs(Diagonal(values), 11, which, tol=1e-5, checkpoint=file)
    assert torch.equal(saved.eigenvectors, whole.eigenvectors)
    assert not file.exists()


@pytest.mark.parametrize("after", [60, 110, 150, 200, 230])
def test_resumed_where_no_gap_is_resolved(after: int) -> None:
    values = bulk(1)
    values[:3] = 1.02  # a long search for copies
    whole = eigenpairs(Diagonal(values), 4, tol=1e-3)
    assert whole.products > after
    with pytest.warns(ThermogradWarning, match="interrupted"):
        part = eigenpairs(Diagonal(values, interrupt_after=after), 4, tol=1e-3)
    rest = eigenpairs(Diagonal(values), 4, tol=1e-3, resume=part)
    assert rest.products == whole.products
    assert torch.equal(rest.eigenvectors, whole.eigenvectors)


def test_a_spent_budget_can_be_added_to() -> None:
    whole = eigenpairs(Diagonal(bulk()), 4, tol=1e-4)
    with pytest.warns(ThermogradWarning, match="resume"):
        part = eigenpairs(Diagonal(bulk()), 4, tol=1e-4, maxiter=50)
    assert torch.equal(eigenpairs(Diagonal(bulk()), 4, tol=1e-4, resume=part).eigenvectors, whole.eigenvectors)


def test_what_cannot_be_resumed_is_refused(tmp_path: Path) -> None:
    with pytest.warns(ThermogradWarning):
        part = eigenpairs(Diagonal(bulk()), 4, tol=1e-4, maxiter=20)
    with pytest.raises(InputError, match="tol"):
        eigenpairs(Diagonal(bulk()), 4, tol=1e-5, resume=part)
    with pytest.raises(InputError, match="no state"):
        eigenpairs(Diagonal(bulk()), 4, tol=1e-4, resume=eigenpairs(Diagonal(bulk()), 4, tol=1e-2))
    (tmp_path / "broken.pt").write_bytes(b"nothing")
    with pytest.raises(StoreError):
        eigenpairs(Diagonal(bulk()), 4, checkpoint=tmp_path / "broken.pt")


def test_a_start_from_a_cheaper_operator() -> None:
    values = torch.logspace(0, -3, P, dtype=torch.float64)
    cold = eigenpairs(Diagonal(values), 10, tol=1e-4)
    start = eigenpairs(Diagonal(values), 10, tol=1e-4, start=Diagonal(1.03 * values))
    torch.testing.assert_close(start.eigenvalues, cold.eigenvalues, rtol=1e-7, atol=0)
    assert start.products < cold.products
    with pytest.raises(InputError):
        eigenpairs(Diagonal(values), 10, start=torch.eye(3))


def test_single_precision() -> None:
    values = torch.logspace(0, -3, P, dtype=torch.float64)
    pairs = eigenpairs(Diagonal(values.float()), 5, tol=1e-4)
    torch.testing.assert_close(pairs.eigenvalues.double(), values[:5], rtol=1e-5, atol=0)


@settings(max_examples=40, deadline=None)
@given(
    values=st.lists(st.sampled_from([-3.0, -1.0, 0.0, 1e-5, 0.5, 1.0, 2.0]), min_size=1, max_size=15),
    which=st.sampled_from(["LA", "SA", "LM", "BE"]),
    data=st.data(),
)
def test_small_matrices_of_any_spectrum(values: list[float], which: str, data: st.DataObject) -> None:
    k = data.draw(st.integers(1, len(values)))
    spectrum = torch.tensor(values, dtype=torch.float64)
    operator = Diagonal(spectrum)
    pairs = eigenpairs(operator, k, which=which)
    torch.testing.assert_close(
        pairs.eigenvalues.abs().sort()[0] if which == "LM" else pairs.eigenvalues,
        wanted(spectrum, k, which).abs().sort()[0] if which == "LM" else wanted(spectrum, k, which),
        atol=1e-12,
        rtol=0,
    )
    V = pairs.eigenvectors
    torch.testing.assert_close(V.T @ V, torch.eye(k, dtype=V.dtype), atol=1e-12, rtol=0)
    torch.testing.assert_close(operator @ V, V * pairs.eigenvalues, atol=1e-11, rtol=0)


def test_warm_start_costs_less_and_finds_the_same() -> None:
    values = torch.logspace(0, -2, P, dtype=torch.float64)
    cold = eigenpairs(Diagonal(values), 10)
    warm = eigenpairs(Diagonal(values), 10, v0=cold.eigenvectors)
    torch.testing.assert_close(cold.eigenvalues, warm.eigenvalues, rtol=1e-11, atol=0)
    assert warm.products < cold.products / 2


def test_a_start_vector_that_misses_the_answer_does_no_harm() -> None:
    values = torch.zeros(P, dtype=torch.float64)
    values[0], values[1] = 3.0, 1.0
    operator = Diagonal(values)
    second = operator._reflect(torch.eye(P, dtype=torch.float64)[:, 1:2])[:, 0]
    assert float(eigenpairs(operator, 1, v0=second).eigenvalues) == pytest.approx(3.0)


def test_deterministic() -> None:
    first, second = (eigenpairs(Diagonal(bulk()), 3, tol=1e-3, seed=4) for _ in range(2))
    assert torch.equal(first.eigenvectors, second.eigenvectors)


def test_not_converged_is_warned_of_and_marked() -> None:
    with pytest.warns(ThermogradWarning, match="eigenpairs reached"):
        pairs = eigenpairs(Diagonal(bulk()), 5, tol=1e-10, maxiter=40)
    assert not bool(pairs.converged.all())
    assert float(pairs.residuals.max()) > 1e-10


def test_an_interrupt_returns_what_has_converged() -> None:
    values = bulk()
    values[:3] = torch.tensor([100.0, 50.0, 20.0])
    full = Diagonal(values)
    eigenpairs(full, 3)
    with pytest.warns(ThermogradWarning, match="interrupted"):
        pairs = eigenpairs(Diagonal(values, interrupt_after=full.products), 12)
    assert 1 <= len(pairs.eigenvalues) < 12
    assert bool(pairs.converged.all())
    np.testing.assert_allclose(pairs.eigenvalues[:3].numpy(), [100, 50, 20][: len(pairs.eigenvalues)], rtol=1e-9)
    with pytest.raises(KeyboardInterrupt):
        eigenpairs(Diagonal(values, interrupt_after=0), 3)


def test_what_is_not_symmetric_is_refused() -> None:
    class Skew(Diagonal):
        def _product(self, block: Tensor) -> Tensor:
            return self.values[:, None] * block + block.roll(1, 0)

    with pytest.raises(InputError, match="symmetric"):
        eigenpairs(Skew(bulk()), 3)


@pytest.mark.parametrize(
    "options", [{"k": 0}, {"k": 5}, {"which": "SM"}, {"tol": 0.0}, {"tol": float("nan")}, {"tol": 2.0}, {"maxiter": 0}]
)
def test_bad_arguments(options: dict) -> None:
    with pytest.raises(InputError):
        eigenpairs(torch.eye(4), **{"k": 2, **options})


@pytest.mark.parametrize("name", ["relu-cross-entropy", "transformer", "tied"])
def test_networks(name: str) -> None:
    H = hessian(make(name).problem())
    true = torch.linalg.eigvalsh(H.dense()).flip(0)
    torch.testing.assert_close(eigenpairs(H, 4).eigenvalues, true[:4], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(all_eigenpairs(H).eigenvalues, true, rtol=1e-9, atol=1e-12)


def test_iteration_on_a_network() -> None:
    problem = teacher(samples=60, hidden=80)
    H = hessian(problem)
    assert problem.P > 400  # so that Lanczos runs
    pairs = eigenpairs(H, 6, which="BE", tol=1e-7)
    true = wanted(torch.linalg.eigvalsh(H.dense()), 6, "BE")
    torch.testing.assert_close(pairs.eigenvalues, true, rtol=1e-10, atol=1e-12)
    assert float(pairs.residuals.max()) <= 1e-7
    assert pairs.to_xarray()["eigenvectors"].dims == ("weight", "mode")
    assert pairs.plot().get_ylabel() == "|eigenvalue|"


def test_explicit_matrices_in_wider_blocks() -> None:
    values = bulk()
    values[:12] = torch.tensor([5.0, 4.0]).repeat_interleave(6)
    matrix = Diagonal(values).dense()
    pairs = eigenpairs(matrix, 14, tol=1e-7)
    torch.testing.assert_close(pairs.eigenvalues, values.sort(descending=True)[0][:14], rtol=1e-9, atol=0)
    assert bool(pairs.converged.all())
