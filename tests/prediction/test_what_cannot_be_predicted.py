"""Runs and arguments that nothing can be predicted from are refused in words; what was measured is of this run."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import thermograd as tg
from thermograd.errors import DivergedError, InputError, TooShortError
from thermograd.whatif import measured_run

N, B = 60, 6


@pytest.fixture
def trained(tmp_path):
    """A function that records a small regression; ``change(step, optimizer, model)`` acts before each step."""

    def train(optimizer=lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.5), *, steps=200, change=None, **recording):
        generator = torch.Generator().manual_seed(3)
        X = torch.randn(N, 2, generator=generator, dtype=torch.float64)
        y = X.sum(1, keepdim=True) + torch.randn(N, 1, generator=generator, dtype=torch.float64)
        model = torch.nn.Linear(2, 1, dtype=torch.float64)
        problem = tg.Problem(model, torch.nn.MSELoss(), (X, y))
        chosen = optimizer(list(model.parameters()))
        folder = tmp_path / f"run{len(list(tmp_path.iterdir()))}"
        with tg.Recorder(folder, problem, chosen, batch_size=B, sampling="replacement", **recording):
            for k in range(steps):
                index = torch.randint(0, N, (B,), generator=generator)
                chosen.zero_grad()
                torch.nn.functional.mse_loss(model(X[index]), y[index]).backward()
                if change is not None:
                    change(k, chosen, model)
                chosen.step()
        return folder, problem

    return train


@pytest.mark.parametrize(("name", "value"), [("lr", 0.01), ("momentum", 0.9), ("weight_decay", 0.3)])
def test_a_setting_that_changes_in_the_last_half_is_refused_and_named(trained, name, value):
    def change(when):
        return lambda k, optimizer, _: k == when and optimizer.param_groups[0].update({name: value})

    late, said = trained(change=change(150)), name.replace("lr", "learning rate").replace("_", " ")
    with pytest.raises(InputError, match=f"{said} changed from .* to {value}"):
        tg.predict(*late, steps=50)
    found = tg.predict(*trained(change=change(60)), steps=50)
    assert float(found[name]) == value


@pytest.mark.parametrize(
    ("optimizer", "says"),
    [
        (lambda p: torch.optim.AdamW(p, lr=0.01), "trained by AdamW"),
        (
            lambda p: torch.optim.SGD([{"params": p[:1], "lr": 0.05}, {"params": p[1:], "lr": 0.01}], lr=0.1),
            "hold for all its weights",
        ),
        (lambda p: torch.optim.SGD(p, lr=1e-4, maximize=True), "hold for all its weights"),
        (lambda p: torch.optim.SGD(p, lr=0.0), "hold for all its weights"),
    ],
)
def test_what_is_not_sgd_with_one_setting_is_refused(trained, optimizer, says):
    run = trained(optimizer)
    with pytest.raises(InputError, match=says):
        tg.predict(*run)
    sgd = tg.SGD(lr=0.05, batch_size=B, sampling="replacement")
    assert np.isfinite(float(tg.predict(*run, sgd=sgd, steps=50)["sharpness_margin"]))


def test_short_and_diverged_runs_are_refused(trained):
    with pytest.raises(TooShortError, match="40 recorded steps"):
        tg.predict(*trained(steps=40))

    def spoil(k, _, model):
        if k == 150:
            with torch.no_grad():
                model.weight += float("nan")

    with pytest.warns(tg.errors.ThermogradWarning, match="not finite"):
        spoiled = trained(change=spoil)
    with pytest.raises(DivergedError, match="step 151"):
        tg.predict(*spoiled)


def test_the_problem_has_to_be_the_one_that_was_trained(trained):
    folder, problem = trained()
    X, y = problem.inputs, problem.targets
    same_size = torch.nn.Sequential(torch.nn.Linear(2, 1, dtype=torch.float64))
    for other, says in (
        (tg.Problem(same_size, torch.nn.MSELoss(), (X, y)), "'weight' are .* absent"),
        (tg.Problem(problem.model, torch.nn.MSELoss(), (X[:50], y[:50])), "60 samples, the problem has 50"),
    ):
        with pytest.raises(InputError, match=says):
            tg.predict(folder, other)
    with pytest.raises(InputError, match="problem is a Linear"):
        tg.predict(folder, problem.model)


def test_a_measurement_is_not_used_for_other_data_or_after_a_kill(trained, monkeypatch):
    folder, problem = trained()
    one = float(tg.predict(folder, problem, steps=50)["excess_loss"])
    louder = tg.Problem(problem.model, torch.nn.MSELoss(), (problem.inputs, 3 * problem.targets))
    assert float(tg.predict(folder, louder, steps=50)["excess_loss"]) > 1.5 * one
    # killed: the record has no end, so that the rows have to say how far it got
    key = "thermograd.prediction.measuring._key"
    import thermograd.prediction.measuring as module

    seen, original = [], module._key
    monkeypatch.setattr(key, lambda *a: seen.append(original(*a)) or seen[-1])
    measured_run(folder, problem, steps=50)
    tree = tg.open_run(folder)
    attrs = dict(tree["trajectory"].attrs)
    for rows in (200, 190):
        tree["trajectory"].attrs = {k: v for k, v in attrs.items() if k != "end"} | {"rows": rows}
        measured_run(tree, problem, steps=50)
    assert len(set(seen)) == 3


def test_short_last_batches_are_dropped_where_the_loader_drops_them(tmp_path):
    X = torch.randn(20, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    y = X + torch.randn(20, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    data = torch.utils.data.TensorDataset(X, y)
    loader = torch.utils.data.DataLoader(data, 8, shuffle=True, drop_last=True)
    model = torch.nn.Linear(1, 1, dtype=torch.float64)
    problem = tg.Problem(model, torch.nn.MSELoss(), loader)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    with tg.Recorder(tmp_path / "run", problem, optimizer):
        for _ in range(60):
            for x, t in loader:
                optimizer.zero_grad()
                torch.nn.functional.mse_loss(model(x), t).backward()
                optimizer.step()
    assert measured_run(tmp_path / "run", problem, steps=40).forecast.standing.drop_last
    assert not measured_run(tmp_path / "run", problem, steps=40, drop_last=False).forecast.standing.drop_last


def test_arguments_that_make_no_sense_are_named(trained, tmp_path):
    folder, problem = trained()
    for change, says in (
        ({"learning_rate": 0.1}, "did you mean 'lr'"),
        ({"momentun": 0.1}, "did you mean 'momentum'"),
        ({"colour": 1}, "no argument 'colour'"),
        ({"steps": "many"}, "steps is 'many'"),
        ({"steps": float("nan")}, "steps is nan"),
        ({"steps": float("inf")}, "steps is inf"),
        ({"sgd": {"lr": 0.1}}, "sgd is a dict"),
        ({"momentum": [[0.1], [0.2, 0.3]]}, "a number, or a list of numbers"),
        ({"momentum": np.zeros((2, 2))}, "a number, or a list of numbers"),
        ({"momentum": torch.tensor([0.1, 0.2])}, "a number, or a list of numbers"),
        ({"batch_size": float("nan")}, "batch_size is nan"),
        ({"batch_size": float("inf")}, "batch_size is inf"),
        ({"lr": []}, "a number, or a list of numbers"),
    ):
        with pytest.raises(InputError, match=says):
            tg.predict(folder, problem, **change)
    assert tg.predict(folder, problem, momentum=np.array(0.5), steps=50)["excess_loss"].dims == ()
    with pytest.raises(InputError, match="path of its folder"):
        tg.validate(tg.open_run(folder), problem)
