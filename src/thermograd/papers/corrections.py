"""What corrected the four papers: Kühn & Rosenow 2023, Zhang, Yang & Tu 2026, Yang, Tang & Tu 2023."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from ..hyperparameters import SGD
from ..landscape import eigenpairs, hessian
from ..models import mlp
from ..noise import in_directions
from ..problem import Problem
from ..simulate import Potential, langevin, networks, quadratic_sgd
from ..theory import flatness, sampling
from ..trajectory.detrend import detrended
from .item import Bench, register
from .lines import fitted, stacked
from .outcome import Outcome, Panel, Published, Row, Series, row_of

__all__ = ["epoch_noise", "noise_exponent", "valley"]

_Array = np.ndarray[Any, Any]


def _images(bench: Bench, name: str, samples: int, pool: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Images drawn at random, averaged over squares of ``pool`` pixels, and their classes."""
    data = bench.data(name)
    chosen = np.random.default_rng(seed).permutation(len(data.X))[:samples]
    X = data.X[chosen]
    return (torch.nn.functional.avg_pool2d(X, pool) if pool > 1 else X), data.y[chosen]


def _network(X: torch.Tensor, y: torch.Tensor, hidden: list[int], seed: int, bias: bool = True) -> Problem:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = mlp([X[0].numel(), *hidden, 10], bias=bias)
    return Problem(model, torch.nn.CrossEntropyLoss(), (X, y))


# ---------------------------------------------------------------------------------------- Kühn & Rosenow

_EPOCH = SGD(lr=0.05, batch_size=10, dataset_size=10_000, sampling="reshuffle")
_CURVATURE = np.array([0.002, 0.0035, 0.006, 0.02, 0.06, 0.2, 0.6, 1.3, 3.0])
_SETTLED = 30_000  # steps: three relaxation times of the slowest mode


@register(
    name="kuehn-rosenow/epoch-noise",
    paper="Kühn & Rosenow 2023",
    title="Anti-correlated noise of epochs",
    statement="Reshuffled epochs anti-correlate the noise: below a crossover curvature the weights fluctuate far less.",
    data="made up: a quadratic loss; CIFAR-10, averaged to 8 x 8",
    cost="two minutes",
    full_cost="an hour",
)
def epoch_noise(bench: Bench) -> Outcome:
    """Variance and correlation time of each mode, reshuffled and with replacement: a quadratic loss, then a network."""
    found = bench.each_seed("quadratic", lambda seed: _quadratic(bench, seed))
    rows, panels = _quadratic_rows(found)
    caveats: list[str] = []
    if bench.scale != "reduced":
        modes = bench.each_seed("network", lambda seed: _network_modes(bench, seed))
        more, panel, caveats = _network_rows(modes)
        rows, panels = rows + more, [*panels, panel]
    return Outcome(
        tuple(rows), tuple(panels), tuple(caveats),
        f"Quadratic loss: {len(_CURVATURE)} modes with C = H, {_EPOCH.steps_per_epoch:.0f} steps an epoch, "
        f"η = {_EPOCH.lr:g}; exact values are the discrete sums of the theory. Network: 192-16-10 on CIFAR-10, B = 20, "
        "no momentum; variances in windows of 20 epochs with a straight line removed, along the Hessian's eigenvectors "
        "in the middle of the window, against the exact discrete theory with the measured C and H and nothing fitted.",
    )  # fmt: skip


def _quadratic(bench: Bench, seed: int) -> dict[str, Any]:
    size, samples = len(_CURVATURE), _EPOCH._needed("dataset_size")
    offsets = np.random.default_rng(seed).normal(size=(samples, size)) * np.sqrt(_CURVATURE)
    result: dict[str, Any] = {"noise": offsets.var(axis=0) * _EPOCH.minibatch_factor}
    for scheme in bench.choose(("reshuffle",), *2 * [("reshuffle", "replacement")]):
        path = quadratic_sgd(
            _EPOCH.replace(sampling=scheme), _CURVATURE, offsets, steps=bench.choose(20_000, 50_000, 500_000),
            replicas=16, seed=seed, record_every=7, burn_in=_SETTLED,
        )  # fmt: skip
        moments = path.moments(mean=np.zeros(size))
        result[scheme], result[f"{scheme} v"] = moments.position, moments.velocity
    return result


def _exponent(variance: _Array, noise: _Array, part: _Array) -> _Array:
    """Exponent of each row of variances in the curvature for noise in proportion to it, [S]."""
    x = np.log(_CURVATURE[part])
    return np.array([fitted(x, np.log(v / s)[part]).slope + 1 for v, s in zip(variance, noise, strict=True)])


def _quadratic_rows(found: list[dict[str, _Array]]) -> tuple[list[Row], list[Panel]]:
    seeds, longest, edge = len(found), (_EPOCH.steps_per_epoch + 1) / 3, sampling.crossover_curvature(_EPOCH)
    noise, variance = stacked(found, "noise"), stacked(found, "reshuffle")
    exact = np.stack([sampling.weight_variance(_EPOCH, _CURVATURE, one) for one in noise])
    flat, sharp = edge / 9 > _CURVATURE, 9 * edge < _CURVATURE
    rows = []
    for name, part, claimed, sign in (("flat", flat, 1.0, "<"), ("sharp", sharp, 0.0, ">")):
        told = Published(claimed, f"C ∝ H, λ {sign} λ_c", 0.15)
        ours, theory = (_exponent(kind, noise, part) for kind in (variance, exact))
        rows.append(row_of(f"exponent of the variance in λ, {name} modes, C = H", ours, told, theory))
    unit = _EPOCH.lr**2 * noise * longest / 2
    ours, theory = ((kind / unit)[:, flat].mean(axis=1) for kind in (variance, exact))
    told = Published(1.0, "flat modes: η²C(M+1)/6", 0.1)
    rows.append(row_of("variance over η²C(M+1)/6, flat modes", ours, told, theory))
    time = 2 * variance / (_EPOCH.lr**2 * stacked(found, "reshuffle v"))
    told = Published(longest, "flat modes: (M+1)/3", 0.1 * longest)
    theory = sampling.correlation_time(_EPOCH, _CURVATURE)[flat]
    rows.append(row_of("correlation time of flat modes in steps", time[:, flat].mean(axis=1), told, theory))
    curves = [
        Series("reshuffled", _CURVATURE, variance.mean(axis=0), variance.std(axis=0, ddof=1) / seeds**0.5, colour=0),
        Series("exact", _CURVATURE, exact.mean(axis=0), style="line", colour=0),
    ]
    if "replacement" in found[0]:
        free, white = stacked(found, "replacement"), _EPOCH.replace(sampling="replacement")
        stationary = sampling.weight_variance(white, _CURVATURE, noise.mean(axis=0))
        curves += [
            Series("with replacement", _CURVATURE, free.mean(axis=0), free.std(axis=0, ddof=1) / seeds**0.5, colour=1),
            Series("exact, with replacement", _CURVATURE, stationary, style="line", colour=1),
        ]
    title = f"Quadratic loss, λ_c = {edge:.2g}"
    return rows, [Panel(title, "curvature λ", "variance of the weights", tuple(curves), "log", "log")]


def _network_modes(bench: Bench, seed: int) -> dict[str, Any]:
    """Window variances of the sharpest modes of one trained network, under either scheme, and the theory's."""
    samples, modes = bench.choose(400, 2000, 10_000), bench.choose(10, 50, 200)
    problem = _network(*_images(bench, "cifar10", samples, 4, seed), [16], seed)
    sgd = SGD(lr=0.05, batch_size=20, dataset_size=samples, sampling="reshuffle")
    epoch = samples // 20
    start = networks(problem, 1, bench.choose(20, 40, 100) * epoch, sgd, seed=seed).theta[0]
    window = 20 * epoch
    result: dict[str, Any] = {}
    for scheme in ("reshuffle", "replacement"):
        one = sgd.replace(sampling=scheme)
        run = networks(problem, 1, window, one, seed=seed + 1, record_every=1, start=start, keep_weights=True)
        assert run.position is not None
        path = run.position[0]  # [T + 1, P]
        middle = path[len(path) // 2]
        pairs = eigenpairs(hessian(problem, middle), modes, seed=seed)
        along = ((path[1:] - middle) @ pairs.eigenvectors.to(path)).cpu().numpy()  # [T, k]
        curvature = pairs.eigenvalues.double().cpu().numpy()
        noise = in_directions(problem, pairs, middle).variance * one.minibatch_factor
        result[f"{scheme} measured"] = (detrended(along, "linear") ** 2).mean(axis=0)
        result[f"{scheme} theory"] = sampling.weight_variance_window(one, curvature, noise, window, "linear")
        result[f"{scheme} curvature"] = curvature
        result[f"{scheme} loss"] = run.loss[0, [0, -1]]
        result[f"{scheme} sums"] = _epoch_sums(along, curvature, sgd.lr, epoch)
    return result


def _epoch_sums(along: _Array, curvature: _Array, lr: float, epoch: int) -> float:
    """Mean square of the noise summed over an epoch, over what independent steps would give; median over modes.

    The noise is what moved the weights beyond the quadratic loss and a slow drift: 0 when an epoch's noise cancels.
    """
    noise = -np.diff(along, axis=0) / lr - curvature * along[:-1]  # [T - 1, k]
    noise = detrended(noise, "linear")
    whole = noise[epoch - 1 :]  # rows begin after the first step of an epoch, so that this is where the second begins
    sums = whole[: len(whole) // epoch * epoch].reshape(-1, epoch, len(curvature)).sum(axis=1)
    return float(np.median((sums**2).mean(axis=0) / (epoch * (noise**2).mean(axis=0))))


def _network_rows(modes: list[dict[str, _Array]]) -> tuple[list[Row], Panel, list[str]]:
    edge = 3 / (0.05 * 101)
    rows, curves, caveats = [], [], []
    for i, (scheme, name) in enumerate((("reshuffle", "reshuffled"), ("replacement", "with replacement"))):
        ratio = stacked(modes, f"{scheme} measured") / stacked(modes, f"{scheme} theory")
        told = Published(1.0, "validated along the Hessian directions of networks", 0.3)
        name_of = f"network: variance over theory, median mode, {name}"
        rows.append(row_of(name_of, np.median(ratio, axis=1), told, 1.0))
        one = modes[0]
        curves += [
            Series(name, one[f"{scheme} curvature"], one[f"{scheme} measured"], colour=i),
            Series("theory" if i == 0 else "", one[f"{scheme} curvature"], one[f"{scheme} theory"], None, "line", i),
        ]
        told = Published(float(i), "noise of an epoch cancels" if i == 0 else "independent steps", 0.2)
        name_of = f"network: mean square of an epoch's noise, independent steps = 1, {name}"
        rows.append(row_of(name_of, [float(one[f"{scheme} sums"]) for one in modes], told))
    reduced = []
    for kind in ("measured", "theory"):
        pair = [stacked(modes, f"{scheme} {kind}") for scheme in ("reshuffle", "replacement")]
        below = [stacked(modes, f"{scheme} curvature") < edge / 2 for scheme in ("reshuffle", "replacement")]
        reduced.append([np.median(a[m]) / np.median(b[n]) for a, b, m, n in zip(*pair, *below, strict=True)])
    told = Published(1.0, "strongly reduced below λ_c", 0.0, "at most")
    rows.append(row_of("network: variance of flat modes, reshuffled over replacement", reduced[0], told, reduced[1]))
    losses = stacked(modes, "reshuffle loss").mean(axis=0)
    caveats.append(
        f"The network is not stationary: its loss falls from {losses[0]:.3g} to {losses[1]:.3g} within the window, and "
        "noise that depends on the weights does not cancel over an epoch."
    )
    panel = Panel("Network on CIFAR-10", "curvature λ", "variance in the window", tuple(curves), "log", "log")
    return rows, panel, caveats


# -------------------------------------------------------------------------------------- Zhang, Yang & Tu

_SQUARES = 300  # samples whose Hessians are squared
_SQUARED = 30  # modes along which they are
_LAYERS = ("layer1.weight", "layer2.weight", "layer3.weight")


@register(
    name="zhang-yang-tu/noise-exponent",
    paper="Zhang, Yang & Tu 2026",
    title="Noise as a power of the curvature, layer by layer",
    statement="The noise follows the mean square of the samples' Hessians, not H: C ∝ H^γ, 1 ≤ γ ≤ 2 in each layer.",
    data="MNIST",
    cost="four minutes",
    full_cost="two hours",
)
def noise_exponent(bench: Bench) -> Outcome:
    """C_ii against H_ii and against E h²_ii in the eigenbasis of each layer's Hessian of a trained network."""
    samples, modes, width = bench.choose(150, 1000, 10_000), bench.choose(8, 100, 200), bench.choose(15, 50, 50)
    layers = bench.choose(_LAYERS[1:2], _LAYERS, _LAYERS)

    def measure(seed: int) -> dict[str, Any]:
        X, y = _images(bench, "mnist", samples, 1, seed) if bench.scale != "reduced" else _digits(bench, samples)
        whole = _network(X, y, [width, width], seed, bias=False)
        sgd = SGD(lr=0.1, batch_size=50, sampling="reshuffle")
        trained = networks(whole, 1, bench.choose(600, 4000, 100_000), sgd, seed=seed)
        found: dict[str, Any] = {"loss": trained.loss[0, -1]}
        named = whole.unflatten(trained.theta[0])
        for layer in layers:
            problem = _one_layer(whole, named, layer)
            pairs = eigenpairs(hessian(problem), min(modes, problem.P), tol=1e-4, seed=seed)
            curvature = pairs.eigenvalues.double().cpu().numpy()
            C = in_directions(problem, pairs).variance
            used = np.flatnonzero((curvature > 1e-3 * curvature[0]) & (C > 0))
            some = used[np.unique(np.linspace(0, len(used) - 1, _SQUARED).round().astype(int))]
            square = np.log(_mean_square_hessian(problem, pairs.eigenvectors[:, some]))
            H, C = np.log(np.maximum(curvature, 1e-300)), np.log(np.maximum(C, 1e-300))
            gamma, of_squares = fitted(H[used], C[used]).slope, fitted(H[some], square).slope
            found[layer] = [gamma, of_squares, fitted(square, C[some]).correlation]
            H, C = H[used], C[used]
            found[f"{layer} H"], found[f"{layer} C"] = np.exp(H), np.exp(C)
        return found

    found = bench.each_seed("layers", measure)
    rows: list[Row] = []
    curves = []
    for i, layer in enumerate(layers):
        gamma, square, goes_along = stacked(found, layer).T
        name = layer.removesuffix(".weight")
        for told in (Published(1.0, "1 ≤ γ", 0.05, "at least"), Published(2.0, "γ ≤ 2", 0.05, "at most")):
            rows.append(row_of(f"γ of {name}", gamma, told))
        rows.append(row_of(f"exponent of E h² in H, {name}", square))
        told = Published(1.0, "C ∝ E h²", 0.1)
        rows.append(row_of(f"correlation of log C with log E h², {name}", goes_along, told))
        H, C = found[0][f"{layer} H"], found[0][f"{layer} C"]
        line = fitted(np.log(H), np.log(C))
        curves += [
            Series(name, H, C, colour=i),
            Series("", H, np.exp(line.at(np.log(H))), style="line", colour=i),
        ]
    loss = float(np.mean([one["loss"] for one in found]))
    return Outcome(
        tuple(rows),
        (Panel("Noise against curvature, layer by layer", "H_ii", "C_ii", tuple(curves), "log", "log"),),
        (
            "The network was changed after a first run, and the number of modes raised after another, in both of which "
            "the exponent of the first layer was below 1: the few sharpest modes alone give a smaller one.",
        ),
        f"Network d-{width}-{width}-10 without biases on {samples} samples, SGD with B = 50 and η = 0.1 down to a loss "
        f"of {loss:.3g}; the {modes} largest eigenvalues of each layer's own Hessian, down to a thousandth of the "
        f"largest. E h² are squares of the samples' Hessians applied to {_SQUARED} of the eigenvectors, by differences "
        "of the samples' gradients.",
    )  # fmt: skip


def _digits(bench: Bench, samples: int) -> tuple[torch.Tensor, torch.Tensor]:
    data = bench.data("digits", samples)
    return data.X, data.y


def _one_layer(whole: Problem, named: Any, layer: str) -> Problem:
    """The same network at its trained weights, with one layer's weights as theta."""
    model = whole.model
    assert model is not None
    with torch.no_grad():
        for name, value in model.named_parameters():
            value.copy_(named[name])
    return Problem(model, torch.nn.CrossEntropyLoss(), (whole.inputs, whole.targets), params=layer)


def _mean_square_hessian(problem: Problem, directions: torch.Tensor, step: float = 1e-8) -> _Array:
    """E |h_p u|² over samples for each direction u [P, k]: the diagonal of E h², [k].

    The step is as small as rounding allows: a unit that switches within it counts as 1/step, and is no curvature.
    """
    theta, values = problem.theta, []
    some = torch.arange(min(problem.N, _SQUARES))
    for u in directions.T.to(theta):
        ahead, behind = (problem.sample_gradients(theta + sign * step * u, some) for sign in (1, -1))  # [n, P]
        values.append(float(((ahead - behind) / (2 * step)).square().sum(1).mean()))
    return np.array(values)


# ---------------------------------------------------------------------------------------- Yang, Tang & Tu


def _valley_slope(x: _Array, out: _Array) -> None:
    """λ(x_0) x_1² / 2 with λ = exp(cos x_0); x[2] and x[3] stay as they are."""
    curvature = math.exp(math.cos(x[0]))
    out[0] = -0.5 * math.sin(x[0]) * curvature * x[1] * x[1]
    out[1], out[2], out[3] = curvature * x[1], 0.0, 0.0


def _valley_loss(x: _Array) -> float:
    return 0.5 * math.exp(math.cos(x[0])) * x[1] * x[1]


def _valley_noise(x: _Array, out: _Array) -> None:
    """Δ across the valley, Δ/κ along it."""
    out[0], out[1], out[2], out[3] = x[2] / x[3], x[2], 0.0, 0.0


@register(
    name="yang-tang-tu/valley",
    paper="Yang, Tang & Tu 2023",
    title="Noise that prefers the flat part of a valley",
    statement="Anisotropic noise adds an effective loss Δ(1-κ) ln F along a valley: flat parts are visited more often.",
    data="none: a valley of constant loss and changing width",
    cost="three minutes",
    full_cost="an hour",
)
def valley(bench: Bench) -> Outcome:
    """Stationary density along a valley against its curvature, for noise κ times as strong across it as along it."""
    cases = bench.choose([(0.02, 2.0)], *2 * [[(0.02, 1.0), (0.02, 2.0), (0.02, 4.0), (0.005, 2.0)]])
    dt, replicas = bench.choose(0.02, 0.005, 0.005), bench.choose(50, 100, 400)
    time = bench.choose(3_000, 6_000, 60_000)
    edges = np.linspace(0, 2 * np.pi, 25)
    middle = (edges[1:] + edges[:-1]) / 2
    curvature = np.exp(np.cos(middle))

    def measure(seed: int) -> dict[str, Any]:
        found = {}
        for noise, anisotropy in cases:
            start = np.zeros((replicas, 4))
            start[:, 0] = np.random.default_rng(seed).uniform(0, 2 * np.pi, replicas)
            start[:, 2:] = noise, anisotropy
            steps = round(time * max(1, 0.02 / noise) / dt)  # a weaker noise takes longer along the valley
            path = langevin(
                Potential(_valley_loss, _valley_slope), _valley_noise, start=start, dt=dt, steps=steps,
                replicas=replicas, seed=seed, record_every=round(10 / dt), burn_in=steps // 5,
            ).position  # fmt: skip
            density, _ = np.histogram(path[..., 0] % (2 * np.pi), edges, density=True)
            found[f"{noise} {anisotropy}"] = density
        return found

    found = bench.each_seed("valleys", measure)
    rows, curves = [], []
    for i, (noise, anisotropy) in enumerate(cases):
        density = stacked(found, f"{noise} {anisotropy}")
        name = f"κ = {anisotropy:g}, Δ = {noise:g}"
        slopes = np.array([fitted(np.log(curvature), np.log(np.maximum(d, 1e-12))).slope for d in density])
        expected = flatness.flat_preference(curvature, anisotropy)
        claimed = fitted(np.log(curvature), np.log(expected)).slope
        told = Published(claimed, "P ∝ λ^(-κ/2)", 0.1 * abs(claimed))
        rows.append(row_of(f"exponent of P(x) in λ, {name}", slopes, told))
        # the width of the valley alone gives -1/2; the rest is the effective loss, zero for isotropic noise
        told = Published(anisotropy - 1, "L_SGD = Δ(1-κ) ln F", 0.1 * anisotropy)
        rows.append(row_of(f"-L_SGD / (Δ ln F), {name}", -2 * slopes - 1, told))
        expected = expected / (expected.sum() * (edges[1] - edges[0]))
        curves += [
            Series(name, middle, density.mean(axis=0), density.std(axis=0, ddof=1) / len(found) ** 0.5, colour=i),
            Series("", middle, expected, style="line", colour=i),
        ]
    return Outcome(
        tuple(rows),
        (Panel("Density along the valley", "x, the valley is sharp at 0", "P(x)", tuple(curves)),),
        (),
        f"L = λ(x) y²/2 with λ = exp(cos x), a closed valley of loss 0; {replicas} Langevin replicas a seed, time "
        f"step {dt}. Lines are λ^(-κ/2), the limit in which y is much faster than x.",
    )
