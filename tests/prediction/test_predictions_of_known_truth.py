"""Predictions on linear regression, where the exact moments are known."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import thermograd as tg
from thermograd.errors import HyperparameterError, InputError, StoreError
from thermograd.prediction import modes as modes_file
from thermograd.prediction.modes import measure_modes
from thermograd.prediction.show import columns, rows
from thermograd.prediction.validation import observe
from thermograd.theory import limiting
from thermograd.whatif import measured_run

SETTINGS = [
    {}, {"lr": 0.005}, {"lr": 0.15}, {"batch_size": 2}, {"batch_size": 40}, {"momentum": 0.0}, {"momentum": 0.9},
    {"lr": 0.01, "momentum": 0.9, "batch_size": 4}, {"sampling": "replacement"},
]  # fmt: skip


@pytest.fixture(scope="module")
def measured(regression):
    return measured_run(regression.folder, regression.problem)


def truth(regression, sgd):
    X = regression.X
    H = X.T @ X / len(X) + sgd.weight_decay * np.eye(X.shape[1])
    return 0.5 * float(np.trace(H @ limiting.linear_regression_moments(sgd, X, regression.y).position))


@pytest.mark.parametrize("change", SETTINGS)
def test_the_floor_is_the_exact_one_within_the_error_bar(regression, measured, change):
    sgd = measured.sgd.replace(**change)
    exact, row = truth(regression, sgd), measured.at(sgd)
    # 4 errors; the exact value for reshuffling takes noise from the spread as white, a few percent
    assert abs(row["stationary_excess_loss"] - exact) < 4 * row["excess_loss_stderr"] + 0.03 * exact
    assert row["excess_loss_stderr"] < 0.5 * exact


def test_rank_order_over_settings_is_exact(regression, measured):
    sgds = [measured.sgd.replace(**change) for change in SETTINGS]
    predicted = [measured.at(sgd)["stationary_excess_loss"] for sgd in sgds]
    exact = [truth(regression, sgd) for sgd in sgds]
    assert np.corrcoef(np.log(predicted), np.log(exact))[0, 1] > 0.998


def test_weight_variances_are_those_of_the_sharpest_modes(regression, measured):
    sgd = measured.sgd.replace(lr=0.01)
    X = regression.X
    values, vectors = np.linalg.eigh(X.T @ X / len(X))
    position = limiting.linear_regression_moments(sgd, X, regression.y).position
    exact = np.einsum("ij,ik,kj->j", vectors, position, vectors)[::-1]
    np.testing.assert_allclose(measured.at(sgd)["weight_variance"][:5], exact, rtol=0.1)
    np.testing.assert_allclose(np.sort(measured.forecast.hot.curvature)[::-1], values[::-1], rtol=1e-9)


def test_flags_go_up_where_they_must(regression, measured):
    own, top = measured.sgd, measured.forecast.top

    def flags(**change):
        return "; ".join(measured.at(own.replace(**change))["flags"])

    assert flags() == ""
    assert "stability bound" in flags(lr=2.2 * 1.6 / top)
    assert np.isinf(measured.at(own.replace(lr=2.2 * 1.6 / top))["excess_loss"])
    assert "mean square diverges" in flags(lr=1.4 / top, batch_size=1, momentum=0.0) or "times the run's" in flags(
        lr=1.4 / top, batch_size=1, momentum=0.0
    )
    assert "times the run's" in flags(lr=0.4)
    assert "one order" in flags(sampling="shuffle-once")
    assert "another weight decay" in flags(weight_decay=0.5)


def test_a_run_that_still_falls_is_flagged(regression, tmp_path):
    X, y = torch.as_tensor(regression.X), torch.as_tensor(regression.y)
    model = torch.nn.Linear(5, 1, dtype=torch.float64)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.002)
    problem = tg.Problem(model, torch.nn.MSELoss(), (X, y[:, None]))
    with tg.Recorder(tmp_path / "run", problem, optimizer, batch_size=20, sampling="replacement"):
        for k in range(300):
            index = torch.randint(0, len(X), (20,), generator=torch.Generator().manual_seed(k))
            optimizer.zero_grad()
            torch.nn.functional.mse_loss(model(X[index]), y[index][:, None]).backward()
            optimizer.step()
    row = measured_run(tmp_path / "run", problem, steps=200).at(
        tg.SGD(lr=0.002, batch_size=20, dataset_size=len(X), sampling="replacement")
    )
    assert any("not stationary" in flag or "have not equilibrated" in flag for flag in row["flags"])


def test_momentum_near_one_is_predicted_where_the_spread_makes_much_of_the_noise(noisy_regression):
    ready = measured_run(noisy_regression.folder, noisy_regression.problem, steps=1000)
    slow = ready.sgd.replace(lr=ready.sgd.lr / 10, momentum=0.99)
    assert ready.at(ready.sgd)["noise_gain"] > 0.2
    row, seen = ready.at(slow), observe(ready, slow, 40, 3)
    error = np.hypot(row["excess_loss_stderr"], seen["excess_loss_stderr"])
    assert abs(row["excess_loss"] - seen["excess_loss"]) < 3 * error
    assert error < 0.3 * seen["excess_loss"]
    ready.forecast._shares[slow] = 0.0  # as if the noise of the spread were drawn anew each step
    assert ready.at(slow)["excess_loss"] > 1.15 * row["excess_loss"]


def interpolating(samples, weights):
    rng = np.random.default_rng(0)
    X = rng.standard_normal((samples, weights))
    return X, X @ rng.standard_normal(weights)


@pytest.mark.parametrize("steps", [1200, 4000])
def test_a_run_that_interpolates_is_refused_in_words(train_line, tmp_path, steps):
    problem = train_line(tmp_path / "run", *interpolating(10, 20), lr=0.02, batch=5, steps=steps)
    with pytest.raises(InputError, match="interpolates"):
        measured_run(tmp_path / "run", problem)


def test_the_way_down_does_not_count_as_noise(train_line, tmp_path):
    problem = train_line(tmp_path / "run", *interpolating(30, 60), lr=0.001, batch=5, steps=1000)
    ready = measured_run(tmp_path / "run", problem, steps=400)
    for change in ({}, {"lr": 0.003}, {"lr": 0.0001}, {"batch_size": 2}):
        sgd = ready.sgd.replace(**change)
        row, seen = ready.at(sgd), observe(ready, sgd, 4, 3)
        assert row["excess_loss"] == pytest.approx(seen["excess_loss"], rel=0.1, abs=1e-3)
        assert any("not stationary" in flag for flag in row["flags"])


def covered(ready, changes, replicas):
    """Predicted less observed, in units of their common error."""
    found = []
    for number, change in enumerate(changes):
        sgd = ready.sgd.replace(**change)
        row, seen = ready.at(sgd), observe(ready, sgd, replicas, 100 * number)
        error = np.hypot(row["excess_loss_stderr"], seen["excess_loss_stderr"])
        found.append((row["excess_loss"] - seen["excess_loss"]) / error)
    return np.array(found)


def test_error_bars_cover_what_is_observed(regression, noisy_regression):
    changes = ({}, {"lr": 0.002}, {"batch_size": 20}, {"momentum": 0.0}, {"sampling": "replacement"})
    z = np.concatenate([
        covered(measured_run(run.folder, run.problem, steps=800), changes, 30) for run in (regression, noisy_regression)
    ])  # fmt: skip
    # errors of one run are shared by its settings: about six independent numbers
    assert np.sqrt(np.mean(z**2)) < 1.7
    assert np.abs(z).max() < 3


def test_equivalent_settings_have_the_same_floor(measured):
    rate = measured.equivalent(measured.sgd, 16)
    there = measured.forecast.stationary_excess(measured.sgd.replace(lr=rate, batch_size=16))
    assert there == pytest.approx(measured.forecast.stationary_excess(measured.sgd), rel=0.01)
    assert 1.2 * measured.sgd.lr < rate < 4 * measured.sgd.lr


def test_lists_become_dimensions_with_units(regression):
    found = tg.predict(regression.folder, regression.problem, lr=[0.01, 0.05], batch_size=[4, 8, 16], momentum=0.5)
    assert dict(found["excess_loss"].sizes) == {"lr": 2, "batch_size": 3}
    assert float(found["momentum"]) == 0.5
    assert found["excess_loss"].attrs["units"] == "loss"
    assert found["weight_variance"].dims == ("lr", "batch_size", "mode")
    one = tg.predict(regression.folder, regression.problem, lr=0.05, batch_size=16, momentum=0.5)
    assert float(one["excess_loss"]) == float(found["excess_loss"].sel(lr=0.05, batch_size=16))
    assert len(columns(found)) == 6
    assert rows(one)[0][0].startswith("mean loss")
    falling = found["excess_loss"].values
    assert (np.diff(falling, axis=0) > 0).all()  # more with the learning rate
    assert (np.diff(falling, axis=1) < 0).all()  # less with the batch size


def test_what_was_measured_is_kept_and_used_again(regression, measured, monkeypatch):
    def never(*_, **__):
        raise AssertionError("measured again")

    monkeypatch.setattr("thermograd.prediction.measuring.measure_modes", never)
    again = measured_run(regression.folder, regression.problem)
    assert again.at(again.sgd)["excess_loss"] == measured.at(measured.sgd)["excess_loss"]


def test_bad_input_is_refused(regression, measured, tmp_path):
    for change, error in (
        ({"lr": -1}, HyperparameterError),
        ({"lr": "fast"}, InputError),
        ({"lr": []}, InputError),
        ({"lr": [0.1, 0.1]}, InputError),
        ({"batch_size": 2.5}, InputError),
        ({"batch_size": 1000}, HyperparameterError),
        ({"momentum": 1.0}, HyperparameterError),
        ({"sampling": "sorted"}, InputError),
        ({"steps": 3}, InputError),
    ):
        with pytest.raises(error):
            tg.predict(regression.folder, regression.problem, **change)
    with pytest.raises(StoreError, match="config"):
        tg.predict(regression.folder, lr=0.1)
    with pytest.raises(StoreError, match="exist"):
        tg.predict(tmp_path / "nowhere", lr=0.1)
    with pytest.raises(InputError, match="path"):
        tg.predict(measured, lr=0.1)


def test_modes_by_quadrature_give_the_sums_over_all_modes(monkeypatch):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(12, 10), torch.nn.Tanh(), torch.nn.Linear(10, 4)).double()
    X, y = torch.randn(200, 12, dtype=torch.float64), torch.randint(0, 4, (200,))
    problem = tg.Problem(model, torch.nn.CrossEntropyLoss(), (X, y))
    points = [problem.theta + 0.02 * torch.randn(problem.P, dtype=torch.float64) for _ in range(4)]
    centre = sum(points) / len(points)
    dense = measure_modes(problem, problem.theta, points, centre)
    monkeypatch.setattr(modes_file, "DENSE", 0)
    monkeypatch.setattr(modes_file, "_SHARP", 8)
    sparse = measure_modes(problem, problem.theta, points, centre)
    for full, part in zip(dense, sparse, strict=True):
        assert part.probes == 12
        for cut in (0.01, 0.1, 1.0):

            def total(found, cut=cut):
                weight = (found.coloured + found.white) * np.maximum(found.energy, 0) / (np.abs(found.curvature) + cut)
                return weight, float(weight.sum())

            each, value = total(part)
            sums = np.array([each[part.probe == p].sum() * part.probes for p in range(part.probes)])
            error = sums.std(ddof=1) / np.sqrt(part.probes)
            assert abs(value - total(full)[1]) < 4 * error + 0.04 * abs(total(full)[1])
    joined = dense[0].binned()
    assert joined.coloured.sum() == pytest.approx(dense[0].coloured.sum())
    assert (joined.coloured * joined.energy).sum() == pytest.approx((dense[0].coloured * dense[0].energy).sum())


def test_estimates_of_a_part_of_the_work_end_an_interrupted_measurement(regression, tmp_path, monkeypatch):
    import shutil
    import warnings

    import thermograd.prediction.measuring as module
    from thermograd.errors import ThermogradWarning

    folder = tmp_path / "run"
    shutil.copytree(regression.folder, folder)

    def a_part(*_):
        warnings.warn("interrupted: the density rests on 21 of 40 steps", ThermogradWarning, stacklevel=2)

    monkeypatch.setattr(module, "measure_modes", a_part)
    with pytest.raises(KeyboardInterrupt):
        measured_run(folder, regression.problem, steps=500)
    assert (folder / ".prediction.part").is_file()


def test_an_interrupted_measurement_goes_on_where_it_stopped(regression, tmp_path, monkeypatch):
    import shutil

    import thermograd.prediction.measuring as module

    folder = tmp_path / "run"
    shutil.copytree(regression.folder, folder)

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    descend, begun = module.descend, []

    def second_interrupted(*args):
        begun.append(args)
        return interrupt() if len(begun) == 2 else descend(*args)

    with monkeypatch.context() as patched:  # amid the second flow
        patched.setattr(module, "descend", second_interrupted)
        with pytest.raises(KeyboardInterrupt):
            measured_run(folder, regression.problem, steps=500)
    kept = torch.load(folder / ".prediction.part", weights_only=True)
    assert {"standing", "here"} == set(kept) - {"key"}
    monkeypatch.setattr(module, "stand", interrupt)
    with monkeypatch.context() as patched:  # when all but curvature and noise are known
        patched.setattr(module, "measure_modes", interrupt)
        with pytest.raises(KeyboardInterrupt):
            measured_run(folder, regression.problem, steps=500)
    kept = torch.load(folder / ".prediction.part", weights_only=True)
    assert {"standing", "here", "mean"} == set(kept) - {"key"}
    monkeypatch.setattr(module, "descend", interrupt)
    again = measured_run(folder, regression.problem, steps=500)
    assert not (folder / ".prediction.part").exists()
    monkeypatch.undo()
    fresh = measured_run(regression.folder, regression.problem)
    assert again.forecast.kappa == pytest.approx(fresh.forecast.kappa, rel=1e-3)


def test_the_full_batch_has_no_noise(regression, measured):
    row = measured.at(measured.sgd.replace(batch_size=160))
    assert row["fluctuation"] == 0
    assert row["stationary_excess_loss"] == 0
    assert row["distance"] == 0
    assert row["excess_loss"] == row["mean_excess"]
    assert np.isfinite(row["loss"])


def test_nesterov_and_dampening_are_predicted_too(regression, measured):
    for change in ({"nesterov": True}, {"dampening": 0.3}):
        row = measured.at(measured.sgd.replace(**change))
        assert np.isfinite(row["excess_loss"])
        assert np.isfinite(row["stationary_excess_loss"])
    damped = measured.at(measured.sgd.replace(dampening=0.3, lr=0.05 / 0.7))
    assert damped["stationary_excess_loss"] == pytest.approx(
        measured.at(measured.sgd)["stationary_excess_loss"], rel=1e-9
    )


def test_a_run_whose_own_setting_is_unstable_on_paper_is_flagged_not_refused(regression, measured):
    import dataclasses

    from thermograd.prediction import Forecast, Predictions

    forecast = measured.forecast
    sharp = dataclasses.replace(forecast.cold, curvature=100 * forecast.cold.curvature)
    for cold, hot in ((sharp, forecast.hot), (sharp, sharp)):
        made = Forecast(forecast.standing, cold, hot, forecast.flows, forecast.steps, forecast.fits)
        row = Predictions(made).at(measured.sgd)
        assert any("stability bound" in flag for flag in row["flags"])
        found = tg.prediction.predict(None, regression.problem, lr=[0.01, 0.05], measured=Predictions(made))
        assert not found["ok"].values[1]
        if hot is sharp:
            assert np.isinf(row["excess_loss"])
            assert np.isnan(found["equivalent_lr"].values[1]).all()
        else:  # where the run is, the curvature is below the bound: it stands where it stands
            assert row["fluctuation"] == pytest.approx(measured.at(measured.sgd)["fluctuation"], rel=0.1)
            assert row["level"] == pytest.approx(1, abs=0.05)
            assert all(np.isfinite(found[name].values).all() for name in ("excess_loss", "stationary_excess_loss"))


def test_a_fluctuation_slower_than_the_record_is_flagged(regression, measured):
    import dataclasses

    from thermograd.prediction import Forecast, Predictions

    forecast = measured.forecast
    assert forecast.unseen < 0.2

    def with_a_flat_mode(modes):
        more = {"curvature": 1e-6 - 0.02, "energy": 1e-3, "coloured": 0.0, "white": 10.0, "probe": -1}
        return dataclasses.replace(modes, **{name: np.append(getattr(modes, name), more[name]) for name in more})

    cold, hot = with_a_flat_mode(forecast.cold), with_a_flat_mode(forecast.hot)
    made = Forecast(forecast.standing, cold, hot, forecast.flows, forecast.steps, forecast.fits)
    assert made.unseen > 0.5
    assert any("slower than its record" in flag for flag in Predictions(made).at(measured.sgd)["flags"])
    assert not any("slower than" in flag for flag in measured.at(measured.sgd)["flags"])
