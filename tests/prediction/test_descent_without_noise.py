"""The noise-free flow against exponentials."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import thermograd as tg
from thermograd.errors import InputError
from thermograd.prediction.descent import descend, flow_time


def bowl(curvature):
    data, stiff = torch.zeros(2, len(curvature)), torch.as_tensor(curvature)
    return tg.Problem.from_function(lambda w, a: 0.5 * (stiff * (w - a) ** 2).sum(), torch.ones(len(curvature)), data)


def test_stiff_modes_decay_exponentially_each_at_its_rate():
    curvature = np.array([100.0, 1.0, 0.01])
    problem = bowl(curvature)
    found = descend(problem, 0.05, torch.ones(3, dtype=torch.float64), 30.0, 100.05)
    exact = 0.5 * ((curvature + 0.05) * np.exp(-2 * (curvature + 0.05) * found.time[:, None])).sum(1)
    late = found.time > 0.1
    np.testing.assert_allclose(found.loss[late], exact[late], rtol=0.02)
    np.testing.assert_allclose(found.theta[2], np.exp(-0.06 * 30), rtol=0.01)
    assert len(found.time) < 80


def test_the_way_is_read_off_between_its_points():
    found = descend(bowl(np.array([1.0])), 0.0, torch.ones(1, dtype=torch.float64), 5.0, 1.0)
    for time in (0.0, 0.3, 2.0, 5.0):
        assert found.at(time) == pytest.approx(0.5 * np.exp(-2 * time), abs=0.005)
    assert found.at(100.0) == found.loss[-1]


def test_times_that_make_no_sense_are_refused():
    for time, curvature in ((0.0, 1.0), (1.0, -1.0), (float("inf"), 1.0)):
        with pytest.raises(InputError, match="positive"):
            descend(bowl(np.array([1.0])), 0.0, torch.ones(1, dtype=torch.float64), time, curvature)


def test_it_stops_where_the_work_would_be_too_much(monkeypatch):
    import thermograd.prediction.descent as module

    monkeypatch.setattr(module, "_MOST", 12)
    found = descend(bowl(np.array([100.0, 1.0])), 0.0, torch.ones(2, dtype=torch.float64), 50.0, 100.0)
    assert 0 < found.time[-1] < 1
    assert found.at(50.0) == found.loss[-1]


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize(("momentum", "before"), [(0.99, 0.9), (0.9, 0.0), (0.5, 0.95), (0.9, 0.9)])
def test_the_mean_lags_behind_the_flow_while_momentum_builds_up(momentum, before, nesterov):
    sgd = tg.SGD(lr=0.01, momentum=momentum, nesterov=nesterov)
    own = tg.SGD(lr=0.02, momentum=before)
    slow = 1e-3 * (1 - momentum) ** 2 / 0.01  # a mode far slower than the momentum
    at, buffer = 1.0, slow / (1 - before)
    for steps in range(1, 1001):
        pull = slow * at
        buffer = momentum * buffer + pull
        at -= 0.01 * (pull + momentum * buffer if nesterov else buffer)
        if steps in (1, 30, 1000):
            assert 1 - at == pytest.approx(-np.expm1(-slow * flow_time(sgd, steps, own)), rel=5e-3)
