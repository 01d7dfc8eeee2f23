"""Where the directions of a landscape constraint come from: the path, eigenvectors, layers, both, and how many."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

import thermograd as tg
from thermograd.continual import EWC, LandscapeConstraint, LayerLandscape
from thermograd.continual.curvature import tempered
from thermograd.continual.forms import Blocks
from thermograd.errors import InputError

Data = tuple[Tensor, Tensor]
LOSS = nn.CrossEntropyLoss()


def path(problem: tg.Problem, rows: int = 30) -> Tensor:
    """A random walk with steps of many sizes, [T, P]."""
    random = torch.Generator().manual_seed(0)
    steps = torch.randn(rows, problem.P, generator=random, dtype=torch.float64)
    return problem.theta + (steps * torch.linspace(0.01, 0.1, problem.P).double()).cumsum(0)


def test_principal_components_of_each_layer_by_itself(network: nn.Module, blobs: Data) -> None:
    problem = tg.Problem(network, LOSS, blobs)
    walk = path(problem)
    held = LandscapeConstraint(directions="trajectory", weights="curvature", rank=3, by_layer=True)
    form = held.fit(problem, run=walk.numpy()).form
    assert isinstance(form, Blocks)
    assert list(form.parts) == ["0.weight", "2.weight"]
    H = tg.landscape.hessian(problem).dense()
    for at, part in form.parts.values():
        expected = tg.trajectory.pca(walk[:, at].numpy(), held_out=False, n=3).directions
        torch.testing.assert_close((part.directions * expected).sum(0).abs(), torch.ones(3).double())
        own = (expected * (H[at][:, at] @ expected)).sum(0).clamp_min(0)
        torch.testing.assert_close(part.curvature, own)
    assert held.memory == 3 * problem.P + 2 * 3 * 2  # as many numbers as three directions of the whole network
    with pytest.raises(InputError, match="the run has 3 weights"):
        LandscapeConstraint(directions="trajectory", by_layer=True).fit(problem, run=torch.randn(20, 3).numpy())


def test_a_window_of_the_path_counts_for_layers_too(network: nn.Module, blobs: Data) -> None:
    problem = tg.Problem(network, LOSS, blobs)
    walk = path(problem).numpy()
    options = {"directions": "trajectory", "weights": "curvature", "rank": 2, "by_layer": True}
    some = LandscapeConstraint(window=12, **options).fit(problem, run=walk)  # type: ignore[arg-type]
    same = LandscapeConstraint(**options).fit(problem, run=walk[-12:])  # type: ignore[arg-type]
    with torch.no_grad():
        network[0].weight.add_(0.3)
    assert some.penalty(network).item() == pytest.approx(same.penalty(network).item(), rel=1e-9)


def test_two_kinds_of_eigenvectors_layer_by_layer(network: nn.Module, blobs: Data) -> None:
    problem = tg.Problem(network, LOSS, blobs)
    both = LandscapeConstraint(directions=("hessian", "gauss_newton"), weights="curvature", rank=2, by_layer=True)
    H = tg.landscape.hessian(problem).dense()
    for at, part in both.fit(problem).form.parts.values():  # type: ignore[attr-defined]
        inside = part.directions.T @ H[at][:, at] @ part.directions
        torch.testing.assert_close(inside, torch.diag(inside.diagonal()), rtol=0, atol=1e-9)
        top = torch.linalg.eigvalsh(H[at][:, at])[-1]
        assert inside[0, 0].item() == pytest.approx(top.item(), rel=1e-3)


def test_hessian_directions_stay_those_of_the_hessian_when_tempered(network: nn.Module, blobs: Data) -> None:
    problem = tg.Problem(network, LOSS, blobs)
    plain = LandscapeConstraint(directions="hessian", weights="curvature", rank=2).fit(problem).form
    hot = LandscapeConstraint(directions="hessian", weights="curvature", rank=2, temperature=math.inf).fit(problem)
    overlap = (plain.directions * hot.form.directions).sum(0).abs()  # type: ignore[attr-defined]
    torch.testing.assert_close(overlap, torch.ones(2).double())
    G = tg.landscape.gauss_newton(tempered(problem, math.inf)).dense()
    own = (plain.directions * (G @ plain.directions)).sum(0)  # type: ignore[attr-defined]
    torch.testing.assert_close(hot.form.curvature, own)  # type: ignore[attr-defined]


def test_memory_is_bounded_from_the_first_task_on(network: nn.Module, blobs: Data) -> None:
    problem = tg.Problem(network, LOSS, blobs)
    pair = LandscapeConstraint(directions=("trajectory", "gauss_newton"), weights="curvature", rank=3, temperature=4.0)
    for tasks in (1, 2, 3):
        pair.fit(problem, run=path(problem).numpy())
        assert (pair.tasks, pair.memory) == (tasks, 6 * (problem.P + 2))
    few = LandscapeConstraint(weights="curvature", rank=6, capacity=2).fit(problem)
    assert few.memory == 2 * (problem.P + 2)
    whole = LandscapeConstraint(weights="curvature", rank=6).fit(problem).form.curvature  # type: ignore[attr-defined]
    torch.testing.assert_close(few.form.curvature, whole[:2])  # type: ignore[attr-defined]


@pytest.mark.parametrize("rise", [1.2, math.e, 50.0])
def test_of_a_parabola_every_rise_gives_the_curvature(rise: float) -> None:
    random = torch.Generator().manual_seed(0)
    X = torch.randn(40, 3, generator=random, dtype=torch.float64)
    y = X.sum(1, keepdim=True) + torch.randn(40, 1, generator=random, dtype=torch.float64)
    model = nn.Linear(3, 1, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(torch.linalg.lstsq(X, y).solution.T)
    problem = tg.Problem(model, nn.MSELoss(), (X, y))
    held = LandscapeConstraint(rank=3, rise=rise).fit(problem).form
    exact = torch.linalg.eigvalsh(2 * X.T @ X / len(X)).flip(0)
    torch.testing.assert_close(held.curvature, exact, rtol=1e-3, atol=0)  # type: ignore[attr-defined]


def test_a_larger_rise_sees_the_wall_beyond_the_parabola() -> None:
    """Of L = 1 + w^4 the flatness is 2 (r - 1)^(1/4), and so h = 2 (r - 1)^(1/2)."""
    problem = tg.Problem.from_function(
        lambda w, x: 1 + (w**4).sum() + 0 * x.sum(), torch.zeros(1).double(), torch.zeros(2, 1).double()
    )
    for rise in (math.e, 101.0):
        held = LandscapeConstraint(directions="hessian", rank=1, rise=rise).fit(problem).form
        assert held.curvature.item() == pytest.approx(2 * math.sqrt(rise - 1), rel=1e-3)  # type: ignore[attr-defined]


def test_smoothed_labels_have_the_curvature_of_plain_ones(network: nn.Module, blobs: Data) -> None:
    for make in (lambda: EWC(), lambda: LayerLandscape(temperature=math.inf)):
        plain, smooth = (make().fit(network, loss, blobs) for loss in (LOSS, nn.CrossEntropyLoss(label_smoothing=0.2)))
        with torch.no_grad():
            network[0].weight.add_(0.2)
        assert smooth.penalty(network).item() == pytest.approx(plain.penalty(network).item(), rel=1e-12)
    outputs = network(blobs[0][:1])[0].detach()
    smoothed = nn.CrossEntropyLoss(label_smoothing=0.2)
    second = torch.autograd.functional.hessian(lambda f: smoothed(f[None], blobs[1][:1]), outputs)
    p = outputs.softmax(0)
    torch.testing.assert_close(second, torch.diag(p) - torch.outer(p, p))
