"""What the live test of equilibrium sees of a loop: rates changed by others, pauses, groups, kinds of optimizer."""

from __future__ import annotations

import warnings

import pytest
import torch

import thermograd as tg
from thermograd.errors import ThermogradWarning
from thermograd.trajectory import Equilibration


def loop(optimizer=lambda p: torch.optim.SGD(p, lr=0.1), size=3):
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(100, size, generator=generator)
    y = X.sum(1, keepdim=True) + torch.randn(100, 1, generator=generator)
    model = torch.nn.Linear(size, 1)
    with torch.no_grad():  # at the minimum, so that nothing has to be waited for
        solution = torch.linalg.lstsq(torch.cat([X, torch.ones(100, 1)], 1), y).solution.flatten()
        model.weight.copy_(solution[:-1])
        model.bias.copy_(solution[-1:])
    problem = tg.Problem(model, torch.nn.MSELoss(), (X, y))
    made = optimizer(list(model.parameters()))

    def train(steps, after=lambda k: None):
        for k in range(steps):
            index = torch.randint(0, 100, (50,), generator=generator)
            made.zero_grad()
            torch.nn.functional.mse_loss(model(X[index]), y[index]).backward()
            made.step()
            after(k)

    return problem, made, train


def test_a_rate_that_something_else_changes_begins_the_test_anew(tmp_path):
    problem, optimizer, train = loop()
    with tg.Recorder(tmp_path, problem, optimizer) as recorder:
        scheduler = tg.EquilibrationLR(optimizer, recorder, total_steps=1000)
        train(300)
        assert recorder.equilibration.steps == 300
        optimizer.param_groups[0]["lr"] = 0.05
        train(20, lambda _: scheduler.step())
        assert recorder.equilibration.steps == 20
        assert scheduler.steps == 320
        assert not recorder.equilibrated


def test_a_schedule_that_never_rests_is_never_called_equilibrated(tmp_path):
    problem, optimizer, train = loop()
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 600)
    with tg.Recorder(tmp_path, problem, optimizer) as recorder:
        recorder.equilibration = Equilibration(least=40)
        said = []
        train(200, lambda _: (cosine.step(), said.append(recorder.equilibrated)))
    assert not any(said)
    assert recorder.equilibration.windows == 0


def test_steps_that_are_not_recorded_are_watched_all_the_same(tmp_path):
    seen = []
    for every in (1, 10):
        problem, optimizer, train = loop()
        with tg.Recorder(tmp_path / str(every), problem, optimizer, every=every) as recorder:
            recorder.equilibration = Equilibration(least=100)
            train(250)
        meter = recorder.equilibration
        seen.append((meter.steps, meter.windows, meter.wander, meter.drift))
    assert seen[0] == seen[1]
    assert seen[0][2] is not None


def test_a_scheduler_outside_the_recorder_says_so_once(tmp_path):
    problem, optimizer, train = loop()
    recorder = tg.Recorder(tmp_path, problem, optimizer, record=tg.Scalars())
    scheduler = tg.EquilibrationLR(optimizer, recorder, total_steps=100)
    with pytest.warns(ThermogradWarning, match="does not see") as told:
        train(95, lambda _: scheduler.step())
    assert len(told) == 1
    assert scheduler.decays == [90]  # the planned end counts every step
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with recorder:
            train(5, lambda _: scheduler.step())
    assert scheduler.steps == 100


def test_a_test_that_is_replaced_is_the_one_that_decides(tmp_path):
    problem, optimizer, train = loop()
    with tg.Recorder(tmp_path, problem, optimizer, record=tg.Scalars()) as recorder:
        scheduler = tg.EquilibrationLR(optimizer, recorder, factor=0.5)
        recorder.equilibration = Equilibration(least=40, tolerance=50.0, wander_tolerance=50.0)
        train(60, lambda _: scheduler.step())
    assert len(scheduler.decays) == 1


def test_every_group_is_lowered_and_rates_that_are_tensors_stay_tensors(tmp_path):
    problem, optimizer, train = loop(
        lambda p: torch.optim.SGD([{"params": p[:1], "lr": torch.tensor(0.1)}, {"params": p[1:], "lr": 0.02}], lr=0.1)
    )
    kept = optimizer.param_groups[0]["lr"]
    with tg.Recorder(tmp_path, problem, optimizer, record=tg.Scalars()) as recorder:
        scheduler = tg.EquilibrationLR(optimizer, recorder, total_steps=20)
        train(20, lambda _: scheduler.step())
    assert scheduler.get_last_lr() == pytest.approx([0.01, 0.002])
    assert optimizer.param_groups[0]["lr"] is kept


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_free_diffusion_wanders_off_with_all_its_motion_whatever_the_optimizer(tmp_path, kind):
    """Gradients that are pure noise: the share is 1 for momentum of SGD and of Adam alike."""
    generator = torch.Generator().manual_seed(1)
    weights = torch.nn.Parameter(torch.zeros(400, dtype=torch.float64))
    problem = tg.Problem.from_function(lambda w, a: (w * a).sum(), weights, torch.randn(4, 400, generator=generator))
    if kind == "sgd":
        optimizer = torch.optim.SGD([weights], lr=0.1, momentum=0.9)
    else:
        optimizer = torch.optim.AdamW([weights], lr=0.1, weight_decay=0.0)
    with tg.Recorder(
        tmp_path, problem, optimizer, record=tg.Scalars(), batch_size=1, sampling="replacement"
    ) as recorder:
        recorder.equilibration = Equilibration(least=800)
        for _ in range(800):
            weights.grad = torch.randn(400, dtype=torch.float64, generator=generator)
            optimizer.step()
    assert recorder.equilibration.wander[0] == pytest.approx(1.0, abs=0.2)
    assert not recorder.equilibrated


def test_adam_at_rest_is_recognised_in_the_end(tmp_path):
    problem, optimizer, train = loop(lambda p: torch.optim.AdamW(p, lr=0.05, betas=(0.5, 0.99), weight_decay=0.0))
    said = []
    with tg.Recorder(tmp_path, problem, optimizer, record=tg.Scalars()) as recorder:
        train(4000, lambda _: said.append(recorder.equilibrated))
    assert any(said)
