"""Frozen predictions, real training, resumption."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

import thermograd as tg
from thermograd.errors import InputError, StoreError
from thermograd.prediction.validation import default_settings, load, validate
from thermograd.whatif import measured_run


@pytest.fixture(scope="module")
def measured(regression):
    return measured_run(regression.folder, regression.problem, steps=600)


def settings(sgd):
    return [sgd, sgd.replace(lr=0.01), sgd.replace(batch_size=4), sgd.replace(momentum=0.0)]


def test_training_confirms_the_predictions_on_linear_regression(measured, tmp_path):
    found = validate(measured, tmp_path, settings=settings(measured.sgd), replicas=24)
    error = np.sqrt(found.predicted_stderr**2 + found.observed_stderr**2)
    assert (np.abs(found.predicted - found.observed) < 4 * error).all()
    assert found.median_error < 0.15
    assert found.rank_correlation == pytest.approx(1.0)
    assert len(found.failures) == 0
    assert found.ok.all()
    assert found.plot().get_xlabel() == "observed excess loss"


def test_it_goes_on_where_it_stopped_with_the_same_frozen_predictions(measured, tmp_path, monkeypatch):
    chosen = settings(measured.sgd)
    first = validate(measured, tmp_path, settings=chosen, replicas=2)
    text = (tmp_path / "predictions.json").read_text()
    (tmp_path / "setting-02.json").unlink()
    partly = load(tmp_path)
    assert len(partly.lr) == 3
    trained = []
    import thermograd.prediction.validation as module

    original = module.observe
    monkeypatch.setattr(module, "observe", lambda *a: trained.append(a[1]) or original(*a))
    again = validate(measured, tmp_path, settings=chosen, replicas=2)
    assert trained == [chosen[2]]
    assert (tmp_path / "predictions.json").read_text() == text
    np.testing.assert_array_equal(again.observed, first.observed)


def test_predictions_are_on_disk_before_any_training(measured, tmp_path, monkeypatch):
    import thermograd.prediction.validation as module

    def interrupted(*_):
        assert json.loads((tmp_path / "predictions.json").read_text())["sha256"]
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "observe", interrupted)
    with pytest.raises(KeyboardInterrupt):
        validate(measured, tmp_path, settings=settings(measured.sgd), replicas=2)
    with pytest.raises(StoreError, match="no trained setting"):
        load(tmp_path)


def test_changed_predictions_and_other_settings_are_refused(measured, tmp_path):
    chosen = settings(measured.sgd)[:2]
    validate(measured, tmp_path, settings=chosen, replicas=2)
    with pytest.raises(StoreError, match="other settings"):
        validate(measured, tmp_path, settings=chosen[:1], replicas=2)
    path = tmp_path / "predictions.json"
    content = json.loads(path.read_text())
    content["predictions"][0]["excess_loss"] *= 1.1
    path.write_text(json.dumps(content))
    with pytest.raises(StoreError, match="were changed"):
        validate(measured, tmp_path, settings=chosen, replicas=2)
    assert len(validate(measured, tmp_path, settings=chosen[:1], replicas=2, fresh=True).lr) == 1
    with pytest.raises(InputError, match="replicas"):
        validate(measured, tmp_path, replicas=1)
    with pytest.raises(InputError, match="weight decay"):
        validate(measured, tmp_path, settings=[measured.sgd.replace(weight_decay=0.5)])
    with pytest.raises(StoreError, match="no validation"):
        load(tmp_path / "elsewhere")


def test_divergence_is_observed_as_infinite(measured, tmp_path):
    wild = measured.sgd.replace(lr=50.0)
    found = validate(measured, tmp_path, settings=[measured.sgd, wild], replicas=2)
    assert np.isinf(found.observed[1])
    assert not found.ok[1]
    assert np.isnan(found.relative_error[1])  # predicted to diverge, and did


def test_default_settings_span_what_they_promise():
    sgd = tg.SGD(lr=0.1, momentum=0.9, batch_size=40, dataset_size=1000)
    found = default_settings(sgd, 1000)
    assert len(found) == 16
    assert {round(s.lr / sgd.lr, 3) for s in found} >= {0.1, 0.3, 1.0, 2.0, 3.0}
    assert {s.batch_size for s in found} >= {10, 20, 40, 80, 160, 320}
    assert {s.momentum for s in found} >= {0.0, 0.5, 0.9, 0.99}
    assert all(1 <= s.batch_size <= 30 for s in default_settings(sgd.replace(dataset_size=60), 60))


def test_branches_carry_the_momentum_buffer_on():
    torch.manual_seed(0)
    X, y = torch.randn(30, 4, dtype=torch.float64), torch.randn(30, 1, dtype=torch.float64)
    model = torch.nn.Linear(4, 1, dtype=torch.float64)
    problem = tg.Problem(model, torch.nn.MSELoss(), (X, y))
    sgd = tg.SGD(lr=0.05, momentum=0.9, batch_size=30, dataset_size=30, weight_decay=0.1)
    whole = tg.simulate.networks(problem, 1, 8, sgd)
    half = tg.simulate.networks(problem, 1, 5, sgd)
    rest = tg.simulate.networks(problem, 1, 3, sgd, start=half.theta, velocity=half.velocity)
    torch.testing.assert_close(rest.theta, whole.theta)
    np.testing.assert_allclose(rest.squared_norm[:, -1], whole.theta.square().sum(1))


def test_a_divergence_that_was_predicted_alone_or_seen_alone_is_an_infinite_error():
    from thermograd.prediction.validation import _relative

    inf = np.inf
    found = _relative(np.array([1.1, inf, 1.0, inf]), np.array([1.0, 1.0, inf, inf]))
    np.testing.assert_allclose(found[:1], 0.1)
    assert found[1] == inf
    assert found[2] == -inf
    assert np.isnan(found[3])


@pytest.mark.parametrize("batches", [2, 12, 25, 60, 80, 100, 120, 128, 240])
def test_no_two_looks_at_the_loss_fall_on_the_same_phase_while_others_are_unseen(batches):
    from thermograd.prediction.validation import looks_at

    every, looks = looks_at(600, batches)
    assert every * looks <= 600
    assert len({k * every % batches for k in range(looks)}) == min(looks, batches)
