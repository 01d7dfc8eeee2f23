"""Constraints as a plugin of Avalanche, where that library is installed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from thermograd.continual import EWC, Constraint, L2ToAnchor, LandscapeConstraint, LayerLandscape, SynapticIntelligence
from thermograd.errors import InputError, NotAvailableError

pytest.importorskip("avalanche", reason="avalanche-lib is not installed", exc_type=(ImportError, RuntimeError))
try:
    from thermograd.integrations.avalanche import ConstraintPlugin
except NotAvailableError as error:
    pytest.skip(str(error), allow_module_level=True)
from avalanche.benchmarks import nc_benchmark
from avalanche.models import IncrementalClassifier, MTSimpleMLP, SimpleMLP
from avalanche.training.supervised import Naive


class _Points(TensorDataset):
    """Points with the labels that Avalanche looks for."""

    def __init__(self, X: Tensor, y: Tensor):
        super().__init__(X, y)
        self.targets = y.tolist()


def benchmark(task_labels: bool) -> Any:
    random = torch.Generator().manual_seed(0)
    y = torch.arange(160) % 4
    X = torch.randn(160, 784, generator=random) / 10 + nn.functional.one_hot(y, 784).float()
    points = _Points(X, y)
    return nc_benchmark(
        points, points, 2, task_labels=task_labels, shuffle=False, class_ids_from_zero_in_each_exp=task_labels
    )


class Growing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.head = nn.Linear(784, 8), IncrementalClassifier(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.trunk(x).relu())


MODELS = {
    "single head": lambda: SimpleMLP(num_classes=4, hidden_size=8, drop_rate=0.0),
    "growing head": Growing,
    "multi head": lambda: MTSimpleMLP(hidden_size=8),
}


def trained(model: nn.Module, constraint: Constraint, in_loss: bool, labels: bool) -> Any:
    plugin = ConstraintPlugin(constraint, in_loss)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    strategy = Naive(
        model=model, optimizer=optimizer, criterion=nn.CrossEntropyLoss(), train_mb_size=20, train_epochs=3,
        plugins=[plugin], evaluator=None,
    )  # fmt: skip
    before = None
    for experience in benchmark(labels).train_stream:
        strategy.train(experience)
        before = before if before is not None else next(model.parameters()).detach().clone()
    return strategy, before


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("in_loss", [False, True])
@pytest.mark.parametrize(
    "make",
    [
        lambda: EWC(1.0),
        lambda: LayerLandscape(1.0),
        lambda: LandscapeConstraint(1.0, rank=2),
        lambda: SynapticIntelligence(0.1),
    ],
)
def test_two_experiences(name: str, in_loss: bool, make: Any) -> None:
    torch.manual_seed(0)
    strategy, _ = trained(MODELS[name](), make(), in_loss, name == "multi head")
    constraint = strategy.plugins[0].constraint
    assert constraint.tasks == 2
    assert all(bool(torch.isfinite(p).all()) for p in strategy.model.parameters())


def test_a_strong_constraint_holds_the_weights() -> None:
    torch.manual_seed(0)
    strategy, before = trained(MODELS["single head"](), L2ToAnchor(1e6), False, False)
    torch.testing.assert_close(next(strategy.model.parameters()).detach(), before, rtol=0, atol=1e-5)


def test_what_the_plugin_cannot_do_is_refused() -> None:
    with pytest.raises(InputError, match="trajectory"):
        ConstraintPlugin(LandscapeConstraint(directions="trajectory"))
    with pytest.raises(InputError, match="constraint"):
        ConstraintPlugin(nn.Linear(1, 1))  # type: ignore[arg-type]
