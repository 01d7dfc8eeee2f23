"""Mori, Ziyin, Liu, Ueda: Power-law escape rate of SGD (ICML 2022, arXiv 2105.09557): networks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..hyperparameters import SGD
from ..landscape import eigenpairs, gauss_newton, trace, trace_of_square
from ..losses import half_squared_error
from ..models import mlp
from ..noise import decoupling, in_directions
from ..problem import Problem
from ..progress import bar, track
from ..simulate import networks_first_passage
from .item import Bench, expected_warnings, register
from .lines import fitted, jackknife, points, stacked
from .outcome import Outcome, Panel, Published, Row, Series, between_seeds

__all__ = ["fig1", "fig3c", "fig6", "glorot", "train"]

PAPER = "Mori et al. 2022"
_Array = np.ndarray[Any, Any]


def train(problem: Problem, lr: float, batch: int, steps: int, seed: int, at: Sequence[int]) -> Iterator[int]:
    """Train the problem's model in place by SGD with reshuffled epochs; yield each step of ``at``."""
    model, criterion = problem.model, problem.criterion
    assert model is not None
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    generator = torch.Generator().manual_seed(seed)
    wanted, step = set(at), 0
    if 0 in wanted:
        yield 0
    with bar("training", steps) as progress:
        while step < steps:
            for index in torch.randperm(problem.N, generator=generator).split(batch):
                if len(index) < batch or step == steps:
                    break
                optimizer.zero_grad()
                criterion(model(problem.inputs[index]), problem.targets[index]).mean().backward()
                optimizer.step()
                step += 1
                progress.advance()
                if step in wanted:
                    yield step


def glorot(model: nn.Module, seed: int) -> nn.Module:
    """Glorot's normal initialisation, biases 0."""
    generator = torch.Generator().manual_seed(seed)
    for weight in model.parameters():
        if weight.ndim > 1:
            nn.init.xavier_normal_(weight, generator=generator)
        else:
            nn.init.zeros_(weight)
    return model


def _parity(bench: Bench, n: int) -> tuple[Tensor, Tensor]:
    """MNIST digits, even +1 and odd -1."""
    X, y = bench.data("mnist", n=n)
    return X, (1 - 2 * (y % 2)).to(X.dtype)[:, None]


# ---------------------------------------------------------------------------------------------- figure 1


@register(
    name="mori/fig1",
    paper=PAPER,
    title="Decoupling of loss and output gradient",
    statement="The spectra of the mean of l C_f and of L times the mean of C_f agree but for the smallest values.",
    data="MNIST, first 10,000 images (2,000 by default), even against odd",
    cost="two minutes",
    full_cost="three hours",
)
def fig1(bench: Bench) -> Outcome:
    """Leading eigenvalues of both matrices at initialisation and after 50 and 500 epochs."""
    n, batch, k = bench.choose(300, 2_000, 10_000), 100, bench.choose(20, 50, 50)
    epochs = bench.choose((0, 2, 5), (0, 50, 500), (0, 50, 500))
    X, y = _parity(bench, n)

    def measure(seed: int) -> dict[str, Any]:
        problem = Problem(glorot(mlp([784, 100, 100, 1]), seed), half_squared_error, (X, y), dtype=torch.float32)
        found: dict[str, Any] = {}
        at = {epoch * (n // batch): epoch for epoch in epochs}
        for step in train(problem, 0.01, batch, max(at), seed, list(at)):
            result, epoch = decoupling(problem, k=k, seed=seed), at[step]
            found |= {
                f"ratio{epoch}": result.ratio, f"coupled{epoch}": result.eigenvalues,
                f"decoupled{epoch}": result.decoupled_eigenvalues, f"loss{epoch}": float(problem.loss()),
                "samples": result.spectrum_samples,
            }  # fmt: skip
        return found

    found = bench.each_seed("spectra", measure)
    rows, panels = [], []
    for epoch in epochs:
        # of the gradients' (f - y)² = 2 l, and halved those of l
        coupled = np.stack([one[f"coupled{epoch}"] for one in found]) / 2  # [S, k]
        decoupled = np.stack([one[f"decoupled{epoch}"] for one in found]) / 2
        apart, error = between_seeds(np.median(np.abs(np.log10(coupled / decoupled)), axis=1))
        # histograms over many decades: agreement can be read off to about a third of one
        published = Published(0.0, "Fig. 1", 0.3)
        rows.append(Row(f"decades between the spectra after {epoch} epochs", apart, error, len(found), published))
        ratio, error = between_seeds([float(one[f"ratio{epoch}"]) for one in found])
        published = Published(1.0, "Eq. 7", 0.1)
        name = f"traces, coupled / decoupled, after {epoch} epochs"
        rows.append(Row(name, ratio, error, len(found), published, decides=False))
        rank = np.arange(1, coupled.shape[1] + 1)
        curves = (
            Series("mean of l C_f", rank, np.exp(np.log(coupled).mean(axis=0))),
            Series("L times mean of C_f", rank, np.exp(np.log(decoupled).mean(axis=0)), style="line"),
        )
        panels.append(Panel(f"After {epoch} epochs", "rank", "eigenvalue", curves, "log", "log"))
    return Outcome(
        tuple(rows), tuple(panels),
        note=f"MLP 784-100-100-1, {n} images, half the squared error, η = 0.01, B = 100, Glorot initialisation. "
        f"The {k} largest eigenvalues are those of {int(found[0]['samples'])} of the images drawn at random, the "
        "median over them is taken of |log10| of the ratio; the traces are over all images.",
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------- figures 3c and 6


def _pretrained(bench: Bench, seed: int, samples: int, pool: int, modes: int) -> tuple[Problem, dict[str, Any]]:
    """A network of ten hidden units on even against odd digits, trained until its loss stands still."""
    X, y = _parity(bench, samples)
    X = nn.functional.avg_pool2d(X.reshape(-1, 1, 28, 28), pool).flatten(1)
    problem = Problem(glorot(mlp([X.shape[1], 10, 1]), seed), half_squared_error, (X, y), dtype=torch.float32)
    assert problem.model is not None

    def make() -> dict[str, Any]:
        steps = bench.choose(500, 15_000, 100_000)
        for lr in (0.05, 0.01):  # then with less noise, down to the bottom of the valley
            for _ in train(problem, lr, 50, steps, seed, [steps]):
                pass
        curvature, loss = gauss_newton(problem), float(problem.loss())
        top = eigenpairs(curvature, modes, tol=1e-3)
        steepest = in_directions(problem, top.eigenvectors[:, :1]).variance[0]
        return {
            "theta": problem.theta.numpy(), "loss": loss, "eigenvalues": top.eigenvalues.numpy(),
            "trace": trace(curvature).value, "square": trace_of_square(curvature).value,
            "noise": steepest / (2 * loss * float(top.eigenvalues[0])),
        }  # fmt: skip

    return problem, bench.part(f"pretrained-{seed}", make)


@register(
    name="mori/fig6",
    paper=PAPER,
    title="Curvature of a trained network",
    statement="The Gauss-Newton spectrum is a bulk near zero and a few outliers, not sharply separated.",
    data="MNIST, first 10,000 images, even against odd",
    cost="two minutes",
    full_cost="ten minutes",
)
def fig6(bench: Bench) -> Outcome:
    """Leading Gauss-Newton eigenvalues and effective dimension of a network of ten hidden units."""
    found, sizes = [], 0
    for seed in track(bench.seeds, "networks"):
        samples, modes = bench.choose((400, 10), (10_000, 120), (10_000, 400))
        problem, made = _pretrained(bench, seed, samples, 1, modes)
        found.append(made)
        sizes = problem.P
    values = np.stack([one["eigenvalues"] for one in found])  # [S, k]
    relative = values / values[:, :1]
    bulk = [1 - float((row > 0.01).sum()) / sizes for row in relative]  # those not computed are smaller
    share, error = between_seeds(bulk)
    gap, gap_error = between_seeds((relative[:, 1:] / relative[:, :-1]).min(axis=1))
    n, n_error = between_seeds([float(one["trace"] ** 2 / one["square"]) for one in found])
    loss, loss_error = between_seeds([float(one["loss"]) for one in found])
    count = len(found)
    few, separate = Published(0.95, "Fig. 6", 0.0, "at least"), Published(0.2, "Fig. 6", 0.0, "at least")
    rank = np.arange(1, values.shape[1] + 1)
    return Outcome(
        (
            Row("share of eigenvalues below a hundredth of the largest", share, error, count, few),
            Row("smallest ratio of an eigenvalue to the one before", gap, gap_error, count, separate),
            Row("effective dimension n, participation ratio", n, n_error, count),
            Row("loss at the end of training", loss, loss_error, count),
        ),
        (
            Panel(
                "Gauss-Newton eigenvalues", "rank", "eigenvalue / largest",
                tuple(Series(f"seed {i + 1}", rank, row) for i, row in enumerate(relative)), "log", "log",
            ),
        ),
        note=f"MLP 784-10-1, {sizes} weights, of whose eigenvalues the {len(rank)} largest are computed, "
        "half the squared error, SGD with B = 50, η = 0.05 and then 0.01 until the loss stands still. The paper's Eq. "
        "45 for n is not legible in the public copies: the participation ratio is one of two candidates.",
    )  # fmt: skip


_STEP = 0.3  # learning rate times the largest curvature
_RELAXED, _LONG = 50.0, 1000.0  # mean steps between which a passage counts as escape and can be waited for


@register(
    name="mori/fig3c",
    paper=PAPER,
    title="Escape of a trained network",
    statement="First-passage times of a network are powers of the loss ratio, with exponent B/(ηh) + 1 - n/2.",
    data="MNIST, first 4,000 images of 14 x 14, with --full 10,000 of 28 x 28, even against odd",
    cost="four minutes",
    full_cost="half a day",
)
def fig3c(bench: Bench) -> Outcome:
    """First passages from a trained network for several batch sizes, with the exponent from measured curvature."""
    batches, replicas = bench.choose((4,), (3, 5, 8), (3, 5, 8, 12)), bench.choose(10, 30, 100)
    ratios, limit, every = np.geomspace(1.05, 2.5, 31), bench.choose(600, 1_500, 20_000), 4
    samples, pool = bench.choose((400, 4), (4_000, 2), (10_000, 1))
    longest = bench.choose(400.0, _LONG, 10 * _LONG)

    def measure(seed: int) -> dict[str, Any]:
        problem, made = _pretrained(bench, seed, samples, pool, 1)
        h, lowest = float(made["eigenvalues"][0]), float(made["loss"])
        found: dict[str, Any] = {"n": made["trace"] ** 2 / made["square"], "noise": made["noise"]}
        for batch in batches:
            sgd = SGD(lr=_STEP / h, batch_size=batch, sampling="replacement")
            with expected_warnings():  # a threshold never reached is left out of the fit
                passage = networks_first_passage(
                    problem, lowest * ratios, sgd=sgd, replicas=replicas, max_steps=limit, seed=seed, watch_every=every,
                    start=torch.as_tensor(made["theta"]),
                )  # fmt: skip
            found[f"mean{batch}"] = np.where(passage.events >= replicas / 2, passage.mean - (every - 1) / 2, np.nan)
        return found

    found = bench.each_seed("passages", measure)
    n, noise = (between_seeds([float(one[name]) for one in found]) for name in ("n", "noise"))
    rows: list[Row] = []
    curves: list[Series] = []
    slopes: list[tuple[int, _Array]] = []
    for batch in batches:
        times = np.log(stacked(found, f"mean{batch}"))  # [S, m]
        seen = _escapes(times, longest)
        if seen.sum() < 3:
            continue
        claimed = batch / _STEP + 1 - n[0] / 2
        each, more, drawn = _passages(batch, ratios[seen], times[:, seen], claimed, len(slopes))
        slopes.append((batch, each))
        rows, curves = rows + more, curves + drawn
    if not slopes:
        return Outcome(unavailable=f"no batch size has three mean times between {_RELAXED:g} and {longest:g} steps")
    if len(slopes) > 1:
        (low, first), (high, last) = slopes[0], slopes[-1]
        step = between_seeds((last - first) / (high - low))
        claim = Published(1 / _STEP, "Eq. 15: 1/(ηh)", 0.3 / _STEP)
        rows.append(Row("growth of the slope with B", *step, len(found), claim))
        step = between_seeds([1 / (_STEP * float(one["noise"])) for one in found])
        rows.append(Row("1/(ηh) with the noise along the steepest direction as measured", *step, len(found)))
    rows.append(Row("noise along the steepest direction over 2Lh/B", *noise, len(found)))
    rows.append(Row("effective dimension n, participation ratio", *n, len(found)))
    ylabel = "mean first-passage time in steps"
    return Outcome(
        tuple(rows), (Panel("Escape of a network", "c = L / L*", ylabel, tuple(curves), "log", "log"),),
        ("The window of T was set, and images made smaller for time, after a first run with 1.1 ≤ c ≤ 1.4.",),
        f"As in mori/fig6, on {samples} images of {28 // pool} x {28 // pool}; {replicas} runs a seed, η = {_STEP} / h "
        "with h the largest Gauss-Newton eigenvalue, minibatches with replacement, the full loss watched every "
        f"{every} steps. Slopes are over the c whose mean time is {_RELAXED:g} to {longest:g} steps: below, the loss "
        "relaxes to its stationary value. Dashed: the predicted slope.",
    )  # fmt: skip


def _escapes(times: _Array, longest: float) -> _Array:
    """Which thresholds have a mean time, of which log T [S, m] are the seeds', that counts as escape."""
    mean = np.exp(times.mean(axis=0))  # NaN where a seed saw too few
    return (mean >= _RELAXED) & (mean <= longest)


def _passages(
    batch: int, ratios: _Array, times: _Array, claimed: float, colour: int
) -> tuple[_Array, list[Row], list[Series]]:
    """Slopes of log T [S, m] in log c of every seed; with the straightness of their mean, as rows; the curves."""
    x, seeds = np.log(ratios), len(times)
    slopes = np.array([fitted(x, row).slope for row in times])
    published = Published(claimed, "Eq. 15, n as measured", 0.3 * abs(claimed))
    name = f"slope of log T in log c, B = {batch}, c = {ratios[0]:.2f} to {ratios[-1]:.2f}"
    straight = jackknife(times, lambda mean: fitted(x, mean).correlation ** 2)
    rows = [
        Row(name, *between_seeds(slopes), seeds, published, decides=False),
        Row(f"R² of the power law, B = {batch}", *straight, seeds, Published(0.98, "Fig. 3c", 0.0, "at least")),
    ]
    law = np.exp(times[:, 0].mean() + claimed * (x - x[0]))
    label = "" if colour else "predicted slope"
    measured = replace(points(f"B = {batch}", ratios, times, np.exp), colour=colour)
    return slopes, rows, [measured, Series(label, ratios, law, style="dashed", colour=colour)]
