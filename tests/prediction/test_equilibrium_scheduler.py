"""The streaming test of equilibrium: its false alarms, what it sees, and the scheduler that it drives."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import thermograd as tg
from thermograd.errors import InputError, StoreError
from thermograd.trajectory import Equilibration


def feed(meter, steps, *, rng, drift=0.0, loss_noise=0.03, pull=0.05, wander=0.0, size=6):
    """Weights that fluctuate (AR(1)) and drift, with a loss of mean 1 that falls by ``drift`` in these steps."""
    theta, place, noise = np.zeros(size), 0.0, 0.0
    for k in range(steps):
        before = theta + place
        theta = (1 - pull) * theta + rng.standard_normal(size)
        place += wander
        noise = 0.5 * noise + loss_noise * rng.standard_normal()
        needed = meter.wants_weights
        loss = 1 + drift * (0.5 - k / steps) + noise
        meter.add(
            torch.from_numpy(before) if needed else None,
            torch.from_numpy(theta + place) if needed else None,
            loss, 0.0,
        )  # fmt: skip


def test_a_drift_as_large_as_the_tolerance_is_called_equilibrated_in_at_most_5_percent():
    rng, alarms, windows = np.random.default_rng(0), 0, 400
    for _ in range(windows):
        meter = Equilibration(least=200)
        feed(meter, 200, rng=rng, drift=0.1, loss_noise=0.01)
        alarms += meter.equilibrated
    # binomial: 5% of 400 is 20, standard deviation 4.4; exceeded by chance once in 2000
    assert alarms <= 20 + 3.3 * 4.4


def test_a_run_at_rest_is_recognised():
    rng, found = np.random.default_rng(1), 0
    for _ in range(20):  # a window of 50 correlation times
        meter = Equilibration(least=1000)
        feed(meter, 1000, rng=rng, drift=0.0, loss_noise=0.01)
        found += meter.equilibrated
    assert found >= 18


def test_a_rise_need_not_be_excluded_but_one_that_is_shown_is_no_equilibrium():
    found = {}
    for fall in (0.05, -0.05, -0.4):
        meters = [Equilibration(least=400) for _ in range(20)]
        for seed, meter in enumerate(meters):
            feed(meter, 400, rng=np.random.default_rng(seed), drift=fall, loss_noise=0.08)
        found[fall] = sum(meter.equilibrated for meter in meters)
    assert found[-0.05] >= 18  # no fall, whatever the noise
    assert found[0.05] < found[-0.05]  # this noise does not always exclude that 10% were lost
    assert found[-0.4] == 0


def test_noise_too_large_to_tell_is_not_called_equilibrium():
    meter = Equilibration(least=200)
    feed(meter, 200, rng=np.random.default_rng(2), loss_noise=0.5)
    assert not meter.equilibrated
    assert meter.drift is not None
    assert meter.drift[1] > 0.1


def test_weights_that_travel_are_seen_though_the_loss_stands_still():
    meter = Equilibration(least=400)
    feed(meter, 400, rng=np.random.default_rng(3), loss_noise=0.001, wander=0.5)
    assert not meter.equilibrated
    assert meter.wander is not None
    assert meter.wander[1] > 0.1
    assert meter.drift is not None
    assert meter.drift[1] < 0.05


def test_free_diffusion_shows_a_wandering_share_of_one():
    shares = []
    for seed in range(20):
        meter = Equilibration(least=800)
        feed(meter, 800, rng=np.random.default_rng(seed), pull=0.0, size=200)
        shares.append(meter.wander[0])
    assert np.mean(shares) == pytest.approx(1.0, abs=0.1)


def test_windows_grow_with_the_steps_taken_and_a_reset_begins_anew():
    meter = Equilibration(least=100, overlap=1)
    feed(meter, 1000, rng=np.random.default_rng(4))
    assert meter.windows == 4  # at 100, 200, 400, 800 and 1600 the next
    assert meter.window == (400, 800)
    meter.reset()
    assert (meter.steps, meter.windows, meter.equilibrated) == (0, 0, False)


@pytest.mark.parametrize("growth", [0.5, 1.0])
def test_windows_overlap_and_each_is_a_fixed_part_of_the_steps_before_it(growth):
    meter, seen, most = Equilibration(least=100, growth=growth, overlap=4), [], 0
    for _ in range(2000):
        meter.add(None, None, 1.0, 0.0)
        most = max(most, len(meter._open))
        if not seen or meter.window not in (None, seen[-1]):
            seen += [meter.window] if meter.window else []
    starts, ends = np.array(seen[1:]).T
    np.testing.assert_allclose(ends - starts, growth * starts, atol=1)
    np.testing.assert_allclose(np.diff(np.log(ends)), np.log(1 + growth) / 4, atol=0.02)
    assert most <= 5


def test_overlapping_windows_see_what_one_that_is_fed_alone_sees():
    many, alone = Equilibration(least=200, overlap=4), Equilibration(least=200, overlap=1)
    for meter in (many, alone):
        feed(meter, 1600, rng=np.random.default_rng(8))
    assert many.window == alone.window == (800, 1600)
    assert many.wander == alone.wander
    assert many.drift == alone.drift


def test_a_checkpoint_of_the_test_goes_on_as_if_nothing_had_happened(tmp_path):
    one, other = Equilibration(least=100), Equilibration(least=100)
    feed(one, 137, rng=np.random.default_rng(5))
    torch.save(one.state_dict(), tmp_path / "meter.pt")
    other.load_state_dict(torch.load(tmp_path / "meter.pt", weights_only=True))
    for meter in (one, other):
        feed(meter, 200, rng=np.random.default_rng(6))
    assert (one.wander, one.drift, one.equilibrated) == (other.wander, other.drift, other.equilibrated)
    with pytest.raises(StoreError, match="state"):
        other.load_state_dict({"steps": 3})


@pytest.mark.parametrize(
    "change", [{"least": 3}, {"growth": 0}, {"overlap": 0}, {"tolerance": -1}, {"false_alarm": 0.7}]
)
def test_settings_out_of_range_are_refused(change):
    with pytest.raises(InputError):
        Equilibration(**change)


def regression(seed=0):
    generator = torch.Generator().manual_seed(seed)
    X = torch.randn(200, 4, generator=generator)
    y = X @ torch.ones(4) + torch.randn(200, generator=generator)
    torch.manual_seed(seed)
    model = torch.nn.Linear(4, 1)
    problem = tg.Problem(model, torch.nn.MSELoss(), (X, y[:, None]))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.5)
    return X, y[:, None], model, problem, optimizer


def train(steps, X, y, model, optimizer, after):
    generator = torch.Generator().manual_seed(7)
    for _ in range(steps):
        index = torch.randint(0, len(X), (50,), generator=generator)
        optimizer.zero_grad()
        torch.nn.functional.mse_loss(model(X[index]), y[index]).backward()
        optimizer.step()
        after()


def test_a_recorder_says_live_when_training_has_equilibrated(tmp_path):
    X, y, model, problem, optimizer = regression()
    said = []
    with tg.Recorder(tmp_path, problem, optimizer) as recorder:
        assert not recorder.equilibrated
        train(2500, X, y, model, optimizer, lambda: said.append(recorder.equilibrated))
    assert not any(said[:300])
    assert said[-1]


def test_the_scheduler_decays_at_equilibrium_and_goes_on_from_a_checkpoint(tmp_path):
    X, y, model, problem, optimizer = regression()
    with tg.Recorder(tmp_path / "a", problem, optimizer, record=tg.Scalars()) as recorder:
        scheduler = tg.EquilibrationLR(optimizer, recorder, factor=0.5, max_decays=1)
        train(2500, X, y, model, optimizer, scheduler.step)
        assert scheduler.get_last_lr() == [0.05]
        assert len(scheduler.decays) == 1
        assert 300 < scheduler.decays[0] < 2500
        assert scheduler.steps == 2500
        torch.save(scheduler.state_dict(), tmp_path / "scheduler.pt")
    recorder = tg.Recorder(tmp_path / "b", problem, optimizer, record=tg.Scalars())
    again = tg.EquilibrationLR(optimizer, recorder, factor=0.5, max_decays=1)
    again.load_state_dict(torch.load(tmp_path / "scheduler.pt", weights_only=True))
    assert again.decays == scheduler.decays
    assert again.steps == 2500
    with pytest.raises(StoreError, match="state"):
        again.load_state_dict({})


def test_the_floor_of_the_rate_and_the_planned_end_are_kept(tmp_path):
    X, y, model, problem, optimizer = regression()
    with tg.Recorder(tmp_path, problem, optimizer, record=tg.Scalars()) as recorder:
        scheduler = tg.EquilibrationLR(optimizer, recorder, factor=0.1, min_lr=0.08, total_steps=100)
        train(100, X, y, model, optimizer, scheduler.step)
    assert scheduler.decays == [90]
    assert scheduler.get_last_lr() == [0.08]


def test_impossible_schedulers_are_refused(tmp_path):
    *_, problem, optimizer = regression()
    recorder = tg.Recorder(tmp_path, problem, optimizer)
    other = torch.optim.SGD(problem.model.parameters(), lr=0.1)
    for keywords in ({"factor": 1.5}, {"min_lr": -1.0}, {"max_decays": -1}, {"total_steps": 0}):
        with pytest.raises(InputError):
            tg.EquilibrationLR(optimizer, recorder, **keywords)
    with pytest.raises(InputError, match="another optimizer"):
        tg.EquilibrationLR(other, recorder)
