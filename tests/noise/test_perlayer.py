"""Per-sample gradients layer by layer against loops over samples, on every kind of layer and use of weights.

Agreement is asked for to 1e-10 in float64 and 1e-5 in float32, relative to the size of the whole.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import thermograd as tg
from landscape.networks import NAMES, make, teacher
from thermograd.errors import NonFiniteError
from thermograd.noise import covariance, covariance_eigenpairs, covariance_spectrum, factors
from thermograd.noise import perlayer as module
from thermograd.noise.gram import centre, leading
from thermograd.noise.perlayer import PerLayer

from .test_covariance import gradients, relative

N = 11  # samples: no other dimension has this size


class Cross(nn.Module):
    """Cross attention, sequence first, between two parts of the input."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = x.transpose(0, 1)
        return self.attention(x[:2], x[2:], x[1:4], need_weights=False)[0].mean(0)


class Separate(nn.Module):
    """Attention to keys and values of a width of their own, and projections by products with transposes."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, kdim=3, vdim=2, batch_first=True)
        self.first, self.second = nn.Linear(4, 3, bias=False), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.attention(x[..., :4], x[..., 4:7], x[..., 7:], need_weights=False)[0]
        h = torch.tanh(x @ self.first.weight.T).mean(1)
        return torch.addmm(self.second.bias, h, self.second.weight.t())


class Own(nn.Module):
    """Weights used by hand: a scale, a power, a product from the left, and positions added to the input."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.matrix = nn.Parameter(torch.randn(3)), nn.Parameter(torch.randn(3, 3))
        self.position = nn.Embedding(4, 3)
        self.unused = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.position(torch.arange(4))
        return torch.tanh(x * self.scale.square() @ (self.matrix @ self.matrix)).sum(1)


class Shared(nn.Module):
    """One linear layer used for tokens in and out, an embedding tied to the output, and an in-place activation."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.mix = nn.Embedding(9, 5, padding_idx=0), nn.Linear(5, 5)
        self.out = nn.Linear(5, 9)
        self.out.weight = self.embedding.weight
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        h = self.relu(self.mix(self.embedding(x)))
        return self.out(self.mix(h).mean(1))


class Flattened(nn.Module):
    """Samples and positions in one dimension before a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.inner(x.reshape(-1, 3)))
        return self.outer(h.reshape(len(x), -1, 4)).mean(1)


def _normed() -> nn.Module:
    model = nn.Sequential(nn.Conv1d(2, 4, 3, padding="same"), nn.BatchNorm1d(4), nn.Tanh(), nn.Flatten())
    model.append(nn.Linear(20, 2))
    model(torch.randn(30, 2, 5))
    return model.eval()


def _weight_norm() -> nn.Module:
    return nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(3, 4)), nn.Tanh(), nn.Linear(4, 2))


CASES = {
    "cross-attention": (Cross, lambda: torch.randn(N, 5, 4), 4),
    "separate-projections": (Separate, lambda: torch.randn(N, 5, 9), 3),
    "weights-by-hand": (Own, lambda: torch.randn(N, 4, 3), 3),
    "shared": (Shared, lambda: torch.randint(0, 9, (N, 4)), 9),
    "flattened": (Flattened, lambda: torch.randn(N, 3, 3), 2),
    "conv1d": (_normed, lambda: torch.randn(N, 2, 5), 2),
    "conv3d": (
        lambda: nn.Sequential(nn.Conv3d(1, 2, 2, stride=(1, 2, 1), padding=(1, 0, 1)), nn.Flatten(), nn.LazyLinear(2)),
        lambda: torch.randn(N, 1, 3, 4, 3),
        2,
    ),
    "transposed": (
        lambda: nn.Sequential(nn.ConvTranspose2d(1, 2, 2), nn.Tanh(), nn.Flatten(), nn.Linear(32, 2)),
        lambda: torch.randn(N, 1, 3, 3),
        2,
    ),
    "transposed-every-option": (
        lambda: nn.Sequential(
            nn.ConvTranspose2d(2, 4, 3, stride=2, padding=1, output_padding=1, groups=2),
            nn.Tanh(),
            nn.ConvTranspose2d(4, 2, 2, dilation=3),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        ),
        lambda: torch.randn(N, 2, 3, 3),
        2,
    ),
    "instance-norm": (
        lambda: nn.Sequential(nn.Conv1d(2, 3, 2), nn.InstanceNorm1d(3, affine=True), nn.Tanh(), nn.Flatten()),
        lambda: torch.randn(N, 2, 5),
        12,
    ),
    "circular": (
        lambda: nn.Sequential(nn.Conv2d(1, 2, 3, padding=1, padding_mode="circular"), nn.Flatten(), nn.Linear(32, 2)),
        lambda: torch.randn(N, 1, 4, 4),
        2,
    ),
    "recurrent": (
        lambda: nn.Sequential(nn.LSTM(3, 4, batch_first=True), _Last(), nn.Linear(4, 2)),
        lambda: torch.randn(N, 4, 3),
        2,
    ),
    "weight-norm": (_weight_norm, lambda: torch.randn(N, 3), 2),
    "sequence-first": (
        lambda: nn.Sequential(_Turn(), nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0), _Turn(), _Mean()),
        lambda: torch.randn(N, 3, 4),
        4,
    ),
    "rms-norm": (
        lambda: nn.Sequential(nn.Linear(3, 4), nn.RMSNorm(4), nn.Linear(4, 2)),
        lambda: torch.randn(N, 3),
        2,
    ),
}


class _Last(nn.Module):
    def forward(self, x: tuple[Tensor, object]) -> Tensor:
        return x[0][:, -1]


class _Turn(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.transpose(0, 1)


class _Mean(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1)


def problem_of(name: str, dtype: torch.dtype = torch.float64) -> tg.Problem:
    if name not in CASES:
        return make(name).problem(dtype=dtype)
    torch.manual_seed(sum(map(ord, name)))
    build, data, outputs = CASES[name]
    model, X = build(), data()
    if name == "conv3d":
        model(X)
    return tg.Problem(model, nn.CrossEntropyLoss(), (X, torch.arange(N) % outputs), dtype=dtype)


@pytest.mark.parametrize("name", [*sorted(CASES), *NAMES])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_every_kind_of_layer(name: str, dtype: torch.dtype) -> None:
    tolerance = 1e-10 if dtype == torch.float64 else 1e-5
    G = gradients(problem_of(name))  # [N, P]
    problem = problem_of(name, dtype)
    layers = PerLayer(problem)
    random = torch.Generator().manual_seed(0)
    u = torch.randn(problem.N, 3, generator=random, dtype=torch.float64)
    D = torch.randn(3, problem.P, generator=random, dtype=torch.float64)
    assert relative(layers.gram().double(), G @ G.T) < tolerance
    assert relative(layers.lift(u).double(), u.T @ G) < tolerance
    assert relative(layers.project(D.to(dtype)).double(), G @ D.T) < tolerance
    assert relative(layers.squares().double(), G.square().sum(1)) < tolerance
    assert relative(layers.mean_squares().double(), G.square().mean(0)) < tolerance
    assert relative(layers.mean().double(), G.mean(0)) < 10 * tolerance


KNOWN = ["mlp-mse", "grouped-dilated", "transformer", "batchnorm-eval", "shared", "cross-attention", "rms-norm"]
KNOWN += ["transposed", "transposed-every-option", "separate-projections", "instance-norm", "circular", "conv3d"]


@pytest.mark.parametrize("name", KNOWN)
def test_known_layers_are_not_formed_sample_by_sample(name: str) -> None:
    assert {entry.form for entry in PerLayer(problem_of(name)).plan} <= {"outer", "tokens", "rows"}


def test_unknown_uses_are_found_out() -> None:
    plan = PerLayer(problem_of("weights-by-hand")).plan
    mapped = {name for entry in plan if entry.form == "mapped" for name in entry.names}
    assert {"scale", "matrix", "position.weight"} <= mapped
    plan = PerLayer(problem_of("weight-norm")).plan
    assert {name for entry in plan if entry.form != "mapped" for name in entry.names} >= {"2.weight", "2.bias"}


@pytest.mark.parametrize("name", ["mlp-mse", "cnn-maxpool", "transformer", "shared", "weights-by-hand"])
def test_blocks_give_what_the_whole_gives(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = problem_of(name)
    G = gradients(problem)
    monkeypatch.setattr(module, "_BLOCK_BYTES", 4 * 8 * problem.P)
    monkeypatch.setattr(factors, "_TILE", 2)
    layers = PerLayer(problem)
    assert len(layers.blocks()) > 1
    D = torch.randn(2, problem.P, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert relative(layers.gram(), G @ G.T) < 1e-10
    assert relative(layers.product(D, None), D @ G.T @ G / problem.N) < 1e-10
    assert relative(covariance(problem)._product(D.T), torch.cov(G.T, correction=0) @ D.T) < 1e-10


class _Big(nn.Module):
    """A table too large for explicit gradients, and a linear layer on few positions with many weights."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.wide = nn.Embedding(3000, 6), nn.Linear(6, 90)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.wide(self.table(x))).sum(1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_large_embeddings_and_a_few_positions(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    X = torch.randint(0, 3000, (40, 2))
    X[:, 1] = X[0, 1]
    X[3] = X[3, 0]  # a token twice in one sample
    model = _Big()
    G = gradients(tg.Problem(model, nn.CrossEntropyLoss(), (X, torch.arange(40))))
    problem = tg.Problem(model, nn.CrossEntropyLoss(), (X, torch.arange(40)), dtype=dtype)
    layers = PerLayer(problem)
    assert {entry.form for entry in layers.plan} == {"tokens", "outer"}
    tolerance = 1e-10 if dtype == torch.float64 else 1e-5
    D = torch.randn(2, problem.P, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert relative(layers.gram().double(), G @ G.T) < tolerance
    assert relative(layers.project(D.to(dtype)).double(), G @ D.T) < tolerance
    assert relative(layers.lift(G @ D.T).double(), (G @ D.T).T @ G) < tolerance
    assert relative(layers.squares().double(), G.square().sum(1)) < tolerance
    assert relative(layers.mean_squares().double(), G.square().mean(0)) < tolerance
    part = slice(3, 17)
    piece = next(p for p in layers.factors(torch.arange(40)) if p.name == "table.weight")
    rows = G[:, layers.places["table.weight"]]
    assert relative(piece.part(part).gram(piece).double(), rows[part] @ rows.T) < tolerance


# ---------------------------------------------------------------------- eigenpairs, spectrum, trace, diagonal


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", ["cnn-maxpool", "transformer", "tied", "cross-attention"])
def test_eigenpairs_trace_and_diagonal(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setattr(sys.modules["thermograd.noise.covariance"], "_DENSE", 0)
    G = gradients(problem_of(name))
    C = torch.cov(G.T, correction=0)
    operator = covariance(problem_of(name, dtype))
    assert not operator.keeps_gradients
    tolerance = 1e-10 if dtype == torch.float64 else 1e-5
    pairs = operator.eigenpairs(5, tol=1e-4)
    true = torch.linalg.eigvalsh(C).flip(0)
    assert relative(pairs.eigenvalues.double(), true[:5]) < tolerance
    V = pairs.eigenvectors.double()
    residual = (C @ V - V * pairs.eigenvalues.double()).norm(dim=0) / pairs.eigenvalues
    # the residuals are measured on random sums in the operator's own precision: of the right size
    assert bool((residual <= 5 * pairs.residuals + 5 * torch.finfo(dtype).eps * true[0] / pairs.eigenvalues).all())
    assert relative(operator.spectrum().double(), true[: min(C.shape[0], len(G))]) < tolerance
    assert operator.trace() == pytest.approx(float(C.trace()), rel=10 * tolerance)
    assert relative(operator.diagonal().double(), C.diagonal()) < 10 * tolerance


def test_the_vectors_of_the_bench_are_the_vectors_of_lanczos() -> None:
    problem = teacher(samples=900, hidden=250)
    pairs = covariance_eigenpairs(problem, 12, tol=1e-8)
    C = covariance(problem)
    residual = (C @ pairs.eigenvectors - pairs.eigenvectors * pairs.eigenvalues).norm(dim=0) / pairs.eigenvalues
    assert float(residual.max()) < 1e-7
    assert bool(pairs.converged.all())
    assert relative(pairs.eigenvalues, torch.linalg.eigvalsh(C.gram()).flip(0)[:12]) < 1e-12


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_leading_pairs_of_a_matrix_with_copies(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    values = torch.cat([torch.full((9,), 5.0), torch.linspace(1, 4, 20), torch.rand(971)]).double()
    Q = torch.linalg.qr(torch.randn(1000, 1000).double())[0]
    K = ((Q * values) @ Q.T).to(dtype)
    found, vectors, rest = leading(K, 29, 1e-5, seed=0)
    torch.testing.assert_close(found.double(), values[:29].sort(descending=True)[0], rtol=1e-5, atol=0)
    assert float((rest.norm(dim=0) / found).max()) < 3e-5
    torch.testing.assert_close(vectors.T @ vectors, torch.eye(29, dtype=dtype), atol=1e-5, rtol=0)


def test_double_centring() -> None:
    rows = torch.randn(30, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 3
    off = rows - rows.mean(0)
    torch.testing.assert_close(centre(rows @ rows.T), off @ off.T)


def test_subsampled_spectrum_has_an_honest_trace_error() -> None:
    problem = teacher(samples=1500, hidden=6)
    truth = covariance_spectrum(problem)
    assert truth.trace_stderr == 0
    assert truth.trace == pytest.approx(covariance(problem).trace(), rel=1e-10)
    found = [covariance_spectrum(problem, n=200, seed=s) for s in range(40)]
    z = np.array([(f.trace * 200 / 199 - truth.trace) / f.trace_stderr for f in found])
    # squares have heavy tails: scores are skewed, their spread is 1 within 40 draws (error 0.11)
    assert 0.5 < z.std() < 1.6
    assert abs(z.mean()) < 4.5 / np.sqrt(40) + 0.3
    first = np.array([f.eigenvalues[0] for f in found])
    stated = np.mean([f.eigenvalues_stderr[0] for f in found])
    assert 0.4 < stated / first.std() < 2.5


def test_what_is_not_finite_is_named() -> None:
    class Root(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(2, 1, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x).sqrt()  # zero with an infinite slope for the last sample

    model = Root()
    nn.init.ones_(model.linear.weight)
    X = torch.ones(8, 2)
    X[7] = torch.tensor([1.0, -1.0])  # beyond the samples that the setup looks at
    problem = tg.Problem(model, lambda f, t: f.sum(), (X, torch.zeros(8, 1)))
    with pytest.raises(NonFiniteError, match=r"sample 7.*linear\.weight"):
        PerLayer(problem).gram()


# ---------------------------------------------------------------------- what is built on it


@pytest.mark.parametrize("name", ["cnn-maxpool", "transformer", "mlp-mse"])
def test_strength_scale_and_projections_do_not_depend_on_the_way(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from thermograd.noise import gradients as ways

    problem = problem_of(name)
    D = torch.randn(problem.P, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def measured() -> list[np.ndarray]:
        scale = tg.noise.noise_scale(problem)
        return [
            np.asarray(tg.noise.strength(problem).value),
            np.asarray([scale.simple, scale.stderr, scale.curvature_weighted, scale.gradient_square_stderr]),
            tg.noise.projections(problem, D).numpy(),
            ways.combinations(problem, problem.theta, torch.arange(problem.N), 2, seed=1).numpy(),
        ]

    plain = measured()
    monkeypatch.setattr(ways, "_LARGE", 0)
    for a, b in zip(plain, measured()):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12)


def test_a_large_common_gradient_leaves_the_strength_accurate(monkeypatch: pytest.MonkeyPatch) -> None:
    from thermograd.noise import gradients as ways

    monkeypatch.setattr(ways, "_LARGE", 0)
    torch.manual_seed(0)
    X = 1e6 + torch.randn(20, 3, dtype=torch.float64)
    model = nn.Linear(3, 1, bias=False).double()
    problem = tg.Problem(model, lambda f, t: f.sum(), (X, torch.zeros(20, 1)))
    assert tg.noise.strength(problem).value == pytest.approx(float(torch.cov(X.T, correction=0).trace()), rel=1e-8)


@pytest.mark.parametrize("name", ["cnn-maxpool", "transformer", "mlp-mse", "weights-by-hand"])
def test_spectra_of_decoupling_do_not_depend_on_the_way(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from thermograd.noise import gradients as ways

    problem = problem_of(name)
    plain = tg.noise.decoupling(problem, k=6)
    monkeypatch.setattr(ways, "_LARGE", 0)
    other = tg.noise.decoupling(problem, k=6)
    np.testing.assert_allclose(other.eigenvalues, plain.eigenvalues, rtol=1e-9, atol=1e-12 * plain.trace)
    np.testing.assert_allclose(other.decoupled_eigenvalues, plain.decoupled_eigenvalues, rtol=1e-9)
    assert other.ratio == pytest.approx(plain.ratio, rel=1e-12)


def test_errors_of_subsampled_eigenvalues_are_honest() -> None:
    # 40 draws of 5 eigenvalues: honest 95% intervals hold 176 of 200 with a probability above 0.99, draws correlated
    problem = teacher(samples=1200, hidden=6)
    true = covariance_spectrum(problem).eigenvalues[:5]
    draws = [covariance_spectrum(problem, n=300, seed=seed) for seed in range(40)]
    values = np.array([d.eigenvalues[:5] - d.eigenvalues_bias[:5] for d in draws])
    errors = np.array([d.eigenvalues_stderr[:5] for d in draws])
    assert (np.abs(values - true) < 1.96 * errors).sum() >= 165
    whole = covariance_spectrum(problem)
    assert not whole.eigenvalues_stderr.any()
    assert not whole.eigenvalues_bias.any()
    assert whole.trace_stderr == 0.0
