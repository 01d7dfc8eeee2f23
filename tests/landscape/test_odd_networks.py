"""Layers and losses with odd features: products against plain torch, by either way, or a clear refusal."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import thermograd as tg
from thermograd.errors import ModelError, NotAvailableError
from thermograd.landscape import gauss_newton, hessian

from .test_curvature import relative

N = 6


class Masked(nn.Module):
    """Self-attention over padded sequences, causal, with the embedding of the padding left alone."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(6, 4, padding_idx=0)
        self.attention, self.head = nn.MultiheadAttention(4, 2, batch_first=True), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h, padding = self.words(x), x == 0
        padding[:, 0] = False
        causal = torch.triu(torch.ones(x.shape[1], x.shape[1], dtype=torch.bool), 1)
        out, _ = self.attention(h, h, h, key_padding_mask=padding, attn_mask=causal, need_weights=False)
        return self.head(out.masked_fill(padding[..., None], 0).sum(1))


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.Module], **options: Any) -> None:
        super().__init__()
        self.cells, self.head = kind(3, 4, batch_first=True, **options), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.cells(x)[0][:, -1])


class TiedWords(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.inner, self.out = nn.Embedding(6, 4), nn.Linear(4, 4), nn.Linear(4, 6, bias=False)
        self.out.weight = self.words.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.inner(self.words(x).mean(1))))


class Centres(nn.Module):
    """Radial functions with centres of their own, and a parameter without dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Bilinear(4, 4, 3), nn.Linear(5, 2)
        self.centres, self.scale = nn.Parameter(torch.randn(5, 3)), nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        distance = (torch.sin(self.inner(x, x))[:, None] - self.centres).square().sum(-1)
        return self.head((-distance * self.scale.exp()).exp())


def _sequential(*layers: nn.Module) -> nn.Sequential:
    return nn.Sequential(*layers)


def _images(channels: int, size: int) -> Tensor:
    return torch.randn(N, channels, size, size)


def _classes(count: int) -> Tensor:
    return torch.arange(N) % count


def _focal(output: Tensor, target: Tensor) -> Tensor:
    each = F.cross_entropy(output, target, reduction="none")
    return ((1 - (-each).exp()) ** 2 * each).mean()


CASES: dict[str, Callable[[], tuple[nn.Module, Any, Tensor, Tensor]]] = {
    "grouped": lambda: (
        _sequential(
            *(nn.Conv2d(4, 8, 3, groups=4, bias=False), nn.PReLU(8), nn.Conv2d(8, 4, 2, dilation=2, groups=2)),
            *(nn.Flatten(), nn.Linear(16, 3)),
        ),
        nn.CrossEntropyLoss(),
        _images(4, 6),
        _classes(3),
    ),
    "transposed and circular": lambda: (
        _sequential(
            *(nn.ConvTranspose2d(2, 4, 3, stride=2, output_padding=1, groups=2), nn.GELU(approximate="tanh")),
            *(nn.Conv2d(4, 2, 3, padding="same", padding_mode="circular"), nn.AdaptiveAvgPool2d(2)),
            *(nn.Flatten(), nn.Linear(8, 2)),
        ),
        nn.SmoothL1Loss(beta=0.3),
        _images(2, 3),
        torch.randn(N, 2),
    ),
    "overlapping pools": lambda: (
        _sequential(
            *(nn.Conv2d(1, 3, 3), nn.ReLU6(), nn.MaxPool2d(3, stride=1, padding=1), nn.Conv2d(3, 2, 2), nn.ELU()),
            *(nn.MaxPool2d(2, ceil_mode=True), nn.Flatten(), nn.Linear(8, 3)),
        ),
        nn.CrossEntropyLoss(),
        _images(1, 6),
        _classes(3),
    ),
    "masked attention": lambda: (Masked(), nn.CrossEntropyLoss(), torch.randint(0, 6, (N, 5)), _classes(3)),
    "tied words": lambda: (TiedWords(), nn.CrossEntropyLoss(), torch.randint(0, 6, (N, 3)), _classes(6)),
    "lstm": lambda: (Recurrent(nn.LSTM), nn.MSELoss(), torch.randn(N, 2, 3), torch.randn(N, 2)),
    "radial": lambda: (Centres(), nn.HuberLoss(delta=0.4), torch.randn(N, 4), torch.randn(N, 2)),
    "in place": lambda: (
        _sequential(nn.Linear(4, 6), nn.ReLU(inplace=True), nn.RMSNorm(6), nn.SiLU(inplace=True), nn.Linear(6, 2)),
        nn.CrossEntropyLoss(),
        torch.randn(N, 4),
        _classes(2),
    ),
    "pixels with a void class": lambda: (
        _sequential(nn.Conv2d(1, 3, 3, padding=1), nn.Softplus(), nn.Conv2d(3, 4, 1)),
        nn.CrossEntropyLoss(ignore_index=255, weight=torch.tensor([1.0, 2, 0.5, 0.1]).double()),
        _images(1, 3),
        torch.where(torch.rand(N, 3, 3) < 0.2, 255, torch.randint(0, 4, (N, 3, 3))),
    ),
    "weights, smoothing and a void class": lambda: (
        _sequential(nn.Linear(3, 5), nn.Hardswish(), nn.Linear(5, 4)),
        nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2, 0.5, 0.1]).double(), label_smoothing=0.2, ignore_index=1),
        torch.randn(N, 3),
        _classes(4),
    ),
    "positive weights": lambda: (
        _sequential(nn.Linear(3, 5), nn.SELU(), nn.Linear(5, 3)),
        nn.BCEWithLogitsLoss(pos_weight=torch.tensor([1.0, 3, 0.2]).double()),
        torch.randn(N, 3),
        (torch.randn(N, 3) > 0).double(),
    ),
    "focal": lambda: (_sequential(nn.Linear(3, 5), nn.CELU(), nn.Linear(5, 3)), _focal, torch.randn(N, 3), _classes(3)),
}


@pytest.mark.parametrize("name", CASES)
def test_products(name: str) -> None:
    torch.manual_seed(sum(map(ord, name)))
    model, loss, X, y = CASES[name]()
    model = model.double()
    X, y = (t.double() if t.is_floating_point() else t for t in (X, y))
    problem = tg.Problem(model, loss, (X, y), chunk_size=4)
    V = torch.randn(problem.P, 2, dtype=torch.float64)

    def outputs(theta: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.MATH):
            return functional_call(model, problem.unflatten(theta), (X,))

    theta = problem.theta
    f = outputs(theta).detach()
    # backwards twice, which differs from forward mode where a layer stops its gradient
    H = torch.autograd.functional.hessian(lambda t: loss(outputs(t), y), theta)
    inner = torch.autograd.functional.hessian(lambda z: loss(z.view_as(f), y), f.flatten())
    J = torch.autograd.functional.jacobian(outputs, theta).reshape(-1, problem.P)
    single = tg.Problem(model, loss, (X, y), dtype=torch.float32)
    for operator, true in ((hessian, H @ V), (gauss_newton, J.T @ (inner @ (J @ V)))):
        assert relative(operator(problem) @ V, true) < 1e-10
        assert relative((operator(single) @ V.float()).double(), true) < 1e-5
        for given, bound in ((problem, 1e-10), (single, 1e-5)):
            try:
                found = operator(given, method="linearised") @ V
            except NotAvailableError:  # refused, and "auto" goes the other way
                assert name in ("transposed and circular", "lstm")
                continue
            assert relative(found.double(), true) < bound


@pytest.mark.parametrize("name", ["transposed and circular", "masked attention", "lstm"])
def test_what_cannot_be_linearised_goes_the_other_way(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model, loss, X, y = CASES[name]()
    problem = tg.Problem(model, loss, (X, y), dtype=torch.float32)
    V = torch.randn(problem.P, 9)
    true = hessian(problem, method="reverse") @ V
    monkeypatch.setattr("thermograd.landscape.curvature.worth_tracing", lambda *_: True)
    H = hessian(problem)
    assert relative(H @ V, true) < 1e-5
    assert H.method == ("linearised" if name == "masked attention" else "reverse")


@pytest.mark.parametrize("dim", [0, 1, None])
def test_weight_norm(dim: int | None) -> None:
    """Held against differences of the gradient: torch's own second derivative of its fused kernel is wrong."""
    torch.manual_seed(0)
    norm = nn.utils.parametrizations.weight_norm
    model = _sequential(norm(nn.Linear(4, 3), dim=dim), nn.Tanh(), nn.Linear(3, 2)).double()
    X, y = torch.randn(N, 4).double(), torch.randn(N, 2).double()
    problem = tg.Problem(model, nn.MSELoss(), (X, y))
    torch.testing.assert_close(problem.loss(), nn.MSELoss()(model(X), y).detach(), rtol=1e-13, atol=0)
    v = torch.randn(problem.P).double()
    step = 1e-5
    slope = (problem.gradient(problem.theta + step * v) - problem.gradient(problem.theta - step * v)) / (2 * step)
    for method in ("reverse", "linearised"):
        assert relative(hessian(problem, method=method) @ v, slope) < 1e-7


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
def test_a_model_that_cannot_be_copied_is_refused() -> None:
    model = nn.utils.weight_norm(nn.Linear(4, 2))
    with pytest.raises(ModelError, match="cannot be copied"):
        tg.Problem(model, nn.MSELoss(), (torch.randn(3, 4), torch.randn(3, 2)))


def test_a_layer_without_second_derivative_is_named() -> None:
    model = _sequential(nn.EmbeddingBag(6, 4), nn.Tanh(), nn.Linear(4, 2))
    problem = tg.Problem(model, nn.CrossEntropyLoss(), (torch.randint(0, 6, (N, 3)), _classes(2)))
    with pytest.raises(NotAvailableError, match=r"cannot be differentiated twice.*embedding_bag"):
        hessian(problem) @ torch.ones(problem.P).double()
