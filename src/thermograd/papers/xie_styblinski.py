"""Xie, Sato, Sugiyama (ICLR 2021, arXiv 2002.03495): escape on the Styblinski-Tang function with real minibatches."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from scipy.special import ndtr

from ..simulate import Potential, langevin_first_passage
from ..theory import discrete
from .item import Bench, expected_warnings, register
from .lines import fitted, points, rate, stacked
from .outcome import Outcome, Panel, Published, Row, Series, between_seeds
from .xie_kramers import nothing

__all__ = ["styblinski_tang"]

_PAPER = "Xie et al. 2021"
_Array = np.ndarray[Any, Any]


_MOST = 8  # samples in the largest minibatch


def _shifted_slope(x: _Array, out: _Array) -> None:
    """Minibatch gradient of f(sqrt(k) x[0] - s) over x[3] samples s, which are x[4:] and drawn anew every step.

    x[1] is sqrt(k); x[2] is one over the time step, so that a sample forgets itself in one step.
    """
    total, batch = 0.0, int(x[3])
    for j in range(4, x.size):
        out[j] = x[2] * x[j]
        if j - 4 < batch:
            u = x[1] * x[0] - x[j]
            total += 2 * u**3 - 16 * u + 2.5
    out[0], out[1], out[2], out[3] = x[1] * total / batch, 0.0, 0.0, 0.0


def _fresh_samples(x: _Array, out: _Array) -> None:
    for j in range(x.size):
        out[j] = 0.5 * x[2] if j > 3 else 0.0


def _shifted_places() -> tuple[float, float]:
    """Minimum and saddle of E f(theta - s) for one coordinate, s ~ N(0, 1)."""
    low, saddle, _ = np.sort(np.roots([2, 0, 6 - 16, 2.5]).real)
    return float(low), float(saddle)


def _slope_above(c: _Array, mean: _Array) -> _Array:
    """P(f'(u) >= c) for u ~ N(mean, 1): the real roots of the cubic 2u^3 - 16u + 2.5 = c."""
    half, third = (2.5 - c) / 4, -8 / 3
    root = np.sqrt(np.maximum(half**2 + third**3, 0))
    single = np.cbrt(-half + root) + np.cbrt(-half - root)
    angle = np.arccos(np.clip(half / third / math.sqrt(-third), -1, 1)) / 3
    three = [2 * math.sqrt(-third) * np.cos(angle - 2 * np.pi * i / 3) for i in range(3)]
    low, middle, high = (ndtr(u - mean) for u in np.sort(three, axis=0))
    return np.where(half**2 + third**3 > 0, 1 - ndtr(single - mean), middle - low + 1 - high)


_WIDEST, _BINS = 1500.0, 8192  # slopes of one sample beyond this have a probability below 1e-12


def _shifted_exact(lr: float, batch: int) -> float:
    """Mean steps of one coordinate from minimum to saddle, by the transition kernel of minibatch SGD."""
    low, saddle = _shifted_places()
    edges = np.linspace(-6.0, saddle, 401)

    def below(x: _Array, b: _Array) -> _Array:
        least = batch * (x - b) / lr  # of the sum of the samples' slopes
        if batch == 1:
            return _slope_above(least, x)
        bin_edges = np.linspace(-_WIDEST, _WIDEST, _BINS + 1)
        width = bin_edges[1] - bin_edges[0]
        single = -np.diff(_slope_above(bin_edges, x), axis=1)  # [n, bins]
        many = np.fft.irfft(np.fft.rfft(np.fft.ifftshift(single, axes=1)) ** batch, _BINS)
        above = np.cumsum(np.fft.fftshift(np.maximum(many, 0), axes=1)[:, ::-1], axis=1)[:, ::-1]
        place = bin_edges[:-1] + (batch - 1) / 2 * width  # lower edges: middles of bins add up
        return np.stack([np.interp(one, place, row) for one, row in zip(least, above, strict=True)])

    steps = discrete.kernel_passage_steps(below, edges)
    return float(np.interp(low, (edges[1:] + edges[:-1]) / 2, steps))


@register(
    name="xie/styblinski-tang",
    paper=_PAPER,
    title="Styblinski-Tang under minibatch noise",
    statement="-log γ is a straight line in 1/k, B and 1/η for SGD on the ten-dimensional Styblinski-Tang function.",
    data="made up: samples N(0, 1) that shift the function",
    cost="one minute",
    full_cost="five minutes",
)
def styblinski_tang(bench: Bench) -> Outcome:
    """SGD on E f(θ - x) with real minibatches; ten coordinates, one valley, out of it by any coordinate."""
    d, escapes = 10, bench.choose(40, 100, 400)
    sharp = np.array(bench.choose([1.0, 1.5, 2.0], *2 * [[0.75, 1.0, 1.25, 1.5, 2.0, 3.0]]))
    rates = np.array(bench.choose([0.01, 0.014, 0.02], *2 * [[0.007, 0.008, 0.01, 0.0125, 0.016, 0.02]]))
    batches = np.array(bench.choose([1, 2, 4], *2 * [[1, 2, 3, 4, 6, 8]]))
    scans = {
        "1/k": (1 / sharp, [(float(k), 1, 0.01) for k in sharp]),
        "B": (batches, [(1.0, int(B), 0.03) for B in batches]),
        "1/η": (1 / rates, [(1.0, 1, float(lr)) for lr in rates]),
    }
    low, saddle = _shifted_places()
    potential, limit = Potential(nothing, _shifted_slope), bench.choose(10**6, 10**6, 10**8)

    def steps(k: float, batch: int, lr: float, seed: int) -> tuple[_Array, _Array]:
        """Steps to the boundary of every coordinate on its own: coordinates share nothing, [10 escapes]."""
        root, rng = math.sqrt(k), np.random.default_rng([seed, 1])
        start = np.zeros((d * escapes, 4 + _MOST))
        start[:, :4], start[:, 4:] = (low / root, root, 1 / lr, batch), rng.normal(size=(d * escapes, _MOST))
        with expected_warnings():  # the samples are coordinates here, whose pull is no curvature of the loss
            found = langevin_first_passage(
                potential, _fresh_samples, saddle / root, start=start, dt=lr, max_steps=limit, replicas=d * escapes,
                seed=seed,
            )  # fmt: skip
        return found.time[:, 0] / lr, found.watched / lr

    def measure(seed: int) -> dict[str, Any]:
        result: dict[str, Any] = {"same": np.array_equal(steps(4.0, 1, 0.01, seed)[0], steps(1.0, 1, 0.04, seed)[0])}
        for name, (_, cases) in scans.items():
            rows = []
            for k, batch, lr in cases:
                time, watched = steps(k, batch, lr, seed)
                first = np.fmin.reduce(time.reshape(-1, d), axis=1)  # the valley of all is left by the first
                rows.append([*rate(time, watched), *rate(first, watched.reshape(-1, d).min(axis=1))])
            result[name] = rows
        return result

    found = bench.each_seed("escapes", measure)
    seeds, rows, panels, censored = len(found), [], [], 0.0
    height = _mean_tang(saddle) - _mean_tang(low)
    for name, (x, cases) in scans.items():
        table = stacked(found, name)  # [S, n, 4]
        alone, together = np.log(table[..., 1] / table[..., 0]), np.log(table[..., 3] / table[..., 2])
        censored += float((d * escapes - table[..., 0]).sum())
        lines = [fitted(x, y) for y in together]
        straight = Published(1.0, f"-log γ = O({name}), a straight line", 0.02)
        correlation = between_seeds([line.correlation for line in lines])
        rows.append(Row(f"correlation of -log γ with {name}, d = {d}", *correlation, seeds, straight))
        slopes = between_seeds([line.slope for line in lines])
        least = fitted(x, [2 * B * height / (k * lr) * _least_inverse() for k, B, lr in cases]).slope
        bound = Published(least, f"Theorem 3.2, any s, slope in {name}", 0.1 * least, "at least")
        rows.append(Row(f"slope of -log γ in {name}, d = {d}", *slopes, seeds, bound, decides=False))
        drawn = [Series("straight line", x, fitted(x, together.mean(axis=0)).at(x), style="line", colour=0)]
        marks = [
            points("ten coordinates", x, together),
            Series("one coordinate", x, alone.mean(axis=0), None, colour=1),
        ]
        if name != "B" or bench.scale != "reduced":
            exact = np.log([_shifted_exact(k * lr, B) for k, B, lr in cases])
            slope = between_seeds([fitted(x, y).slope for y in alone])
            rows.append(Row(f"slope of -log γ in {name}, d = 1", *slope, seeds, None, fitted(x, exact).slope))
            drawn.append(Series("exact, one coordinate", x, exact, style="line", colour=1))
        panels.append(Panel(f"Styblinski-Tang, {name}", name, "-log γ per step", (*marks, *drawn)))
    same = float(np.mean([one["same"] for one in found]))
    rows.append(Row("share of runs with T(k, η) = T(1, kη) step for step (k = 4)", same, 0.0, seeds, theory=1.0))
    return Outcome(
        tuple(rows), tuple(panels), _tang_caveats(rows, censored),
        f"{escapes} escapes a point and seed from the minimum of E f(θ - x), x ~ N(0, 1), until a coordinate reaches "
        "the saddle; samples are fresh every step. Coordinates are independent, so ten single runs are one in ten "
        "dimensions. Exact values are those of the transition kernel of the chain, its jumps included.",
    )  # fmt: skip


def _mean_tang(x: float) -> float:
    """E f(x - s) for s ~ N(0, 1)."""
    return 0.5 * (x**4 + 6 * x**2 + 3 - 16 * (x**2 + 1) + 5 * x)


def _least_inverse() -> float:
    """The smaller of 1/H_a and 1/|H_b|, the least that any s makes of the bracket of Theorem 3.2."""
    return min(1 / abs(6 * x**2 - 10) for x in _shifted_places())


def _tang_caveats(rows: list[Row], censored: float) -> tuple[str, ...]:
    slow = [row.ours / row.published.value for row in rows if row.published and row.published.kind == "at least"]
    said = [
        "L(√k θ) is a change of the learning rate, step for step, so the plots against 1/k and 1/η are one experiment.",
        f"Slopes are {min(slow):.2g} to {max(slow):.2g} of the least that Theorem 3.2 allows: the noise is not H/B "
        "here and escapes are single jumps, which a straight line does not show.",
    ]
    if censored:
        said.append(f"{censored:.0f} runs of one coordinate had not escaped at the end; they count as long as watched.")
    return tuple(said)
