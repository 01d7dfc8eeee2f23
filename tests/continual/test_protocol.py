"""The comparison: streams, choosing on validation data alone, statistics, resuming, and the command."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray
from scipy import stats
from typer.testing import CliRunner

import thermograd as tg
from thermograd.cli import app
from thermograd.continual import protocol
from thermograd.continual.comparison import compare
from thermograd.continual.learning import Cell, constraint_of, learn
from thermograd.continual.settings import Settings
from thermograd.continual.streams import stream
from thermograd.errors import ConfigError, DivergedError, InputError, NonFiniteError

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
SMALL: dict[str, Any] = {
    "stream": {"data": "digits", "scenario": "domain", "tasks": 2, "n": 200},
    "network": {"widths": [12]},
    "training": {"epochs": 4, "batch_size": 20, "path_steps": 20},
    "protocol": {"seeds": 2, "selection_seeds": 1, "samples": 100},
    "methods": {"none": {}, "ewc": {"strengths": [1.0, 100.0]}},
}


def small(**changes: Any) -> dict[str, Any]:
    merged = {**SMALL}
    for section, values in changes.items():
        merged[section] = values if section == "methods" else {**SMALL.get(section, {}), **values}
    return merged


# ---------------------------------------------------------------------- streams


@pytest.mark.parametrize(("scenario", "outputs"), [("task", 10), ("domain", 2), ("class", 10)])
def test_streams_deal_out_the_classes(scenario: Any, outputs: int) -> None:
    found = stream("digits", scenario, 5)
    assert found.outputs == outputs
    for t, task in enumerate(found.tasks):
        expected = {2 * t, 2 * t + 1} if scenario == "class" else {0, 1}
        for part in (task.train, task.validation, task.test):
            assert set(part[1].tolist()) == expected
        assert task.outputs == ((2 * t, 2 * t + 1) if scenario == "task" else None)


def test_parts_of_a_stream_share_no_sample() -> None:
    seen: list[Any] = []
    for task in stream("digits", "class", 5).tasks:
        seen += [tuple(x.tolist()) for part in (task.train, task.validation, task.test) for x in part[0]]
    digits = {tuple(x.tolist()) for x in tg.data.digits().X}
    assert len(seen) == len(tg.data.digits())
    assert len(set(seen)) == len(digits)


def test_permuted_streams_move_pixels_and_nothing_else() -> None:
    tasks = stream("digits", "permuted", 3).tasks
    assert torch.equal(tasks[0].test[0].sort(1).values, tasks[1].test[0].sort(1).values)
    assert not torch.equal(tasks[0].test[0], tasks[1].test[0])
    assert not torch.equal(tasks[1].test[0], tasks[2].test[0])


def test_standardised_by_what_the_first_task_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, moved = (stream("digits", "class", 5, standardise=yes) for yes in (False, True))
    first = moved.tasks[0].train[0]
    assert first.mean().item() == pytest.approx(0, abs=1e-6)
    assert first.std().item() == pytest.approx(1)
    mean, scale = plain.tasks[0].train[0].mean(), plain.tasks[0].train[0].std()
    for task, before in zip(moved.tasks, plain.tasks):
        for part, old in ((task.train, before.train), (task.validation, before.validation), (task.test, before.test)):
            torch.testing.assert_close(part[0], (old[0] - mean) / scale)
            assert torch.equal(part[1], old[1])
    random = torch.Generator().manual_seed(0)
    shifts = torch.tensor([1.0, 2.0, 3.0])[:, None, None]
    X = torch.rand(400, 3, 4, 4, generator=random) * shifts
    images = tg.data.Dataset(X, torch.arange(400) % 4, tuple("abcd"), "images")
    monkeypatch.setattr(tg.data, "load", lambda *_, **__: images)
    X = stream("images", "domain", 2, standardise=True).tasks[0].train[0]
    torch.testing.assert_close(X.mean((0, 2, 3)), torch.zeros(3), rtol=0, atol=1e-5)
    torch.testing.assert_close(X.std((0, 2, 3)), torch.ones(3))


def test_streams_that_cannot_be_are_refused() -> None:
    with pytest.raises(InputError, match="4 tasks of the 10 classes"):
        stream("digits", "class", 4)
    with pytest.raises(InputError, match="tasks is 1"):
        stream("digits", "class", 1)
    with pytest.raises(InputError, match="validation"):
        stream("digits", "class", 5, validation=1.0)


@pytest.mark.parametrize("name", ["mnist", pytest.param("cifar10", marks=pytest.mark.slow)])
def test_streams_of_real_images(shared_data: Path, name: str) -> None:
    found = stream(name, "task", 5, folder=shared_data, n=50, n_test=20)
    assert [len(t.train[1]) + len(t.validation[1]) for t in found.tasks] == [50] * 5
    assert found.inputs == ((3, 32, 32) if name == "cifar10" else (1, 28, 28))


# ---------------------------------------------------------------------- learning


def settings(**changes: Any) -> Settings:
    return Settings.from_dict(small(**changes))


@pytest.mark.parametrize("scenario", ["task", "domain", "class", "permuted"])
@pytest.mark.parametrize("kind", ["none", "joint", "ewc", "synaptic_intelligence", "layer_landscape"])
def test_every_kind_learns_every_scenario(scenario: Any, kind: str) -> None:
    tasks = stream("digits", scenario, 2, n=500 if scenario == "permuted" else 120)
    cell = learn(tasks, settings(training={"epochs": 8}), kind, 1.0, {}, seed=0)
    assert cell.test[0][0] > (0.2 if scenario == "permuted" else 0.5)
    assert math.isnan(cell.test[0][1])
    assert (cell.memory > 0) == (kind not in ("none", "joint"))


def test_the_trajectory_is_recorded_where_it_is_asked_for() -> None:
    options = {"directions": "trajectory", "rank": 4, "weights": "curvature"}
    cell = learn(stream("digits", "domain", 2, n=150), settings(), "landscape", 1.0, options, seed=0)
    assert cell.memory == 4 * (cell.weights + 2)


def test_the_same_seed_gives_the_same_cell_and_another_does_not() -> None:
    tasks = stream("digits", "domain", 2, n=150)
    a, b, c = (learn(tasks, settings(), "ewc", 10.0, {}, seed=s).test for s in (0, 0, 1))
    assert repr(a) == repr(b)
    assert repr(a) != repr(c)


def test_a_held_network_forgets_less() -> None:
    tasks = stream("digits", "domain", 2)
    held, free = (learn(tasks, settings(), "l2", s, {}, seed=0) for s in (1e6, 0.0))
    assert held.test[1][0] == held.test[0][0]  # nothing moves
    assert free.test[1][0] < held.test[1][0]
    assert free.test[1][1] > held.test[1][1]


# ---------------------------------------------------------------------- choosing and reporting


def test_only_validation_data_choose(monkeypatch: pytest.MonkeyPatch) -> None:
    def fake(stream: Any, settings: Any, kind: str, strength: float, options: Any, seed: int) -> Cell:
        good = 0.9 if strength == 100.0 else 0.5
        test = 0.2 if strength == 100.0 else 0.95  # what would be chosen by the test part
        nan = math.nan
        return Cell([[test, nan], [test, test]], [[good, nan], [good, good]], 10, 5, 0.1, 0.2, 0.3)

    monkeypatch.setattr(protocol, "learn", fake)
    found = tg.continual.run(small())
    assert found.settings == ("", "strength=100")
    assert found.average_accuracy[1].tolist() == [0.2, 0.2]
    assert found.at_edge == (False, True)
    seeds = {trial.strength: trial.old_error for trial in found.trials}
    assert seeds == {1.0: pytest.approx((0.05,)), 100.0: pytest.approx((0.8,))}


def test_reported_seeds_are_not_those_that_chose(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[float, int]] = []

    def fake(stream: Any, settings: Any, kind: str, strength: float, options: Any, seed: int) -> Cell:
        seen.append((strength, seed))
        return Cell([[1.0, math.nan], [1.0, 1.0]], [[1.0, math.nan], [1.0, 1.0]], 10, 5)

    monkeypatch.setattr(protocol, "learn", fake)
    tg.continual.run(small(methods={"ewc": {"strengths": [1.0, 2.0, 3.0]}}))
    choosing = {seed for strength, seed in seen[:3]}
    assert len(seen) == 3 + 2
    assert not choosing & {seed for _, seed in seen[3:]}


def test_statistics_are_scipys() -> None:
    random = np.random.default_rng(0)

    def cells(shift: float) -> list[Cell]:
        found = []
        for _ in range(6):
            first, after, second = random.uniform(0.8, 0.9) + shift, random.uniform(0.5, 0.7) + shift, 0.9
            found.append(Cell([[first, math.nan], [after, second]], [], 10, 5))
        return found

    both = {"ewc": cells(0.0), "mine": cells(0.1)}
    found = compare(both, {"ewc": "", "mine": ""}, dict.fromkeys(both, False), [], range(6), "ewc", "a stream")
    mean = {name: np.array([np.mean(c.test[-1]) for c in cs]) for name, cs in both.items()}
    test = stats.ttest_rel(mean["mine"], mean["ewc"])
    assert found.p_value[1] == pytest.approx(test.pvalue)
    low, high = test.confidence_interval(0.95)
    assert found.difference[1] + found.difference_halfwidth[1] == pytest.approx(high)
    assert found.difference[1] - found.difference_halfwidth[1] == pytest.approx(low)
    assert found.forgetting[0] == pytest.approx([c.test[0][0] - c.test[1][0] for c in both["ewc"]])
    assert math.isnan(found.p_value[0])


def test_an_interrupted_comparison_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = tg.continual.run(small(), tmp_path / "whole")
    made = 0

    def interrupted(*args: Any) -> Cell:
        nonlocal made
        if made == 3:
            raise KeyboardInterrupt
        made += 1
        return learn(*args)

    monkeypatch.setattr(protocol, "learn", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tg.continual.run(small(), tmp_path / "parts")
    assert len(list((tmp_path / "parts" / "cells").glob("*.json"))) == 3
    made = -100
    again = tg.continual.run(small(), tmp_path / "parts")
    assert made == -100 + 3  # three of six were there
    np.testing.assert_array_equal(again.accuracy, whole.accuracy)
    tg.continual.run(small(), tmp_path / "parts")
    assert made == -100 + 3


def test_results_are_written_in_every_form(tmp_path: Path) -> None:
    found = tg.continual.run(small(), tmp_path)
    with xarray.open_dataset(tmp_path / "comparison.nc", engine="scipy") as kept:
        np.testing.assert_array_equal(kept["average_accuracy"], found.average_accuracy)
        assert kept["trial_old_error"].dims == ("trial", "selection_seed")
    kept = json.loads((tmp_path / "comparison.json").read_text())
    assert kept["methods"]["ewc"]["memory"] == 2 * kept["weights"]
    assert kept["methods"]["ewc"]["average_accuracy"]["mean"] == pytest.approx(found.average_accuracy[1].mean())
    assert (tmp_path / "table.md").read_text().count("\n") == 2 + 2
    assert "epsilon_1" in found.plot().get_xlabel()
    assert (tmp_path / "figure.svg").stat().st_size > 1000


@pytest.mark.parametrize("error", [DivergedError, NonFiniteError])
def test_a_setting_that_diverges_is_not_chosen(error: type[Exception], monkeypatch: pytest.MonkeyPatch) -> None:
    def sometimes(*args: Any) -> Cell:
        if args[3] == 100.0:
            raise error("the weights are not finite")
        return learn(*args)

    monkeypatch.setattr(protocol, "learn", sometimes)
    found = tg.continual.run(small())
    assert found.settings[1] == "strength=1"
    assert [trial.validation == 0 for trial in found.trials] == [False, True]


def test_runs_that_diverge_are_counted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def sometimes(*args: Any) -> Cell:
        if args[2] == "ewc" and args[5] == 1:
            raise DivergedError("the weights are not finite")
        return learn(*args)

    monkeypatch.setattr(protocol, "learn", sometimes)
    found = tg.continual.run(small(), tmp_path)
    assert found.diverged == (0, 1)
    assert "1 of 2 runs diverged" in (tmp_path / "table.md").read_text()
    with pytest.raises(DivergedError, match="in every run"):
        tg.continual.run(small(training={"lr": 1e30}))


def test_weights_that_are_not_finite_are_divergence() -> None:
    tasks = stream("digits", "domain", 2, n=150)
    with pytest.raises(DivergedError, match="ewc of strength 10, seed 0"):
        learn(tasks, settings(training={"lr": 1e30}), "ewc", 10.0, {}, seed=0)


def test_bad_configurations_are_refused(tmp_path: Path) -> None:
    cases = {
        "no method": small(methods={}),
        "needs strengths": small(methods={"ewc": {}}),
        "nothing to choose": small(methods={"none": {"strengths": [1.0]}}),
        "needs kind": small(methods={"mine": {"strengths": [1.0]}}),
        "did you mean 'epochs'": small(training={"epoch": 3}),
        "methods.ewc.strenghts": small(methods={"ewc": {"strenghts": [1.0]}}),
        "stream.scenario": small(stream={"scenario": "domains"}),
        "each be there once": small(methods={"ewc": {"strengths": [1.0, 1.0]}}),
        "greater than or equal to 1": small(network={"widths": [0]}),
        "'ecw', no method": small(protocol={"baseline": "ecw"}),
        "draws in its options and in its grid": small(
            methods={"ewc": {"strengths": [1.0], "options": {"draws": 1}, "grid": {"draws": [1, 2]}}}
        ),
    }
    for text, values in cases.items():
        with pytest.raises(ConfigError) as caught:
            tg.continual.run(values)
        assert text in str(caught.value), str(caught.value)
    with pytest.raises(ConfigError, match="there is no file"):
        tg.continual.run(tmp_path / "absent.toml")
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="results cannot be kept"):
        tg.continual.run(small(), tmp_path / "file")


@pytest.mark.parametrize(
    ("kind", "options", "text"),
    [
        ("ewc", {"rank": 3}, "ewc has no option 'rank' here"),
        ("ewc", {"temprature": 3.0}, "did you mean 'temperature'"),
        ("random", {"rnak": 3}, "did you mean 'rank'"),
        ("ewc", {"params": "0"}, "no option 'params'"),
        ("ewc", {"strength": 1.0}, "no option 'strength'"),
        ("ewc", {"temperature": 0.5}, "temperature is 0.5"),
        ("layer_landscape", {"memory_per_weight": "much"}, "memory_per_weight|another type"),
        ("landscape", {"directions": "trajectry"}, "directions is 'trajectry'"),
        ("landscape", {"directions": "trajectory"}, "the path of a task has 3 steps"),
    ],
)
def test_bad_options_are_refused_before_anything_is_trained(
    kind: str, options: dict[str, Any], text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any) -> Cell:
        raise AssertionError("it was trained")

    monkeypatch.setattr(protocol, "learn", never)
    config = small(methods={kind: {"strengths": [1.0], "options": options}}, training={"path_steps": 4, "epochs": 1})
    config["training"]["batch_size"] = 60
    with pytest.raises(InputError, match=text):
        tg.continual.run(config)


def test_damaged_results_are_made_again(tmp_path: Path) -> None:
    first = tg.continual.run(small(), tmp_path)
    for damaged, text in zip(sorted((tmp_path / "cells").iterdir()), ("", '{"tset": []}', "[1]")):
        damaged.write_text(text)
    again = tg.continual.run(small(), tmp_path)
    np.testing.assert_array_equal(again.accuracy, first.accuracy)


def test_a_table_without_the_baseline_has_no_test() -> None:
    found = tg.continual.run(small(methods={"none": {}, "l2": {"strengths": [1.0]}}))
    assert "less ewc" not in found.to_markdown()
    assert {len(row) for row in found.rows()} == {len(found.columns)}


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("continual_*.toml")), ids=lambda path: path.stem)
def test_examples_are_in_order(path: Path) -> None:
    """Every key and every option of every method; the data are not needed for that."""
    found = tg.continual.load(path)
    for name, method in found.methods.items():
        for choice in protocol._choices(name, method):
            constraint_of(choice.kind, choice.strength, choice.arguments, None, 0)
    assert found.protocol.baseline in found.methods
    assert found.protocol.seeds >= 5


def test_there_is_an_example_of_every_scenario() -> None:
    scenarios = {tg.continual.load(path).stream.scenario for path in EXAMPLES.glob("continual_*.toml")}
    assert scenarios == {"task", "domain", "class", "permuted"}


def test_the_command(tmp_path: Path) -> None:
    config = tmp_path / "small.toml"
    config.write_text(
        '[stream]\ndata = "digits"\nscenario = "domain"\ntasks = 2\nn = 100\n[network]\nwidths = [8]\n'
        "[protocol]\nseeds = 2\nselection_seeds = 1\n[methods.none]\n[methods.ewc]\nstrengths = [1, 10.0]\n"
    )
    result = CliRunner().invoke(app, ["continual", str(config), "--out", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    assert "  ewc: strength=1" in result.output
    assert (tmp_path / "out" / "table.md").is_file()
    config.write_text(config.read_text().replace("domain", "donain"))
    result = CliRunner().invoke(app, ["continual", str(config)])
    assert result.exit_code == 2
    assert "domain" in result.output


def test_an_interrupted_command_says_how_to_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any) -> Cell:
        raise KeyboardInterrupt

    monkeypatch.setattr(protocol, "learn", interrupted)
    example = EXAMPLES / "continual_digits.toml"
    result = CliRunner().invoke(app, ["continual", str(example), "--out", str(tmp_path)])
    assert result.exit_code == 130
    assert f"continual {example} --out {tmp_path}" in result.output.replace("\n", "")
