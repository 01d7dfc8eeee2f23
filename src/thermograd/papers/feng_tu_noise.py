"""Feng & Tu 2021: temperature, the ensemble of minibatch losses, and correlation times."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from .. import landscape, noise
from ..simulate import TorchPotential, langevin
from .feng_tu_protocol import (
    BASES,
    DATA,
    PAPER,
    SCHEMES,
    Run,
    components_of,
    explore,
    fitted_over,
    middle,
    modes_of,
    note,
    power,
    ready,
    relation,
    sizes,
    standard,
    theory_line,
)
from .item import Bench, register
from .outcome import Outcome, Panel, Published, Row, Series, row_of

__all__ = ["fig3", "fig4", "null"]

_Array = np.ndarray[Any, Any]


@register(
    name="feng-tu/fig3",
    paper=PAPER,
    title="Direction temperature and the ensemble of minibatch losses",
    statement="Minibatch losses are parabolas of scattered curvature and minimum, so the noise temperature is a "
    "parabola in the displacement; it is higher in sharper directions and falls as training goes on.",
    data=DATA,
    cost="two minutes",
    full_cost="three hours",
)
def fig3(bench: Bench) -> Outcome:
    """Slopes of minibatch losses at five points along principal components and Hessian modes; T against flatness."""
    batches, lr = bench.choose(60, 200, 1000), 0.1

    def measure(seed: int) -> dict[str, Any]:
        return {**relation(bench, seed), **_ensembles(bench, seed, batches)}

    found = bench.each_seed("temperature", measure)

    def each(what: Any) -> list[float]:
        return [float(what(one)) for one in found]

    def exponent(of: str, flatness: str) -> list[float]:
        return each(lambda f: -power(f[flatness], f[of])[0])

    rows = [
        row_of("T now over T at a tenfold loss", each(lambda f: f["cooling"]),
            Published(1.0, "Fig. 3, T falls as training goes on", 0.0, "at most")),
    ]  # fmt: skip
    for basis, name in (("pc", "principal components"), ("mode", "Hessian basis")):
        parabolas, upwards = (
            (Published(0.9, "Fig. 4, minibatch losses are parabolas", 0.0, "at least"),
             Published(1.0, "Fig. 3, a parabola open upwards", 0.0, "at least"))
            if basis == "pc" else (None, None)
        )  # fmt: skip
        rows += [
            row_of(f"share of a minibatch's change of slope that a line explains, {name}",
                each(lambda f, b=basis: f[f"{b}_line"]), parabolas, decides=False),
            row_of(f"T a tenth of F away over T at the centre, {name}",
                each(lambda f, b=basis: _ends(f[f"{b}_temperature"])), upwards,
                each(lambda f, b=basis: _ends(f[f"{b}_parabola"]))),
            row_of(f"T of the ensemble at the centre over that of all samples, {name}",
                each(lambda f, b=basis: np.mean(f[f"{b}_temperature"][:, 2] / f[f"{b}_exact"])), None, 1.0),
            row_of(f"exponent of the curvature's scatter against curvature, {name}",
                each(lambda f, b=basis: power(f[f"{b}_curvature"], f[f"{b}_scatter"])[0])),
            row_of(f"exponent of the minima's scatter against curvature, {name}",
                each(lambda f, b=basis: power(f[f"{b}_curvature"], f[f"{b}_minimum"])[0])),
        ]  # fmt: skip
    for scheme, words in SCHEMES.items():
        for basis, name in (("in", "principal components"), ("hess", "Hessian basis")):
            told = None
            if (scheme, basis) == ("reshuffle", "in"):
                told = Published(0.0, "Fig. 3, T is larger in sharper directions", 0.0, "at least")
            F = f"{scheme}_{basis}_flatness"
            rows.append(
                row_of(f"exponent of T against 1/F, {name}, {words}", exponent(f"{scheme}_{basis}_noise", F), told)
            )
    for scheme, words in SCHEMES.items():
        for basis, name in BASES.items():
            known = [f"{scheme}_{basis}_{what}" for what in ("variance", "noise", "tau")]
            rows.append(
                row_of(f"median of σ²/(αTτ), {name}, {words}",
                    each(lambda f, k=known: np.median(f[k[0]] / (lr**2 / 2 * f[k[1]] * f[k[2]]))), None, 1.0)
            )  # fmt: skip
    return Outcome(
        tuple(rows),
        _temperature_panels(found[0], lr),
        (),
        f"{note(bench, found)}{fitted_over(*sizes(bench))} {batches} minibatches of 50, five displacements between "
        f"-F/10 and F/10 along {len(found[0]['pc_flatness'])} directions of each basis. T is a property of a point, "
        "the centre of the first window; σ² and τ are those of a window. Exact beside the temperature away from the "
        "centre is the parabola from the scatter of curvatures and forces.",
    )


def _ends(temperature: _Array) -> float:
    """T at the outermost displacements over that at the centre, median over directions [k, 5]."""
    return float(np.median(temperature[:, [0, -1]].mean(1) / temperature[:, 2]))


def _ensembles(bench: Bench, seed: int, batches: int) -> dict[str, Any]:
    """Minibatch losses along principal components and Hessian modes, and T where the loss was ten times as large."""
    components, hessian, _ = sizes(bench)
    count = bench.choose(8, 12, 20)
    run, modes = explore(bench, seed), modes_of(bench, seed, hessian, count)
    P, _ = components_of(run, components, count)
    wide = landscape.flatness(run.problem, P, rtol=1e-2).flatness
    early = middle(ready(bench, seed, bench.choose(5e-2, 1e-2, 1e-2)))
    found: dict[str, Any] = {}
    for name, directions, flat in (("pc", P, wide), ("mode", modes.vectors, modes.flatness)):
        one = _ensemble(run, directions, flat, batches, seed)
        found |= {f"{name}_{key}": value for key, value in one.items()}
    before = run.sgd.lr / 2 * noise.in_directions(early, P).variance * run.sgd.minibatch_factor
    return {**found, "cooling": np.median(found["pc_exact"] / before)}


def _ensemble(run: Run, directions: torch.Tensor, flat: _Array, batches: int, seed: int) -> dict[str, _Array]:
    """Curvatures, minima and the temperature of minibatch losses, and what follows from the scatter of the former."""
    lr = run.sgd.lr
    offsets = np.linspace(-0.1, 0.1, 5)[None, :] * flat[:, None]  # the loss rises by a few per cent
    ensemble = noise.minibatch_losses(run.problem, directions, offsets, 50, batches, seed)
    force = ensemble.slopes[:, :, 2] - ensemble.full_slopes[:, 2]  # of each minibatch at the centre
    mean = ensemble.slopes.mean(2, keepdims=True)
    line = ensemble.curvature[:, :, None] * offsets + mean
    left = 1 - ((ensemble.slopes - line) ** 2).sum(0) / ((ensemble.slopes - mean) ** 2).sum(0)
    bent = ensemble.curvature - ensemble.full_curvature
    parabola = (
        (force**2).mean(0)[:, None] + bent.var(0)[:, None] * offsets**2 + 2 * (bent * force).mean(0)[:, None] * offsets
    )
    return {
        "flatness": flat, "temperature": ensemble.temperature(lr), "offsets": offsets / flat[:, None],
        "exact": lr / 2 * noise.in_directions(run.problem, directions).variance * run.sgd.minibatch_factor,
        "parabola": lr / 2 * parabola, "line": np.median(left), "curvature": ensemble.full_curvature,
        "scatter": bent.std(0),
        "minimum": np.array([np.subtract(*np.percentile(m[np.isfinite(m)], [75, 25])) for m in ensemble.minimum.T]),
    }  # fmt: skip


def _temperature_panels(one: dict[str, _Array], lr: float) -> tuple[Panel, ...]:
    flat = one["pc_flatness"]
    curves: list[Series] = []
    for i, k in enumerate(np.linspace(0, len(flat) - 1, 4).round().astype(int)):
        curves.append(Series(f"F = {flat[k]:.2g}", one["pc_offsets"][k], one["pc_temperature"][k], colour=i))
        curves.append(Series("", one["pc_offsets"][k], np.maximum(one["pc_parabola"][k], 1e-300), None, "line", i))
    return (
        Panel("T along principal components", "displacement over F", "temperature T", tuple(curves), "linear", "log"),
        Panel("T against flatness", "flatness F", "temperature T", tuple(
            Series(name, one[f"reshuffle_{basis}_flatness"], lr / 2 * one[f"reshuffle_{basis}_noise"], colour=i)
            for i, (basis, name) in enumerate((("in", "principal components"), ("hess", "Hessian basis")))
        ), "log", "log"),
    )  # fmt: skip


@register(
    name="feng-tu/fig4",
    paper=PAPER,
    title="Correlation time against flatness",
    statement="The correlation time of the weights is longer in sharper directions, as the variance is larger.",
    data=DATA,
    cost="a minute",
    full_cost="three hours",
)
def fig4(bench: Bench) -> Outcome:
    """τ = 2Var/Var(step) in sample, held out and in the Hessian basis, with and without replacement."""
    found = bench.each_seed("times", lambda seed: relation(bench, seed))
    rows: list[Row] = []
    slopes: dict[str, list[float]] = {}
    for scheme, words in SCHEMES.items():
        for basis, name in BASES.items():
            values = [power(one[f"{scheme}_{basis}_flatness"], one[f"{scheme}_{basis}_tau"])[0] for one in found]
            slopes[f"{scheme}_{basis}"] = values
            told = None
            if scheme == "reshuffle" and basis == "in":
                told = Published(0.0, "abstract, τ depends inversely on flatness", 0.0, "at most")
            exact = None
            if basis == "hess":
                exact = [power(one[f"{scheme}_hess_flatness"], one[f"{scheme}_exact_tau"])[0] for one in found]
            rows.append(row_of(f"exponent of τ against F, {name}, {words}", values, told, exact))
        median, exact = ([np.median(one[f"{scheme}_{kind}_tau"]) for one in found] for kind in ("hess", "exact"))
        rows.append(row_of(f"median τ in steps, Hessian basis, {words}", median, None, exact))
    inside, outside, hess = (np.mean(slopes[f"reshuffle_{basis}"]) for basis in BASES)
    caveats = (
        f"τ goes as F^{inside:+.2f} only where directions and times come from one window; with the times of another it "
        f"goes as F^{outside:+.2f}, in the Hessian basis as F^{hess:+.2f}.",
    )
    one = found[0]
    curves = [
        Series(name, one[f"reshuffle_{basis}_flatness"], one[f"reshuffle_{basis}_tau"], colour=i)
        for i, (basis, name) in enumerate(BASES.items())
    ]
    curves.append(theory_line(one, "tau"))
    panel = Panel("Correlation time against flatness", "flatness F", "τ in steps", tuple(curves), "log", "log")
    window = 10 * round(standard(ready(bench, bench.seeds[0])).steps_per_epoch)
    return Outcome(
        tuple(rows), (panel,), caveats,
        f"{note(bench, found)}{fitted_over(*sizes(bench))} Exact: the epoch-noise theory for a window of {window} "
        "steps with its line removed, from the measured curvatures; nothing fitted.",
    )  # fmt: skip


@register(
    name="feng-tu/thermal-null",
    paper=PAPER,
    title="Null model: isotropic noise in the same landscape",
    statement="In thermal equilibrium the variance is larger in flatter directions; that of SGD is the inverse.",
    data=DATA,
    cost="a minute",
    full_cost="one hour",
)
def null(bench: Bench) -> Outcome:
    """The layer's Hessian directions as a parabola, driven by white noise as strong as that of SGD on average."""
    hessian = bench.choose(10, 20, 100)
    replicas, steps = bench.choose(8, 6, 6), bench.choose(200, 400, 12_000)

    def measure(seed: int) -> dict[str, Any]:
        layer = middle(ready(bench, seed))
        sgd = standard(layer)
        modes = landscape.eigenpairs(landscape.hessian(layer), hessian, tol=1e-3)
        flat = landscape.flatness(layer, modes.eigenvectors, rtol=1e-2).flatness
        strength = noise.in_directions(layer, modes.eigenvectors).variance.mean() * sgd.minibatch_factor
        temperature = float(sgd.lr / 2 * strength)

        def energy(x: torch.Tensor) -> torch.Tensor:
            return (x.square() * modes.eigenvalues / 2).sum(1)

        path = langevin(
            TorchPotential(energy), temperature, start=np.zeros(hessian), dt=sgd.lr, steps=steps * 10,
            replicas=replicas, seed=seed, record_every=10, burn_in=bench.choose(1_000, 5_000, 50_000),
        ).position  # fmt: skip
        h = modes.eigenvalues.numpy()
        return {"flatness": flat, "variance": (path**2).mean((0, 1)), "exact": temperature / h / (1 - sgd.lr * h / 2)}

    found = bench.each_seed("thermal", measure)
    psi = [-power(one["flatness"], one["variance"])[0] for one in found]
    exact = [-power(one["flatness"], one["exact"])[0] for one in found]
    claim = Published(0.0, "equilibrium, variance grows with F", 0.0, "at most")
    rows = (row_of("ψ of isotropic noise, Hessian basis", psi, claim, exact),)
    one = found[0]
    panel = Panel("Variance against flatness, isotropic noise", "flatness F", "variance", (
        Series("measured", one["flatness"], one["variance"], colour=0),
        Series("T/h", one["flatness"], one["exact"], None, "line", 1),
    ), "log", "log")  # fmt: skip
    return Outcome(
        rows, (panel,), (),
        f"The {hessian} sharpest modes of the middle layer's Hessian in networks trained as in the other figures, each "
        f"a parabola of its curvature, driven by white noise; {replicas} replicas for each of {len(found)} networks, "
        f"{steps * 10} steps of size α after burn-in. Flatness is that of the network's loss. Exact: the variance of "
        "the discrete steps, T/h/(1 - αh/2).",
    )  # fmt: skip
