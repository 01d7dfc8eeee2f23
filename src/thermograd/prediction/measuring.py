"""Measuring of a run what predictions need, once: the result is kept in the run's store."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import warnings
from collections.abc import Iterator
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from .. import landscape, noise
from ..errors import InputError, StoreError, ThermogradWarning, TooShortError
from ..hyperparameters import SGD
from ..problem import Problem
from ..progress import bar
from ..theory.arrays import Array
from ..trajectory import open_run, write_group
from .descent import Descent, descend, objective
from .forecast import Forecast
from .modes import Modes, measure_modes
from .standing import Standing, stand

if TYPE_CHECKING:
    import xarray

__all__ = ["flows_for", "measure"]

_GROUP, _FORMAT = "prediction", 2
_LONGER = 4.0  # how much longer than the run's own time the flow from the last weights is followed
_LEAST_STEPS, _EPOCHS = 2000, 25
_DIRECTIONS = 5  # along which the loss is compared with a parabola
_SEEN = 256  # samples whose losses say which data a measurement was made from
_VANISHED = 0.01  # loss of the noise-free flow over the run's at which there is no stationary state
_DEVIATION = 0.5  # relative deviation from the parabola that ends the quadratic region


def default_steps(sgd: SGD, recorded: int) -> int:
    """Steps that predictions look ahead: 2000 or 25 epochs, whichever is more, at most the recorded steps."""
    return int(min(max(_LEAST_STEPS, round(_EPOCHS * sgd.steps_per_epoch)), max(recorded, 100)))


def measure(
    run: Any,
    problem: Problem,
    *,
    theta: Any = None,
    velocity: Any = None,
    sgd: SGD | None = None,
    steps: int | None = None,
    drop_last: bool | None = None,
    seed: int = 0,
) -> Forecast:
    """Measure where a run stands, the noise-free flow from there, curvature and noise there and along the run.

    What is found is written into the run's store and used again as long as the last weights, the losses there and the
    options are the same.

    Args:
        run: a run's folder or its open tree (then nothing is kept).
        problem: the network with all weights that were trained, its loss and data.
        theta: last weights; velocity: minus the momentum buffer; sgd: hyperparameters; see
            :func:`~thermograd.prediction.standing.stand`.
        velocity: see theta.
        sgd: see theta.
        steps: how far ahead predictions look; default 2000 or 25 epochs, at most the recorded steps.
        drop_last: whether short last batches are dropped; default: as the problem's data loader does.
        seed: of every random draw.

    Raises:
        InputError, TooShortError, DivergedError: the run cannot be predicted from; the message says why.
    """
    if not isinstance(problem, Problem):
        raise InputError(
            f"the problem is a {type(problem).__name__}",
            expected="a thermograd.Problem of all weights that were trained, the loss and the data",
        )
    if sgd is not None and not isinstance(sgd, SGD):
        raise InputError(f"sgd is a {type(sgd).__name__}", expected="thermograd.SGD(lr=..., batch_size=...)")
    if steps is not None and not (isinstance(steps, Real) and 20 <= steps < math.inf and steps == int(steps)):
        raise InputError(f"steps is {steps!r}", expected="a whole number of steps, at least 20")
    drop_last = problem.drop_last if drop_last is None else drop_last
    before = torch.get_num_threads()
    if problem.P < 20_000:  # handing work of small networks to other threads costs more than it saves
        torch.set_num_threads(1)
    try:
        with _whole_or_not_at_all(), bar("measuring for predictions", 3) as progress:
            return _measure(run, problem, theta, velocity, sgd, steps, drop_last, seed, progress)
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def _whole_or_not_at_all() -> Iterator[None]:
    """Estimates that Ctrl-C leaves of a part of the work end the measurement, and are not taken for whole ones."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="interrupted", category=ThermogradWarning)
        try:
            yield
        except ThermogradWarning:
            raise KeyboardInterrupt from None


def _measure(
    run: Any, problem: Problem, theta: Any, velocity: Any, sgd: SGD | None, steps: int | None, drop_last: bool,
    seed: int, progress: bar,
) -> Forecast:  # fmt: skip
    kept = _kept(run)
    key = _key(problem, theta, velocity, sgd, steps, drop_last, seed, run)
    if kept is not None and kept.attrs.get("key") == key:
        return _load(kept, problem)
    half = _HalfDone(run, key)
    standing = half.standing(problem)
    if standing is None:
        standing = stand(run, problem, theta=theta, velocity=velocity, sgd=sgd, drop_last=drop_last, seed=seed)
        half.keep_standing(standing)
    progress.advance(1, "following the flow without noise")
    sgd = standing.sgd
    ahead = steps or default_steps(sgd, 2 * standing.rows)
    if ahead < 20:
        raise TooShortError(f"predictions look {ahead} steps ahead", expected="at least 20")
    here, mean = flows_for(standing, sgd.weight_decay, ahead, half)
    refuse_interpolation(standing, mean)
    progress.advance(1, "measuring curvature and noise")
    cold, hot = measure_modes(problem, mean.theta, standing.points, standing.centre, seed)
    progress.advance()
    forecast = Forecast(standing, cold, hot, {sgd.weight_decay: (here, mean)}, ahead)
    forecast.fits = _facts(forecast)
    if isinstance(run, str | os.PathLike) and "://" not in str(run):
        write_group(run, _GROUP, _saved(forecast, key).assign_attrs(asked_steps=steps or 0))
        half.remove()
    return forecast


class _HalfDone:
    """What an interrupted measurement had found, in a file of the run's folder, so that the next call goes on."""

    def __init__(self, run: Any, key: str):
        local = isinstance(run, str | os.PathLike) and "://" not in str(run)
        self.path, self.key = (Path(run) / ".prediction.part" if local else None), key
        self.found: dict[str, Any] = {}
        if self.path is not None and self.path.is_file():
            with contextlib.suppress(Exception):  # a damaged file is as good as none
                found = torch.load(self.path, weights_only=True)
                self.found = found if found["key"] == key else {}

    def standing(self, problem: Problem) -> Standing | None:
        if "standing" not in self.found:
            return None
        kept = dict(self.found["standing"])
        return Standing(
            problem=problem,
            sgd=SGD.from_dict(kept.pop("sgd")),
            losses=kept.pop("losses").numpy(),
            point_losses=kept.pop("point_losses").numpy(),
            points=tuple(kept.pop("points")),
            **kept,
        )

    def flow(self, name: str) -> Descent | None:
        if name not in self.found:
            return None
        times, losses, end, norm = self.found[name]
        return Descent(times.numpy(), losses.numpy(), end, norm)

    def keep_flow(self, name: str, flow: Descent) -> None:
        self._keep(name, (torch.as_tensor(flow.time), torch.as_tensor(flow.loss), flow.theta, flow.gradient_norm))

    def keep_standing(self, standing: Standing) -> None:
        names = ("theta", "velocity", "centre", "rows", "continued", "drop_last")
        content = {name: getattr(standing, name) for name in names} | {
            "sgd": standing.sgd.to_dict(),
            "losses": torch.as_tensor(standing.losses),
            "point_losses": torch.as_tensor(standing.point_losses),
            "points": list(standing.points),
        }
        self._keep("standing", content)

    def _keep(self, name: str, content: Any) -> None:
        self.found = {**self.found, "key": self.key, name: content}
        if self.path is None:
            return
        new = self.path.with_name(f"{self.path.name}.new")
        torch.save(self.found, new)
        os.replace(new, self.path)

    def remove(self) -> None:
        if self.path is not None:
            self.path.unlink(missing_ok=True)


def refuse_interpolation(standing: Standing, mean: Descent) -> None:
    """Refuse a run whose loss vanishes without noise: its noise vanishes with it, and nothing is stationary.

    Raises:
        InputError: the objective falls to a hundredth of the run's, or it is zero to rounding; and so does the noise of
            the gradient (of a loss that is zero at its minimum by its own scale it does not).
    """
    problem = standing.problem
    origin, rounding = torch.zeros_like(standing.theta), torch.finfo(problem.dtype).eps ** (2 / 3)
    zero = abs(objective(problem, 0.0, origin)) * rounding
    if standing.loss > zero:
        if mean.loss[-1] > _VANISHED * standing.loss:
            return
        left, seen, unit = (float(noise.strength(problem, at).value) for at in (mean.theta, standing.theta, origin))
        if left > _VANISHED * seen and left > rounding * unit:
            return
    raise InputError(
        f"the run interpolates its data: its training loss is {standing.loss:.2g} and falls to {mean.loss[-1]:.2g} "
        "without noise, and the noise of the gradient vanishes with it",
        expected="a run that fluctuates about a minimum where the loss is not zero",
        remedy="train with weight decay, or on more samples than the network can fit",
    )


def flows_for(
    standing: Standing, weight_decay: float, steps: int, half: _HalfDone | None = None
) -> tuple[Descent, Descent]:
    """Noise-free flows under a weight decay, from the last weights and from the mean of the run."""
    problem, time = standing.problem, steps * standing.sgd.effective_lr
    found, top = [], math.nan
    for name, start, length in (("here", standing.theta, _LONGER * time), ("mean", standing.centre, time)):
        flow = half.flow(name) if half is not None else None
        if flow is None:
            if math.isnan(top):
                pairs = landscape.eigenpairs(landscape.hessian(problem, standing.theta), k=1, tol=1e-2)
                top = max(float(pairs.eigenvalues[0]), 1e-8) + weight_decay
            flow = descend(problem, weight_decay, start, length, top)
            if half is not None:
                half.keep_flow(name, flow)
        found.append(flow)
    return found[0], found[1]


def _facts(forecast: Forecast) -> dict[str, Any]:
    """Scalars and the quadratic region: how far along the sharpest directions the loss stays a parabola."""
    standing, hot = forecast.standing, forecast.hot
    problem, sgd = standing.problem, standing.sgd
    losses = problem.sample_losses(standing.centre).double()
    gradient = problem.gradient(standing.theta).double()
    exact = hot.exact[:_DIRECTIONS]
    curvature = hot.curvature[exact] + sgd.weight_decay
    spread = np.sqrt(forecast.variances(sgd, hot)[exact])
    good = (curvature > 0) & (spread > 0)
    widths = np.full(len(exact), np.nan)
    if good.any():
        vectors = hot.vectors[:, : len(exact)][:, torch.as_tensor(good)]
        widths[good] = _quadratic_region(standing, vectors, spread[good])
    return {
        "sample_loss_variance": float(losses.var(unbiased=False)),
        "gradient_noise_scale": float(
            noise.strength(problem, standing.theta).value / max(float(gradient.square().sum()), 1e-300)
        ),
        "quadratic_width": widths,
        "quadratic_curvature": curvature,
    }


def _quadratic_region(standing: Standing, vectors: Tensor, spread: Array) -> Array:
    """Largest displacement along each direction up to which the loss is a parabola within the tolerance."""
    sizes = np.geomspace(0.5, 60, 15)  # in standard deviations of the run
    grid = np.concatenate([[0.0], sizes, -sizes])[None, :] * spread[:, None]
    found = landscape.loss_along(
        standing.problem, vectors, grid, standing.centre, weight_decay=standing.sgd.weight_decay
    ).losses
    count = len(sizes)
    even = found[:, 1 : 1 + count] + found[:, 1 + count :] - 2 * found[:, :1]  # [k, m]
    ratio = even / (grid[:, 1 : 1 + count] ** 2)
    start = np.median(ratio[:, :3], axis=1, keepdims=True)
    off = np.abs(ratio / start - 1) > _DEVIATION
    first = np.where(off.any(1), off.argmax(1), count - 1)
    return np.abs(grid[np.arange(len(grid)), 1 + first])


# ---------------------------------------------------------------------- keeping it


def _key(
    problem: Problem, theta: Any, velocity: Any, sgd: SGD | None, steps: int | None, drop_last: bool, seed: int,
    run: Any,
) -> str:  # fmt: skip
    """What a kept measurement must have been made from."""
    digest = hashlib.sha256()
    for given in (theta, velocity):
        if given is not None:
            digest.update(problem.as_theta(given).double().cpu().numpy().tobytes())
    tree = open_run(run)
    attrs = dict(tree["trajectory"].attrs) if "trajectory" in tree.children else {}
    # a run that was killed has no end; rows and steps then say how far it got
    standing = [attrs.get(name) for name in ("end", "rows", "committed_step", "sgd")]
    settings = [_FORMAT, standing, sgd.to_dict() if sgd else None, steps, drop_last, seed, problem.P, problem.N]
    settings += [str(problem.dtype), _seen_of_the_data(problem, theta, tree)]
    digest.update(json.dumps(settings, sort_keys=True, default=str).encode())
    return digest.hexdigest()


def _seen_of_the_data(problem: Problem, theta: Any, tree: Any) -> list[str]:
    """Losses of some samples at the last weights: they tell another loss or other data of the same size."""
    if theta is None and "theta" in tree["trajectory"].to_dataset():
        last = tree["trajectory/theta"][-1].values
        theta = last if last.shape == (problem.P,) and np.isfinite(last).all() else None
    if theta is None:
        return []
    index = torch.as_tensor(np.unique(np.linspace(0, problem.N - 1, _SEEN).round().astype(int)))
    losses = problem.sample_losses(theta, index)
    return [f"{float(value):.4g}" for value in (losses.mean(), losses.square().mean())]


def _kept(run: Any) -> xarray.Dataset | None:
    if not isinstance(run, str | os.PathLike):
        return None
    try:
        tree = open_run(run)
    except StoreError:
        raise
    return tree[_GROUP].to_dataset() if _GROUP in tree.children else None


_MODE_ARRAYS = ("curvature", "energy", "coloured", "white", "probe")


def _saved(forecast: Forecast, key: str) -> xarray.Dataset:
    import xarray

    variables: dict[str, Any] = {}
    for name, modes in (("cold", forecast.cold), ("hot", forecast.hot)):
        for array in _MODE_ARRAYS:
            variables[f"{name}_{array}"] = (f"{name}_mode", getattr(modes, array))
        variables[f"{name}_vectors"] = (("weight", f"{name}_sharp"), modes.vectors.cpu().numpy())
    standing = forecast.standing
    for name in ("theta", "velocity", "centre"):
        variables[name] = ("weight", getattr(standing, name).cpu().numpy())
    variables["losses"] = ("look", standing.losses)
    variables["point_losses"] = ("point", standing.point_losses)
    for name, flow in zip(("here", "mean"), forecast.flows[standing.sgd.weight_decay], strict=True):
        variables[f"{name}_time"], variables[f"{name}_loss"] = (
            (f"{name}_point", flow.time),
            (f"{name}_point", flow.loss),
        )
        variables[f"{name}_end"] = ("weight", flow.theta.cpu().numpy())
    fits = forecast.fits
    for name in ("quadratic_width", "quadratic_curvature"):
        variables[name] = ("direction", np.asarray(fits[name]))
    attrs = {
        "key": key,
        "sgd": json.dumps(standing.sgd.to_dict()),
        "rows": standing.rows,
        "continued": int(standing.continued),
        "drop_last": int(standing.drop_last),
        "steps": forecast.steps,
        "probes": json.dumps([forecast.cold.probes, forecast.hot.probes]),
        "white_error": forecast.hot.white_error,
        "gradient_norms": json.dumps([flow.gradient_norm for flow in forecast.flows[standing.sgd.weight_decay]]),
        **{name: float(fits[name]) for name in ("sample_loss_variance", "gradient_noise_scale")},
        "description": "curvature, noise and noise-free flow that predictions start from",
    }
    return xarray.Dataset(variables, attrs=attrs)


def _load(kept: xarray.Dataset, problem: Problem) -> Forecast:
    def weights(name: str) -> Tensor:
        return torch.as_tensor(kept[name].values).to(problem.device, problem.dtype)

    attrs = kept.attrs
    probes = json.loads(attrs["probes"])
    cold, hot = (
        Modes(
            **{array: kept[f"{name}_{array}"].values for array in _MODE_ARRAYS},
            probes=count,
            vectors=weights(f"{name}_vectors"),
            white_error=error,
        )
        for name, count, error in zip(("cold", "hot"), probes, (0.0, float(attrs["white_error"])), strict=True)
    )
    sgd = SGD.from_dict(json.loads(attrs["sgd"]))
    standing = Standing(
        problem, sgd, weights("theta"), weights("velocity"), weights("centre"), (), kept["point_losses"].values,
        kept["losses"].values,
        int(attrs["rows"]), bool(attrs["continued"]), bool(attrs["drop_last"]),
    )  # fmt: skip
    norms = json.loads(attrs["gradient_norms"])
    here, mean = (
        Descent(kept[f"{name}_time"].values, kept[f"{name}_loss"].values, weights(f"{name}_end"), norm)
        for name, norm in zip(("here", "mean"), norms, strict=True)
    )
    forecast = Forecast(standing, cold, hot, {sgd.weight_decay: (here, mean)}, int(attrs["steps"]))
    forecast.fits = {
        **{name: kept[name].values for name in ("quadratic_width", "quadratic_curvature")},
        **{name: float(attrs[name]) for name in ("sample_loss_variance", "gradient_noise_scale")},
    }
    return forecast
