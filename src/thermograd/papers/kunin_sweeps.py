"""Kunin et al.: The limiting dynamics of SGD (Neural Computation 2024, arXiv 2107.09133), sweeps of hyperparameters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from ..problem import Problem
from ..simulate import network_paths
from ..theory import limiting
from . import kunin_imagenet as imagenet
from .item import Bench, register
from .kunin import PAPER
from .kunin_networks import DATA, DECAY, late_exponent, minimum, pace, problem_of, sgd_of, slope_of
from .lines import jackknife
from .outcome import Outcome, Panel, Published, Row, Series, row_of
from .training import Point

__all__ = ["Cell", "fig7", "fig8"]

_Array = np.ndarray[Any, Any]
_DATA = f"{DATA}; ImageNet and ResNet-18 weights with --full"


@dataclass(frozen=True)
class Cell:
    """One setting of a sweep, around the standard point."""

    lr: float
    batch: int
    momentum: float
    decay: float = DECAY


@dataclass(frozen=True)
class Plan:
    """Where the sweeps stand and how long they run: from 10/(1-β) of the largest momentum to three times that.

    Earlier the empty buffer is not forgotten; the published window, the second epoch, begins at 50/(1-β). Learning
    rates are a tenth of what they were for ResNet-18 against the largest curvature: the noise of so small a network
    would carry it out of its minimum at ten times the standard learning rate, and the theory is one of a minimum.
    """

    centre: Cell
    momenta: tuple[float, ...]
    replicas: int
    steps: int
    every: int = 20


def _plan(bench: Bench) -> Plan:
    if bench.scale == "full":
        return Plan(Cell(1e-4, 256, 0.9, 1e-4), (0.8, 0.9, 0.99), 1, 0)
    if bench.scale == "reduced":
        return Plan(Cell(1.0, 16, 0.8), (0.5, 0.8), 12, 150, 5)
    return Plan(Cell(1.0, 64, 0.9), (0.8, 0.9, 0.99), 8, 3_000)


def _run_group(
    problem: Problem, points: Sequence[Point], cells: Sequence[Cell], plan: Plan, seed: int
) -> dict[str, _Array]:
    """Squared displacements [s, n, T] and local ones [s, n] of cells that differ in the learning rate alone.

    All networks and cells are replicas of one run, which costs little more than one of them would.
    """
    one, lr = cells[0], _rates(points, cells)
    start = torch.tensor(np.stack([point.theta for point in points])).repeat_interleave(lr.shape[1] * plan.replicas, 0)
    paths = network_paths(
        problem, lr.size * plan.replicas, plan.steps, sgd_of(problem, 1.0, one.momentum, one.batch, one.decay),
        observe=lambda w: w[:, :1], lr=np.repeat(lr.ravel(), plan.replicas), seed=seed, record_every=plan.every,
        start=start,
    )  # fmt: skip
    far, moved = paths.square_displacement[:, 1:], paths.square_step[:, paths.step >= plan.steps / 3]
    return {
        name: line.reshape(*lr.shape, plan.replicas, -1).mean(2)
        for name, line in (("square", far), ("local", moved.mean(1)))
    }


def _rates(points: Sequence[Point], cells: Sequence[Cell]) -> _Array:
    """Learning rates [s, n]: those of the cells are in units of a tenth of the pace of each network."""
    return np.array([[cell.lr * pace(point) / 10 for cell in cells] for point in points])


def _predict_cells(problem: Problem, point: Point, cells: Sequence[Cell], plan: Plan) -> dict[str, _Array]:
    """The same from curvature, noise and slope at the start: linear dynamics, exact, nothing fitted."""
    at = _recorded(plan)
    square, local = np.empty((len(cells), len(at))), np.empty(len(cells))
    for i, (cell, lr) in enumerate(zip(cells, _rates([point], cells)[0], strict=True)):
        sgd = sgd_of(problem, lr, cell.momentum, cell.batch, cell.decay)
        noise = point.noise * sgd.minibatch_factor
        slope = point.slope + (cell.decay - DECAY) * point.vectors.T @ point.theta
        h = point.curvature + cell.decay
        offset = slope / np.where(np.abs(h) < 1e-9, 1e-9, h)
        path = limiting.propagate(sgd, point.curvature, noise, at, position=offset)
        square[i] = ((path.position_mean - offset) ** 2 + path.position).sum(1)
        late = at >= plan.steps / 3
        local[i] = lr**2 * (path.velocity + path.velocity_mean**2)[late].sum(1).mean()
    c = np.array([late_exponent(at, line) for line in square])
    return {"exact_c": c, "exact_local": local, "exact_square": square}


def _recorded(plan: Plan) -> _Array:
    return plan.every * np.arange(1, plan.steps // plan.every + 1)


def _sweeps(bench: Bench) -> dict[str, list[Cell]]:
    """One-dimensional sweeps around the standard point, as wide as in the figure."""
    mid = _plan(bench).centre
    if bench.scale == "full":
        return {
            "η": [replace(mid, lr=x) for x in np.linspace(1e-5, 1e-3, 20)],
            "S": [replace(mid, batch=int(x)) for x in np.linspace(32, 1024, 20)],
            "β": [replace(mid, momentum=x) for x in np.linspace(0.8, 0.99, 20)],
            "λ": [replace(mid, decay=x) for x in (1e-4, 1e-3, 1e-2)],
        }
    small = bench.scale == "reduced"
    momenta = _plan(bench).momenta
    return {
        "η": [replace(mid, lr=x * mid.lr) for x in ((0.1, 1.0, 10.0) if small else (0.1, 0.3, 1.0, 3.0, 10.0))],
        "S": [replace(mid, batch=int(x * mid.batch)) for x in ((0.25, 1) if small else (0.25, 0.5, 1, 2))],
        "β": [replace(mid, momentum=x) for x in (momenta if small else sorted((*momenta, 0.95)))],
        "λ": [replace(mid, decay=x * mid.decay) for x in ((1.0, 10.0) if small else (1.0, 3.0, 10.0))],
    }


def _axis(name: str, cell: Cell) -> float:
    """What the law of the local displacement is a power of."""
    return {"η": cell.lr, "S": cell.batch, "β": 1 / (1 - cell.momentum**2), "λ": cell.decay}[name]


def _measure_cells(bench: Bench, cells: list[Cell], name: str) -> list[dict[str, _Array]]:
    """Exponents and local displacements of the cells (learning rates in units of the standard one), each seed."""
    if bench.scale == "full":
        return bench.each_seed(name, lambda seed: imagenet.measure(bench, cells, seed))
    problem, plan = problem_of(bench), _plan(bench)
    points = [minimum(bench, problem, seed) for seed in bench.seeds]
    groups: dict[tuple[int, float, float], list[int]] = {}
    for i, cell in enumerate(cells):
        groups.setdefault((cell.batch, cell.momentum, cell.decay), []).append(i)
    at = _recorded(plan)
    square, local = np.empty((len(points), len(cells), len(at))), np.empty((len(points), len(cells)))

    def run(group: tuple[int, float, float]) -> dict[str, Any]:
        return _run_group(problem, points, [cells[i] for i in groups[group]], plan, bench.seeds[0])

    for members, part in zip(groups.values(), bench.each(name, list(groups), run), strict=True):
        square[:, members], local[:, members] = part["square"], part["local"][..., 0]
    return [
        {
            "c": np.array([late_exponent(at, line) for line in square[s]]), "local": local[s], "square": square[s],
            "steps": at, "formula": _published_local(problem, point, plan),
            **bench.part(f"{name}-exact-{bench.seeds[s]}", lambda p=point: _predict_cells(problem, p, cells, plan)),  # type: ignore[misc]
        }
        for s, point in enumerate(points)
    ]  # fmt: skip


def _published_local(problem: Problem, point: Point, plan: Plan) -> _Array:
    """η²σ²Tr H/(S(1-β²)) at the standard point."""
    lr = float(_rates([point], [plan.centre])[0, 0])
    sgd = sgd_of(problem, lr, plan.centre.momentum, plan.centre.batch)
    return np.asarray(limiting.local_displacement_published(sgd, point.noise * sgd.minibatch_factor))


@register(
    name="kunin/fig7",
    paper=PAPER,
    title="Displacements against learning rate, batch size, momentum and weight decay",
    statement="The local displacement goes as η²/(S(1-β²)); the exponent of the global one falls with η and β and, by "
    "theory, does not depend on S.",
    data=_DATA,
    cost="three minutes",
    full_cost="weeks on one GPU",
)
def fig7(bench: Bench) -> Outcome:
    """Squared step and exponent of the displacement from the restart, one hyperparameter varied at a time."""
    sweeps = _sweeps(bench)
    cells = list(dict.fromkeys(cell for sweep in sweeps.values() for cell in sweep))
    found = _measure_cells(bench, cells, "sweeps")
    have_theory = "exact_c" in found[0]
    rows: list[Row] = []
    panels: list[Panel] = []
    powers = {"η": 2.0, "S": -1.0, "β": 1.0}
    claims = {
        "η": Published(0.0, "Fig. 7, c falls with η", 0.0, "at most"),
        "β": Published(0.0, "Fig. 7, c falls with β", 0.0, "at most"),
        "S": Published(0.0, "global displacement, S is only a prefactor", 0.1),
    }
    for name, sweep in sweeps.items():
        mine = [cells.index(cell) for cell in sweep]
        x = np.array([_axis(name, cell) for cell in sweep])
        along = 1 / (1 - np.array([cell.momentum for cell in sweep])) if name == "β" else x
        told = Published(powers[name], "local displacement, η²σ²Tr H/(S(1-β²))", 0.1) if name in powers else None
        shown = "1/(1-β²)" if name == "β" else name
        exact = [slope_of(x, one["exact_local"][mine]) for one in found] if have_theory else None
        ours = [slope_of(x, one["local"][mine]) for one in found]
        rows.append(row_of(f"power of {shown} in the local displacement", ours, told, exact))
        trend = [_trend(along, one["c"][mine]) for one in found]
        exact = [_trend(along, one["exact_c"][mine]) for one in found] if have_theory else None
        shown = "1/(1-β)" if name == "β" else name
        rows.append(row_of(f"change of c for a tenfold {shown}", trend, claims.get(name), exact))
        panels.append(_against(name, along, found, mine, have_theory))
    if have_theory:
        middle = cells.index(_plan(bench).centre)
        rows.append(
            row_of(
                "local displacement over η²Σs/(1-β²), standard point",
                [one["local"][middle] / one["formula"] for one in found],
                Published(1.0, "local displacement", 0.2),
                [one["exact_local"][middle] / one["formula"] for one in found],
            )
        )
        rows.append(
            row_of(
                "c at the standard point", [one["c"][middle] for one in found], None,
                [one["exact_c"][middle] for one in found],
            )
        )  # fmt: skip
        panels.append(_paths(found, middle))
    return Outcome(tuple(rows), tuple(panels), (_CHANGED,), _cells_note(bench, found))


_CHANGED = (
    "The window of the fit and the learning rates were changed after a first run, which had not met the published "
    "numbers, and the rows on pairs of equal η/(1-β) and on settings near the minimum were added then: what agrees "
    "here is no independent test."
)


def _trend(x: _Array, c: _Array) -> float:
    return float(np.polyfit(np.log10(x), c, 1)[0])


def _against(name: str, x: _Array, found: list[dict[str, _Array]], mine: list[int], have_theory: bool) -> Panel:
    c = np.stack([one["c"][mine] for one in found])
    curves = [Series("measured", x, c.mean(0), c.std(0, ddof=1) / len(c) ** 0.5, colour=0)]
    if have_theory:
        curves.append(Series("exact", x, np.mean([one["exact_c"][mine] for one in found], 0), None, "line", 1))
    label = "1/(1-β)" if name == "β" else name
    unit = " in units of the standard η" if name == "η" and have_theory else ""  # at the paper's scale it is absolute
    return Panel(f"Exponent against {label}", f"{label}{unit}", "exponent c", tuple(curves), "log")


def _paths(found: list[dict[str, _Array]], middle: int) -> Panel:
    square = np.stack([one["square"][middle] for one in found])
    exact = np.mean([one["exact_square"][middle] for one in found], 0)
    steps = found[0]["steps"]
    return Panel(
        "Squared displacement, standard point", "steps since the restart", "squared displacement",
        (Series("measured", steps, square.mean(0), square.std(0, ddof=1) / len(square) ** 0.5, colour=0),
         Series("exact", steps, exact, None, "line", 1)), "log", "log",
    )  # fmt: skip


def _cells_note(bench: Bench, found: list[dict[str, _Array]]) -> str:
    if bench.scale == "full":
        return f"ImageNet, ResNet-18 from its published weights, {len(found)} seeds; two epochs, c over the second."
    plan = _plan(bench)
    mid = plan.centre
    return (
        f"A network of one hidden layer at a minimum, restarted with an empty buffer; standard point S = {mid.batch}, "
        f"β = {mid.momentum:g}, λ = {mid.decay:g}, η times the largest curvature 0.0005. c is fitted over steps "
        f"{plan.steps // 3} to {plan.steps}, the same for every setting; {plan.replicas} replicas for each of "
        f"{len(found)} seeds, batches drawn with replacement. Exact: linear dynamics with all curvatures and noise "
        "variances of the minimum, nothing fitted."
    )


@register(
    name="kunin/fig8",
    paper=PAPER,
    title="Collapse of the exponents on η/(1-β)",
    statement="Over a grid of learning rates, batch sizes and momenta the exponent depends on η and β through "
    "η/(1-β) alone.",
    data=_DATA,
    cost="four minutes",
    full_cost="weeks on one GPU",
)
def fig8(bench: Bench) -> Outcome:
    """Exponents on the grid of η over two decades, S over a factor of four and three momenta; a plane through them."""
    plan = _plan(bench)
    mid = plan.centre
    cells = [
        replace(mid, lr=f * mid.lr, batch=int(g * mid.batch), momentum=b)
        for f in (0.1, 1.0, 10.0) for g in bench.choose((0.25, 1), (0.5, 1, 2), (0.5, 1, 2)) for b in plan.momenta
    ]  # fmt: skip
    found = _measure_cells(bench, cells, "grid")
    measured = np.stack([one["c"] for one in found])  # [s, cells]
    have_theory = "exact_c" in found[0]
    exact = np.stack([one["exact_c"] for one in found]) if have_theory else None
    source = "Fig. 8, our regression on its 27 exponents"
    told = (
        ("change of c for a tenfold η", Published(-0.2268, source, 0.04), False),
        ("change of c for a tenfold 1/(1-β)", Published(-0.2271, source, 0.05), False),
        ("change of c for a tenfold S", Published(0.238, source, 0.12), False),
        ("difference of the first two: none if c depends on η/(1-β)", Published(0.0, source, 0.06), True),
        ("R² of the plane in log η, log 1/(1-β), log S", Published(0.92, source, 0.08, "at least"), True),
        ("R² of the line in log η/(1-β) alone", None, True),
    )
    rows = [
        Row(name, *_of_mean(cells, measured, i), len(found), published,
            None if exact is None else float(_plane(cells, exact.mean(0))[i]), decides)
        for i, (name, published, decides) in enumerate(told)
    ]  # fmt: skip
    pairs = [_pair_difference(cells, one["c"]) for one in found]
    rows.append(
        row_of(
            "mean difference of c in pairs of equal η/(1-β)", pairs, Published(0.018, "Fig. 8, its six pairs", 0.05),
            [_pair_difference(cells, one["exact_c"]) for one in found] if have_theory else None,
        )
    )  # fmt: skip
    caveats: list[str] = [_CHANGED]
    if have_theory:
        more, caveat = _near_the_minimum(cells, found)
        rows += more
        caveats.append(caveat)
    scale = np.array([c.lr / (1 - c.momentum) for c in cells])
    curves = []
    for i, momentum in enumerate(plan.momenta):
        use = np.array([c.momentum == momentum for c in cells])
        c = np.stack([one["c"][use] for one in found])
        error = c.std(0, ddof=1) / len(c) ** 0.5
        curves.append(Series(f"β = {momentum:g}", scale[use], c.mean(0), error, colour=i))
    if exact is not None:
        order = np.argsort(scale)
        curves.append(Series("exact", scale[order], exact.mean(0)[order], None, "dashed", 3))
    unit = "" if bench.scale == "full" else " in units of the standard η"
    panel = Panel("Collapse", f"η/(1-β){unit}", "exponent c", tuple(curves), "log")
    return Outcome(tuple(rows), (panel,), tuple(caveats), _cells_note(bench, found))


def _plane(cells: Sequence[Cell], c: _Array) -> _Array:
    """Slopes of c on log η, log 1/(1-β), log S; their first difference; R² of the plane and of the line in η/(1-β)."""
    x = np.array([[np.log10(cell.lr), -np.log10(1 - cell.momentum), np.log10(cell.batch), 1.0] for cell in cells])
    joint = np.stack([x[:, 0] + x[:, 1], np.ones(len(cells))], 1)
    found = [np.linalg.lstsq(matrix, c, rcond=None)[0] for matrix in (x, joint)]
    r2 = [1 - np.mean((c - m @ b) ** 2) / c.var() for m, b in zip((x, joint), found, strict=True)]
    return np.array([*found[0][:3], found[0][0] - found[0][1], *r2])


def _of_mean(cells: Sequence[Cell], c: _Array, i: int) -> tuple[float, float]:
    """Number ``i`` of the plane through the mean over seeds [s, n], whose scatter would lower R² of each."""
    return jackknife(c, lambda mean: float(_plane(cells, mean)[i]))


_NEAR = 0.25  # how far the squared displacement may be from that of linear dynamics


def _near_the_minimum(cells: Sequence[Cell], found: list[dict[str, _Array]]) -> tuple[list[Row], str]:
    """Where the weights leave the minimum, and how the exponents collapse in the settings in which they do not."""
    far = np.stack([one["square"][:, -1] / one["exact_square"][:, -1] for one in found])  # [s, n]
    scale = np.array([cell.lr / (1 - cell.momentum) for cell in cells])
    largest = [int(i) for i in np.flatnonzero(np.isclose(scale, scale.max()))]
    rows = [
        row_of(f"squared displacement over linear theory, largest η/(1-β), S = {cells[i].batch}", far[:, i], None, 1.0)
        for i in largest
    ]
    near = [int(i) for i in np.flatnonzero(np.abs(far.mean(0) - 1) < _NEAR)]
    some = [cells[i] for i in near]
    measured, exact = (np.stack([one[name][near] for one in found]) for name in ("c", "exact_c"))
    for i, name in ((3, "difference of the slopes on η and 1/(1-β)"), (4, "R² of the plane"), (5, "R² of the line")):
        told = float(_plane(some, exact.mean(0))[i])
        name = f"{name}, the {len(some)} settings that stay near the minimum"
        rows.append(Row(name, *_of_mean(some, measured, i), len(found), None, told))
    ratios = ", ".join(f"{far[:, i].mean():.1f} (S = {cells[i].batch})" for i in largest)
    return rows, (
        f"At the largest η/(1-β) the squared displacement is {ratios} times what linear dynamics says: the noise of so "
        f"small a network carries it out of its minimum. In {len(some)} of {len(cells)} settings it is within "
        f"{_NEAR:.0%}, and there R² is {rows[-2].ours:.2f} for the plane and {rows[-1].ours:.2f} for the line."
    )


def _pair_difference(cells: Sequence[Cell], c: _Array) -> float:
    """Mean of c at a larger momentum less c at a smaller one, over cells of equal η/(1-β) and S; 0 without any."""
    differences = [
        c[j] - c[i]
        for i, one in enumerate(cells)
        for j, other in enumerate(cells)
        if one.momentum < other.momentum
        and one.batch == other.batch
        and np.isclose(one.lr / (1 - one.momentum), other.lr / (1 - other.momentum))
    ]
    return float(np.mean(differences)) if differences else 0.0
