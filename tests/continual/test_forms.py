"""Proximal steps are what a brute-force minimisation finds; sums keep what they promise."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from thermograd.continual.forms import Blocks, Diagonal, Form, LowRank
from thermograd.continual.kronecker import Kronecker, principal, principal_of
from thermograd.errors import InputError, NonFiniteError

P = 12


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def low_rank(k: int, seed: int = 0, capacity: int = P) -> LowRank:
    directions = torch.linalg.qr(normal(P, k, seed=seed)).Q
    return LowRank(directions, normal(k, seed=seed + 1).square(), normal(k, seed=seed + 2), capacity)


def kronecker(seed: int = 0, q: int = 3, r: int = 4, bias: bool = True) -> Kronecker:
    left, right = torch.linalg.qr(normal(3, q, seed=seed)).Q, torch.linalg.qr(normal(4, r, seed=seed + 1)).Q
    return Kronecker(left, right, normal(q, r, seed=seed + 2).square(), normal(q, r, seed=seed + 3), bias)


def blocks() -> Blocks:
    parts = {"a": (torch.tensor([0, 1, 2]), Diagonal(normal(3).square(), normal(3, seed=5)))}
    directions = torch.linalg.qr(normal(6, 2)).Q
    parts["b"] = torch.tensor([11, 4, 9, 5, 6, 3]), LowRank(directions, normal(2).square(), normal(2), 2)
    return Blocks(P, parts)


def own_axes(seed: int = 0) -> Kronecker:
    rotated = kronecker(seed)
    return Kronecker(None, rotated.right, rotated.curvature, rotated.target, True)


FORMS = [Diagonal(normal(P).square(), normal(P, seed=1)), low_rank(4), kronecker(), kronecker(1, 2, 3, False), blocks()]
FORMS.append(own_axes())


def hessian(form: Form) -> Tensor:
    return torch.autograd.functional.hessian(form.value, torch.zeros(P, dtype=torch.float64))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("rate", [0.0, 0.3, 40.0])
def test_proximal_step_is_the_argmin(form: Form, rate: float) -> None:
    v = normal(P, seed=9)
    w = v.clone().requires_grad_()
    exact = {"tolerance_grad": 1e-13, "tolerance_change": 1e-16, "line_search_fn": "strong_wolfe"}
    optimizer = torch.optim.LBFGS([w], max_iter=500, **exact)

    def objective() -> Tensor:
        optimizer.zero_grad()
        value = 0.5 * (w - v).square().sum() + rate * form.value(w)
        value.backward()
        return value

    optimizer.step(objective)
    torch.testing.assert_close(form.proximal(v, rate), w.detach(), rtol=1e-6, atol=1e-7)


def test_own_axes_are_a_rotation_that_is_not_stored() -> None:
    form = own_axes()
    assert form.left is None
    same = Kronecker(torch.eye(3, dtype=torch.float64), form.right, form.curvature, form.target, True)
    assert form.value(normal(P)).item() == pytest.approx(same.value(normal(P)).item())
    assert form.memory == same.memory - 9
    for a, b in ((form, kronecker(7)), (kronecker(7), form), (form, own_axes(7))):
        total = a.plus(b)
        assert total.left is None
        exact = hessian(a) + hessian(b)
        assert torch.trace(hessian(total)).item() == pytest.approx(torch.trace(exact).item())
        gradients = [torch.func.grad(f.value)(torch.zeros(P, dtype=torch.float64)) for f in (a, b, total)]
        torch.testing.assert_close(gradients[2], gradients[0] + gradients[1])


@pytest.mark.parametrize("form", [FORMS[0], FORMS[1], FORMS[4]])
def test_proximal_step_with_a_rate_for_each_weight(form: Form) -> None:
    v, rate = normal(P, seed=9), normal(P, seed=3).abs() + 0.1
    zero = torch.zeros(P, dtype=torch.float64)
    A, pull = hessian(form), torch.func.grad(form.value)(zero)
    expected = torch.linalg.solve(torch.diag(1 / rate) + A, v / rate - pull)
    torch.testing.assert_close(form.proximal(v, rate), expected)
    assert bool(torch.isfinite(form.proximal(v, 1e200 * rate)).all())


def test_one_layer_has_one_rate() -> None:
    with pytest.raises(InputError, match="different learning rates"):
        kronecker().proximal(normal(P), normal(P).abs())


@pytest.mark.parametrize("form", FORMS)
def test_gradient_of_the_value(form: Form) -> None:
    theta = normal(P, seed=4).requires_grad_()
    assert torch.autograd.gradcheck(form.value, (theta,))


@pytest.mark.parametrize("form", FORMS)
def test_centring_keeps_the_curvature(form: Form) -> None:
    theta = normal(P, seed=8)
    moved = form.centred(theta)
    torch.testing.assert_close(hessian(moved), hessian(form))
    assert moved.value(theta).item() == pytest.approx(0, abs=1e-20)


def test_sums_that_are_exact() -> None:
    theta, other = normal(P, seed=8), normal(P, seed=9)
    for a, b in [
        (FORMS[0], Diagonal(normal(P, seed=6).square(), normal(P, seed=7))),
        (low_rank(4), low_rank(5, seed=10)),
        (low_rank(9), low_rank(9, seed=10)),  # more directions than weights
    ]:
        total = a.plus(b)
        rises = [f.value(theta) - f.value(other) for f in (a, b, total)]
        assert rises[2].item() == pytest.approx((rises[0] + rises[1]).item())
        torch.testing.assert_close(hessian(total), hessian(a) + hessian(b))


def test_a_capped_sum_loses_what_it_says() -> None:
    total, exact = low_rank(4, capacity=4), hessian(low_rank(4))
    for seed in (20, 30, 40):
        new = low_rank(4, seed=seed, capacity=4)
        total, exact = total.plus(new), exact + hessian(new)
        assert total.directions.shape[1] == 4
        lost = torch.linalg.eigvalsh(exact - hessian(total))
        assert float(lost.min()) > -1e-9
        assert float(lost.max()) <= total.dropped + 1e-9
    assert total.dropped > 0


def test_a_kronecker_sum_keeps_the_curvature_along_its_directions() -> None:
    a, b = kronecker(0), kronecker(7)
    total, exact = a.plus(b), hessian(a) + hessian(b)
    for i, j in itertools.product(range(3), range(4)):
        direction = total._vector(torch.outer(total.left[:, i], total.right[:, j]))
        assert (direction @ exact @ direction).item() == pytest.approx(total.curvature[i, j].item())
    gradient = torch.func.grad(total.value)(torch.zeros(P, dtype=torch.float64))
    both = sum(torch.func.grad(f.value)(torch.zeros(P, dtype=torch.float64)) for f in (a, b))
    torch.testing.assert_close(gradient, both)  # complete bases: the linear part is kept in full
    assert torch.trace(hessian(total)).item() == pytest.approx(torch.trace(exact).item())


def test_kronecker_sums_with_equal_bases_are_exact() -> None:
    a = kronecker(0)
    b = Kronecker(a.left, a.right, normal(3, 4, seed=6).square(), normal(3, 4, seed=5), True)
    torch.testing.assert_close(hessian(a.plus(b)), hessian(a) + hessian(b))


@pytest.mark.parametrize("form", FORMS)
def test_grown_forms_do_not_feel_new_weights(form: Form) -> None:
    big = normal(16, seed=2)
    if isinstance(form, Kronecker):  # grows by rows of the weight, as a head does
        W, more = normal(3, 4), normal(1, 4)
        grown = form.grown(16, torch.arange(12))
        value = grown.value(grown._vector(torch.cat([W, more])))
        assert value.item() == pytest.approx(form.value(form._vector(W)).item())
        return
    positions = torch.tensor([3, 0, 7, 9, 1, 2, 5, 13, 14, 11, 12, 6])
    assert form.grown(16, positions).value(big).item() == pytest.approx(form.value(big[positions]).item())


def test_principal_directions_of_moments_that_are_almost_nothing() -> None:
    factor = torch.randn(200, 5, generator=torch.Generator().manual_seed(0))
    moment = 1e-36 * factor @ factor.T
    found = principal(moment, 5)
    torch.testing.assert_close(found.T @ found, torch.eye(5))
    inside = found @ (found.T @ factor)
    torch.testing.assert_close(inside, factor, rtol=0, atol=1e-3)
    assert bool(torch.isfinite(principal(torch.zeros(3, 3), 2)).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("n", "rank"), [(6, 4), (6, 6), (6, 9), (30, 7)])  # few rows, fewer than asked for, many
def test_principal_directions_of_rows_are_those_of_their_moment(n: int, rank: int, dtype: torch.dtype) -> None:
    random = torch.Generator().manual_seed(0)
    rows = torch.randn(n, 40, generator=random, dtype=torch.float64) * 10.0 ** -torch.arange(n)[:, None].double()
    rows = (1e-25 * rows).to(dtype)  # sizes over many decades, squares below what float32 can hold
    found = principal_of(rows, rank).double()
    torch.testing.assert_close(found.T @ found, torch.eye(rank).double(), rtol=0, atol=1e-5)
    shared = min(4, rank)
    _, _, exact = torch.linalg.svd(rows.double(), full_matrices=False)
    overlap = (found[:, :shared] * exact[:shared].T).sum(0).abs()
    torch.testing.assert_close(
        overlap, torch.ones(shared).double(), rtol=0, atol=1e-5 if dtype == torch.float64 else 1e-3
    )


def test_bad_curvature_is_refused() -> None:
    with pytest.raises(InputError, match="importance"):
        Diagonal(-torch.ones(2), torch.zeros(2))
    with pytest.raises(NonFiniteError):
        Diagonal(torch.tensor([float("nan")]), torch.zeros(1))
