"""Small networks of every kind, with data, a loss and the mean loss written out independently."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import thermograd as tg

SAMPLES = 14


@dataclass
class Case:
    """A network with data: the problem thermograd sees, and the same functions by plain torch."""

    model: nn.Module
    loss: Any
    X: Tensor
    y: Tensor
    params: Any = None
    chunk_size: int | None = None

    def problem(self, **options: Any) -> tg.Problem:
        options = {"params": self.params, "chunk_size": self.chunk_size, **options}
        return tg.Problem(self.model, self.loss, (self.X, self.y), **options)

    def outputs(self, problem: tg.Problem, theta: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.MATH):
            return functional_call(self.model, problem.unflatten(theta), (self.X,))

    def mean_loss(self, problem: tg.Problem, theta: Tensor) -> Tensor:
        return self.loss(self.outputs(problem, theta), self.y)


class Tied(nn.Module):
    """An autoencoder whose decoder is its encoder's transpose, with one layer used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)
        self.outer = nn.Linear(5, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.inner(torch.tanh(self.inner(self.outer(x)))))
        return h @ self.outer.weight


class Words(nn.Module):
    """Embedding, mean over positions, linear."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(6, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.embedding(x)).mean(1))


class Attention(nn.Module):
    """One transformer encoder layer over embedded tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 4)
        self.layer = nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0, batch_first=True, activation="gelu")
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(self.embedding(x)).mean(1))


def _images(channels: int = 1) -> Tensor:
    return torch.randn(SAMPLES, channels, 6, 6)


def _labels(classes: int) -> Tensor:
    return torch.arange(SAMPLES) % classes


def _pseudo_huber(output: Tensor, target: Tensor) -> Tensor:
    return ((1 + (output - target).square()).sqrt() - 1).mean()


def _frozen() -> nn.Module:
    model = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 2))
    model[2].requires_grad_(False)
    return model


def _batchnorm() -> nn.Module:
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 2))
    model(torch.randn(30, 1, 6, 6))  # running statistics that are not trivial
    return model.eval()


def _mlp(inputs: int, outputs: int, activation: type[nn.Module] = nn.Tanh) -> nn.Module:
    return nn.Sequential(nn.Linear(inputs, 6), activation(), nn.Linear(6, 5), activation(), nn.Linear(5, outputs))


def _cases() -> dict[str, Callable[[], Case]]:
    N = SAMPLES
    return {
        "mlp-mse": lambda: Case(_mlp(3, 2), nn.MSELoss(), torch.randn(N, 3), torch.randn(N, 2), chunk_size=5),
        "relu-cross-entropy": lambda: Case(_mlp(3, 4, nn.ReLU), nn.CrossEntropyLoss(), torch.randn(N, 3), _labels(4)),
        "weights-smoothing": lambda: Case(
            _mlp(3, 3),
            nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 0.5]).double(), label_smoothing=0.1),
            torch.randn(N, 3),
            _labels(3),
        ),
        "bce": lambda: Case(_mlp(3, 1), nn.BCEWithLogitsLoss(), torch.randn(N, 3), _labels(2)[:, None].double()),
        "huber": lambda: Case(_mlp(3, 2), nn.HuberLoss(delta=0.7), torch.randn(N, 3), torch.randn(N, 2)),
        "custom": lambda: Case(_mlp(3, 2), _pseudo_huber, torch.randn(N, 3), torch.randn(N, 2)),
        "cnn-maxpool": lambda: Case(
            nn.Sequential(
                nn.Conv2d(1, 3, 3),
                nn.ReLU(),
                nn.MaxPool2d(2),
                nn.Conv2d(3, 4, 2),
                nn.Tanh(),
                nn.Flatten(),
                nn.Linear(4, 3),
            ),
            nn.CrossEntropyLoss(),
            _images(),
            _labels(3),
        ),
        "grouped-dilated": lambda: Case(
            nn.Sequential(
                nn.Conv2d(2, 4, 2, groups=2),
                nn.GELU(),
                nn.Conv2d(4, 2, 2, dilation=2, stride=2),
                nn.Flatten(),
                nn.Linear(8, 2),
            ),
            nn.MSELoss(),
            _images(2),
            torch.randn(N, 2),
        ),
        "layernorm": lambda: Case(
            nn.Sequential(nn.Linear(3, 6), nn.LayerNorm(6), nn.SiLU(), nn.Linear(6, 3)),
            nn.CrossEntropyLoss(),
            torch.randn(N, 3),
            _labels(3),
        ),
        "groupnorm": lambda: Case(
            nn.Sequential(nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4), nn.Tanh(), nn.Flatten(), nn.Linear(64, 2)),
            nn.CrossEntropyLoss(),
            _images(),
            _labels(2),
        ),
        "batchnorm-eval": lambda: Case(_batchnorm(), nn.CrossEntropyLoss(), _images(), _labels(2)),
        "embedding": lambda: Case(Words(), nn.CrossEntropyLoss(), torch.randint(0, 6, (N, 4)), _labels(3)),
        "transformer": lambda: Case(Attention(), nn.CrossEntropyLoss(), torch.randint(0, 5, (N, 3)), _labels(2)),
        "tied": lambda: Case(Tied(), nn.MSELoss(), torch.randn(N, 5), torch.randn(N, 5)),
        "frozen": lambda: Case(_frozen(), nn.CrossEntropyLoss(), torch.randn(N, 3), _labels(2)),
        "subset": lambda: Case(_mlp(3, 3), nn.CrossEntropyLoss(), torch.randn(N, 3), _labels(3), params="2.*"),
    }


NAMES = sorted(_cases())


def make(name: str) -> Case:
    """The case of that name, in float64, the same every time."""
    torch.manual_seed(sum(map(ord, name)))
    case = _cases()[name]()
    case.model.double()
    if case.X.is_floating_point():
        case.X = case.X.double()
    if case.y.is_floating_point():
        case.y = case.y.double()
    return case


def teacher(samples: int = 200, hidden: int = 8, outputs: int = 1, noise: float = 0.3, seed: int = 0) -> tg.Problem:
    """A trained-looking regression problem: student at a perturbed teacher, half squared error."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, hidden), nn.Tanh(), nn.Linear(hidden, outputs)).double()
    X = torch.randn(samples, 4).double()
    with torch.no_grad():
        y = model(X) + noise * torch.randn(samples, outputs).double()
    return tg.Problem(model, lambda f, t: 0.5 * F.mse_loss(f, t), (X, y))
