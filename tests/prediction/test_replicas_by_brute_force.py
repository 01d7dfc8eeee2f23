"""Everything that is stationary against replicas of SGD written here, for each scheme and form of momentum."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import thermograd as tg
from thermograd.whatif import measured_run

N, STIFF = 24, np.array([2.0, 0.8, 0.3])
FORMS = {
    "reshuffled": {"batch_size": 4, "momentum": 0.8},
    "short last batch": {"batch_size": 9, "momentum": 0.5, "weight_decay": 0.05},
    "dropped last batch": {"batch_size": 9, "momentum": 0.5, "drop_last": True},
    "nesterov": {"batch_size": 4, "momentum": 0.8, "nesterov": True, "sampling": "replacement"},
    "dampening": {"batch_size": 12, "momentum": 0.8, "dampening": 0.5, "lr": 0.2},
}


def batches_of(rng, replicas, batch_size, sampling="reshuffle", drop_last=False, **_):
    """Sample indices [replicas, n] of one step after the other."""
    while True:
        if sampling == "replacement":
            yield rng.integers(0, N, (replicas, batch_size))
            continue
        order = rng.permuted(np.tile(np.arange(N), (replicas, 1)), axis=1)
        for start in range(0, N - batch_size + 1 if drop_last else N, batch_size):
            yield order[:, start : start + batch_size]


def steps_of(rng, centres, replicas, *, lr=0.1, momentum=0.0, weight_decay=0.0, nesterov=False, dampening=0.0, **form):
    """Weights [replicas, d] and minibatch losses [replicas] at each step of 0.5 sum h (w - a)^2, from the minimum."""
    w = np.tile(STIFF * centres.mean(0) / (STIFF + weight_decay), (replicas, 1))
    buffer = np.zeros_like(w)
    for index in batches_of(rng, replicas, **form):
        away = w[:, None] - centres[index]  # [replicas, n, d]
        yield w, 0.5 * (STIFF * away**2).sum(2).mean(1)
        gradient = (STIFF * away).mean(1) + weight_decay * w
        buffer = momentum * buffer + (1 - dampening) * gradient
        w = w - lr * (gradient + momentum * buffer if nesterov else buffer)


@pytest.fixture(scope="module", params=list(FORMS))
def case(request, tmp_path_factory):
    form = FORMS[request.param]
    rng = np.random.default_rng(5)
    centres = rng.standard_normal((N, 3)) * np.array([0.3, 0.7, 1.5])
    weights = torch.tensor(STIFF * centres.mean(0) / (STIFF + form.get("weight_decay", 0.0)), requires_grad=True)
    stiff, points = torch.tensor(STIFF), torch.tensor(centres)
    problem = tg.Problem.from_function(lambda w, a: 0.5 * (stiff * (w - a) ** 2).sum(), weights, points)
    own = {k: v for k, v in form.items() if k in ("momentum", "weight_decay", "nesterov", "dampening")}
    optimizer = torch.optim.SGD([weights], lr=form.get("lr", 0.1), **own)
    folder = tmp_path_factory.mktemp("replicas") / "run"
    batches = batches_of(rng, 1, **{"sampling": "reshuffle", **form})
    sampling = form.get("sampling", "reshuffle")
    with tg.Recorder(folder, problem, optimizer, batch_size=form["batch_size"], sampling=sampling):
        for _ in range(2500):
            index = torch.as_tensor(next(batches)[0])
            optimizer.zero_grad()
            (0.5 * stiff * (weights - points[index]) ** 2).sum(1).mean().backward()
            optimizer.step()
    ready = measured_run(folder, problem, steps=300, drop_last=form.get("drop_last", False))
    return form, centres, ready


def replicas(form, centres, replicas=800, settle=240, steps=240):
    """Weights [steps, replicas, d] and minibatch losses [steps, replicas] once they are stationary."""
    stream = steps_of(np.random.default_rng(6), centres, replicas, **form)
    rows = [next(stream) for _ in range(settle + steps)][settle:]
    return np.stack([w for w, _ in rows]), np.stack([loss for _, loss in rows])


def test_the_runs_own_fluctuation_is_the_predicted_one(case):
    _, _, ready = case
    assert ready.forecast.kappa == pytest.approx(1, abs=4 * ready.forecast.kappa_stderr)
    assert ready.forecast.kappa_stderr < 0.15


@pytest.mark.parametrize("change", [{}, {"batch_size": 2}, {"batch_size": 12, "momentum": 0.1}], ids=str)
def test_stationary_quantities_are_those_of_the_replicas(case, change):
    form, centres, ready = case
    changed = {**form, **change}
    row = ready.at(ready.sgd.replace(**change))
    # what one run of finite length told, in proportion to the level; the theory is the rest
    scale = 1 + (ready.forecast.closure.scale[0] - 1) * min(row["level"], 1)
    decay = form.get("weight_decay", 0.0)
    path, minibatch = replicas(changed, centres)
    away = path - STIFF * centres.mean(0) / (STIFF + decay)
    objective = 0.5 * ((STIFF + decay) * away**2).sum(2)  # [steps, replicas]
    assert row["stationary_excess_loss"] / scale == pytest.approx(objective.mean(), rel=0.03)
    np.testing.assert_allclose(row["weight_variance"][:3] / scale, (away**2).mean((0, 1)), rtol=0.06)
    assert row["loss_variance"] / scale**2 == pytest.approx(objective.var(), rel=0.08)
    # without replacement the batches to come are correlated with the weights, which the formula leaves out
    left_out = 0.06 if changed.get("sampling") == "replacement" else 0.12
    assert row["minibatch_loss_variance"] == pytest.approx(minibatch.var(), rel=left_out)
    lag = 30
    moved = ((path[lag:] - path[:-lag]) ** 2).sum(2).mean()
    far = ready.at(ready.sgd.replace(**change), steps=lag)
    assert far["distance"] ** 2 / scale == pytest.approx(moved, rel=0.06)
    seen = {"stationary_excess_loss": objective.mean(), "loss_variance": objective.var()}
    seen |= {"minibatch_loss_variance": minibatch.var(), "weight_variance": (away**2).mean((0, 1))}
    for name, truth in seen.items():  # as predicted, the run's own scatter included; 5% is that of the replicas
        told, error = (np.atleast_1d(row[key])[:3] for key in (name, f"{name}_stderr"))
        assert np.all(
            np.abs(told - truth) < 3.5 * error + (0.05 if name != "minibatch_loss_variance" else left_out) * truth
        )
        assert np.all((error > 0) & (error < 0.5 * truth))
    assert abs(far["distance"] - moved**0.5) < 3.5 * far["distance_stderr"] + 0.03 * moved**0.5
    near = ((path[3:] - path[:-3]) ** 2).sum(2).mean()
    assert far["diffusion_exponent"] == pytest.approx(np.log10(moved / near), abs=0.03)


def test_what_a_lower_rate_gains_and_what_batch_is_worth_it(case):
    form, centres, ready = case
    row = ready.at(ready.sgd)
    scale, decay = ready.forecast.closure.scale[0], form.get("weight_decay", 0.0)
    centre = STIFF * centres.mean(0) / (STIFF + decay)

    def floor(**change):
        path, _ = replicas({**form, **change}, centres, replicas=400, settle=240 if "lr" not in change else 1200)
        return 0.5 * ((STIFF + decay) * (path - centre) ** 2).sum(2).mean()

    whole = floor()
    drop = 1 - floor(lr=form.get("lr", 0.1) / 10) / whole
    assert row["decay_drop"] / row["stationary_excess_loss"] == pytest.approx(drop, abs=0.03)
    assert abs(row["decay_drop"] - drop * whole) < 3.5 * row["decay_drop_stderr"] + 0.05 * whole
    rate = ready.equivalent(ready.sgd, 3)
    assert floor(lr=rate, batch_size=3) == pytest.approx(whole, rel=0.06 + abs(scale - 1))
