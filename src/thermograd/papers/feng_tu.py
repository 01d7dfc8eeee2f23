"""Feng & Tu: The inverse variance-flatness relation in SGD (PNAS 118, e2015617118, 2021)."""

from __future__ import annotations

from typing import Any

import numpy as np

from .. import landscape
from ..trajectory import pca
from .feng_tu_protocol import (
    BASES,
    DATA,
    PAPER,
    SCHEMES,
    correlation_times,
    explore,
    fitted_over,
    in_bases,
    middle,
    modes_of,
    note,
    power,
    ranks,
    ready,
    relation,
    sizes,
    theory_line,
)
from .item import Bench, register
from .lines import jackknife
from .outcome import Outcome, Panel, Published, Row, Series, row_of

__all__ = ["fig1", "fig2", "fig2_sweep"]

_Array = np.ndarray[Any, Any]


# ---------------------------------------------------------------------------------------------- figure 1


def _msd(line: _Array, lags: _Array) -> _Array:
    return np.array([np.mean((line[m:] - line[:-m]) ** 2) for m in lags])


@register(
    name="feng-tu/fig1",
    paper=PAPER,
    title="Drift, diffusion and the spectrum of principal components",
    statement="The first principal component is a persistent drift, the others diffuse; their variances fall as a "
    "power of the rank, so that a few tens hold nearly all.",
    data=DATA,
    cost="two minutes",
    full_cost="an hour",
)
def fig1(bench: Bench) -> Outcome:
    """Principal components of the middle layer over ten epochs, beside those of a random walk."""
    found = bench.each_seed("components", lambda seed: _spectra(bench, seed))

    def each(name: str) -> list[float]:
        return [float(one[name]) for one in found]

    mine, later = bench.scale == "full", int(found[0]["later"])
    walk_gap, walk_decay = 4.0, 2.0  # exact for a long random walk: variances as 1/i²
    fall = "exponent of the variance against rank, i ≥ 20"
    rows = [
        row_of("σ1² over σ2²", each("gap"), Published(2.0, "Fig. 1A, σ1² far above σ2²", 0.0, "at least")),
        row_of(f"{fall}, in sample", each("reshuffle_in"), Published(2.5, "Fig. 1A, 2 to 3", 0.5), decides=mine),
        row_of("components after the first that hold 90 %", each("n90"),
            Published(35, "Fig. 1B, MNIST, of 2500", 5), decides=mine),
        row_of("drift index of the first component (1: a straight line)", each("drift"),
            Published(0.5, "Fig. 1C, persistent drift", 0.0, "at least")),
        row_of("exponent of the squared displacement, first component", each("ballistic"),
            Published(2.0, "Fig. 1C, drift", 0.3), decides=False),
        row_of(f"exponent of the squared displacement, component {later}", each("diffusive"),
            Published(1.0, "Fig. 1D, diffusion", 0.3), decides=False),
        row_of("cosine of the first component with the weights", each("aligned")),
    ]  # fmt: skip
    rows += [
        row_of(f"{fall}, {BASES[basis]}, {words}", each(f"{scheme}_{basis}"))
        for scheme, words in SCHEMES.items()
        for basis in BASES
        if (scheme, basis) != ("reshuffle", "in")
    ]
    rows += [
        row_of("random walk: σ1² over σ2²", each("null_gap"), None, walk_gap),
        row_of("random walk: exponent against rank", each("null_decay"), None, walk_decay),
        row_of("random walk: components after the first that hold 90 %", each("null_n90")),
    ]
    caveats = (
        "A random walk that knows nothing of the loss has a first component "
        f"{np.mean(each('null_gap')):.1f} times the second and variances that fall as rank^-"
        f"{np.mean(each('null_decay')):.1f}: the gap and the power are no property of the landscape by themselves. "
        "With the variances of another window, or along the Hessian's eigenvectors, the exponents are "
        f"{np.mean(each('reshuffle_out')):.1f} and {np.mean(each('reshuffle_hess')):.1f}.",
    )
    used = " Exponents against rank are over components 21 to 100, or fewer where the window has fewer rows."
    return Outcome(tuple(rows), _spectrum_panels(found), caveats, note(bench, found) + used)


def _spectra(bench: Bench, seed: int) -> dict[str, Any]:
    """One network: spectra under either scheme in three bases, what drifts and what diffuses, and a random walk."""
    layer = middle(ready(bench, seed))
    vectors = landscape.eigenpairs(landscape.hessian(layer), bench.choose(70, 120, 300), tol=1e-3).eigenvectors.numpy()
    last, spectra = min(100, vectors.shape[1]), {}
    for scheme in SCHEMES:
        run = explore(bench, seed, scheme)
        parts = pca(run.first, held_out=False, sgd=run.sgd)
        if scheme == "reshuffle":
            standard_run, standard_parts = run, parts
        last = min(last, len(parts.variance) * 2 // 3)  # the last ones of few rows have hardly any variance
        spectra[scheme] = {
            "in": parts.variance,
            "out": correlation_times(run.second @ parts.directions.numpy())[0],
            "hess": correlation_times(run.second @ vectors)[0],
        }
    run, parts = standard_run, standard_parts
    walk = np.cumsum(np.random.default_rng(seed).standard_normal(run.first.shape), 0)
    drawn = pca(walk, held_out=False)
    i = np.arange(20, last) + 1
    decay = {
        f"{scheme}_{basis}": -power(i.astype(float), variance[20:last])[0]
        for scheme, bases in spectra.items()
        for basis, variance in bases.items()
    }
    # component i of T rows has the period 2T/i of its cosine, which must be long against the lags
    later = min(49, len(run.first) // 30)
    place = run.first @ parts.directions[:, [0, later]].numpy()
    lags = np.unique(np.geomspace(1, max(4, run.epoch // 8), 8).round().astype(int))
    mean = run.first.mean(0)
    shown = {f"spectrum_{basis}": variance[:200] for basis, variance in spectra["reshuffle"].items()}
    return {
        **decay, **shown, "gap": parts.variance[0] / parts.variance[1], "n90": parts.n90_without_first,
        "null_decay": -power(i.astype(float), drawn.variance[20:last])[0],
        "null_gap": drawn.variance[0] / drawn.variance[1], "null_n90": drawn.n90_without_first,
        "drift": parts.drift_index, "ballistic": power(lags.astype(float), _msd(place[:, 0], lags))[0],
        "diffusive": power(lags.astype(float), _msd(place[:, 1], lags))[0],
        "aligned": abs(parts.directions[:, 0].numpy() @ mean) / np.linalg.norm(mean),
        "null": parts.random_walk[:200], "path": place[:: max(1, len(place) // 300)].T, "later": later + 1,
        "epochs": len(place) / run.epoch,
    }  # fmt: skip


def _spectrum_panels(found: list[dict[str, _Array]]) -> tuple[Panel, ...]:
    curves = []
    for k, (basis, name) in enumerate(BASES.items()):
        least = min(len(one[f"spectrum_{basis}"]) for one in found)
        mean = np.exp(np.mean([np.log(one[f"spectrum_{basis}"][:least]) for one in found], 0))
        curves.append(Series(name, np.arange(1, least + 1), mean, colour=k))
    null = np.mean([one["null"] for one in found], 0)
    null = null[null > 0]
    curves.append(Series("random walk, in sample", np.arange(1, len(null) + 1), null, None, "dashed", 3))
    one = found[0]
    labels = ("component 1", f"component {int(one['later'])}")
    paths = tuple(
        Series(name, np.linspace(0, float(one["epochs"]), len(line)), line - line.mean(), None, "line", i)
        for i, (name, line) in enumerate(zip(labels, one["path"], strict=True))
    )
    return (
        Panel("Variance against rank, mean over seeds", "rank", "variance", tuple(curves), "log", "log"),
        Panel("Coordinates in time", "epoch", "coordinate", paths),
    )


# ---------------------------------------------------------------------------------------------- figure 2


@register(
    name="feng-tu/fig2",
    paper=PAPER,
    title="Inverse variance-flatness relation",
    statement="The variance of the weights is larger in sharper directions, as an inverse power of flatness.",
    data=DATA,
    cost="two minutes",
    full_cost="three hours",
)
def fig2(bench: Bench) -> Outcome:
    """Exponent ψ in sample, held out and in the Hessian basis, with and without replacement; amplitude; nulls."""
    components, *_ = sizes(bench)
    shown = (4, components // 4, components - 1)

    def measure(seed: int) -> dict[str, Any]:
        run = explore(bench, seed)
        walk = np.cumsum(np.random.default_rng(seed).standard_normal(run.first.shape), 0)
        null = pca(walk, held_out=False, n=components).directions[:, ranks(8, components)]
        parts = pca(run.first, held_out=False, n=components).directions
        offsets = np.linspace(-3, 3, 41)
        return {
            **relation(bench, seed), "offsets": offsets, "window": len(run.first),
            "null_decades": np.ptp(np.log10(landscape.flatness(run.problem, null, rtol=1e-2).flatness)),
            "profile": landscape.loss_along(run.problem, parts[:, shown], offsets).losses,
        }  # fmt: skip

    found = bench.each_seed("relation", measure)
    rows: list[Row] = []
    psi: dict[str, list[float]] = {}
    for scheme, words in SCHEMES.items():
        for basis, name in BASES.items():
            flat = [one[f"{scheme}_{basis}_flatness"] for one in found]
            fits = [power(F, one[f"{scheme}_{basis}_variance"]) for F, one in zip(flat, found, strict=True)]
            psi[f"{scheme}_{basis}"] = values = [-slope for slope, _ in fits]
            # in flat directions the variance has the exponent of the noise; in the Hessian basis all is known
            known = {"in": None, "out": "out_noise", "hess": "exact_variance"}[basis]
            exact = known and [-power(F, one[f"{scheme}_{known}"])[0] for F, one in zip(flat, found, strict=True)]
            if (scheme, basis) != ("reshuffle", "in"):
                rows.append(row_of(f"ψ {name}, {words}", values, None, exact))
                continue
            claim = Published(4.0, "Fig. 2, MNIST, about 4", 0.5)
            rows.append(row_of(f"ψ {name}, {words}", values, claim, decides=bench.scale == "full"))
            rows.append(row_of("the same, its sign", values, Published(0.0, "an inverse relation", 0.0, "at least")))
            claim = Published(-0.9, "Fig. 2, points on a line", 0.0, "at most")
            rows.append(row_of("correlation of the logarithms", [r for _, r in fits], claim))
    for scheme, words in SCHEMES.items():
        ratio = [np.median(one[f"{scheme}_hess_variance"] / one[f"{scheme}_exact_variance"]) for one in found]
        rows.append(row_of(f"median variance over the epoch-noise theory, {words}", ratio, None, 1.0))
    rows.append(row_of("decades of F that PCs of a random walk span", [float(one["null_decades"]) for one in found]))
    span = [float(np.ptp(np.log10(one["reshuffle_in_flatness"]))) for one in found]
    rows.append(row_of("decades of F that PCs of SGD span", span))
    caveats = (
        f"The exponent is {np.mean(psi['reshuffle_in']):.1f} only where directions and variances come from one window; "
        f"with the variances of another it is {np.mean(psi['reshuffle_out']):.1f}, in the Hessian basis "
        f"{np.mean(psi['reshuffle_hess']):.1f}, which is what noise that goes with curvature does in flat directions.",
    )
    theory = (
        f" Exact: the epoch-noise theory for a window of {int(found[0]['window'])} steps with its line removed, from "
        "the measured curvatures and noise, nothing fitted; held out, the exponent of the noise, which the variance of "
        "flat directions shares."
    )
    labels = [f"PC {k + 1}" for k in shown]
    protocol = note(bench, found) + fitted_over(*sizes(bench)) + theory
    return Outcome(tuple(rows), _relation_panels(found, labels), caveats, protocol)


def _relation_panels(found: list[dict[str, _Array]], labels: list[str]) -> tuple[Panel, ...]:
    one = found[0]
    curves = [
        Series(name, one[f"reshuffle_{basis}_flatness"], one[f"reshuffle_{basis}_variance"], colour=i)
        for i, (basis, name) in enumerate(BASES.items())
    ]
    curves.append(theory_line(one, "variance"))
    profiles = tuple(
        Series(name, one["offsets"], line, None, "line", i)
        for i, (name, line) in enumerate(zip(labels, one["profile"], strict=True))
    )
    return (
        Panel("Variance against flatness", "flatness F", "variance σ²", tuple(curves), "log", "log"),
        Panel("Loss along principal components", "displacement", "loss", profiles, "linear", "log"),
    )


@register(
    name="feng-tu/fig2-sweep",
    paper=PAPER,
    title="Variance-flatness relation against batch size and learning rate",
    statement="The inverse relation holds for every batch size and learning rate, with about the same exponent.",
    data=DATA,
    cost="two minutes",
    full_cost="four hours",
)
def fig2_sweep(bench: Bench) -> Outcome:
    """Exponents and amplitude for five settings around B = 50, α = 0.1, from one trained network a seed."""
    settings = ((50, 0.1), (50, 0.05), (50, 0.2), (25, 0.1), (100, 0.1))
    components, hessian, count = sizes(bench)
    components = min(components, bench.choose(30, 100, 1000))  # ten epochs of large batches are few rows

    def measure(seed: int) -> dict[str, Any]:
        modes = modes_of(bench, seed, hessian, count * 2 // 3)
        found: dict[str, list[Any]] = {}
        for scheme in SCHEMES:
            for batch, lr in settings:
                run = explore(bench, seed, scheme, lr, batch)
                one = in_bases(run, modes, min(components, len(run.first) // 2), count * 2 // 3)
                numbers = {b: -power(one[f"{b}_flatness"], one[f"{b}_variance"])[0] for b in BASES}
                numbers["exact"] = -power(one["hess_flatness"], one["exact_variance"])[0]
                numbers["amplitude"] = np.median(one["hess_variance"] / one["exact_variance"])
                for kind in ("hess", "exact"):
                    numbers[f"size_{kind}"] = np.exp(np.mean(np.log(one[f"{kind}_variance"])))
                for name, value in numbers.items():
                    found.setdefault(f"{scheme}_{name}", []).append(value)
        return found

    found = bench.each_seed("settings", measure)
    table = {name: np.stack([one[name] for one in found]) for name in found[0]}  # [s, settings] each
    inside = table["reshuffle_in"]
    rows = []
    for i, (batch, lr) in enumerate(settings):
        claim = Published(0.0, "Fig. 2, an inverse relation for each", 0.0, "at least")
        rows.append(row_of(f"ψ in sample, B = {batch}, α = {lr:g}", inside[:, i], claim))
    claim = Published(0.0, "Fig. 2, about the same exponent", 1.0)
    rows.append(Row("largest less smallest ψ in sample", *jackknife(inside, np.ptp), len(inside), claim))
    for scheme, words in SCHEMES.items():
        for basis, name in BASES.items():
            exact = table[f"{scheme}_exact"] if basis == "hess" else None
            rows.append(
                row_of(f"ψ {name}, {words}, mean of the settings", table[f"{scheme}_{basis}"].mean(1), None, exact)
            )
        amplitude = table[f"{scheme}_amplitude"]
        for i, (batch, lr) in enumerate(settings):
            name = f"variance over the epoch-noise theory, B = {batch}, α = {lr:g}, {words}"
            rows.append(row_of(name, amplitude[:, i], None, 1.0))
        for name, chosen, values in (("α", [1, 0, 2], [0.05, 0.1, 0.2]), ("1/B", [4, 0, 3], [0.01, 0.02, 0.04])):
            powers = {
                kind: [power(np.array(values), line)[0] for line in table[f"{scheme}_size_{kind}"][:, chosen]]
                for kind in ("hess", "exact")
            }
            name = f"power of {name} in the variance, Hessian basis, {words}"
            rows.append(row_of(name, powers["hess"], None, powers["exact"]))
    x = np.array([lr / batch for batch, lr in settings])
    drawn = [(name, table[f"reshuffle_{basis}"]) for basis, name in BASES.items()]
    drawn.append(("theory, Hessian basis", table["reshuffle_exact"]))
    curves = tuple(
        Series(name, x, v.mean(0), v.std(0, ddof=1) / len(v) ** 0.5, colour=i) for i, (name, v) in enumerate(drawn)
    )
    panel = Panel("Exponent ψ in the five settings", "α/B", "exponent ψ", curves, "log")
    outside, hess = table["reshuffle_out"].mean(), table["reshuffle_hess"].mean()
    excess = table["reshuffle_amplitude"].mean(0) - 1
    caveats = (
        f"Held out the exponents are {outside:.1f} on average, in the Hessian basis {hess:.1f}, not "
        f"{inside.mean():.1f}.",
        f"Without replacement the variances are {100 * excess.min():.0f} to {100 * excess.max():.0f} % above the "
        "theory of noise that does not depend on the weights; noise that does is not summed to zero by an epoch.",
    )
    return Outcome(
        tuple(rows), (panel,), caveats,
        f"{note(bench, found)}{fitted_over(components, hessian, count * 2 // 3)} Of a window of few rows "
        "components up to half their number are used. Other settings start from the same network. Exact: the "
        "epoch-noise theory with measured curvature and noise, nothing fitted; its power of α and of 1/B is 2 each "
        "where the whole layer is flat.",
    )  # fmt: skip
