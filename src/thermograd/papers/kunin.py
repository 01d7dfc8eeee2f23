"""Kunin et al.: The limiting dynamics of SGD (Neural Computation 2024, arXiv 2107.09133), the solvable models."""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy.linalg import expm
from scipy.sparse.linalg import LinearOperator, eigsh

from ..hyperparameters import SGD
from ..simulate import Potential, langevin, linear_regression_sgd
from ..theory import limiting
from .item import Bench, register
from .outcome import Outcome, Panel, Published, Row, Series, row_of

__all__ = ["fig2", "fig3"]

PAPER = "Kunin et al. 2024"
_Array = np.ndarray[Any, Any]


# ---------------------------------------------------------------------------------------------- figure 2


def _pixels(bench: Bench) -> tuple[_Array, _Array]:
    """Inputs [N, d] standardised by channel, and classes [N]."""
    if bench.scale == "reduced":
        images, labels = bench.data("digits", 600)
        flat = images.double().numpy()
        return (flat - flat.mean()) / flat.std(), labels.numpy()
    images, labels = bench.data("cifar10", bench.choose(0, 4_000, 50_000))
    pool = bench.choose(1, 2, 1)
    colours = images.unflatten(2, (-1, pool)).unflatten(4, (-1, pool)).mean((3, 5)).numpy()  # [N, 3, 32/p, 32/p]
    colours = (colours - colours.mean((0, 2, 3), keepdims=True)) / colours.std((0, 2, 3), keepdims=True)
    return colours.reshape(len(colours), -1).astype(float), labels.numpy()


def _poles_of(path: _Array) -> complex:
    """The pole of x(k+1) = p x(k) - b x(k-1) that fits paths [R, T] best, the one of positive phase."""
    now, before, after = path[:, 1:-1].ravel(), path[:, :-2].ravel(), path[:, 2:].ravel()
    p, b = np.linalg.lstsq(np.stack([now, -before], 1), after, rcond=None)[0]
    return complex(p / 2 + np.sqrt(complex(p * p / 4 - b)))


@register(
    name="kunin/fig2",
    paper=PAPER,
    title="Phase spirals of linear regression",
    statement="Along the top eigenvector SGD with momentum follows the damped oscillation of the underdamped "
    "Langevin equation.",
    data="CIFAR-10",
    cost="a minute",
    full_cost="ten minutes",
)
def fig2(bench: Bench) -> Outcome:
    """Images to one-hot classes, S = 512: position and velocity along the top eigenvector for three β."""
    inputs, labels = _pixels(bench)
    size, d = inputs.shape
    second = LinearOperator((d, d), matvec=lambda v: inputs.T @ (inputs @ v) / size, dtype=np.float64)
    values, vectors = eigsh(second, k=2, v0=np.ones(d))
    top, along, following = float(values[-1]), vectors[:, -1], float(values[-2])
    momenta, steps, replicas = (0.9, 0.99, 0.999), 400, bench.choose(2, 2, 10)
    # pooling divides the curvature of smooth images by the pixels pooled; digits turn at about that pace
    lr, batch = (1e-5 * 3072 / d, 512) if d >= 768 else (0.01 / top, 64)
    sgds = [SGD(lr=lr, momentum=b, batch_size=batch, dataset_size=size, sampling="replacement") for b in momenta]

    def measure(seed: int) -> dict[str, Any]:
        rng = np.random.default_rng(seed)
        found: dict[str, Any] = {"start": [], "position": [], "velocity": [], "noise": []}
        for r in range(replicas):
            target = (labels == rng.integers(labels.max() + 1)).astype(float)
            start = rng.uniform(-1, 1, d) / np.sqrt(d)  # as torch initialises a linear layer
            centre = float(along @ inputs.T @ target / size / top)
            slopes = (inputs @ start - target) * (inputs @ along)
            found["noise"].append(slopes.var() * sgds[0].minibatch_factor)
            found["start"].append(start @ along - centre)
            for sgd in sgds:
                path = linear_regression_sgd(
                    sgd, inputs, target, steps=steps, replicas=1, seed=seed + r, start=start
                )  # fmt: skip
                found["position"].append(path.position[0] @ along - centre)
                found["velocity"].append(path.velocity[0] @ along)
        for key in ("position", "velocity"):
            found[key] = np.reshape(found[key], (replicas, len(sgds), steps + 1))
        return found

    found = bench.each_seed("spirals", measure)
    start = np.stack([one["start"] for one in found])  # [s, R]
    position = np.stack([one["position"] for one in found])  # [s, R, 3, T]
    velocity = np.stack([one["velocity"] for one in found])
    noise = float(np.mean([one["noise"] for one in found]))
    size_of_start = np.sqrt((start**2).mean())
    rows: list[Row] = []
    panels = []
    for i, sgd in enumerate(sgds):
        theory = limiting.propagate(sgd, [top], [noise], np.arange(steps + 1), position=1.0)
        unit = limiting.propagate(sgd, [top], [0.0], np.arange(steps + 1), position=1.0)
        phase = float(limiting.phase_per_step(sgd, [top])[0])
        turn = round(2 * np.pi / phase)
        omega = float(limiting.langevin_coefficients(sgd, [top]).omega[0])
        x, v, name = position[:, :, i], velocity[:, :, i], f"β = {sgd.momentum:g}"
        phases = [float(np.angle(_poles_of(one))) for one in x]
        if sgd.momentum == 0.99:
            source = "Fig. 2, loops of about 65 steps"
            rows.append(
                row_of(f"steps a turn, {name}", [2 * np.pi / p for p in phases], Published(65, source, 5), turn)
            )
            turns = [steps * p / (2 * np.pi) for p in phases]
            told = Published(6, "Fig. 2, about 6 loops", 0.5)
            rows.append(row_of(f"turns in {steps} steps, {name}", turns, told, steps * phase / (2 * np.pi)))
        amplitude = np.sqrt((omega * x) ** 2 + v**2)  # [s, R, T]
        left = np.sqrt((amplitude[..., turn] ** 2).mean(1) / (amplitude[..., 0] ** 2).mean(1))
        exact = np.hypot(omega * unit.position_mean[turn, 0], unit.velocity_mean[turn, 0]) / omega
        words = {
            0.9: Published(0.1, "Fig. 2, settles after one overshoot", 0.0, "at most"),
            0.999: Published(0.9, "Fig. 2, nearly undamped", 0.0, "at least"),
        }
        rows.append(row_of(f"share of the amplitude left after a turn, {name}", left, words.get(sgd.momentum), exact))
        off = np.sqrt(((x - start[..., None] * unit.position_mean[:, 0]) ** 2).mean((1, 2))) / size_of_start
        overlaid = Published(0.2, "Fig. 2, theory overlays closely", 0.0, "at most")
        spread = float(np.sqrt(theory.position.mean())) / size_of_start
        rows.append(row_of(f"rms distance from the mean path over the start, {name}", off, overlaid, spread))
        panels.append(
            Panel(
                f"Phase plane, {name}", "position", "velocity", (
                    Series("SGD", x[0, 0], v[0, 0], colour=0),
                    Series("mean, exact", start[0, 0] * unit.position_mean[:, 0],
                           start[0, 0] * unit.velocity_mean[:, 0], None, "line", 1),
                ),
            )
        )  # fmt: skip
    caveats = () if d >= 768 else (f"Run on {d} pixels of digits, not on CIFAR-10.",)
    return Outcome(
        tuple(rows), tuple(panels), caveats,
        f"{size} images of {d} numbers, standardised, one class against the rest, drawn with replacement; eigenvalues "
        f"{top:.0f}, {following:.0f}. {replicas} starts for each of {len(found)} seeds, as torch initialises a linear "
        "layer. Exact is the discrete recursion; for the distances, the standard deviation of a mode with the noise of "
        "the start, which falls as the residuals do.",
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------- figure 3

_DRIFT = np.array([[2.5, -1.5], [-1.5, 2.5]])  # eigenvalues 4 and 1 along the diagonals
_PUSH = np.array([-0.1, 0.05])
_DIFFUSION = np.array([4.0, 1.0])
_STEP = 1e-4


def _tilted(x: _Array) -> float:
    return 1.25 * x[0] * x[0] + 1.25 * x[1] * x[1] - 1.5 * x[0] * x[1] + 0.1 * x[0] - 0.05 * x[1]


def _tilted_gradient(x: _Array, out: _Array) -> None:
    out[0] = 2.5 * x[0] - 1.5 * x[1] + 0.1
    out[1] = 2.5 * x[1] - 1.5 * x[0] - 0.05


def _anisotropic(x: _Array, out: _Array) -> None:
    out[0] = 2e-4  # D times 1/kappa = step/2
    out[1] = 5e-5


@register(
    name="kunin/fig3",
    paper=PAPER,
    title="Two-dimensional Ornstein-Uhlenbeck process with current",
    statement="Where noise and curvature do not commute the stationary density is that of a modified loss, and a "
    "probability current circulates.",
    data="made up: a quadratic loss with anisotropic noise",
    cost="half a minute",
    full_cost="two minutes",
)
def fig3(bench: Bench) -> Outcome:
    """Steps of 1e-4 on a loss with curvatures 4 and 1, noise 4 and 1 along the axes: density and current."""
    replicas, rows_kept, every = bench.choose(100, 400, 4_000), bench.choose(500, 1_000, 1_000), 100
    kappa, lag = 2 / _STEP, every * _STEP
    process = limiting.linear_process(
        _DRIFT, np.diag(_DIFFUSION), inverse_temperature=kappa, centre=np.linalg.solve(_DRIFT, _PUSH)
    )
    form = limiting.gibbs_form(process)
    whiten = np.linalg.cholesky(form.potential).T  # circles of the modified loss become round
    landscape = Potential(_tilted, _tilted_gradient)

    def measure(seed: int) -> dict[str, Any]:
        path = langevin(
            landscape, _anisotropic, start=[0.09, 0.0], dt=_STEP, steps=every * rows_kept, replicas=replicas,
            seed=seed, record_every=every, burn_in=int(8 / _STEP),
        ).position  # fmt: skip
        away = path - path.mean((0, 1))
        flat = away.reshape(-1, 2)
        covariance = flat.T @ flat / len(flat)
        lagged = np.einsum("rti,rtj->ij", away[:, 1:], away[:, :-1]) / (replicas * rows_kept)
        return {
            "potential": np.linalg.inv(covariance) / kappa,
            "rotation": kappa * (lagged.T - lagged)[0, 1] / (2 * lag),
            "path": path[0, :300], "mean": path.mean((0, 1)),
        }  # fmt: skip

    found = bench.each_seed("process", measure)
    later = expm(-_DRIFT * lag) @ form.covariance
    seen = kappa * (later.T - later)[0, 1] / (2 * lag)  # what rows a finite lag apart show
    rows = [
        row_of(
            f"modified loss U{i + 1}{j + 1}", [one["potential"][i, j] for one in found],
            Published(float(form.potential[i, j]), "stationary solution, A = (D + Q)U", 0.05), form.potential[i, j],
        )
        for i, j in ((0, 0), (0, 1), (1, 1))
    ]  # fmt: skip
    rows.append(
        row_of(
            "rotation Q12", [float(one["rotation"]) for one in found],
            Published(float(form.rotation[0, 1]), "Q of symmetric A, (D_ij)(a_i - a_j)/(a_i + a_j)", 0.05), seen,
        )
    )  # fmt: skip
    for i in range(2):
        rows.append(
            row_of(f"mean position {i + 1}", [one["mean"][i] for one in found], theory=float(process.centre[i]))
        )  # fmt: skip
    circle = np.linspace(0, 2 * np.pi, 100)
    ring = np.stack([np.cos(circle), np.sin(circle)])
    radius = 2 / np.sqrt(kappa)
    ellipse = process.centre[:, None] + radius * np.linalg.solve(whiten, ring)
    loss = process.centre[:, None] + radius * np.linalg.solve(np.linalg.cholesky(_DRIFT).T, ring)
    path = found[0]["path"]
    panel = Panel(
        "A path, the modified loss and the loss", "x", "y", (
            Series("path", path[:, 0], path[:, 1], None, "points", 0),
            Series("modified loss", ellipse[0], ellipse[1], None, "line", 1),
            Series("loss", loss[0], loss[1], None, "dashed", 2),
        ),
    )  # fmt: skip
    return Outcome(
        tuple(rows), (panel,), (),
        f"{replicas} paths for each of {len(found)} seeds from (0.09, 0), the first 8 time units dropped, "
        f"{rows_kept * lag:g} recorded. The current is read off the antisymmetric part of the correlation at lag "
        f"{lag:g}; the column beside says what that is exactly at this lag.",
    )  # fmt: skip
