"""Xie, Sato, Sugiyama (ICLR 2021, arXiv 2002.03495): escape under white noise and under noise [H]+/B."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from scipy.special import ndtr

from ..hyperparameters import SGD
from ..simulate import Potential, langevin_first_passage, rare_event
from ..theory import discrete, first_passage, kramers
from .item import Bench, register
from .lines import fitted, log_rates, points, stacked
from .outcome import Outcome, Panel, Published, Row, Series, between_seeds

__all__ = ["nothing", "sgd_noise", "white_noise"]

_PAPER = "Xie et al. 2021"
_Array = np.ndarray[Any, Any]


def nothing(x: _Array) -> float:
    """A potential that nobody asks for its height: only slopes move a walker."""
    return 0.0


# ------------------------------------------------------------------------------------------- white noise

_WELL = (0.25, 2.0, -1.0)  # barrier and curvatures of the double well x^4/4 - x^2/2
_ACROSS = ((1.0, 1.0), (1.0, 3.0), (3.0, 1.0))  # curvature across at the minimum and at the saddle
_EXIT = -0.6  # well beyond the saddle at 0: a stop at its top halves the time


def _quartic(x: _Array) -> _Array:
    return x**4 / 4 - x**2 / 2


def _scaled_slope(x: _Array, out: _Array) -> None:
    """Double well L(sqrt(k) x), with sqrt(k) as a second coordinate that stays as it is."""
    u = x[1] * x[0]
    out[0], out[1] = x[1] * (u**3 - u), 0.0


def _scaled_noise(x: _Array, out: _Array) -> None:
    out[0], out[1] = 0.05, 0.0


def _crossed_slope(x: _Array, out: _Array) -> None:
    """Double well along x[0]; the curvature along x[1] goes from x[2] at the minima to x[3] at the saddle."""
    bump = (x[3] - x[2]) * math.exp(-4.0 * x[0] * x[0])
    out[0] = x[0] ** 3 - x[0] - 4.0 * x[0] * bump * x[1] * x[1]
    out[1] = (x[2] + bump) * x[1]
    out[2], out[3] = 0.0, 0.0


def _crossed_noise(x: _Array, out: _Array) -> None:
    out[0], out[1], out[2], out[3] = 0.0075, 0.0075, 0.0, 0.0


def _tang(x: _Array) -> _Array:
    return 0.5 * (x**4 - 16 * x**2 + 5 * x)


def _tang_places() -> tuple[float, float]:
    """Minimum and saddle of one coordinate of the Styblinski-Tang function."""
    low, saddle, _ = np.sort(np.roots([2, 0, -16, 2.5]).real)
    return float(low), float(saddle)


_HOT = np.array([0.1, 0.08, 0.065, 0.05, 0.04])  # temperatures by brute force


def _cold(bench: Bench) -> _Array:
    """Temperatures by splitting."""
    return np.array(bench.choose([0.03, 0.02], *2 * [[0.03, 0.02, 0.015]]))


def _factors(bench: Bench) -> _Array:
    """Sharpness k."""
    return np.array(bench.choose([], *2 * [[0.25, 0.5, 1.0, 2.0, 4.0]]))


def _tang_temperatures(bench: Bench) -> _Array:
    return np.array(bench.choose([7.0, 8.0, 9.0], *2 * [[5.5, 6.0, 6.5, 7.0, 8.0]]))


def _white_escapes(bench: Bench, seed: int) -> dict[str, Any]:
    """Mean escape times in one dimension, in two, over k, and in ten dimensions."""
    some: dict[str, Any] = {"max_steps": 10**8, "replicas": bench.choose(40, 100, 400), "seed": seed}
    splitting: dict[str, Any] = {"dt": 0.01, "seed": seed, "trials": bench.choose(150, 2400, 2400), "repeats": 10}
    well: dict[str, Any] = {"start": 1.0, "dt": 0.01, "monitoring": "bridge", **some}
    one = [langevin_first_passage("double-well", D, _EXIT, **well).mean[0] for D in _HOT]
    one += [rare_event("double-well", D, _EXIT, start=1.0, **splitting).mean for D in _cold(bench)]
    crossed, scaled = Potential(nothing, _crossed_slope), Potential(nothing, _scaled_slope)
    pairs = bench.choose((), _ACROSS, _ACROSS)
    two = [rare_event(crossed, _crossed_noise, _EXIT, start=[1.0, 0.0, *w], **splitting).mean for w in pairs]
    sharper = [
        langevin_first_passage(
            scaled, _scaled_noise, _EXIT / root, start=[1 / root, root], dt=0.0025, **some
        ).mean[0]
        for root in np.sqrt(_factors(bench))
    ]  # fmt: skip
    ten, low = [], _tang_places()[0]
    for D in _tang_temperatures(bench):  # ten coordinates share nothing: the first of ten runs ends that in ten
        many = {**some, "replicas": 10 * some["replicas"]}
        found = langevin_first_passage("styblinski-tang", D, 1.5, start=low, dt=0.002, **many)
        ten.append(found.time.reshape(-1, 10).min(axis=1).mean())
    return {"one": one, "two": two, "scaled": sharper, "ten": ten}


@register(
    name="xie/white-noise",
    paper=_PAPER,
    title="Escape under white noise",
    statement="Under white noise the escape time is exp(ΔL/D) times a ratio of determinants: a power of the sharpness.",
    data="none: double wells in one and two dimensions, Styblinski-Tang in ten",
    cost="two minutes",
    full_cost="three minutes",
)
def white_noise(bench: Bench) -> Outcome:
    """Langevin equations: log rate against 1/D, curvature across, sharpness k; Styblinski-Tang in ten dimensions."""
    cold, factors, tang = _cold(bench), _factors(bench), _tang_temperatures(bench)
    found = bench.each_seed("escapes", lambda seed: _white_escapes(bench, seed))
    seeds = len(found)
    one, two, scaled, ten = (np.log(stacked(found, name)) for name in ("one", "two", "scaled", "ten"))
    D = np.concatenate([_HOT, cold])
    exact = np.log([first_passage.quadrature(_quartic, d, 1.0, _EXIT) for d in D])
    formula = np.log(kramers.escape_time_white(_WELL[0], _WELL[1], _WELL[2], D))
    far = D <= 0.05
    barrier = _WELL[0]
    slope = between_seeds([fitted(1 / D[far], y[far]).slope for y in one])
    published = Published(barrier, "Theorem 3.1, exponent ΔL/D", 0.05 * barrier)
    law = fitted(1 / D[far], exact[far])
    rows = [Row("slope of -log γ in 1/D, one dimension", *slope, seeds, published, law.slope)]
    ratio = between_seeds(np.exp(one[:, -1] - formula[-1]))
    published, theory = Published(1.0, "Theorem 3.1", 0.1), math.exp(exact[-1] - formula[-1])
    rows.append(Row(f"time over Theorem 3.1 at ΔL/D = {barrier / D[-1]:.3g}", *ratio, seeds, published, theory))
    for (a, b), column in zip(_ACROSS[1:], two.T[1:], strict=False):
        ratio = between_seeds(np.exp(column - two[:, 0]))
        published = Published(math.sqrt(b / a), "Theorem 3.1, determinants", 0.15 * math.sqrt(b / a))
        name = f"time ratio, curvature across {a:g} at the minimum, {b:g} at the saddle"
        rows.append(Row(name, *ratio, seeds, published))
    if factors.size:
        slope = between_seeds([fitted(np.log(factors), -y).slope for y in scaled])
        rows.append(Row("exponent of γ against sharpness k", *slope, seeds, Published(1.0, "γ = O(k)", 0.1), 1.0))
    low, saddle = _tang_places()
    height = float(_tang(np.array(saddle)) - _tang(np.array(low)))
    tang_exact = np.log([first_passage.quadrature(_tang, d, low, 1.5) / 10 for d in tang])
    lines = [fitted(1 / tang, y) for y in ten]
    slope = between_seeds([line.slope for line in lines])
    published = Published(height, "-log γ = O(1/D), exponent ΔL/D", 0.1 * height)
    theory = fitted(1 / tang, tang_exact).slope
    rows.append(Row("slope of -log γ in 1/D, Styblinski-Tang, d = 10", *slope, seeds, published, theory))
    correlation, published = between_seeds([line.correlation for line in lines]), Published(1.0, "straight line", 0.02)
    rows.append(Row("correlation of -log γ with 1/D, Styblinski-Tang", *correlation, seeds, published))
    panels = [
        log_rates("White noise, one dimension", "1/D", 1 / D, one, [("quadrature", exact), ("Theorem 3.1", formula)]),
        log_rates(
            "White noise, Styblinski-Tang, d = 10", "1/D", 1 / tang, ten, [("ten rates, quadrature", tang_exact)]
        ),
    ]
    if factors.size:
        straight = factors * math.exp(-first_passage.log_quadrature(_quartic, 0.05, 1.0, _EXIT))
        series = (
            points("measured", factors, -scaled, np.exp),
            Series("proportional to k", factors, straight, style="line"),
        )
        panels.append(Panel("White noise, sharpness", "k", "γ", series, "log", "log"))
    return Outcome(
        tuple(rows), tuple(panels), (),
        f"{bench.choose(40, 100, 400)} escapes a point and seed, by splitting for D ≤ {cold[0]:g}; "
        "the exit lies well beyond the saddle. With a curvature across ΔL/D is 33.3: at half of that, and with a sixth "
        "of the trials, the time ratio of 3 at the minimum was 0.65 ± 0.02, at the edge of its tolerance. "
        "Exact values are the quadrature of the Langevin equation; for ten dimensions ten times the rate of one.",
    )  # fmt: skip


# --------------------------------------------------------------------------------------------- SGD noise

_BARRIER, _TOP = 0.04, 1.0  # ΔL and |H_b| of the path
_SHARE = 0.5  # s: the share of the barrier climbed under the minimum's curvature


_JOIN = -math.sqrt(2 * (1 - _SHARE) * _BARRIER / _TOP)  # where the curvature changes; the saddle is at 0
_LIFT = 2 * _SHARE * _BARRIER


def _path_slope(x: _Array, out: _Array) -> None:
    """A parabola of curvature x[1] up to the join, then a saddle of curvature -1; x[1:] stays as it is."""
    out[0] = x[1] * (x[0] - _JOIN) + math.sqrt(_LIFT * x[1]) if x[0] < _JOIN else -_TOP * x[0]
    out[1], out[2] = 0.0, 0.0


def _path_noise(x: _Array, out: _Array) -> None:
    """D = x[2] |L''|, x[2] = lr / 2B."""
    out[0] = x[2] * (x[1] if x[0] < _JOIN else _TOP)
    out[1], out[2] = 0.0, 0.0


def _path_white(x: _Array, out: _Array) -> None:
    out[0], out[1], out[2] = x[2], 0.0, 0.0


def _valley_slope(x: _Array, out: _Array) -> None:
    """The path with a second weight, x[3], whose curvature goes from x[4] at the minimum to x[5] at the saddle."""
    place = _JOIN - math.sqrt(_LIFT / x[1])
    steep = 4.0 / (place * place)
    bump = (x[5] - x[4]) * math.exp(-steep * x[0] * x[0])
    out[0] = x[1] * (x[0] - place) if x[0] < _JOIN else -_TOP * x[0]
    out[0] -= steep * x[0] * bump * x[3] * x[3]
    out[1], out[2], out[3], out[4], out[5] = 0.0, 0.0, (x[4] + bump) * x[3], 0.0, 0.0


def _valley_noise(x: _Array, out: _Array) -> None:
    place = _JOIN - math.sqrt(_LIFT / x[1])
    out[0] = x[2] * (x[1] if x[0] < _JOIN else _TOP)
    out[1], out[2], out[4], out[5] = 0.0, 0.0, 0.0, 0.0
    out[3] = x[2] * (x[4] + (x[5] - x[4]) * math.exp(-4.0 * x[0] * x[0] / (place * place)))


def _minimum(curvature: float) -> float:
    return _JOIN - math.sqrt(_LIFT / curvature)


def _temperature(sgd: SGD) -> float:
    """D over the curvature, η/2B."""
    return sgd.lr / (2 * sgd._needed("batch_size"))


def _path_exact(sgd: SGD, curvature: float) -> float:
    """Time from the minimum to the exit of SGD with Gaussian noise [H]^+/B, step by step, in units of t."""
    a, batch = _minimum(curvature), sgd._needed("batch_size")
    kick = sgd.lr * math.sqrt(min(curvature, _TOP) / batch)
    wall = a - math.sqrt(
        2 * (float(_exponent(sgd, curvature)) + 30) * _temperature(sgd)
    )  # never reached before the exit
    edges = np.linspace(wall, -_JOIN, math.ceil(4 * (-_JOIN - wall) / kick))
    cell = edges[1] - edges[0]

    def below(x: _Array, b: _Array) -> _Array:
        inside = x < _JOIN
        after = x - sgd.lr * np.where(inside, curvature * (x - a), -_TOP * x)
        variance = sgd.lr**2 * np.where(inside, curvature, _TOP) / batch
        return ndtr((b - after) / np.sqrt(variance - cell**2 / 12))  # cells blur by the rest

    steps = discrete.kernel_passage_steps(below, edges)
    return sgd.lr * float(np.interp(a, (edges[1:] + edges[:-1]) / 2, steps))


@register(
    name="xie/sgd-noise",
    paper=_PAPER,
    title="Escape under SGD noise",
    statement="With noise C = [H]⁺/B the escape time is exponential in 1/sharpness, batch size and 1/learning rate.",
    data="none: a path over a saddle, alone and with a second weight",
    cost="one minute",
    full_cost="three minutes",
)
def sgd_noise(bench: Bench) -> Outcome:
    """SGD with Gaussian noise [H]^+/B over one saddle: log rate against 1/H_a at fixed H_b and ΔL, B, and 1/η."""
    effort = {"trials": bench.choose(80, 400, 1000), "repeats": 10}
    sharp = np.array(bench.choose([1.0, 2.0, 4.0], *2 * [[0.75, 1.0, 4 / 3, 2.0, 4.0]]))
    batches = np.array(bench.choose([2, 3, 4], *2 * [[3, 4, 6, 8, 10]]))
    rates = np.array([0.008, 0.01, 0.0125, 0.016, 0.02])
    scans = {
        "1/H_a": (1 / sharp, [(h, bench.choose(4, 10, 10), 0.01) for h in sharp]),
        "B": (batches, [(2.0, int(B), 0.01) for B in batches]),
        "1/η": (1 / rates, [(2.0, 4, float(lr)) for lr in rates]),
    }
    if bench.scale == "reduced":
        del scans["1/η"]
    path, valley = Potential(nothing, _path_slope), Potential(nothing, _valley_slope)

    def escape(potential: Potential, noise: Any, sgd: SGD, curvature: float, seed: int, *rest: float) -> float:
        start = [_minimum(curvature), curvature, _temperature(sgd), *rest]
        return rare_event(potential, noise, -_JOIN, start=start, dt=sgd.lr, seed=seed, **effort).mean

    def measure(seed: int) -> dict[str, Any]:
        times = {
            name: [escape(path, _path_noise, _sgd(B, lr), h, seed) for h, B, lr in cases]
            for name, (_, cases) in scans.items()
        }
        if bench.scale == "reduced":
            return times
        white = [escape(path, _path_white, _sgd(1, 0.005), h, seed) for h in sharp]
        two = [escape(valley, _valley_noise, _sgd(4, 0.01), 2.0, seed, 0.0, *pair) for pair in _ACROSS]
        return {**times, "white": white, "two": two}

    found = bench.each_seed("escapes", measure)
    seeds = len(found)
    rows: list[Row] = []
    panels: list[Panel] = []
    caveats: list[str] = []
    for name, (x, cases) in scans.items():
        y = np.log(stacked(found, name))
        exact = np.log([_path_exact(_sgd(B, lr), h) for h, B, lr in cases])
        psi = np.array([float(_exponent(_sgd(B, lr), h)) for h, B, lr in cases])
        claimed = fitted(x, psi).slope
        lines = [fitted(x, one) for one in y]
        published = Published(claimed, f"Theorem 3.2, -log γ against {name}", 0.1 * claimed)
        rows.append(Row(f"slope of -log γ in {name}", *between_seeds([line.slope for line in lines]), seeds, published,
                        fitted(x, exact).slope))  # fmt: skip
        straight = Published(1.0, f"straight line in {name}", 0.02)
        correlation = between_seeds([line.correlation for line in lines])
        rows.append(
            Row(f"correlation of -log γ with {name}", *correlation, seeds, straight, fitted(x, exact).correlation)
        )
        formula = psi + math.log(2 * math.pi / _TOP)
        panels.append(log_rates(f"SGD noise, {name}", name, x, y, [("exact", exact), ("Theorem 3.2", formula)]))
        if name == "1/H_a":
            rows += _prefactors(y - psi, exact - psi, sharp, seeds)
    if "white" in found[0]:
        slope = between_seeds([fitted(np.log(sharp), one).slope for one in np.log(stacked(found, "white"))])
        published = Published(-0.5, "Theorem 3.1: a power of the sharpness", 0.1)
        rows.append(Row("exponent of the time against H_a under white noise, same path", *slope, seeds, published))
        more, said = _second_weight(np.log(stacked(found, "two")))
        rows, caveats = rows + more, caveats + said
    return Outcome(
        tuple(rows), tuple(panels), tuple(caveats),
        f"Path with ΔL = {_BARRIER}, |H_b| = {_TOP:g}, s = {_SHARE}: the noise is η|L''|/2B with the curvature H_a "
        "up to s ΔL and H_b after it, so that Theorem 3.2 has nothing to fit; H_a changes at fixed step size, unlike "
        "in L(√k θ). Steps are those of SGD with Gaussian noise, watched once a step, by splitting. "
        "Exact values come from the transition kernel of that very chain.",
    )  # fmt: skip


def _sgd(batch: int, lr: float) -> SGD:
    return SGD(lr=lr, batch_size=batch, sampling="replacement")


def _exponent(sgd: SGD, curvature: float) -> _Array:
    return kramers.escape_exponent_sgd(sgd, _BARRIER, curvature, -_TOP, path=_SHARE)


def _second_weight(two: _Array) -> tuple[list[Row], list[str]]:
    """What a curvature across that changes on the way up does to the time, which Theorem 3.2 leaves out."""
    rows, caveats = [], []
    for (low, high), column in zip(_ACROSS[1:], two.T[1:], strict=True):
        ratio, error = between_seeds(np.exp(column - two[:, 0]))
        published = Published(1.0, "Theorem 3.2: no curvature across", 0.15)
        name = f"time ratio, curvature across {low:g} at the minimum, {high:g} at the saddle"
        rows.append(Row(name, ratio, error, len(two), published, decides=False))
        expected = _across(_sgd(4, 0.01), 2.0, low, high)
        caveats.append(
            f"A valley whose curvature across goes from {low:g} to {high:g} on the way up changes the time "
            f"{ratio:.2f} ± {error:.2f} times ({expected:.2f} by the mean push of noise that follows the curvature)."
        )
    return rows, caveats


def _across(sgd: SGD, curvature: float, low: float, high: float) -> float:
    a = _minimum(curvature)
    return kramers.transverse_factor_path(
        sgd,
        lambda x: low + (high - low) * np.exp(-4 * x**2 / a**2),
        lambda x: _temperature(sgd) * np.where(x < _JOIN, curvature, _TOP),
        a,
        0.0,
    )


def _prefactors(measured: _Array, exact: _Array, sharp: _Array, seeds: int) -> list[Row]:
    """Times over exp(psi) for one minimum against Theorem 3.2, and the Ito reading of the same equation."""
    i, rows = list(sharp).index(2.0), []
    for label, scale, published in (
        ("Theorem 3.2, 2π/|H_b|", _TOP, Published(1.0, "Theorem 3.2, prefactor", 0.2)),
        ("the Ito prefactor, 2π/H_a", sharp[i], None),
    ):
        ratio = between_seeds(np.exp(measured[:, i]) * scale / (2 * math.pi))
        theory = float(np.exp(exact[i])) * scale / (2 * math.pi)
        rows.append(Row(f"time over {label}, H_a = {sharp[i]:g}", *ratio, seeds, published, theory, decides=False))
    return rows
