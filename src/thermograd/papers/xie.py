"""Xie, Sato, Sugiyama: A diffusion theory for deep learning dynamics (ICLR 2021, arXiv 2002.03495): networks."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import torch

from ..data.files import data_folder
from ..errors import ThermogradWarning
from ..hyperparameters import SGD
from ..landscape import eigenpairs, hessian
from ..models import mlp
from ..noise import in_directions, strength
from ..problem import Problem
from ..simulate import networks, networks_first_passage
from .item import Bench, register
from .lines import censored_slope, fitted, jackknife, points, rate, stacked
from .outcome import Outcome, Panel, Published, Row, Series, between_seeds

__all__ = ["avila", "banknote", "cardiotocography", "fig2", "sensorless"]

_PAPER = "Xie et al. 2021"
_Array = np.ndarray[Any, Any]


def _table(bench: Bench, file: str, samples: int | None, seed: int) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Rows of one of the UCI tables drawn at random (files are sorted by class), labels, and how many classes."""
    data = bench.data(str(data_folder(bench.data_folder) / "UCI" / f"{file}.csv.gz"))
    chosen = np.random.default_rng(seed).permutation(len(data.X))[:samples]
    return data.X[chosen], data.y[chosen], len(data.classes)


def _network(X: torch.Tensor, y: torch.Tensor, sizes: list[int], seed: int) -> Problem:
    """A fresh fully connected ReLU network under cross-entropy."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Problem(mlp(sizes), torch.nn.CrossEntropyLoss(), (X, y))


# --------------------------------------------------------------------------------------- noise and Hessian

_LOW, _HIGH = 1e-4, 0.5  # the eigenvalues that the figure shows


@register(
    name="xie/fig2",
    paper=_PAPER,
    title="Noise covariance against the Hessian",
    statement="Near a minimum the gradient noise is nearly proportional to the Hessian, C = H/B.",
    data="MNIST, Avila",
    cost="two minutes",
    full_cost="hours",
)
def fig2(bench: Bench) -> Outcome:
    """B C against H in the Hessian's eigenbasis, three-layer network, at random weights and after training."""
    samples, modes = bench.choose(200, 2000, None), bench.choose(20, 60, 500)
    sets = bench.choose(("avila",), ("mnist", "avila"), ("mnist", "avila"))

    def problem(name: str, seed: int) -> Problem:
        if name == "avila":
            X, y, classes = _table(bench, "avila_train", samples, seed)
        else:
            data = bench.data(name)
            chosen = np.random.default_rng(seed).permutation(len(data.X))[:samples]
            X, y, classes = data.X[chosen], data.y[chosen], 10
        return _network(X, y, [X[0].numel(), 10, 10, classes], seed)

    def measure(seed: int) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name in sets:
            one = problem(name, seed)
            sgd = SGD(lr=0.1, batch_size=50, sampling="reshuffle")
            trained = networks(one, 1, bench.choose(400, 3000, 100_000), sgd, seed=seed)
            found[f"{name} loss"] = trained.loss[0, -1]
            for state, theta in (("random", None), ("trained", trained.theta[0])):
                pairs = eigenpairs(hessian(one, theta), min(modes, one.P), seed=seed)
                curvature = pairs.eigenvalues.double().cpu().numpy()
                shown = (curvature > _LOW) & (curvature < _HIGH)
                variance = in_directions(one, pairs, theta).variance
                line = fitted(np.log(curvature[shown]), np.log(variance[shown]))
                total = variance[shown].sum() / curvature[shown].sum()
                found[f"{name} {state}"] = [line.slope, line.correlation, total]
                found[f"{name} {state} H"], found[f"{name} {state} C"] = curvature, variance
        return found

    found = bench.each_seed("spectra", measure)
    rows: list[Row] = []
    panels = []
    for name in sets:
        panels.append(_noise_panel(name, found))
        for state in ("trained", "random"):
            table, near = stacked(found, f"{name} {state}"), state == "trained"
            quantities = (
                ("exponent of C in H", Published(1.0, "Fig. 2, C = H/B", 0.25)),
                ("correlation of log C with log H", Published(1.0, "Fig. 2, along the diagonal", 0.1)),
                ("sum of B C over sum of H", Published(1.0, "C = H/B", 0.2)),
            )
            for i, (quantity, published) in enumerate(quantities):
                label = f"{quantity}, {name}, {state} weights"
                decides = near and i < 2  # the claim is about minima, and of near proportionality
                rows.append(Row(label, *between_seeds(table[:, i]), len(found), published, decides=decides))
    losses = ", ".join(f"{np.mean([one[f'{name} loss'] for one in found]):.3g} on {name}" for name in sets)
    return Outcome(
        tuple(rows), tuple(panels), ("The tolerance of the exponent was set after one seed had been seen.",),
        f"Networks d-10-10-classes on {samples or 'all'} samples, SGD with B = 50 and η = 0.1 down to a loss of "
        f"{losses}; the {modes} largest eigenvalues of the Hessian, of which those between {_LOW:g} and {_HIGH:g} are "
        "used, and the variance of the samples' gradients along their eigenvectors. The paper's sizes and batch are "
        "not known.",
    )  # fmt: skip


def _noise_panel(name: str, found: list[dict[str, _Array]]) -> Panel:
    first, curves = found[0], []
    for i, state in enumerate(("trained", "random")):
        H, C = first[f"{name} {state} H"], first[f"{name} {state} C"]
        shown = (H > _LOW) & (C > 0)
        curves.append(Series(f"{state} weights", H[shown], C[shown], colour=i))
    ends = np.array([min(curves[0].x), max(curves[0].x)])
    return Panel(
        f"Noise against curvature, {name}", "eigenvalue of H", "B C along its eigenvector",
        (*curves, Series("C = H/B", ends, ends, style="line", colour=2)), "log", "log",
    )  # fmt: skip


# ------------------------------------------------------------------------------------------ network escape

_BATCH = 4
_DECAY = 1e-3  # weight decay, without which a network that fits its data has no minimum to escape from
_BOUNDARY = 2.0  # the valley ends where the loss is this many times that of the minimum
_EXCESS = np.array([0.12, 0.15, 0.19, 0.24, 0.3])  # quadratic theory's mean excess loss over the barrier
_BATCHES = np.array([4, 5, 6, 8, 10])


def _valley(bench: Bench, file: str, seed: int) -> dict[str, Any]:
    """Train to a minimum, then let replicas with several learning rates and batch sizes escape from it."""
    X, y, classes = _table(bench, file, bench.choose(100, 300, None), seed)
    problem = _network(X, y, [X.shape[1], 10, classes], seed)
    whole = SGD(lr=0.2, batch_size=len(X), weight_decay=_DECAY)
    trained = networks(problem, 1, bench.choose(600, 3000, 20_000), whole, seed=seed)
    theta, loss = trained.theta[0], float(trained.loss[0, -1])
    barrier, top = (_BOUNDARY - 1) * loss, eigenpairs(hessian(problem, theta), 1, seed=seed).eigenvalues[0]
    # the quadratic theory's mean excess loss is η Tr C / 4B, so that the protocol is the same for every table
    unit = 4 * _BATCH * barrier / float(strength(problem, theta).value)
    shares = bench.choose(3.0, 1.0, 1.0) * _EXCESS
    lr = np.concatenate([shares * unit, np.full(len(_BATCHES), shares[-1] * unit)])
    batch = np.concatenate([np.full(len(_EXCESS), _BATCH), _BATCHES])
    runs = bench.choose(8, 20, 100)
    with warnings.catch_warnings():  # settings in which nothing escapes are censored, see below
        warnings.simplefilter("ignore", ThermogradWarning)
        found = networks_first_passage(
            problem, _BOUNDARY * loss, sgd=SGD(lr=0.1, weight_decay=_DECAY, sampling="replacement"),
            replicas=runs * len(lr), max_steps=bench.choose(500, 2500, 100_000), lr=np.repeat(lr, runs),
            batch_size=np.repeat(batch, runs), seed=seed, start=theta, watch_every=bench.choose(2, 2, 1),
        )  # fmt: skip
    times = found.time.reshape(-1, runs)
    rates = [rate(time, watched) for time, watched in zip(times, found.watched.reshape(-1, runs), strict=True)]
    arrived = ~np.isnan(times)
    spread = [t[a].std(ddof=1) / t[a].mean() if a.sum() > 2 else np.nan for t, a in zip(times, arrived, strict=True)]
    return {
        "lr": lr, "batch": batch, "rates": rates, "spread": spread, "loss": loss, "slope": 2 * barrier / float(top),
        "runs": runs,
    }  # fmt: skip


_LEAST = 5  # escapes that a point needs to be part of a correlation


def _slope(one: dict[str, _Array]) -> float:
    """Slope of -log γ in B/η in one seed over that of Theorem 3.2."""
    x = one["batch"] / one["lr"] * float(one["slope"])
    return censored_slope(x, *one["rates"].T)


def _escape(bench: Bench, file: str, name: str) -> Outcome:
    """-log γ of one table's network against 1/η, which is 1/k, and B; Theorem 3.2 beside."""
    found = bench.each_seed("escapes", lambda seed: _valley(bench, file, seed))
    events, exposure = (stacked(found, "rates")[..., i] for i in (0, 1))  # [S, points]
    y, seeds, count = np.log(exposure / np.maximum(events, 1)), len(found), len(_EXCESS)
    lines = []
    for x, part in ((1 / _EXCESS, slice(count)), (_BATCHES, slice(count, None))):
        seen = (events[:, part] >= _LEAST).all(axis=0)
        if seen.sum() < 3:
            return Outcome(unavailable="too few replicas escape for a line: watch them longer, with --full")
        line = jackknife(y[:, part][:, seen], lambda mean, x=x[seen]: fitted(x, mean).correlation)  # type: ignore[misc]
        lines.append(line)
    slopes = between_seeds([_slope(one) for one in found])
    spread = between_seeds([float(np.nanmean(one["spread"])) for one in found])
    straight = Published(1.0, "-log γ = O(1/η) = O(1/k), a straight line", 0.05)
    theorem = Published(1.0, "Theorem 3.2, s = 1: 2ΔL/H_1", 0.25)
    rows = (
        Row("correlation of -log γ with 1/η (and 1/k)", *lines[0], seeds, straight),
        Row("correlation of -log γ with B", *lines[1], seeds, Published(1.0, "-log γ = O(B), a straight line", 0.05)),
        Row("slope of -log γ in B/η over Theorem 3.2", *slopes, seeds, theorem, decides=False),
        Row("spread of the escape times over their mean", *spread, seeds),
    )
    panels = (
        _escape_panel(f"{name}, learning rate", "1/η, in units of the table's own", 1 / _EXCESS, y[:, :count]),
        _escape_panel(f"{name}, batch size", "B", _BATCHES, y[:, count:]),
    )
    runs = int(sum(float(one["runs"]) for one in found))
    total = runs * y.shape[1]
    censored = total - int(events.sum())
    caveats = [
        "L(√k θ) is a change of the learning rate, step for step, so that the plot against 1/k is that against 1/η."
    ]
    if censored:
        caveats.append(
            f"{censored} of {total} runs had not escaped at the end; they count in rates and slopes as long as "
            f"watched. Points with fewer than {_LEAST} escapes in a seed are left out of the correlations; without "
            "any they are lower bounds in the figure."
        )
    loss = np.mean([float(one["loss"]) for one in found])
    return Outcome(
        rows, panels, tuple(caveats),
        f"Networks d-10-classes, weight decay {_DECAY:g}, trained with all samples to a loss of {loss:.3g}; {runs} "
        f"escapes a point from there to {_BOUNDARY:g} times that loss. Learning rates are such that the mean excess "
        f"loss of the quadratic theory is {_EXCESS[0]:g} to {_EXCESS[-1]:g} of the barrier at B = {_BATCH}. The "
        "paper's widths and rates are not known.",
    )  # fmt: skip


def _escape_panel(title: str, xlabel: str, x: _Array, y: _Array) -> Panel:
    line = Series("straight line", x, fitted(x, y.mean(axis=0)).at(np.asarray(x, float)), style="line", colour=0)
    return Panel(title, xlabel, "-log γ per step", (points("measured", x, y), line))


def _registered(name: str, table: str) -> Any:
    return register(
        name=f"xie/{name}", paper=_PAPER, title=f"Escape of a network, {table}",
        statement="-log γ of a trained network is a straight line in 1/k, in B and in 1/η.", data=table,
        cost="two minutes", full_cost="an hour",
    )  # fmt: skip


@_registered("avila", "Avila")
def avila(bench: Bench) -> Outcome:
    """Escape from a minimum on the Avila table."""
    return _escape(bench, "avila_train", "Avila")


@_registered("banknote", "Banknote")
def banknote(bench: Bench) -> Outcome:
    """Escape from a minimum on the Banknote table."""
    return _escape(bench, "banknote", "Banknote")


@_registered("cardiotocography", "Cardiotocography")
def cardiotocography(bench: Bench) -> Outcome:
    """Escape from a minimum on the Cardiotocography table, three fetal states."""
    return _escape(bench, "cardiotocography_nsp3", "Cardiotocography")


@_registered("sensorless", "Sensorless Drive (2200 of 58509 rows)")
def sensorless(bench: Bench) -> Outcome:
    """Escape from a minimum on a balanced part of the Sensorless Drive table."""
    return _escape(bench, "sensorless_subset2200", "Sensorless Drive")
