"""Each constraint on small networks: against brute force, over restarts, with growing heads, and what is refused."""

from __future__ import annotations

import copy
import importlib
import math
import signal
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import thermograd as tg
from thermograd.continual import (
    EWC,
    Constraint,
    L2ToAnchor,
    LandscapeConstraint,
    LayerLandscape,
    RandomDirections,
    SynapticIntelligence,
)
from thermograd.continual.curvature import output_scores, tempered
from thermograd.errors import InputError, ModelError, NonFiniteError, StoreError, ThermogradWarning
from thermograd.landscape.displaced import DisplacedLosses
from thermograd.landscape.krylov import Krylov

Data = tuple[Tensor, Tensor]
LOSS = nn.CrossEntropyLoss()
LINES = importlib.import_module("thermograd.landscape.flatness")._Lines  # the package has a function of that name
MAKERS: list[Any] = [
    lambda **o: EWC(**o),
    lambda **o: L2ToAnchor(**o),
    lambda **o: LandscapeConstraint(rank=6, **o),
    lambda **o: LandscapeConstraint(rank=2, weights="curvature", by_layer=True, temperature=4.0, **o),
    lambda **o: RandomDirections(rank=3, **o),
    lambda **o: LayerLandscape(**o),
]


def moved(model: nn.Module, by: float = 0.1, seed: int = 0) -> nn.Module:
    other = copy.deepcopy(model)
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in other.parameters():
            p.add_(by * torch.randn(p.shape, generator=random, dtype=torch.float64))
    return other


def label_gradients(model: nn.Module, X: Tensor) -> tuple[Tensor, Tensor]:
    """For every sample and every label: the gradient [n, C, P] and the model's own probability [n, C]."""

    def gradient(x: Tensor, label: int) -> Tensor:
        loss = LOSS(model(x[None]), torch.tensor([label]))
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])

    rows = [torch.stack([gradient(x, label) for label in range(3)]) for x in X]
    return torch.stack(rows), model(X).softmax(1).detach()


def test_ewc_is_the_expectation_over_the_models_own_labels(network: nn.Module, blobs: Data) -> None:
    gradients, p = label_gradients(network, blobs[0])
    expected = (p[:, :, None] * gradients.square()).sum(1).mean(0)
    torch.testing.assert_close(EWC().fit(network, LOSS, blobs).form.curvature, expected)
    drawn = EWC(draws=4000).fit(network, LOSS, blobs).form.curvature
    fourth = (p[:, :, None] * gradients**4).sum(1).mean(0)
    error = (fourth / (40 * 4000)).sqrt()  # at most, of a mean over independent draws
    assert bool(((drawn - expected).abs() <= 5 * error + 1e-12).all())


def test_ewc_does_not_look_at_the_labels(network: nn.Module, blobs: Data) -> None:
    other = blobs[0], (blobs[1] + 1) % 3
    a, b = (EWC().fit(network, LOSS, data).form.curvature for data in (blobs, other))
    torch.testing.assert_close(a, b)


@pytest.mark.parametrize("temperature", [1.0, 3.0, math.inf])
def test_layer_landscape_holds_the_gauss_newton_curvature_along_its_directions(
    network: nn.Module, blobs: Data, temperature: float
) -> None:
    problem = tg.Problem(network, LOSS, blobs)
    G = tg.landscape.gauss_newton(tempered(problem, temperature)).dense()
    held = LayerLandscape(memory_per_weight=None, temperature=temperature).fit(problem).form
    seen = 0.0
    for at, form in held.parts.values():
        q, r = form.curvature.shape
        for i in range(q):
            for j in range(r):
                u = torch.zeros(problem.P, dtype=torch.float64)
                u[at] = form._vector(torch.outer(form.left[:, i], form.right[:, j]))
                assert (u @ G @ u).item() == pytest.approx(form.curvature[i, j].item(), rel=1e-8, abs=1e-14)
        seen += form.curvature.sum().item()
    assert seen == pytest.approx(torch.trace(G).item())


def test_layer_landscape_of_convolutions(blobs: Data) -> None:
    torch.manual_seed(0)
    model = tg.models.small_cnn((2, 3), classes=3, in_channels=1).double()
    X = torch.randn(12, 1, 8, 8, dtype=torch.float64)
    problem = tg.Problem(model, LOSS, (X, blobs[1][:12]))
    held = LayerLandscape(memory_per_weight=None).fit(problem).form
    total = sum(form.curvature.sum().item() for _, form in held.parts.values())
    G = tg.landscape.gauss_newton(problem).dense()
    assert total == pytest.approx(torch.trace(G).item())
    assert sorted(held.parts) == ["conv1.weight", "conv2.weight", "head.weight"]


def test_infinite_temperature_is_the_mean_square_change_of_centred_logits(blobs: Data) -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 3).double()
    held = LandscapeConstraint(rank=15, weights="curvature", temperature=math.inf).fit(model, LOSS, blobs)
    other = moved(model, 1.0)
    change = other(blobs[0]) - model(blobs[0])
    expected = 0.5 * (change - change.mean(1, keepdim=True)).square().sum(1).mean() / 3
    assert held.penalty(other).item() == pytest.approx(expected.item())


@pytest.mark.parametrize("loss", [LOSS, nn.BCEWithLogitsLoss(), nn.MSELoss()])
def test_scores_square_to_the_losss_second_derivative(network: nn.Module, blobs: Data, loss: nn.Module) -> None:
    X, y = blobs
    data = (X, y) if loss is LOSS else (X, nn.functional.one_hot(y, 3).double())
    problem = tg.Problem(network, loss, data)
    scores = output_scores(problem, torch.arange(5))
    for n in range(5):
        f, target = network(X[n : n + 1]).detach(), data[1][n : n + 1]
        H = torch.autograd.functional.hessian(lambda f, t=target: loss(f, t), f).view(3, 3)
        torch.testing.assert_close(scores[:, n].T @ scores[:, n], H)


@pytest.mark.parametrize("make", MAKERS)
def test_before_the_first_task_nothing_is_held(make: Any, network: nn.Module) -> None:
    constraint, before = make(), copy.deepcopy(network.state_dict())
    assert constraint.penalty(network).item() == 0
    constraint.proximal_step(network, 0.1)
    assert all(torch.equal(before[k], v) for k, v in network.state_dict().items())
    assert (constraint.tasks, constraint.memory) == (0, 0)


@pytest.mark.parametrize("make", MAKERS)
def test_penalty_and_proximal_step_say_the_same(make: Any, network: nn.Module, blobs: Data) -> None:
    """A proximal step is an implicit gradient step: w' = v - eta grad R(w')."""
    constraint = make(strength=3.0).fit(network, LOSS, blobs)
    other = moved(network)
    v = torch.cat([p.detach().flatten() for p in other.parameters()])
    constraint.proximal_step(other, 0.5)
    w = torch.cat([p.detach().flatten() for p in other.parameters()])
    gradient = torch.cat(
        [
            g.flatten()
            for g in torch.autograd.grad(
                constraint.penalty(other), other.parameters(), materialize_grads=True, allow_unused=True
            )
        ]
    )
    torch.testing.assert_close(w, v - 0.5 * gradient)
    assert constraint.penalty(network).item() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("make", MAKERS)
def test_memory_does_not_grow_with_the_tasks(make: Any, network: nn.Module, blobs: Data) -> None:
    constraint = make()
    sizes = []
    for seed in range(3):
        network = moved(network, seed=seed)
        sizes.append(constraint.fit(network, LOSS, blobs).memory)
    assert len(set(sizes)) == 1
    assert constraint.tasks == 3


def test_layer_landscape_keeps_to_its_memory(blobs: Data) -> None:
    torch.manual_seed(0)
    model = tg.models.mlp([4, 40, 40, 3]).double()
    P = sum(p.numel() for p in model.parameters())
    for budget in (1.0, 2.0, 4.0):
        held = LayerLandscape(memory_per_weight=budget)
        for seed in range(2):
            held.fit(moved(model, seed=seed), LOSS, blobs)
            assert 0.5 * budget * P < held.memory <= budget * P
        rotated = [form.left is not None for _, form in held.form.parts.values()]
        assert all(rotated) if budget == 4.0 else not any(rotated)
        assert all(form.curvature.shape[0] == form.outputs for _, form in held.form.parts.values())


@pytest.mark.parametrize("make", MAKERS)
def test_a_restart_goes_on_as_if_there_was_none(make: Any, network: nn.Module, blobs: Data, tmp_path: Path) -> None:
    constraint = make(strength=2.0).fit(network, LOSS, blobs)
    torch.save(constraint.state_dict(), tmp_path / "state.pt")
    again = make()
    again.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    other = moved(network)
    assert again.penalty(other).item() == constraint.penalty(other).item()
    for one in (constraint, again):
        one.fit(other, LOSS, blobs)
    third = moved(network, seed=5)
    assert again.penalty(third).item() == constraint.penalty(third).item()
    assert (again.tasks, again.memory) == (2, constraint.memory)


def test_synaptic_intelligence_restarts_amid_a_task(network: nn.Module, blobs: Data, tmp_path: Path) -> None:
    results = []
    for restart in (False, True):
        model, si = copy.deepcopy(network), SynapticIntelligence()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for part in range(2):
            with si.watch(model, optimizer):
                for _ in range(5):
                    optimizer.zero_grad()
                    LOSS(model(blobs[0]), blobs[1]).backward()
                    optimizer.step()
            if restart and part == 0:
                torch.save(si.state_dict(), tmp_path / "si.pt")
                si = SynapticIntelligence()
                si.load_state_dict(torch.load(tmp_path / "si.pt", weights_only=True))
        results.append(si.fit(model, LOSS, blobs).form.curvature)
    torch.testing.assert_close(*results)
    assert float(results[0].max()) > 0


def test_a_state_of_another_kind_is_refused(network: nn.Module, blobs: Data) -> None:
    state = EWC().fit(network, LOSS, blobs).state_dict()
    with pytest.raises(StoreError, match="'l2'"):
        L2ToAnchor().load_state_dict(state)
    with pytest.raises(StoreError):
        EWC().load_state_dict({**state, "format": 99})
    broken = {**state, "form": {**state["form"], "form": "cubic"}}
    with pytest.raises(StoreError, match="cubic"):
        EWC().load_state_dict(broken)


class Heads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Linear(4, 6)
        self.heads = nn.ModuleList([nn.Linear(6, 3)])

    def forward(self, x: Tensor) -> Tensor:
        return self.heads[-1](self.trunk(x).tanh())


@pytest.mark.parametrize("make", MAKERS)
def test_heads_that_come_later_are_free_and_earlier_ones_are_held(make: Any, blobs: Data) -> None:
    torch.manual_seed(0)
    model = Heads().double()
    constraint: Constraint = make().fit(model, LOSS, blobs)
    model.heads.append(nn.Linear(6, 3).double())
    with torch.no_grad():
        model.heads[1].weight.add_(100.0)
    assert constraint.penalty(model).item() == pytest.approx(0, abs=1e-12)
    with torch.no_grad():
        model.heads[1].weight.sub_(100.0)
    constraint.fit(model, LOSS, blobs)
    assert constraint.tasks == 2
    with torch.no_grad():
        model.heads[0].weight[0].add_(1.0)  # all rows alike would not change what the head says
    if not isinstance(constraint, RandomDirections):
        assert constraint.penalty(model).item() > 0


@pytest.mark.parametrize("make", MAKERS)
def test_a_head_that_grows_by_classes(make: Any, blobs: Data) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    constraint: Constraint = make().fit(model, LOSS, blobs)
    wider = nn.Linear(6, 5).double()
    with torch.no_grad():
        wider.weight[:3], wider.bias[:3] = model[2].weight, model[2].bias
    model[2] = wider
    assert constraint.penalty(model).item() == pytest.approx(0, abs=1e-12)
    with torch.no_grad():
        wider.weight[3:] += 10.0
    assert constraint.penalty(model).item() == pytest.approx(0, abs=1e-12)
    constraint.fit(model, LOSS, blobs)
    assert constraint.penalty(model).item() == pytest.approx(0, abs=1e-12)
    assert constraint.tasks == 2


def test_a_frozen_head_stays_held(blobs: Data) -> None:
    torch.manual_seed(0)
    model = Heads().double()
    constraint = EWC(anchors="latest").fit(model, LOSS, blobs)
    model.heads.append(nn.Linear(6, 3).double())
    model.heads[0].requires_grad_(False)
    constraint.fit(model, LOSS, blobs)
    assert constraint.penalty(model).item() == pytest.approx(0, abs=1e-12)
    with torch.no_grad():
        model.heads[0].weight.add_(0.1)
    assert constraint.penalty(model).item() > 0


def test_directions_from_a_recorded_run(network: nn.Module, blobs: Data, tmp_path: Path) -> None:
    problem = tg.Problem(network, LOSS, blobs)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    random = torch.Generator().manual_seed(0)
    with tg.Recorder(tmp_path / "run", problem, optimizer):
        for _ in range(40):
            index = torch.randint(40, (10,), generator=random)
            optimizer.zero_grad()
            LOSS(network(blobs[0][index]), blobs[1][index]).backward()
            optimizer.step()
    run = tmp_path / "run"
    path = tg.open_run(run)["trajectory/theta"].values
    expected = tg.trajectory.pca(path, held_out=False, n=4).directions
    held = LandscapeConstraint(directions="trajectory", rank=4).fit(problem, run=run).form
    torch.testing.assert_close((held.directions * expected).sum(0).abs(), torch.ones(4, dtype=torch.float64))
    widths = tg.landscape.flatness(problem, expected)
    h = torch.as_tensor(8 * (math.e - 1) * widths.loss / widths.flatness**2)
    torch.testing.assert_close(held.curvature, h, rtol=1e-3, atol=1e-9)
    both = LandscapeConstraint(directions=("trajectory", "hessian"), weights="curvature", rank=4).fit(problem, run=path)
    assert both.form.directions.shape == (problem.P, 8)
    H = tg.landscape.hessian(problem).dense()
    inside = both.form.directions.T @ H @ both.form.directions
    torch.testing.assert_close(inside, torch.diag(inside.diagonal()), rtol=0, atol=1e-9)
    torch.testing.assert_close(inside.diagonal().clamp_min(0), both.form.curvature)


def test_the_spectrum_chooses_how_many_directions(network: nn.Module, blobs: Data) -> None:
    problem = tg.Problem(network, LOSS, blobs)
    values = tg.landscape.all_eigenpairs(tg.landscape.gauss_newton(problem)).eigenvalues
    enough = int((values.cumsum(0) < 0.8 * values.sum()).sum()) + 1
    held = LandscapeConstraint(rank=30, coverage=0.8, weights="curvature").fit(problem).form
    assert abs(len(held.curvature) - enough) <= 1  # the trace is an estimate
    assert enough < 30


def test_measuring_leaves_the_model_as_it_was(blobs: Data) -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, 3)).double()
    model[2].eval()
    before = copy.deepcopy(model.state_dict())
    EWC().fit(model, LOSS, blobs)
    assert [m.training for m in model] == [True, True, False, True]
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_an_interrupted_fit_leaves_what_there_was(
    network: nn.Module, blobs: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    constraint = EWC().fit(network, LOSS, blobs)
    other = moved(network)
    before = constraint.penalty(other).item()

    def interrupted(*_: Any) -> None:
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(EWC, "_measure", interrupted)
    with pytest.raises(KeyboardInterrupt):
        constraint.fit(other, LOSS, blobs)
    assert (constraint.tasks, constraint.penalty(other).item()) == (1, before)


@pytest.mark.parametrize("where", ["eigenvectors", "flatness"])
def test_measurements_that_keep_what_they_have_are_interrupted_too(
    network: nn.Module, blobs: Data, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They return a part and warn; half of the directions would be another constraint."""
    constraint = LandscapeConstraint(rank=5).fit(network, LOSS, blobs)
    other = moved(network)
    before = constraint.penalty(other).item()
    calls = 0

    def interrupting(whole: Any) -> Any:
        def called(*args: Any, **options: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == (1 if where == "eigenvectors" else 2):
                signal.raise_signal(signal.SIGINT)
            return whole(*args, **options)

        return called

    if where == "eigenvectors":
        monkeypatch.setattr("thermograd.landscape.spectrum._DENSE_OPERATOR", 10)  # no full matrix
        monkeypatch.setattr(Krylov, "_step", interrupting(Krylov._step))
    else:
        monkeypatch.setattr(DisplacedLosses, "width", 2)  # one direction at a time
        monkeypatch.setattr(LINES, "ends", interrupting(LINES.ends))
    with pytest.raises(KeyboardInterrupt):
        constraint.fit(other, LOSS, blobs)
    assert (constraint.tasks, constraint.penalty(other).item()) == (1, before)


def test_other_warnings_of_a_measurement_stay_warnings(
    network: nn.Module, blobs: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = EWC._measure

    def warning(*args: Any) -> Any:
        warnings.warn("not interrupted", ThermogradWarning, stacklevel=1)
        return whole(*args)

    monkeypatch.setattr(EWC, "_measure", warning)
    with pytest.warns(ThermogradWarning, match="not interrupted"):
        assert EWC().fit(network, LOSS, blobs).tasks == 1


def test_parameter_groups_with_rates_of_their_own(network: nn.Module, blobs: Data) -> None:
    constraint = LandscapeConstraint(2.0, rank=3).fit(network, LOSS, blobs)
    other = moved(network)
    layers = [{"params": network[0].parameters(), "lr": 0.1}, {"params": network[2].parameters(), "lr": 0.3}]
    v = torch.cat([p.detach().flatten() for p in other.parameters()])
    rate = torch.cat([torch.full((30,), 0.1), torch.full((21,), 0.3)]).double()
    with torch.no_grad():
        for p, q in zip(network.parameters(), other.parameters()):
            p.copy_(q)
    constraint.proximal_step(network, torch.optim.SGD(layers))
    w = torch.cat([p.detach().flatten() for p in network.parameters()])
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(constraint.penalty(network), network.parameters())])
    torch.testing.assert_close(w, v - rate * gradient)


def test_bad_input_is_refused(network: nn.Module, blobs: Data) -> None:
    for wrong in (-1.0, math.inf, math.nan, "strong", True):
        with pytest.raises(InputError, match="strength"):
            EWC(wrong)  # type: ignore[arg-type]
    for make in (
        lambda: EWC(draws=0),
        lambda: EWC(anchors="first"),
        lambda: EWC(samples=0),
        lambda: LandscapeConstraint(rank=0),
        lambda: LandscapeConstraint(directions="pca"),
        lambda: LandscapeConstraint(weights="width"),
        lambda: LandscapeConstraint(coverage=1.5),
        lambda: LandscapeConstraint(rise=1.0),
        lambda: LandscapeConstraint(rise=10.0, weights="curvature"),
        lambda: LandscapeConstraint(temperature=0.5),
        lambda: LandscapeConstraint(temperature=2.0),  # with weights from the flatness
        lambda: LayerLandscape(memory_per_weight=0),
        lambda: SynapticIntelligence(xi=0),
    ):
        with pytest.raises(InputError):
            make()
    with pytest.raises(InputError, match="fit got Sequential"):
        EWC().fit(network)
    with pytest.raises(InputError, match="no run"):
        LandscapeConstraint(directions="trajectory").fit(network, LOSS, blobs)
    with pytest.raises(InputError, match="the run has 3 weights"):
        LandscapeConstraint(directions="trajectory").fit(network, LOSS, blobs, run=torch.randn(20, 3).numpy())
    with pytest.raises(InputError, match="no step"):
        SynapticIntelligence().fit(network, LOSS, blobs)
    with pytest.raises(InputError, match="temperature"):
        EWC(temperature=2.0).fit(network, nn.MSELoss(), (blobs[0], torch.zeros(40, 3).double()))
    held = EWC().fit(network, LOSS, blobs)
    with pytest.raises(InputError, match="no parameter"):
        held.penalty(nn.Linear(4, 3))
    with pytest.raises(InputError, match="shape"):
        held.penalty(nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double())
    for rate in (-0.1, math.nan, math.inf):
        with pytest.raises(InputError, match="rate"):
            held.proximal_step(network, rate)
    with pytest.raises(InputError, match="does not hold"):
        held.proximal_step(network, torch.optim.SGD(network[0].parameters(), lr=0.1))
    with torch.no_grad():
        network[0].weight[0, 0] = math.nan
    with pytest.raises(NonFiniteError):
        held.proximal_step(network, 0.1)
    with pytest.raises((NonFiniteError, ModelError)):
        EWC().fit(network, LOSS, blobs)


@pytest.mark.parametrize(
    "make", [lambda: EWC(), lambda: LayerLandscape(), lambda: LayerLandscape(temperature=math.inf)]
)
def test_blocks_of_samples_change_nothing(
    network: nn.Module, blobs: Data, make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = make().fit(network, LOSS, blobs)
    monkeypatch.setattr("thermograd.continual.curvature._REPEATED", 100)
    parts = make().fit(network, LOSS, blobs)
    other = moved(network)
    assert parts.penalty(other).item() == pytest.approx(whole.penalty(other).item())
