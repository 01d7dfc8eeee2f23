"""Mori, Ziyin, Liu, Ueda: Power-law escape rate of SGD (ICML 2022, arXiv 2105.09557): linear regression."""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy.interpolate import CubicSpline

from ..hyperparameters import SGD
from ..simulate import first_passage, linear_regression_sgd
from ..theory import discrete, power_law
from .item import Bench, expected_warnings, register
from .lines import fitted, points, stacked
from .outcome import Outcome, Panel, Published, Row, Series, between_seeds

__all__ = ["fig3a", "fig3b", "steps_of_samples"]

_PAPER = "Mori et al. 2022"
_Array = np.ndarray[Any, Any]


def _regression(samples: int, d: int, seed: int) -> tuple[_Array, _Array]:
    """Inputs and labels that have nothing to do with each other: x ~ N(0, 1), y ~ N(0, 1)."""
    rng = np.random.default_rng([seed, d])
    return rng.normal(size=(samples, d)), rng.normal(size=samples)


# ---------------------------------------------------------------------------------------------- figure 3a

_EXPONENT_CASES = (  # (d, lr, batch sizes): where the second moment exists
    (1, 0.1, (1, 2, 5, 10, 20)),
    (1, 0.3, (1, 2, 5, 10, 20)),
    (1, 1.0, (5, 10, 20, 50)),
    (2, 0.1, (1, 4)),
    (5, 0.1, (1, 4)),
    (10, 0.1, (1, 4)),
)


@register(
    name="mori/fig3a",
    paper=_PAPER,
    title="Stationary exponent of linear regression",
    statement="The stationary density of the weights is a power of the loss, P ~ L^-φ with φ = 1 + B/(ηh*).",
    data="made up: linear regression on Gaussian inputs",
    cost="half a minute",
    full_cost="half a minute",
)
def fig3a(bench: Bench) -> Outcome:
    """Weights of linear regression sampled every 100 steps; maximum-likelihood φ against d, B and η."""
    samples = bench.choose(5_000, 100_000, 100_000)
    kept, chains = bench.choose(2_000, 10_000, 10_000), 16
    cases = [(d, lr, B) for d, lr, batches in _EXPONENT_CASES for B in batches]
    if bench.scale == "reduced":
        cases = [(1, 0.1, 1), (1, 0.1, 10), (1, 1.0, 10), (2, 0.1, 1)]

    def measure(seed: int) -> dict[str, Any]:
        phi, inverse = [], []
        for d, lr, batch in cases:
            X, y = _regression(samples, d, seed)
            sgd = SGD(lr=lr, batch_size=batch, dataset_size=samples, sampling="replacement")
            path = linear_regression_sgd(
                sgd, X, y, steps=100 * (kept // chains), replicas=chains, seed=seed, record_every=100,
                burn_in=int(20 / lr),
            ).position[:, 1:]  # fmt: skip
            H, best = X.T @ X / samples, np.linalg.lstsq(X, y, rcond=None)[0]
            bottom = float(((X @ best - y) ** 2).mean() / 2)
            away = path - best
            u2 = np.einsum("rti,ij,rtj->rt", away, H, away) / (2 * bottom)
            phi.append(float(power_law.estimate_exponent(u2, d).exponent))
            inverse.append(batch / (lr * float(np.trace(H)) / d))
        return {"phi": phi, "inverse": inverse}

    found = bench.each_seed("exponents", measure)
    phi = np.stack([one["phi"] for one in found])  # [S, cases]
    inverse = np.stack([one["inverse"] for one in found])  # B / (lr h)
    batch = np.array([B for _, _, B in cases])
    corrected = inverse - (batch - 1) / 2
    rows: list[Row] = []
    curves: list[Series] = []
    for d, lr in dict.fromkeys((d, lr) for d, lr, _ in cases):
        mine = np.array([(d, lr) == case[:2] for case in cases])
        ratio, error = between_seeds((phi / (1 + inverse))[:, mine].mean(axis=1))
        # the law is one of small learning rates; for η = 1 the paper itself reports a slight deviation
        published = Published(1.0, "Fig. 3a, Eq. 17", 0.1)
        name = f"φ / (1 + B/ηh), d = {d}, η = {lr:g}"
        rows.append(Row(name, ratio, error, len(found), published, decides=lr <= 0.1))
        ratio, error = between_seeds((phi / corrected)[:, mine].mean(axis=1))
        rows.append(Row(f"φ / (B/ηh - (B-1)/2), d = {d}, η = {lr:g}", ratio, error, len(found)))
        if d == 1:
            mean, spread = phi[:, mine].mean(axis=0), phi[:, mine].std(axis=0, ddof=1) / len(found) ** 0.5
            label, colour = f"η = {lr:g}", len(curves) // 3
            curves += [
                Series(f"{label}: measured", batch[mine], mean, spread, colour=colour),
                Series("" if colour else "1 + B/ηh", batch[mine], (1 + inverse)[:, mine].mean(0), None, "line", colour),
                Series(
                    "" if colour else "B/ηh - (B-1)/2", batch[mine], corrected[:, mine].mean(0), None, "dashed", colour
                ),
            ]
    return Outcome(
        rows=tuple(rows),
        panels=(Panel("Stationary exponent, d = 1", "batch size B", "exponent φ", tuple(curves), "log", "log"),),
        note=(
            f"{len(found)} data sets of {samples} samples, {kept} weights each, 100 steps apart; φ by maximum "
            "likelihood, which weighs the core of the density. The second row of each pair holds the finite learning "
            "rate correction, which matches the exact variance of discrete SGD; the density is only about a power, so "
            "that 1 is met to about 2%."
        ),
    )


# ---------------------------------------------------------------------------------------------- figure 3b


def _window(sgd: SGD, d: int, count: int) -> _Array:
    """Thresholds between 20 and 3000 relaxation times of the Ito equation, equally spaced in log c, [count].

    Below, the passage is not yet escape; above, it would take too long.
    """
    grid = np.geomspace(1.02, 100.0, 800)
    with expected_warnings():  # thresholds of relaxation are what is excluded here
        time = power_law.mean_first_passage_time(sgd, 1.0, grid, d)  # in units of lr times steps, h = 1
    low, high = np.interp([np.log(20.0), np.log(3000.0)], np.log(time), grid)
    settled = power_law.stationary_loss_ratio_discrete(sgd, 1.0, d)
    return np.geomspace(max(low, 1.2 * settled), max(high, 2 * settled), count)


def steps_of_samples(X: _Array, y: _Array, lr: float, ratios: _Array, cells: int = 600) -> _Array:
    """Mean steps of SGD on given samples, one weight, B = 1, from the minimum to each loss ratio, [m].

    By the transition kernel cut into cells, on intervals of whole cells, between which log T is interpolated.
    """
    x, h = X[:, 0], float(np.mean(X**2))
    best = float(x @ y / (x @ x))
    bottom = float(((x * best - y) ** 2).mean() / 2)
    reach = np.sqrt(2 * bottom * (np.max(ratios) - 1) / h)
    edges = np.linspace(-reach, reach, cells + 1)
    middle = (edges[1:] + edges[:-1]) / 2  # of theta less its minimum
    kick = lr * x * (y - x * best)
    after = [np.sort(now * (1 - lr * x**2) + kick) for now in middle]
    below = np.stack([np.searchsorted(row, edges, side="right") for row in after]) / x.size  # [cells, cells + 1]
    left_out = np.unique(np.linspace(0, 0.45 * cells, 24).astype(int))[::-1]  # at either end
    steps = []
    for n in left_out:
        inside = slice(n, cells - n)
        kernel = below[inside, n : cells - n + 1]
        times = discrete.kernel_passage_steps(lambda now, b, kernel=kernel: kernel, edges[n : cells - n + 1])  # type: ignore[misc]
        steps.append(float(np.interp(0.0, middle[inside], times)))
    wanted = np.sqrt(2 * bottom * (np.asarray(ratios) - 1) / h)
    return np.exp(CubicSpline(edges[cells - left_out], np.log(steps))(wanted))


def _slope(thresholds: _Array, times: _Array) -> float:
    return fitted(np.log(thresholds), np.log(times)).slope


@register(
    name="mori/fig3b",
    paper=_PAPER,
    title="First-passage times of linear regression",
    statement="The mean first-passage time to c times the minimal loss grows as the power B/(ηh) + 1 - d/2 of c.",
    data="made up: linear regression on Gaussian inputs",
    cost="three minutes",
    full_cost="ten minutes",
)
def fig3b(bench: Bench) -> Outcome:
    """Mean first-passage times of real minibatch SGD against quadrature, linear barrier and large deviations."""
    samples, runs, sets = bench.choose(2_000, 10_000, 10_000), bench.choose(40, 100, 200), bench.choose(1, 4, 4)
    dimensions = bench.choose((2,), (1, 2, 5, 10), (1, 2, 5, 10))
    sgd = SGD(lr=0.1, batch_size=1, dataset_size=samples, sampling="replacement")
    limit = bench.choose(200_000, 10_000_000, 100_000_000)
    levels = {d: _window(sgd, d, 8) for d in dimensions}

    def measure(seed: int) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for d in dimensions:
            events, exposure = np.zeros((sets, levels[d].size)), np.zeros((sets, levels[d].size))
            for i in range(sets):  # which extreme samples a data set happens to hold matters
                X, y = _regression(samples, d, seed + i)
                with expected_warnings():  # a threshold never reached is left out of the fit, see below
                    passage = first_passage(
                        linear_regression_sgd, sgd, X, y, levels[d], max_steps=limit, replicas=runs, seed=seed + i
                    )
                events[i], exposure[i] = passage.events, passage.exposure
            found[f"events{d}"], found[f"exposure{d}"] = events, exposure
        return found

    def exactly(seed: int) -> dict[str, Any]:
        return {"steps": [steps_of_samples(*_regression(samples, 1, seed + i), sgd.lr, levels[1]) for i in range(sets)]}

    found = bench.each_seed("passages", measure)
    exact_sets = bench.each_seed("exact", exactly) if 1 in dimensions else []
    rows: list[Row] = []
    panels: list[Panel] = []
    caveats: list[str] = []
    for d in dimensions:
        events, exposure = stacked(found, f"events{d}"), stacked(found, f"exposure{d}")  # [S, sets, m]
        seen = np.asarray(np.all(events > 0, axis=(0, 1)))
        if seen.sum() < 6:
            caveats.append(f"For d = {d} too few thresholds were reached for a slope.")
            continue
        c = levels[d][seen]
        times = np.exp(np.log(exposure / np.maximum(events, 1)).mean(axis=1))[:, seen]  # [S, m]
        ito = power_law.mean_first_passage_time(sgd, 1.0, c, d) / sgd.lr
        exact = np.exp(np.log(stacked(exact_sets, "steps")[..., seen]).mean(axis=(0, 1))) if d == 1 else None
        rows += _slope_rows(sgd, d, c, times, ito, exact)
        panels.append(_passage_panel(sgd, d, c, times, ito, exact))
        longer = float(np.exp(np.mean(np.log(times / ito))))
        if longer > 1.5:
            caveats.append(
                f"For d = {d} real minibatches take {longer:.1f} times as long as the equation behind the law says: "
                "its noise is not Gaussian."
            )
        left = float((runs - events[..., seen]).sum())
        if left:
            caveats.append(f"For d = {d}, {left:.0f} passages were not over at the end; they count as long as watched.")
    return Outcome(
        tuple(rows), tuple(panels), tuple(caveats),
        f"B = 1, η = 0.1, {len(found)} seeds of {sets} data sets of {samples} samples, {runs} runs each from the "
        "minimum, the full loss watched at every step. Thresholds lie between 20 and 3000 relaxation times of the Ito "
        "equation and above the stationary loss. Means are exposure over events. Error bars are between seeds. For "
        "d = 1 exact is the transition kernel of these very data sets, whose largest samples matter: fresh samples "
        "would be faster where c is large. The line of large deviations is an exponent, drawn through the first point. "
        "Lines that are not in sight lie above.",
    )  # fmt: skip


def _slope_rows(sgd: SGD, d: int, c: _Array, times: _Array, ito: _Array, exact: _Array | None) -> list[Row]:
    """Slopes of log T [S, m] in log c: of all thresholds, of the upper half over the lower, and of the equation."""
    seeds, half = len(times), c.size // 2
    claimed = float(power_law.asymptotic_slope(sgd, 1.0, d))
    published = Published(claimed, "Eq. 15 with h* = 1, n = d", 0.15 * claimed)
    name = f"slope of log T in log c, d = {d}, c = {c[0]:.2f} to {c[-1]:.2f}"
    theory = None if exact is None else _slope(c, exact)
    lower, upper = [_slope(c[:half], t[:half]) for t in times], [_slope(c[-half:], t[-half:]) for t in times]
    bend = between_seeds(np.divide(upper, lower))
    power = Published(1.0, "Fig. 3b: a power law", 0.15)
    return [
        Row(name, *between_seeds([_slope(c, t) for t in times]), seeds, published, theory),
        Row(f"slope in the upper half of the thresholds over the lower, d = {d}", *bend, seeds, power, decides=False),
        Row(f"slope of the Ito equation with noise 2LH/B, quadrature, d = {d}", _slope(c, ito), 0.0, seeds),
    ]


def _passage_panel(sgd: SGD, d: int, c: _Array, times: _Array, ito: _Array, exact: _Array | None) -> Panel:
    claimed, first = float(power_law.asymptotic_slope(sgd, 1.0, d)), np.exp(np.log(times[:, 0]).mean())
    barrier = power_law.linear_barrier_passage_time(sgd, 1.0, c, d) / sgd.lr
    exponent = discrete.quasi_potential(sgd, 1.0, c) / sgd.lr
    curves = [
        points("minibatch SGD", c, np.log(times), np.exp),
        Series("Ito equation, quadrature", c, ito, style="line", colour=1),
        Series(f"slope {claimed:g}, as published", c, first * (c / c[0]) ** claimed, style="dashed", colour=2),
        Series("linear barrier", c, barrier, style="line", colour=3),
        Series("large deviations", c, first * np.exp(exponent - exponent[0]), style="dashed", colour=4),
    ]
    if exact is not None:
        curves.append(Series("exact, these data sets", c, exact, style="line", colour=5))
    ylabel = "mean first-passage time in steps"
    return Panel(f"First passage, d = {d}", "c = L / L*", ylabel, tuple(curves), "log", "log")
