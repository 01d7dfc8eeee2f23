"""`thermograd predict` and `thermograd validate` from the folder of a run alone, and their page."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from typer.testing import CliRunner

import thermograd as tg
from thermograd import cli
from thermograd.prediction import advise
from thermograd.training import train
from thermograd.whatif import measured_run
from thermograd.whatif_show import predict_and_show

CONFIG = """
[model]
name = "mlp"
arguments = { sizes = [64, 3, 10], activation = "tanh" }
[data]
name = "digits"
n = 120
[optimizer]
lr = 0.1
momentum = 0.5
weight_decay = 2e-2
[training]
batch_size = 20
burn_in_steps = 500
steps = 400
[measure]
laws = []
"""


def invoke(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(cli.app, arguments)
    return result.exit_code, result.output


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("whatif")
    (place / "small.toml").write_text(CONFIG)
    return train(place / "small.toml", place / "run")


def test_predict_prints_the_table_and_writes_the_page(folder: Path) -> None:
    code, text = invoke("predict", str(folder), "--lr", "0.05", "--batch-size", "40", "--steps", "100")
    assert code == 0, text
    for label in (
        "excess over the bottom", "loss floor", "steps to equilibrate", "weight variance", "variance of the training",
        "diffusion exponent", "distance travelled", "sharpness margin", "escape-time scale", "divided by ten",
        "critical batch size", "same floor at batch size",
    ):  # fmt: skip
        assert label in text
    page = (folder / "predict.html").read_text()
    assert "loss floor" in page
    assert "http" not in page.replace("http://www.w3.org", "")


def test_maps_and_many_settings(folder: Path) -> None:
    code, text = invoke(
        "predict", str(folder), "--sweep", "--steps", "100", "--budget", "300",
        *(part for rate in (0.01, 0.02, 0.05, 0.1, 0.2) for part in ("--lr", str(rate))),
    )  # fmt: skip
    assert code == 0, text
    assert text.count("lr 0.") >= 5
    assert "Of 300 steps" in text
    page = (folder / "predict.html").read_text()
    assert page.count("<svg") >= 3
    assert "Map of the excess loss" in page
    assert page.count('href="data:image/png;base64,') == page.count("<image ") >= 1  # the colour bars


def test_each_flag_is_told_once_and_narrow_terminals_stack_the_settings(folder: Path) -> None:
    rates = [part for rate in (0.01, 0.02, 0.03) for part in ("--lr", str(rate))]
    result = CliRunner().invoke(cli.app, ["predict", str(folder), "--steps", "100", *rates], env={"COLUMNS": "80"})
    assert result.exit_code == 0, result.output
    flagged = [line for line in result.output.splitlines() if line.startswith("Flag (")]
    assert len(flagged) == len(set(flagged)) > 0
    assert any(line.startswith("Flag (all settings): flat modes") for line in flagged)
    text = io.StringIO()
    predict_and_show(Console(width=80, file=text), folder, {"lr": [0.01, 0.02]}, steps=100, sweep=False, budget=None)
    lines = text.getvalue().splitlines()
    assert sum(line.strip().startswith("mean loss (with weight decay)") for line in lines) == 2
    assert all(len(line) <= 80 for line in lines)


def test_validate_freezes_trains_resumes_and_shows(folder: Path) -> None:
    code, text = invoke("validate", str(folder), "--replicas", "2", "--steps", "100")
    assert code == 0, text
    assert "Median relative error" in text
    assert "nan" not in text
    kept = folder / "validation"
    frozen = json.loads((kept / "predictions.json").read_text())
    assert len(frozen["predictions"]) >= 12
    assert len(list(kept.glob("setting-*.json"))) == len(frozen["predictions"])
    assert "Checked by doing it" in (folder / "predict.html").read_text()
    code, again = invoke("validate", str(folder), "--replicas", "2", "--steps", "100")
    assert code == 0
    assert again.splitlines()[-3:] == text.splitlines()[-3:]
    code, text = invoke("validate", str(folder), "--replicas", "3", "--steps", "100")
    assert code == 2
    assert "--fresh" in text


def test_python_and_command_agree_and_need_nothing_but_the_folder(folder: Path, tmp_path: Path) -> None:
    moved = tmp_path / "elsewhere"
    shutil.copytree(folder, moved)
    here, there = (tg.predict(place, lr=0.05, steps=100) for place in (folder, moved))
    assert float(here["excess_loss"]) == pytest.approx(float(there["excess_loss"]), rel=1e-6)
    assert here.attrs["steps"] == 100


def test_the_last_weights_and_momentum_are_those_of_the_checkpoint(folder: Path) -> None:
    run = tg.open_run(folder)["trajectory"]
    standing = measured_run(folder, steps=100).forecast.standing
    np.testing.assert_allclose(standing.theta.numpy(), run["theta"].values[-1], rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(standing.velocity.numpy(), run["velocity"].values[-1], rtol=1e-3, atol=1e-4)
    assert not standing.continued


def test_a_run_that_recorded_a_layer_alone_is_continued_to_look_at_it(folder: Path, tmp_path: Path) -> None:
    config = tmp_path / "layer.toml"
    config.write_text(CONFIG.replace("steps = 400", 'steps = 300\nrecord = "layer2"'))
    train(str(config), tmp_path / "run")
    ready = measured_run(tmp_path / "run", steps=150)
    assert ready.forecast.standing.continued
    assert ready.forecast.standing.problem.P == measured_run(folder, steps=100).forecast.standing.problem.P
    assert np.isfinite(ready.at(ready.sgd)["excess_loss"])


def test_advice_lowers_the_rate_late_once_all_is_equilibrated(folder: Path) -> None:
    ready = measured_run(folder, steps=100)
    advice = advise(ready, 600)
    assert 0 < advice.best_step < 600
    assert advice.best_excess < advice.constant_excess
    assert "Of 600 steps" in str(advice)
    assert advice.plot().get_ylabel() == "excess loss at the end"
    for budget, factor in ((3, 0.1), (600, 1.5), (100.5, 0.1)):
        with pytest.raises(tg.errors.InputError):
            advise(ready, budget, factor=factor)


def test_bad_input_exits_with_2_and_says_what_to_do(folder: Path, tmp_path: Path) -> None:
    for arguments in (
        ("predict", str(tmp_path / "nowhere")),
        ("predict", str(folder), "--lr", "-1"),
        ("predict", str(folder), "--momentum", "1.2"),
        ("predict", str(folder), "--sampling", "sorted"),
        ("predict", str(folder), "--steps", "3"),
        ("validate", str(tmp_path)),
    ):
        code, text = invoke(*arguments)
        assert code == 2, (arguments, text)
        assert "Error" in text
    scheduled = tmp_path / "scheduled.toml"
    scheduled.write_text(
        CONFIG.replace("burn_in_steps = 500", "burn_in_steps = 0").replace("steps = 400", "steps = 100")
        + '\n[training.schedule]\nname = "StepLR"\narguments = { step_size = 50 }\n'
    )
    train(str(scheduled), tmp_path / "scheduled")
    code, text = invoke("predict", str(tmp_path / "scheduled"))
    assert code == 2
    assert "schedule" in text


def test_the_report_has_the_page_where_predictions_were_measured(folder: Path) -> None:
    assert invoke("check", str(folder), "--law", "curvature_stability")[0] == 0
    assert invoke("predict", str(folder), "--steps", "100")[0] == 0
    (folder / "predict.html").unlink()
    code, text = invoke("report", str(folder))
    assert code == 0, text
    assert "predict.html" in text
    assert "Map of the excess loss" in (folder / "predict.html").read_text()


def test_interrupted_commands_say_how_to_go_on(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("thermograd.whatif_show.validate_and_show", interrupted)
    monkeypatch.setattr("thermograd.whatif_show.predict_and_show", interrupted)
    code, text = invoke("validate", str(folder), "--replicas", "3", "--steps", "70", "--seed", "2")
    assert code == 130
    assert " ".join(text.split()).endswith(f"validate {folder} --replicas 3 --steps 70 --seed 2")
    code, text = invoke("predict", str(folder))
    assert code == 130
    assert "the same command" in text
