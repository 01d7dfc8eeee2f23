"""The command line: help, errors, exit codes, and one whole run."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

import thermograd as tg
from thermograd import cli

CONFIG = """
[model]
name = "mlp"
arguments = { sizes = [64, 4, 10], activation = "tanh" }
[data]
name = "digits"
n = 200
[optimizer]
lr = 0.05
momentum = 0.5
weight_decay = 1e-2
[training]
batch_size = 20
burn_in_steps = 50
steps = 400
[measure]
laws = ["curvature_stability", "fluctuation_dissipation"]
"""
COMMANDS = ("demo", "run", "check", "report", "laws", "predict", "validate")


def thermograd(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """The installed command in a process of its own, as a user meets it."""
    command = [sys.executable, "-m", "thermograd.cli", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment, timeout=300, check=False)


def invoke(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(cli.app, arguments)
    return result.exit_code, result.output


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "small.toml"
    path.write_text(CONFIG)
    return path


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example(command: str) -> None:
    code, text = invoke(command, "--help")
    assert code == 0
    assert f"Example: thermograd {command}" in text


def test_help_lists_the_commands_and_version_is_short() -> None:
    code, text = invoke("--help")
    assert code == 0
    assert all(command in text for command in COMMANDS)
    assert invoke("--version") == (0, f"thermograd {tg.__version__}\n")


def test_help_does_not_wait_for_torch() -> None:
    script = (
        "import sys, thermograd.cli as c\n"
        "try: c.app(['run', '--help'])\n"
        "except SystemExit: pass\n"
        "print([m for m in ('torch', 'xarray', 'matplotlib', 'sklearn') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.strip().endswith("[]")


def test_a_whole_run_then_check_then_report(tmp_path: Path, config: Path) -> None:
    out = tmp_path / "out"
    result = thermograd("run", str(config), "--out", str(out))
    assert result.returncode == 0, result.stderr
    assert "Stability of the sharpest direction" in result.stdout
    page = (out / "report.html").read_text()
    assert "http://" not in page.replace("http://www.w3.org", "")
    sheet = tg.laws.LawSheet.load(out)
    assert [c.law for c in sheet] == ["curvature_stability", "fluctuation_dissipation"]

    code, text = invoke("check", str(out), "--law", "curvature_stability")
    assert code == 0
    assert "Stability" in text
    assert "Fluctuation" not in text
    again = tg.laws.LawSheet.load(out)  # one law asked for: the sheet of all stays
    assert again.verdicts == sheet.verdicts
    assert again["curvature_stability"].measured == sheet["curvature_stability"].measured

    (out / "report.html").unlink()
    code, text = invoke("report", str(out))
    assert code == 0
    assert "report.html" in text
    assert (out / "report.html").is_file()

    code, text = invoke("run", str(config), "--out", str(out))
    assert code == 0
    assert "trained already" in text

    side_by_side = tmp_path / "both.html"
    assert invoke("report", str(out), str(out) + "/", "--out", str(side_by_side))[0] == 0
    assert side_by_side.is_file()


def test_a_configuration_may_ask_for_no_laws(tmp_path: Path, config: Path) -> None:
    config.write_text(CONFIG.replace('["curvature_stability", "fluctuation_dissipation"]', "[]"))
    code, text = invoke("run", str(config), "--out", str(tmp_path / "out"))
    assert code == 0
    assert "asks for no laws" in text
    assert tg.open_run(tmp_path / "out")["trajectory"].sizes["step"] == 400


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["run", "none.toml"], ["there is no file", "none.toml"]),
        (["run", "wrong.toml"], ["unknown key optimizer.mometum", "did you mean 'momentum'"]),
        (["run", "syntax.toml"], ["line 1, column"]),
        (["run", "law.toml"], ["there is no law 'gravity'", "weight_variance"]),
        (["run", "data.toml"], ["MNIST is not there", "train-images-idx3-ubyte"]),
        (["check", "nowhere"], ["nowhere does not exist"]),
        (["check", "."], ["has no config.toml", "thermograd.check"]),
        (["report", "nowhere"], ["nowhere does not exist"]),
        (["laws", "gravity"], ["there is no law 'gravity'"]),
        (["run"], ["Missing argument"]),
        (["fly"], ["No such command 'fly'"]),
        (["demo", "--seed", "-1"], ["--seed"]),
    ],
)
def test_bad_input_is_one_paragraph_and_exit_code_2(
    tmp_path: Path, arguments: list[str], words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "wrong.toml").write_text(CONFIG.replace("momentum", "mometum"))
    (tmp_path / "syntax.toml").write_text("[model")
    (tmp_path / "law.toml").write_text(CONFIG.replace("curvature_stability", "gravity"))
    (tmp_path / "data.toml").write_text(CONFIG.replace('"digits"', '"mnist"\nfolder = "."'))
    monkeypatch.chdir(tmp_path)
    code, text = invoke(*arguments)
    assert code == 2
    assert "Traceback" not in text
    for word in words:
        assert word in text
    assert not (tmp_path / "runs").exists()  # nothing was begun


def test_debug_shows_the_traceback_wherever_it_stands(tmp_path: Path) -> None:
    for arguments in (["--debug", "laws", "gravity"], ["laws", "gravity", "--debug"], ["laws", "gravity"]):
        result = thermograd(*arguments, cwd=tmp_path)
        assert result.returncode == 2
        assert ("Traceback" in result.stderr) == ("--debug" in arguments)
        assert "there is no law 'gravity'" in result.stderr
        assert result.stdout == ""


def test_divergence_and_defects_exit_with_1(tmp_path: Path, config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config.write_text(CONFIG.replace("lr = 0.05", "lr = 1e30"))
    code, text = invoke("run", str(config), "--out", str(tmp_path / "out"))
    assert code == 1
    assert "finite" in text
    assert "--overwrite" in text

    def defect(*_: object) -> None:
        raise ZeroDivisionError("of all things")

    monkeypatch.setattr("thermograd.laws.find", defect)
    code, text = invoke("laws", "weight_variance")
    assert code == 1
    assert "Unexpected error: ZeroDivisionError: of all things" in text


def test_ctrl_c_says_how_to_resume(tmp_path: Path, config: Path) -> None:
    config.write_text(CONFIG.replace("steps = 400", "steps = 1000000"))
    command = [sys.executable, "-m", "thermograd.cli", "run", str(config), "--out", str(tmp_path / "out")]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    deadline = time.monotonic() + 120
    while not (tmp_path / "out" / "store.zarr").exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, message = process.communicate(timeout=120)
    assert process.returncode == 130
    assert f"Resume with: thermograd run {config}" in message
    assert "Traceback" not in message
    assert (tmp_path / "out" / "checkpoint.pt").is_file()


def test_the_demo_may_replace_a_demo_but_nothing_else(tmp_path: Path, config: Path) -> None:
    from thermograd.config import load

    demo = load(cli._DEMO)
    assert not cli._is_other_demo(tmp_path / "new", demo)
    folder = tmp_path / "old"
    folder.mkdir()
    (folder / "config.toml").write_text(demo.replace("run", seed=5).to_toml())
    assert cli._is_other_demo(folder, demo)
    (folder / "config.toml").write_text(demo.to_toml())
    assert not cli._is_other_demo(folder, demo)  # begun and not finished: it is resumed
    (folder / "config.toml").write_text(CONFIG)
    assert not cli._is_other_demo(folder, demo)
    code, text = invoke("demo", "--out", str(folder))
    assert code == 2
    assert "another configuration" in text
