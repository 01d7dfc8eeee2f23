"""Operators and spectra against PyHessian's and curvlinops', on networks that no other test has.

The peers are no dependency: each test is skipped where its peer is not installed. ``benchmarks/bench_curvature.py``
says how to install them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import thermograd as tg
from thermograd.landscape import eigenpairs, empirical_fisher, gauss_newton, hessian

from .test_curvature import relative

SAMPLES = 18
REASON = "{} is not installed; benchmarks/bench_curvature.py says how"


class Residual(nn.Module):
    """Two residual stages with strides, batch norm at rest and a mean over positions."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.first = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.Hardswish(), nn.Conv2d(4, 4, 3, padding=1))
        self.down = nn.Conv2d(4, 6, 2, stride=2)
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        x = torch.relu(self.down(x + self.first(x)))
        return self.head(nn.functional.adaptive_avg_pool2d(x, 1).flatten(1))


class Mixer(nn.Module):
    """Tokens mixed along positions, then along channels, with gates.

    Without a LayerNorm: there curvlinops 3.0.1 with torch 2.13 is off by a percent in the rows of the norm's weight,
    where finite differences of the gradient agree with PyHessian's products and with ours.
    """

    def __init__(self) -> None:
        super().__init__()
        self.words, self.mix = nn.Embedding(9, 6), nn.Linear(5, 5)
        self.gate, self.head = nn.Linear(6, 12), nn.Linear(6, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.words(x)  # [b, 5, 6]
        h = h + self.mix(h.mT).mT
        return self.head(nn.functional.glu(self.gate(nn.functional.softsign(h)), dim=-1).logsumexp(1))


def _residual() -> tuple[nn.Module, nn.Module, Tensor, Tensor]:
    model = Residual()
    model(torch.randn(40, 3, 8, 8))  # running statistics that are not trivial
    X = torch.randn(SAMPLES, 3, 8, 8).double()
    return model.eval(), nn.CrossEntropyLoss(), X, torch.arange(SAMPLES) % 5


def _mixer() -> tuple[nn.Module, nn.Module, Tensor, Tensor]:
    y = (torch.arange(SAMPLES) % 2)[:, None].double()
    return Mixer(), nn.BCEWithLogitsLoss(), torch.randint(0, 9, (SAMPLES, 5)), y


def _sequence() -> tuple[nn.Module, nn.Module, Tensor, Tensor]:
    layers = [nn.Conv1d(2, 4, 3, dilation=2), nn.Softplus(), nn.ConvTranspose1d(4, 3, 2, stride=2), nn.ELU()]
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(36, 4), nn.Tanh(), nn.Linear(4, 3))
    return model, nn.MSELoss(), torch.randn(SAMPLES, 2, 10).double(), torch.randn(SAMPLES, 3).double()


NETWORKS: dict[str, Callable[[], tuple[nn.Module, nn.Module, Tensor, Tensor]]] = {
    "residual": _residual,
    "mixer": _mixer,
    "sequence": _sequence,
}


@pytest.fixture(params=NETWORKS)
def given(request: pytest.FixtureRequest) -> tuple[nn.Module, nn.Module, Tensor, Tensor]:
    torch.manual_seed(11)
    model, loss, X, y = NETWORKS[request.param]()
    return model.double(), loss, X, y


def block_of(problem: tg.Problem) -> Tensor:
    return torch.randn(problem.P, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(4))


def curvlinops_operator(kind: Any, model: nn.Module, loss: nn.Module, data: Any) -> Any:
    """Versions differ in whether they take a list of parameters or a dictionary of them by name."""
    try:
        return kind(model, loss, list(model.parameters()), data, check_deterministic=False)
    except (TypeError, AttributeError, ValueError):
        return kind(model, loss, dict(model.named_parameters()), data, check_deterministic=False)


def test_products_equal_those_of_curvlinops(given: Any) -> None:
    peer = pytest.importorskip("curvlinops", reason=REASON.format("curvlinops-for-pytorch"))
    model, loss, X, y = given
    problem = tg.Problem(model, loss, (X, y))
    V = block_of(problem)
    pairs = [(hessian, peer.HessianLinearOperator), (gauss_newton, peer.GGNLinearOperator)]
    if isinstance(loss, nn.CrossEntropyLoss):  # of means over several outputs it takes other factors
        pairs.append((empirical_fisher, peer.EFLinearOperator))
    for ours, theirs in pairs:
        true = curvlinops_operator(theirs, model, loss, [(X, y)]) @ V
        for method in ("reverse", "linearised"):
            assert relative(ours(problem, method=method) @ V, true) < 1e-10
        single = ours(tg.Problem(model, loss, (X, y), dtype=torch.float32))
        assert relative((single @ V.float()).double(), true) < 1e-5


def test_spectra_equal_those_of_curvlinops(given: Any) -> None:
    peer = pytest.importorskip("curvlinops", reason=REASON.format("curvlinops-for-pytorch"))
    linalg = pytest.importorskip("scipy.sparse.linalg")
    model, loss, X, y = given
    theirs = curvlinops_operator(peer.HessianLinearOperator, model, loss, [(X, y)])
    true = linalg.eigsh(theirs.to_scipy(), k=4, which="LA", tol=1e-11, return_eigenvectors=False)
    H = hessian(tg.Problem(model, loss, (X, y)))
    found = eigenpairs(H, 4, tol=1e-9)
    torch.testing.assert_close(found.eigenvalues, torch.as_tensor(sorted(true, reverse=True)), rtol=1e-8, atol=1e-12)


def test_products_spectrum_and_trace_equal_those_of_pyhessian(given: Any) -> None:
    peer = pytest.importorskip("pyhessian", reason=REASON.format("pyhessian"))
    utils = pytest.importorskip("pyhessian.utils")
    model, loss, X, y = given
    problem = tg.Problem(model, loss, (X, y))
    H, V = hessian(problem), block_of(problem)
    torch.manual_seed(0)
    theirs = peer.hessian(model, loss, data=(X, y), cuda=False)
    sizes = [p.numel() for p in theirs.params]
    for v in V.T:
        pieces = [part.view_as(p) for part, p in zip(v.contiguous().split(sizes), theirs.params)]
        product = utils.hessian_vector_product(theirs.gradsH, theirs.params, pieces)
        assert relative(H @ v, torch.cat([p.reshape(-1) for p in product])) < 1e-10
    values, _ = theirs.eigenvalues(maxIter=3000, tol=1e-9, top_n=2)  # the largest in magnitude, by power iteration
    found = eigenpairs(H, 2, which="LM", tol=1e-9).eigenvalues
    assert sorted(values) == pytest.approx(sorted(found.tolist()), rel=1e-4)
    probes = theirs.trace(maxIter=40, tol=0.0)
    error = torch.tensor(probes).std() / math.sqrt(len(probes))
    # 40 independent probes: beyond five standard errors once in a million
    assert abs(sum(probes) / len(probes) - float(H.dense().diagonal().sum())) < 5 * float(error)
