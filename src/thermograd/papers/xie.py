"""Xie, Sato, Sugiyama: A diffusion theory for deep learning dynamics (ICLR 2021, arXiv 2002.03495): networks."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from ..data.files import data_folder
from ..hyperparameters import SGD
from ..landscape import all_eigenpairs, eigenpairs, hessian
from ..models import mlp
from ..noise import in_directions, strength
from ..problem import Problem
from ..simulate import networks, networks_first_passage
from .item import Bench, expected_warnings, register
from .lines import censored_slope, fitted, jackknife, points, rate, stacked
from .outcome import Outcome, Panel, Published, Row, Series, between_seeds
from .training import pooled_images

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
    data="MNIST (pooled to 7 x 7, with --full as it is), Avila",
    cost="three minutes",
    full_cost="half a day",
)
def fig2(bench: Bench) -> Outcome:
    """B C against H in the Hessian's eigenbasis, three-layer network, at random weights and after training."""
    samples, steps = bench.choose(200, 2000, None), bench.choose(400, 10_000, 100_000)
    sets = bench.choose(("avila",), ("mnist", "avila"), ("mnist", "avila"))

    def measure(seed: int) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name in sets:
            one = _classifier(bench, name, samples, seed)
            sgd = SGD(lr=0.1, batch_size=50, sampling="reshuffle")
            trained = networks(one, 1, steps, sgd, seed=seed)
            found[f"{name} loss"] = trained.loss[0, -1]
            for state, theta in (("random", None), ("trained", trained.theta[0])):
                pairs = all_eigenpairs(hessian(one, theta))
                curvature, variance = pairs.eigenvalues.numpy(), in_directions(one, pairs, theta).variance
                shown = (curvature > _LOW) & (curvature < _HIGH)
                line = fitted(np.log(curvature[shown]), np.log(variance[shown]))
                total = variance[shown].sum() / curvature[shown].sum()
                found[f"{name} {state}"] = [line.slope, line.correlation, total]
                found[f"{name} {state} H"], found[f"{name} {state} C"] = curvature, variance
        return found

    found = bench.each_seed("spectra", measure)
    rows = [row for name in sets for state in ("trained", "random") for row in _noise_rows(name, state, found)]
    losses = ", ".join(f"{np.mean([one[f'{name} loss'] for one in found]):.3g} on {name}" for name in sets)
    return Outcome(
        tuple(rows), tuple(_noise_panel(name, found) for name in sets),
        (
            "The tolerance of the exponent was set after one seed had been seen. A first run with the 60 largest "
            "eigenvalues, which span less than a decade, left the correlation open; now all in the range are used.",
        ),
        f"Networks d-10-10-classes on {samples or 'all'} samples, SGD with B = 50 and η = 0.1 for {steps} steps, down "
        f"to a loss of {losses}; all eigenvalues of the Hessian between {_LOW:g} and {_HIGH:g}, and the variance of "
        "the samples' gradients along their eigenvectors. The paper's sizes and batch are not known. That a fitted "
        "network's noise is smaller than its Hessian is expected: they are equal for labels drawn from its own "
        "probabilities.",
    )  # fmt: skip


def _classifier(bench: Bench, name: str, samples: int | None, seed: int) -> Problem:
    if name == "avila":
        X, y, classes = _table(bench, "avila_train", samples, seed)
        return _network(X, y, [X.shape[1], 10, 10, classes], seed)
    X, y = pooled_images(bench, name, None, bench.choose(4, 4, 1))
    chosen = np.random.default_rng(seed).permutation(len(X))[:samples]
    return _network(X[chosen].flatten(1), y[chosen], [X[0].numel(), 10, 10, 10], seed)


def _noise_rows(name: str, state: str, found: list[dict[str, _Array]]) -> list[Row]:
    table, rows = stacked(found, f"{name} {state}"), []
    for column, quantity, published, decides in (
        (0, "exponent of C in H", Published(1.0, "Fig. 2, C = H/B", 0.25), True),
        (1, "correlation of log C with log H", Published(1.0, "Fig. 2, along the diagonal", 0.1), True),
        (2, "sum of B C over sum of H", Published(1.0, "C = H/B", 0.2), False),  # the claim: near proportionality
    ):
        label = f"{quantity}, {name}, {state} weights"
        mine = between_seeds(table[:, column])
        rows.append(Row(label, *mine, len(found), published, decides=decides and state == "trained"))  # near minima
    return rows


def _noise_panel(name: str, found: list[dict[str, _Array]]) -> Panel:
    first, curves = found[0], []
    for i, state in enumerate(("trained", "random")):
        H, C = first[f"{name} {state} H"], first[f"{name} {state} C"]
        shown = (H > _LOW) & (C > 0)
        curves.append(Series(f"{state} weights, first seed", H[shown], C[shown], colour=i))
    ends = np.array([min(curves[0].x), max(curves[0].x)])
    return Panel(
        f"Noise against curvature, {name}", "eigenvalue of H", "B C along its eigenvector",
        (*curves, Series("C = H/B", ends, ends, style="line", colour=2)), "log", "log",
    )  # fmt: skip


# ------------------------------------------------------------------------------------------ network escape

_DECAY = 1e-3  # weight decay, without which a network that fits its data has no minimum to escape from
_BOUNDARY = 2.0  # the valley ends where the loss is this many times that of the minimum
_FACTORS = np.array([1.0, 1.1, 1.2, 1.3, 1.4, 1.5])  # 1/η over the least
_BATCHES = np.array([6, 7, 8, 9])


@dataclass(frozen=True)
class _Valley:
    """A minimum of a problem, up to where the loss is ``level``."""

    problem: Problem
    theta: torch.Tensor
    level: float
    seed: int

    def escapes(self, lr: Any, batch: Any, runs: int, steps: int, every: int = 2) -> tuple[_Array, _Array]:
        """Steps until each of ``runs`` replicas a setting leaves, NaN if it did not, and steps watched, [n, runs]."""
        with expected_warnings():  # settings in which nothing escapes are censored, see below
            found = networks_first_passage(
                self.problem, self.level, sgd=SGD(lr=0.1, weight_decay=_DECAY, sampling="replacement"),
                replicas=runs * len(lr), max_steps=steps, lr=np.repeat(lr, runs), batch_size=np.repeat(batch, runs),
                seed=self.seed, start=self.theta, watch_every=every,
            )  # fmt: skip
        return found.time.reshape(-1, runs), found.watched.reshape(-1, runs)


def _rates(time: _Array, watched: _Array) -> _Array:
    """Escapes and exposure of each setting, [n, 2]."""
    return np.array([rate(*one) for one in zip(time, watched, strict=True)])


def _log_times(rates: _Array) -> _Array:
    """-log γ; without any escape the bound that one would give."""
    return np.log(rates[..., 1] / np.maximum(rates[..., 0], 1))


def _hottest(valley: _Valley, unit: float, wanted: float) -> float:
    """Learning rate at which the mean escape takes ``wanted`` steps, between those of a coarse grid."""
    lr = unit * np.geomspace(0.8, 0.05, 12)
    time = np.maximum.accumulate(_log_times(_rates(*valley.escapes(lr, np.full(12, _BATCHES[0]), 16, int(4 * wanted)))))
    return float(1 / np.interp(np.log(wanted), time, 1 / lr))


def _rows(bench: Bench) -> int | None:
    """How many rows of a table are used; None for all."""
    return bench.choose(100, 300, None)


def _measured_valley(bench: Bench, file: str, seed: int) -> dict[str, Any]:
    """Train to a minimum, then let replicas with several learning rates and batch sizes escape from it."""
    X, y, classes = _table(bench, file, _rows(bench), seed)
    problem = _network(X, y, [X.shape[1], 10, classes], seed)
    whole = SGD(lr=0.1, momentum=0.9, batch_size=len(X), weight_decay=_DECAY)
    trained = networks(problem, 1, bench.choose(600, 3000, 20_000), whole, seed=seed)
    theta, loss = trained.theta[0], float(trained.loss[0, -1])
    valley, barrier = _Valley(problem, theta, _BOUNDARY * loss, seed), (_BOUNDARY - 1) * loss
    # where the quadratic theory's mean excess loss, η Tr C / 4B, is the barrier
    unit = 4 * _BATCHES[0] * barrier / float(strength(problem, theta).value)
    hot = _hottest(valley, unit, bench.choose(20.0, 100.0, 100.0))
    lr = hot / np.concatenate([_FACTORS, np.ones(len(_BATCHES))])
    batch = np.concatenate([np.full(len(_FACTORS), _BATCHES[0]), _BATCHES])
    runs = bench.choose(8, 20, 100)
    time, watched = valley.escapes(lr, batch, runs, bench.choose(500, 4000, 100_000))
    whole_rows = ~np.isnan(time).any(axis=1)  # a spread without the late ones would be too small
    spread = (time.std(axis=1, ddof=1) / time.mean(axis=1))[whole_rows]
    return {
        "lr": lr, "batch": batch, "rates": _rates(time, watched), "spread": spread, "loss": loss,
        "slope": 2 * barrier / float(eigenpairs(hessian(problem, theta), 1, seed=seed).eigenvalues[0]), "runs": runs,
    }  # fmt: skip


_LEAST = 3  # escapes that a point needs to be part of a correlation


def _slope(one: dict[str, _Array]) -> float:
    """Slope of -log γ in B/η in one seed over that of Theorem 3.2."""
    x = one["batch"] / one["lr"] * float(one["slope"])
    return censored_slope(x, *one["rates"].T)


def _escape(bench: Bench, file: str, name: str) -> Outcome:
    """-log γ of one table's network against 1/η, which is 1/k, and B; Theorem 3.2 beside."""
    found = bench.each_seed("escapes", lambda seed: _measured_valley(bench, file, seed))
    rates, seeds, count = stacked(found, "rates"), len(found), len(_FACTORS)
    predicted = np.mean([one["slope"] * _BATCHES[0] / one["lr"][0] for one in found])  # of -log γ in the multiples
    lines, panels = [], []
    for label, x, part in (
        ("1/η, in units of each network's own", _FACTORS, rates[:, :count]),
        ("batch size B", _BATCHES.astype(float), rates[:, count:]),
    ):
        y, seen = _log_times(part), np.all(part[..., 0] >= _LEAST, axis=0)
        if seen.sum() < 3:
            return Outcome(unavailable="too few replicas escape for a line: watch them longer, with --full")
        lines.append(jackknife(y[:, seen], lambda mean, x=x[seen]: fitted(x, mean).correlation))  # type: ignore[misc]
        panels.append(_escape_panel(name, label, x, y, seen, predicted / x[0]))
    slopes = between_seeds([_slope(one) for one in found])
    spread = between_seeds([float(one["spread"].mean()) for one in found if one["spread"].size])
    straight = Published(1.0, "-log γ = O(1/η) = O(1/k), a straight line", 0.05)
    theorem = Published(1.0, "Theorem 3.2, s = 1: 2ΔL/H_1", 0.25)
    rows = (
        Row("correlation of -log γ with 1/η (and 1/k)", *lines[0], seeds, straight),
        Row("correlation of -log γ with B", *lines[1], seeds, Published(1.0, "-log γ = O(B), a straight line", 0.05)),
        Row("slope of -log γ in B/η over Theorem 3.2", *slopes, seeds, theorem, decides=False),
        Row("spread of the escape times over their mean", *spread, seeds),
    )
    runs = int(sum(float(one["runs"]) for one in found))
    return Outcome(
        rows, tuple(panels), _escape_caveats(runs * rates.shape[1], int(rates[..., 0].sum())),
        f"Networks d-10-classes on {_rows(bench) or 'all'} rows of the table, others for each seed, weight decay "
        f"{_DECAY:g}, trained with full batches to a loss of {np.mean([float(one['loss']) for one in found]):.3g}; "
        f"{runs} escapes a point from there to {_BOUNDARY:g} times that loss, B = {_BATCHES[0]} or the largest of the "
        "learning rates: that at which the mean escape of "
        "the network took 100 steps in a pilot. The paper's widths and rates are not known.",
    )  # fmt: skip


def _escape_caveats(total: int, escaped: int) -> tuple[str, ...]:
    said = [
        "L(√k θ) is a change of the learning rate, step for step, so that the plot against 1/k is that against 1/η.",
        "Learning rates are found by a pilot since first runs, in which the fastest escapes took no longer than the "
        "network relaxes, gave bent lines.",
    ]
    if escaped < total:
        said.append(
            f"{total - escaped} of {total} runs had not escaped at the end; they count in rates and slopes as long as "
            f"watched. Points with fewer than {_LEAST} escapes in a seed are left out of the correlations."
        )
    return tuple(said)


def _escape_panel(name: str, xlabel: str, x: _Array, y: _Array, seen: _Array, slope: float) -> Panel:
    drawn = fitted(x[seen], y[:, seen].mean(axis=0))
    curves = [
        points("measured", x[seen], y[:, seen]),
        Series("straight line", x, drawn.at(x), style="line", colour=0),
        Series("slope of Theorem 3.2", x, y[:, 0].mean() + slope * (x - x[0]), style="dashed", colour=1),
    ]
    if not seen.all():
        curves.append(replace(points("few escapes: left out", x[~seen], y[:, ~seen]), colour=2))
    return Panel(f"{name}, {xlabel.split(',')[0]}", xlabel, "-log γ per step", tuple(curves))


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
