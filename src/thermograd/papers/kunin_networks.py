"""Kunin et al.: The limiting dynamics of SGD (Neural Computation 2024, arXiv 2107.09133), networks."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np
import torch

from ..hyperparameters import SGD
from ..problem import Problem
from ..simulate import network_paths
from ..theory import limiting
from ..trajectory.drift import replica_split
from ..trajectory.selection import select_all
from .item import Bench, register
from .kunin import PAPER
from .outcome import Outcome, Panel, Published, Series, row_of
from .training import Point, pooled_images, settle, small_classifier, surroundings, trained

__all__ = [
    "DATA",
    "DECAY",
    "fig1",
    "fig4",
    "fig6",
    "late_exponent",
    "minimum",
    "pace",
    "problem_of",
    "sgd_of",
    "slope_of",
]

_Array = np.ndarray[Any, Any]
DECAY = 1e-3
DATA = "Fashion-MNIST, first 2,000 images, pooled to 7 x 7"


def problem_of(bench: Bench) -> Problem:
    """A network too small to interpolate, as ResNet-18 is on ImageNet."""
    if bench.scale == "reduced":
        return small_classifier(*pooled_images(bench, "digits", 300, 2), [3])
    return small_classifier(*pooled_images(bench, "fashion_mnist", 2_000, 4), [8])


def sgd_of(problem: Problem, lr: float = 0.1, momentum: float = 0.9, batch: int = 64, decay: float = DECAY) -> SGD:
    """Batches drawn with replacement, as the theory has it."""
    return SGD(lr, momentum, decay, min(batch, problem.N), problem.N, "replacement")


def pretrained(bench: Bench, problem: Problem, seed: int) -> torch.Tensor:
    epochs = bench.choose(6, 30, 30)
    return trained(problem, sgd_of(problem, batch=bench.choose(16, 64, 64)), (0.1, 0.01), epochs, seed)


def minimum(bench: Bench, problem: Problem, seed: int) -> Point:
    """The minimum below pretrained weights, where the theory is meant to hold; made once for each seed."""

    def make() -> dict[str, Any]:
        return asdict(surroundings(problem, settle(problem, pretrained(bench, problem, seed), DECAY), DECAY))

    return Point(**bench.part(f"minimum-{seed}", make))


def pace(point: Point) -> float:
    """The learning rate at which lr times the largest curvature is what it was for ResNet-18, 1e-4 times 53."""
    return 5e-3 / float(point.curvature[0])


def slope_of(x: Any, y: Any) -> float:
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])


def late_exponent(steps: _Array, square: _Array) -> float:
    """Slope over the last two thirds of the steps."""
    use = (steps >= steps[-1] / 3) & (square > 0)
    return slope_of(steps[use], square[use])


# ---------------------------------------------------------------------------------------------- figures 4, 5


@register(
    name="kunin/fig4",
    paper=PAPER,
    title="Modified loss and velocity regulariser (Figs. 4 and 5)",
    statement="In the top Hessian subspace positions spread isotropically, whatever the curvature, and velocities "
    "in proportion to it: they sample a modified loss, not the loss.",
    data=DATA,
    cost="two minutes",
    full_cost="ten minutes",
)
def fig4(bench: Bench) -> Outcome:
    """Positions and velocities along the 30 top eigenvectors of the Hessian around a minimum, SGD with β = 0.9."""
    problem = problem_of(bench)
    modes, replicas, steps = bench.choose(5, 30, 30), bench.choose(32, 16, 64), bench.choose(300, 3_000, 10_000)

    def measure(seed: int) -> dict[str, Any]:
        point = minimum(bench, problem, seed)
        sgd = sgd_of(problem, 2 * pace(point), batch=bench.choose(16, 64, 64))
        h, V = point.curvature[:modes], torch.tensor(point.vectors[:, :modes])
        theta, noise = torch.tensor(point.theta), point.noise[:modes] * sgd.minibatch_factor
        paths = network_paths(
            problem, replicas, steps, sgd, observe=lambda w: w @ V, seed=seed, record_every=5,
            burn_in=int(4 * limiting.relaxation_steps(sgd, h).max()), start=theta,
        )  # fmt: skip
        exact = limiting.stationary_moments(sgd, h, noise)
        away = paths.position - paths.position.mean((0, 1))
        return {
            "h": h + sgd.weight_decay, "noise": noise, "position": (away**2).mean((0, 1)),
            "velocity": (paths.velocity**2).mean((0, 1)), "exact_position": exact.position,
            "exact_velocity": exact.velocity, "lr": sgd.lr, "cloud": away[0, -200:, [0, -1]].T,  # [n, 2]
        }  # fmt: skip

    found = bench.each_seed("moments", measure)
    beta = 0.9

    def each(what: Any) -> list[float]:
        return [float(what(one)) for one in found]

    def formula(f: dict[str, _Array]) -> _Array:
        return f["lr"] * f["noise"] / (2 * (1 - beta) * f["h"])

    rows = [
        row_of(
            "exponent of Var θ against curvature", each(lambda f: slope_of(f["h"], f["position"])),
            Published(0.0, "Fig. 4, a nearly round cloud; the loss alone would give -1", 0.25),
            each(lambda f: slope_of(f["h"], f["exact_position"])),
        ),
        row_of(
            "exponent of Var v against curvature", each(lambda f: slope_of(f["h"], f["velocity"])),
            Published(1.0, "Fig. 5, an ellipse of metric 1/H", 0.25),
            each(lambda f: slope_of(f["h"], f["exact_velocity"])),
        ),
        row_of(
            "exponent of the noise against curvature", each(lambda f: slope_of(f["h"], f["noise"])),
            Published(1.0, "assumption Σ = σ²H", 0.25),
        ),
        row_of(
            "Var θ over ηs/(2(1-β)h)", each(lambda f: np.mean(f["position"] / formula(f))),
            Published(1.0, "stationary solution", 0.1), each(lambda f: np.mean(f["exact_position"] / formula(f))),
        ),
        row_of(
            "Var v over s/(1-β²)", each(lambda f: np.mean(f["velocity"] / f["noise"]) * (1 - beta**2)),
            Published(1.0, "stationary solution", 0.1),
            each(lambda f: np.mean(f["exact_velocity"] / f["noise"]) * (1 - beta**2)),
        ),
        row_of(
            "potential over kinetic energy", each(
                lambda f: np.mean(f["h"] * f["position"]) / np.mean(f["velocity"] * f["lr"] * (1 + beta) / 2)
            ),
            Published(1.0, "equipartition", 0.1), 1.0,
        ),
    ]  # fmt: skip
    one = found[0]
    panels = (
        Panel("Spread of positions", "curvature h", "Var θ", (
            Series("measured", one["h"], one["position"], colour=0),
            Series("exact", one["h"], one["exact_position"], None, "line", 1),
            Series("if the loss were sampled", one["h"], one["position"][0] * one["h"][0] / one["h"], None, "dashed"),
        ), "log", "log"),
        Panel("Spread of velocities", "curvature h", "Var v", (
            Series("measured", one["h"], one["velocity"], colour=0),
            Series("exact", one["h"], one["exact_velocity"], None, "line", 1),
        ), "log", "log"),
        _cloud_panel(one, modes),
    )  # fmt: skip
    return Outcome(
        tuple(rows),
        panels,
        (),
        f"{problem.P} weights, {problem.N} images, weight decay {DECAY:g}. Pretrained by SGD, settled at a minimum, "
        f"restarted with an empty buffer; {replicas} replicas for each of {len(found)} seeds, {modes} modes, batches "
        "drawn with replacement, η times the largest curvature 0.01. Curvature and noise are those at the minimum; "
        "nothing is fitted.",
    )


def _cloud_panel(one: dict[str, _Array], modes: int) -> Panel:
    """A path in the plane of the first and the last eigenvector, with contours of the modified loss and of the loss."""
    spread = 2 * np.sqrt(one["exact_position"][[0, -1]])  # two standard deviations
    narrow = 1 / np.sqrt(one["h"][[0, -1]])  # semi-axes of the loss, scaled to the same area
    narrow *= np.sqrt(spread.prod() / narrow.prod())
    angle = np.linspace(0, 2 * np.pi, 181)
    x, y = np.cos(angle), np.sin(angle)
    return Panel(
        f"Positions along eigenvectors 1 and {modes}", "along eigenvector 1", f"along eigenvector {modes}",
        (Series("SGD", one["cloud"][:, 0], one["cloud"][:, 1], colour=0),
         Series("modified loss, 2σ", spread[0] * x, spread[1] * y, None, "line", 1),
         Series("loss, same area", narrow[0] * x, narrow[1] * y, None, "dashed", 2)),
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------- figure 6


@register(
    name="kunin/fig6",
    paper=PAPER,
    title="Oscillations in the top subspace",
    statement="Position and velocity along an eigenvector loop with the frequency of the stationary current, "
    "slower in flatter directions.",
    data=DATA,
    cost="three minutes",
    full_cost="fifteen minutes",
)
def fig6(bench: Bench) -> Outcome:
    """Angle that (ωθ, v) turns a step in eigenvectors 1 and 30, over 16,000 steps."""
    problem, last = problem_of(bench), bench.choose(4, 29, 29)
    replicas, steps, beta = bench.choose(24, 16, 64), bench.choose(300, 16_000, 16_000), 0.9

    def measure(seed: int) -> dict[str, Any]:
        point = minimum(bench, problem, seed)
        sgd = sgd_of(problem, pace(point), beta, bench.choose(16, 64, 64))
        chosen = [0, last]
        h, V = point.curvature[chosen], torch.tensor(point.vectors[:, chosen])
        paths = network_paths(
            problem, replicas, steps, sgd, observe=lambda w: w @ V, seed=seed, start=torch.tensor(point.theta),
            burn_in=int(3 * limiting.relaxation_steps(sgd, h).max()),
        )  # fmt: skip
        omega = limiting.langevin_coefficients(sgd, h).omega
        u, v = omega * (paths.position - paths.position.mean((0, 1))), paths.velocity
        swept = -(u[:, :-1] * v[:, 1:] - v[:, :-1] * u[:, 1:]).mean((0, 1))
        exact = limiting.stationary_moments(sgd, h, np.ones(2))
        r = limiting.autocorrelation(sgd, h, [2])[0]  # E v(k) θ(k+1) - θ(k) v(k+1) = Var θ (1 - r(2)) / η
        theory = omega * exact.position * (1 - r) / sgd.lr / (omega**2 * exact.position + exact.velocity)
        return {
            "turned": swept / (u**2 + v**2).mean((0, 1)), "theory": theory, "current": omega * sgd.lr,
            "loop": np.stack([u[0, :, 0], v[0, :, 0]]), "slow": np.stack([u[0, :, 1], v[0, :, 1]]),
        }  # fmt: skip

    found = bench.each_seed("loops", measure)
    rows = [
        row_of(
            f"angle a step over that of the current, eigenvector {mode}",
            [one["turned"][i] / one["current"][i] for one in found],
            Published(1.0, "stationary current, frequency (2h/(η(1+β)))^1/2", 0.1),
            [one["theory"][i] / one["current"][i] for one in found],
        )
        for i, mode in enumerate((1, last + 1))
    ]
    rows.append(
        row_of(
            f"angle of eigenvector {last + 1} over that of eigenvector 1",
            [one["turned"][1] / one["turned"][0] for one in found],
            Published(1.0, "Fig. 6, slower in the flatter mode", 0.0, "at most"),
            [one["theory"][1] / one["theory"][0] for one in found],
        )
    )
    panels = []
    for name, mode in (("loop", 1), ("slow", last + 1)):
        kernel = np.ones(20) / 20
        # the last 2,000 steps, as published: more of them cover one another
        u, v = (np.convolve(line[-2_000:], kernel, "valid") for line in found[0][name])
        panels.append(
            Panel(f"Eigenvector {mode}, 20-step means", "ωθ", "velocity", (Series("SGD", u, v, None, "line"),))
        )
    return Outcome(
        tuple(rows),
        tuple(panels),
        (),
        f"{replicas} replicas for each of {len(found)} seeds, {steps} steps after the modes have relaxed, η times the "
        "largest curvature 0.005. The angle is the swept area over the mean square radius. Exact is the discrete "
        "process. 2,000 steps left eigenvector 30 uncertain by 0.04, near the edge of its tolerance.",
    )


# ---------------------------------------------------------------------------------------------- figure 1


@register(
    name="kunin/fig1",
    paper=PAPER,
    title="Anomalous diffusion of a pretrained network: drift and noise",
    statement="Long after performance has converged the weights go on moving, the squared step constant and the "
    "distance from the start a power of time with c above 1.",
    data=DATA,
    cost="two minutes",
    full_cost="ten minutes",
)
def fig1(bench: Bench) -> Outcome:
    """Replicas from pretrained weights that are no minimum: what part of the displacement is drift, against S."""
    problem = problem_of(bench)
    batches = bench.choose((8, 32), (16, 64, 256), (16, 64, 256))
    replicas, steps, every, beta = bench.choose(8, 12, 32), bench.choose(400, 2_000, 4_000), 20, 0.9

    def measure(seed: int) -> dict[str, Any]:
        theta = pretrained(bench, problem, seed)
        point = surroundings(problem, theta, DECAY)
        lr, lags = pace(point), np.arange(1, steps // every + 1)
        result: dict[str, Any] = {"loss": []}
        collect: dict[str, list[Any]] = {k: [] for k in ("drift", "noise", "local", "early", "exact_drift", "exact_c")}
        for batch in batches:
            sgd = sgd_of(problem, lr, beta, batch)
            paths = network_paths(problem, replicas, steps, sgd, seed=seed, record_every=every, start=theta)
            split = replica_split(select_all(paths.position - point.theta), lags)
            collect["drift"].append(split["replica_drift"])
            collect["noise"].append(split["replica_noise"])
            third = len(lags) // 3
            collect["local"].append(paths.square_step[:, -third:].mean())
            collect["early"].append(paths.square_step[:, third : 2 * third].mean())
            h = point.curvature + DECAY
            offset = point.slope / np.where(np.abs(h) < 1e-9, 1e-9, h)
            exact = limiting.propagate(
                sgd, point.curvature, point.noise * sgd.minibatch_factor, every * lags, position=offset
            )
            mean = ((exact.position_mean - offset) ** 2).sum(1)
            collect["exact_drift"].append(mean / (mean + exact.position.sum(1)))
            collect["exact_c"].append(late_exponent(every * lags, mean + exact.position.sum(1)))
            result["loss"].append([float(problem.loss(theta)), float(problem.loss(paths.theta.mean(0)))])
        return {**result, **collect, "steps": every * lags}

    found = bench.each_seed("split", measure)
    steps_at = found[0]["steps"]
    share = np.stack([one["drift"] / (one["drift"] + one["noise"]) for one in found])  # [s, S, T]
    total = np.stack([one["drift"] + one["noise"] for one in found])
    c = np.array([[late_exponent(steps_at, line) for line in one] for one in total])  # [s, S]
    exact_c = np.stack([one["exact_c"] for one in found])
    exact_share = np.stack([one["exact_drift"] for one in found])
    middle = len(batches) // 2
    # what steps of this size make of uncorrelated noise: its velocities add up with the memory of the momentum
    most = steps_at[-1] * np.array([one["local"][middle] for one in found]) * (1 + beta) / (1 - beta)
    ceiling = total[:, middle, -1] / most
    flat = [one["local"][middle] / one["early"][middle] for one in found]
    logs = np.log10(batches)
    rows = [
        row_of(
            f"exponent c over the last two thirds, S = {batches[middle]}", c[:, middle],
            Published(1.0, "Fig. 1, 1.08 to 1.62 in five networks", 0.0, "at least"), exact_c[:, middle],
        ),
        row_of("squared step, last third over the middle one", flat, Published(1.0, "Fig. 1, flat in time", 0.1)),
        row_of(
            "change of c for a tenfold S", [np.polyfit(logs, line, 1)[0] for line in c],
            Published(0.0, "Fig. 7, c rises above S = 188", 0.0, "at least"),
            [np.polyfit(logs, line, 1)[0] for line in exact_c],
        ),
        row_of(
            f"displacement over the most that noise alone can cause, S = {batches[middle]}", ceiling,
            Published(1.28, "Fig. 1, ours from its curves, 1.28 to 9.5", 0.1, "at least"), decides=False,
        ),
    ]  # fmt: skip
    for i, batch in enumerate(batches):
        rows.append(
            row_of(f"share of drift in the squared displacement, S = {batch}", share[:, i, -1],
                 theory=exact_share[:, i, -1])
        )  # fmt: skip
    curves = []
    for i, batch in enumerate(batches):
        error = share[:, i].std(0, ddof=1) / len(share) ** 0.5
        curves.append(Series(f"S = {batch}", steps_at, share[:, i].mean(0), error, colour=i))
        curves.append(Series("", steps_at, exact_share[:, i].mean(0), None, "line", i))
    one = found[0]
    paths_panel = Panel(
        f"Squared displacement, S = {batches[middle]}", "steps", "squared displacement",
        (Series("total", steps_at, total[0, middle], None, "line", 0),
         Series("drift", steps_at, np.maximum(one["drift"][middle], 1e-300), None, "dashed", 1),
         Series("noise", steps_at, one["noise"][middle], None, "dashed", 2)), "log", "log",
    )  # fmt: skip
    drift = float(np.mean(share[:, middle, -1]))
    caveats = (
        f"At S = {batches[middle]} {100 * drift:.0f} % of the squared displacement is drift of the mean, no diffusion.",
    )
    return Outcome(
        tuple(rows), (paths_panel, Panel("Share of drift", "steps", "drift / total", tuple(curves), "log")), caveats,
        f"Pretrained by SGD at η = 0.1 and 0.01, restarted at η times the largest curvature 0.005; {replicas} replicas "
        f"from one point for each of {len(found)} seeds separate drift from noise without bias. Exact: linear dynamics "
        "with the slope, curvatures and noise at the restart.",
    )  # fmt: skip
