"""Decoupling, alignment and the minibatch ensemble on problems whose answer is known.

Statistical tests compare at 4.5 standard errors (false alarm 7e-6 each for Gaussian errors); seeds are fixed.
"""

from __future__ import annotations

import importlib
import math

import numpy as np
import pytest
import torch
from torch import nn

import thermograd as tg
from landscape.networks import NAMES, make, teacher
from thermograd.errors import InputError, NonFiniteError, NotAvailableError, TooShortError
from thermograd.landscape import eigenpairs, gauss_newton, hessian
from thermograd.noise import alignment, covariance, decoupling, in_directions, minibatch_losses, second_moment
from thermograd.noise.factors import Factors
from thermograd.noise.perlayer import PerLayer

# ---------------------------------------------------------------------- decoupling


@pytest.mark.parametrize("name", NAMES)
def test_decoupling_matrices_by_loops(name: str) -> None:
    case = make(name)
    problem = case.problem()
    theta = problem.theta
    with torch.no_grad():
        outputs, targets = problem.differentiable_outputs(theta, None)
    f = outputs.clone().requires_grad_()
    (r,) = torch.autograd.grad(problem.output_sample_losses(f, targets).sum(), f)
    r = r.flatten(1)  # [N, K]
    J = torch.func.jacrev(lambda t: case.outputs(problem, t).flatten(1))(theta).detach()  # [N, K, P]
    R = r.T @ r / problem.N
    dense = torch.einsum("njp,jk,nkq->pq", J, R, J) / problem.N
    found = decoupling(problem, k=5)
    assert found.samples == problem.N
    assert found.trace == pytest.approx(float(second_moment(problem).dense().trace()), rel=1e-9)
    assert found.decoupled_trace == pytest.approx(float(dense.trace()), rel=1e-9)
    assert found.ratio == pytest.approx(found.trace / found.decoupled_trace, rel=1e-12)
    np.testing.assert_allclose(found.decoupled_eigenvalues, torch.linalg.eigvalsh(dense).flip(0)[:5], rtol=1e-8)
    true = torch.linalg.eigvalsh(second_moment(problem).dense()).flip(0)[:5]
    np.testing.assert_allclose(found.eigenvalues, true, rtol=1e-8)
    losses = problem.sample_losses().numpy()
    pearson = np.corrcoef(losses, J.square().sum((1, 2)).numpy())[0, 1]
    assert found.correlation == pytest.approx(pearson, abs=1e-9)


def test_one_output_squared_error_is_the_papers_equation() -> None:
    problem = teacher(samples=120, hidden=6)  # half squared error: R = 2 L, C = 2 l_i C_f
    found = decoupling(problem)
    losses = problem.sample_losses()
    rows = torch.stack([_output_gradient(problem, i) for i in range(problem.N)])  # [N, P]
    squares = rows.square().sum(1)
    assert found.trace == pytest.approx(float((2 * losses * squares).mean()), rel=1e-10)
    assert found.decoupled_trace == pytest.approx(float(2 * losses.mean() * squares.mean()), rel=1e-10)


def _output_gradient(problem: tg.Problem, i: int) -> torch.Tensor:
    leaf = problem.theta.requires_grad_()
    return torch.autograd.grad(problem.differentiable_outputs(leaf, [i])[0].sum(), leaf)[0]


def test_decoupled_and_coupled_data_are_told_apart() -> None:
    random = torch.Generator().manual_seed(0)
    x = torch.randn(2000, 3, generator=random, dtype=torch.float64)
    noise = torch.randn(2000, 1, generator=random, dtype=torch.float64)
    model = nn.Linear(3, 1, bias=False).double()
    with torch.no_grad():
        clean = model(x)
    independent = decoupling(tg.Problem(model, nn.MSELoss(), (x, clean + noise)), n=2000)
    assert abs(independent.ratio - 1) < 4.5 * independent.stderr
    assert abs(independent.correlation) < 4.5 * independent.correlation_stderr
    assert independent.spectrum_distance < 0.2
    # residuals as large as the inputs: E|x|^4 / (E|x|^2)^2 = 5/3 in three dimensions
    coupled = decoupling(tg.Problem(model, nn.MSELoss(), (x, clean + noise * x.norm(dim=1, keepdim=True))), n=2000)
    assert abs(coupled.ratio - 5 / 3) < 4.5 * coupled.stderr
    assert coupled.ratio - 1 > 4.5 * coupled.stderr
    assert coupled.correlation > 4.5 * coupled.correlation_stderr


def test_error_of_the_ratio_is_honest() -> None:
    random = torch.Generator().manual_seed(1)
    model = nn.Linear(3, 1, bias=False).double()
    z = []
    for _ in range(40):
        x = torch.randn(300, 3, generator=random, dtype=torch.float64)
        with torch.no_grad():
            y = model(x) + torch.randn(300, 1, generator=random, dtype=torch.float64)
        found = decoupling(tg.Problem(model, nn.MSELoss(), (x, y)), n=300, k=3)
        z.append((found.ratio - 1) / found.stderr)
    assert 0.6 < np.std(z) < 1.5  # error of the standard deviation: 0.11
    assert abs(np.mean(z)) < 4.5 / math.sqrt(40)


def test_subsample_and_models_without_vmap(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = make("cnn-maxpool").problem()
    mapped = decoupling(problem, n=8, seed=3)
    monkeypatch.setattr(problem, "_vmap_works", False)
    looped = decoupling(problem, n=8, seed=3)
    assert mapped.samples == looped.samples == 8
    assert mapped.ratio == pytest.approx(looped.ratio, rel=1e-10)
    assert mapped.stderr == pytest.approx(looped.stderr, rel=1e-8)
    assert mapped.plot().get_xlabel() == "rank"


def test_spectra_of_a_part_of_the_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    problem = teacher(samples=300, hidden=5)
    whole = decoupling(problem, k=5)
    monkeypatch.setattr(sys.modules["thermograd.noise.decoupling"], "_GRAM", 150)
    part = decoupling(problem, k=5)
    assert (part.samples, part.spectrum_samples) == (300, 150)
    assert part.ratio == pytest.approx(whole.ratio, rel=1e-12)
    np.testing.assert_allclose(part.decoupled_eigenvalues, whole.decoupled_eigenvalues, rtol=0.6)


@pytest.mark.parametrize("outputs", [1, 3])
def test_spectra_layer_by_layer_are_those_of_the_gradients(outputs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    problem = _tanh_network(outputs)
    direct = decoupling(problem, k=8)
    monkeypatch.setattr(sys.modules["thermograd.noise.decoupling"], "by_layers", lambda *_: True)
    layered = decoupling(problem, k=8)
    np.testing.assert_allclose(layered.eigenvalues, direct.eigenvalues, rtol=1e-9)
    np.testing.assert_allclose(layered.decoupled_eigenvalues, direct.decoupled_eigenvalues, rtol=1e-9)


@pytest.mark.parametrize("block", [None, 7])  # samples of one combination of outputs whose factors fit in memory
@pytest.mark.parametrize("name", ["one", "three", "cnn-maxpool", "transformer"])
def test_spectra_of_all_samples_where_few_gradients_fit(
    name: str, block: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = _tanh_network({"one": 1, "three": 3}[name]) if name in ("one", "three") else make(name).problem()
    direct = decoupling(problem, k=8)
    module = importlib.import_module("thermograd.noise.decoupling")
    monkeypatch.setattr(module, "_NUMBERS", 1)
    monkeypatch.setattr(module, "_spectrum", None)  # that of gradients that are held
    if problem.N <= 16:  # so many are held in any case
        monkeypatch.setattr(module, "by_layers", lambda *_: True)
    if block is not None:
        monkeypatch.setattr(PerLayer, "block_size", property(lambda self: block))
    layered = decoupling(problem, k=8)
    assert layered.spectrum_samples == direct.spectrum_samples == problem.N
    for attribute in ("eigenvalues", "decoupled_eigenvalues"):
        true = getattr(direct, attribute)
        np.testing.assert_allclose(getattr(layered, attribute), true, rtol=1e-9, atol=1e-13 * true[0])
    assert layered.ratio == direct.ratio


def test_memory_running_out_amid_the_spectra_halves_the_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = _tanh_network(3)
    direct = decoupling(problem, k=8)
    original, sizes = PerLayer.factors, []

    def factors(self: PerLayer, positions: torch.Tensor) -> list[Factors]:
        sizes.append(len(positions))
        if len(positions) > 5:
            raise torch.OutOfMemoryError("out of memory")
        return original(self, positions)

    monkeypatch.setattr(PerLayer, "factors", factors)
    monkeypatch.setattr(importlib.import_module("thermograd.noise.decoupling"), "_NUMBERS", 1)
    layered = decoupling(problem, k=8)
    assert max(sizes) > 5
    assert layered.spectrum_samples == problem.N
    np.testing.assert_allclose(layered.decoupled_eigenvalues, direct.decoupled_eigenvalues, rtol=1e-9)


class _ByHand(nn.Module):
    """A layer and a weight that no rule knows."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.power = nn.Linear(6, 2), nn.Parameter(torch.tensor(0.5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.layer(x)) * self.power.exp()


class _OtherForMany(nn.Module):
    """One and the same function, as a layer of few samples and by hand for many."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.second = nn.Linear(6, 3), nn.Linear(3, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.layer(x)
        h = self.second(torch.tanh(h))
        return h if len(x) <= 7 else h + 0 * self.second(torch.tanh(self.layer(x)))


@pytest.mark.parametrize("build", [_ByHand, _OtherForMany])
def test_without_rules_the_spectra_take_what_can_be_held(
    build: type[nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(4)
    X, y = torch.randn(40, 6, dtype=torch.float64), torch.randn(40, 2, dtype=torch.float64)
    problem = tg.Problem(build().double(), tg.losses.half_squared_error, (X, y))
    whole = decoupling(problem, k=4)
    module = importlib.import_module("thermograd.noise.decoupling")
    monkeypatch.setattr(module, "_NUMBERS", 20 * 2 * problem.P)
    part = decoupling(problem, k=4)
    assert (part.samples, whole.spectrum_samples, part.spectrum_samples) == (40, 40, 20)
    assert part.ratio == whole.ratio
    monkeypatch.setattr(module, "_NUMBERS", 2**26)
    monkeypatch.setattr(module, "_GRAM", 20 * 2)
    same = decoupling(problem, k=4)
    np.testing.assert_allclose(part.eigenvalues, same.eigenvalues, rtol=1e-9)
    np.testing.assert_allclose(part.decoupled_eigenvalues, same.decoupled_eigenvalues, rtol=1e-9)


def _tanh_network(outputs: int) -> tg.Problem:
    random = torch.Generator().manual_seed(2)
    X, y = (torch.randn(40, k, generator=random, dtype=torch.float64) for k in (6, outputs))
    return tg.Problem(tg.models.mlp([6, 5, outputs], activation="tanh"), tg.losses.half_squared_error, (X, y))


def test_decoupling_needs_outputs() -> None:
    problem = tg.Problem.from_function(lambda w, a: (w - a).square().sum(), torch.zeros(2), torch.randn(5, 2))
    with pytest.raises(NotAvailableError):
        decoupling(problem)


# ---------------------------------------------------------------------- alignment


def quadratic(exponent: float, samples: int = 4000, modes: int = 12) -> tuple[tg.Problem, torch.Tensor]:
    """Quadratic losses of curvature h whose minima have the variance h^(exponent - 2), so that C_ii ~ h^exponent."""
    h = torch.logspace(0, -2, modes, dtype=torch.float64)
    random = torch.Generator().manual_seed(5)
    a = torch.randn(samples, modes, generator=random, dtype=torch.float64) * h ** (exponent / 2 - 1)
    zero = torch.zeros(modes, dtype=torch.float64)
    return tg.Problem.from_function(lambda w, a: 0.5 * (h * (w - a).square()).sum(), zero, a), h


@pytest.mark.parametrize("exponent", [0.0, 1.0, 2.0])
def test_exponent_is_recovered(exponent: float) -> None:
    problem, h = quadratic(exponent)
    found = alignment(problem, k=12)
    assert abs(found.exponent - exponent) < 4.5 * found.exponent_stderr
    assert found.exponent_stderr < 0.02
    np.testing.assert_allclose(found.curvature, h.numpy(), rtol=1e-10)
    C, H = covariance(problem).dense(), torch.diag(h)
    assert found.cosine == pytest.approx(float((C * H).sum() / C.norm() / H.norm()), rel=1e-10)
    assert found.cosine_stderr == 0
    if exponent:
        assert found.correlation > 0.99


def test_alignment_takes_eigenpairs_and_operators() -> None:
    problem = make("relu-cross-entropy").problem()
    pairs = eigenpairs(hessian(problem), 10)
    given, found = alignment(problem, None, pairs), alignment(problem, None, hessian(problem), k=10)
    assert given.exponent == pytest.approx(found.exponent, rel=1e-8)
    assert given.cosine == pytest.approx(found.cosine, rel=1e-10)
    np.testing.assert_allclose(given.variance, in_directions(problem, pairs).variance, rtol=1e-10)
    by_gn = alignment(problem, H=gauss_newton(problem), k=10)
    assert (by_gn.curvature > -1e-12).all()
    assert given.plot().get_xlabel() == "curvature H_ii"


def test_cosine_of_a_larger_network_from_random_forms() -> None:
    problem = teacher(samples=60, hidden=80)
    assert problem.P > 400
    found = alignment(problem, k=6)
    C, H = covariance(problem).dense(), hessian(problem).dense()
    true = float((C * H).sum() / C.norm() / H.norm())
    assert 0 < found.cosine_stderr < 0.3
    assert abs(found.cosine - true) < 4.5 * found.cosine_stderr


def test_too_few_modes() -> None:
    problem, _ = quadratic(1.0, samples=10, modes=2)
    with pytest.raises(TooShortError):
        alignment(problem)


# ---------------------------------------------------------------------- minibatch ensemble


def test_batches_are_means_of_their_samples() -> None:
    case = make("cnn-maxpool")
    problem = case.problem(chunk_size=5)
    D = torch.randn(problem.P, 2, generator=torch.Generator().manual_seed(0)).double()
    offsets = np.array([-0.1, 0.0, 0.2])
    found = minibatch_losses(problem, D, offsets, batch_size=problem.N, batches=2)
    for i in range(2):
        for j, offset in enumerate(offsets):
            theta = problem.theta + offset * D[:, i]
            assert found.full_losses[i, j] == pytest.approx(float(problem.loss(theta)), rel=1e-12)
            assert found.full_slopes[i, j] == pytest.approx(float(problem.gradient(theta) @ D[:, i]), rel=1e-9)
    # the batch of all samples has no noise
    np.testing.assert_allclose(found.losses[0], found.full_losses, rtol=1e-12)
    np.testing.assert_allclose(found.gradient_variance, 0, atol=1e-25)


def test_quadratic_ensemble() -> None:
    # l = m (w - a)^2 / 2 with scattered m and a: curvature and minimum of a batch are weighted means
    random = torch.Generator().manual_seed(0)
    m = 1 + torch.rand(200, 1, generator=random, dtype=torch.float64)
    a = torch.randn(200, 1, generator=random, dtype=torch.float64)
    problem = tg.Problem.from_function(
        lambda w, m, a: 0.5 * (m * (w - a).square()).sum(), torch.zeros(1).double(), (m, a)
    )
    offsets = np.linspace(-1, 1, 5)
    found = minibatch_losses(problem, torch.ones(1), offsets, batch_size=20, batches=4000, seed=1)
    full = float(m.mean())
    assert found.full_curvature[0] == pytest.approx(full, rel=1e-12)
    error = found.curvature.std() / math.sqrt(4000)
    assert abs(found.curvature.mean() - full) < 4.5 * error
    slope_at_zero = -found.curvature * found.minimum
    np.testing.assert_allclose(slope_at_zero[:, 0], found.slopes[:, 0, 2], rtol=1e-9, atol=1e-12)
    # scatter without replacement: C_0 (N - B) / (B (N - 1)) at each displacement, the parabola of Feng and Tu
    for j, offset in enumerate(offsets):
        C0 = float((m * (offset - a)).var(correction=0))
        true = C0 * (200 - 20) / (20 * 199)
        assert abs(found.gradient_variance[0, j] - true) < 4.5 * found.gradient_variance_stderr[0, j]
    np.testing.assert_allclose(found.temperature(0.1), 0.05 * found.gradient_variance)
    assert found.plot().get_xlabel() == "displacement"


def test_seed_and_loader_batch_size() -> None:
    case = make("mlp-mse")
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(case.X, case.y), batch_size=7, shuffle=True)
    problem = tg.Problem(case.model, case.loss, loader)
    D = torch.eye(problem.P)[:, :2]
    one, same = (minibatch_losses(problem, D, [-0.1, 0.1], batches=5, seed=2) for _ in range(2))
    other = minibatch_losses(problem, D, [-0.1, 0.1], batches=5, seed=3)
    assert one.batch_size == 7
    np.testing.assert_array_equal(one.losses, same.losses)
    assert (one.losses != other.losses).any()


def test_bad_ensembles() -> None:
    problem = make("mlp-mse").problem()
    direction = torch.ones(problem.P)
    for options in ({"batch_size": None}, {"batch_size": 0}, {"batch_size": 999}, {"batches": 1}):
        with pytest.raises(InputError):
            minibatch_losses(problem, direction, [0.0, 1.0], **{"batch_size": 4, **options})
    with pytest.raises(InputError):
        minibatch_losses(problem, direction, [0.5], batch_size=4)
    with pytest.raises(NonFiniteError):
        minibatch_losses(problem, direction, [0.0, 1e300], batch_size=4)
