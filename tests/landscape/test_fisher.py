"""Sampled and empirical Fisher matrices, lower precision, compilation, subsamples."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import thermograd as tg
from thermograd.errors import InputError, NonFiniteError, NotAvailableError
from thermograd.landscape import curvature, empirical_fisher, gauss_newton, hessian, sampled_fisher

from .networks import NAMES, Case, make
from .test_curvature import relative

LIKELIHOODS = [name for name in NAMES if name not in ("huber", "custom")]


def dense_empirical_fisher(problem: tg.Problem) -> torch.Tensor:
    rows = []
    for i in range(problem.N):
        leaf = problem.theta.requires_grad_()
        rows.append(torch.autograd.grad(problem.differentiable_sample_losses(leaf, [i]).sum(), leaf)[0])
    G = torch.stack(rows)  # [N, P]
    return G.T @ G / problem.N


def jacobian(case: Case, problem: tg.Problem) -> torch.Tensor:
    outputs = torch.func.jacrev(lambda t: case.outputs(problem, t))(problem.theta)
    return outputs.flatten(1, -2)  # [N, K, P]


@pytest.mark.parametrize("name", NAMES)
def test_empirical_fisher_equals_the_dense_one(name: str) -> None:
    problem = make(name).problem()
    true = dense_empirical_fisher(problem)
    block = torch.randn(problem.P, 3, dtype=torch.float64)
    for method in ("reverse", "linearised"):
        assert relative(empirical_fisher(problem, method=method) @ block, true @ block) < 1e-10
    single = make(name).problem(dtype=torch.float32)
    assert relative((empirical_fisher(single) @ block.float()).double(), true @ block) < 1e-5


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_sampled_fisher_is_made_of_its_scores(name: str) -> None:
    case = make(name)
    problem = case.problem()
    F = sampled_fisher(problem, draws=3, seed=5)
    scores = F.scores.flatten(2)  # [M, N, K]
    pulled = torch.einsum("mnk,nkp->mnp", scores, jacobian(case, problem)).flatten(0, 1)
    true = pulled.T @ pulled / (3 * problem.N)
    block = torch.randn(problem.P, 2, dtype=torch.float64)
    assert relative(F @ block, true @ block) < 1e-10
    linearised = sampled_fisher(problem, draws=3, seed=5, method="linearised")
    assert relative(linearised @ block, true @ block) < 1e-10
    assert torch.equal(sampled_fisher(problem, draws=3, seed=5).scores, F.scores)
    single = case.problem(dtype=torch.float32)
    for method in ("reverse", "linearised"):
        found = sampled_fisher(single, draws=3, seed=5, method=method)
        assert found.dtype == found.scores.dtype == torch.float32
        assert relative((found @ block.float()).double(), true @ block) < 1e-5


@pytest.mark.parametrize("name", ["mlp-mse", "weights-smoothing", "bce", "relu-cross-entropy"])
def test_sampled_fisher_is_unbiased_for_the_gauss_newton_matrix(name: str) -> None:
    """Quadratic forms of independent draws; false alarm below 1e-4 (4 standard errors, normal)."""
    problem = make(name).problem()
    v = torch.randn(problem.P, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    exact = float(v @ (gauss_newton(problem) @ v))
    found = np.array([float(v @ (sampled_fisher(problem, draws=20, seed=s) @ v)) for s in range(60)])
    assert abs(found.mean() - exact) < 4 * found.std(ddof=1) / np.sqrt(len(found))
    assert found.std() > 0


def test_weight_decay_index_and_subsamples() -> None:
    problem = make("relu-cross-entropy").problem()
    one = torch.eye(problem.P, dtype=torch.float64)
    for make_operator in (empirical_fisher, sampled_fisher, gauss_newton, hessian):
        plain, decayed = make_operator(problem), make_operator(problem, weight_decay=0.5)
        torch.testing.assert_close(decayed.dense() - plain.dense(), 0.5 * one, atol=1e-13, rtol=0)
        part = plain.subsample(0.5, seed=3)
        assert type(part) is type(plain)
        assert part._count == 7
        torch.testing.assert_close(plain.subsample(1.0).dense(), plain.dense(), atol=1e-13, rtol=0)
        with pytest.raises(InputError):
            plain.subsample(0.0)
    chosen = [1, 4]
    found = empirical_fisher(problem, index=chosen).dense()
    rows = problem.sample_gradients(index=chosen)
    torch.testing.assert_close(found, rows.T @ rows / 2, atol=1e-13, rtol=1e-10)


def test_what_has_no_likelihood_is_refused() -> None:
    with pytest.raises(InputError, match="gauss_newton"):
        sampled_fisher(make("huber").problem())
    with pytest.raises(InputError):
        sampled_fisher(make("bce").problem(), draws=0)
    plain = tg.Problem.from_function(lambda w, a: (w * a).sum() ** 2, torch.ones(3), torch.randn(4, 3))
    with pytest.raises(NotAvailableError):
        sampled_fisher(plain)
    rows = plain.sample_gradients()
    torch.testing.assert_close(empirical_fisher(plain).dense(), rows.T @ rows / 4)
    rooted = tg.Problem.from_function(
        lambda w, a: (w - a).abs().sqrt().sum(), torch.tensor([0.5]), torch.tensor([[1.0], [2.0], [3.0], [5.0]])
    )
    with pytest.raises(NonFiniteError, match="sample 2"):
        empirical_fisher(rooted, torch.tensor([3.0])) @ torch.ones(1)


@pytest.mark.parametrize("make_operator", [hessian, gauss_newton, empirical_fisher, sampled_fisher])
@pytest.mark.parametrize("method", ["reverse", "linearised"])
def test_lower_precision_states_its_error(make_operator: Callable[..., Any], method: str) -> None:
    problem = make("cnn-maxpool").problem(chunk_size=4)
    block = torch.randn(problem.P, 2, dtype=torch.float64)
    exact = make_operator(problem) @ block
    for precision, most in (("float32", 1e-5), ("bfloat16", 0.1)):
        low = make_operator(problem, precision=precision, method=method)
        product = low @ block
        assert product.dtype == torch.float64
        error = relative(product, exact)
        assert 1e-10 < error < most
        assert low.measured_error < most
        assert low.measured_error > error / 30
    with pytest.raises(InputError):
        make_operator(problem, precision="float16")


def test_running_out_of_memory_halves_the_chunks_of_the_reverse_way(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = make("mlp-mse").problem(chunk_size=14)
    H = hessian(problem, method="reverse")
    true = hessian(problem).dense()
    whole = curvature.Hessian._trace

    def small(self: Any, index: torch.Tensor) -> Any:
        if len(index) > 4:
            raise torch.OutOfMemoryError("out of memory")
        return whole(self, index)

    monkeypatch.setattr(curvature.Hessian, "_trace", small)
    assert relative(H.dense(), true) < 1e-12
    assert H._chunk_size == 3
    monkeypatch.setattr(curvature, "free_memory", lambda device: 40 * problem._saved_bytes)
    assert hessian(make("mlp-mse").problem(), method="reverse")._chunk_size <= 14


@pytest.mark.slow
def test_a_compiled_tangent_part_gives_the_same() -> None:
    problem = tg.Problem(
        nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2)), nn.MSELoss(), (torch.randn(9, 3), torch.randn(9, 2))
    )
    block = torch.randn(problem.P, 2, dtype=torch.float64)
    compiled = hessian(problem, compiled=True)
    assert relative(compiled @ block, hessian(problem) @ block) < 1e-10
    assert compiled.method == "linearised"
    assert compiled.measured_error < 1e-10
