"""The configuration file: what is accepted, and how faults are explained."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from thermograd.config import Config, load
from thermograd.errors import ConfigError

MINIMAL = """
[model]
name = "linear"
arguments = { d_in = 64, d_out = 10 }
[data]
name = "digits"
[optimizer]
lr = 0.1
[training]
batch_size = 50
steps = 100
"""


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "experiment.toml"
    path.write_text(text)
    return path


def test_defaults_and_paths(tmp_path: Path) -> None:
    text = MINIMAL.replace('name = "digits"', 'name = "mnist"\nfolder = "../data"')
    config = load(write(tmp_path, text))
    assert config.data.folder == str((tmp_path / "../data").resolve())
    assert config.run.path == []
    own = load(write(tmp_path, text.replace('"linear"', '"mine:network"')))
    assert own.run.path == [str(tmp_path)]  # modules beside the file are found
    assert config.run.out == "runs/experiment"
    assert config.run.seed == 0
    assert config.loss.name == "cross_entropy"
    assert config.measure.laws == "all"


def test_toml_round_trip(tmp_path: Path) -> None:
    text = MINIMAL + 'record = ["layer1.*", "a\\"b\\\\c\\n"]\n[training.schedule]\nname = "StepLR"\n'
    text += "arguments = { step_size = 5, gamma = 1e-3, nested = { on = true, list = [1, 2.5] } }\n"
    config = load(write(tmp_path, text))
    again = Config.from_dict(tomllib.loads(config.to_toml()))
    assert again == config
    assert load(write(tmp_path, config.to_toml())) == config


def test_what_counts_as_the_same_training() -> None:
    config = Config.from_dict(tomllib.loads(MINIMAL))
    assert config.trains_like(config.replace("measure", modes=3))
    assert config.trains_like(config.replace("run", out="elsewhere"))
    assert config.trains_like(config.replace("data", folder="/moved"))
    other = config.replace("optimizer", lr=0.2)
    assert not config.trains_like(other)
    assert config.differences(other) == ["optimizer.lr: 0.1 -> 0.2"]
    assert not config.trains_like(config.replace("run", seed=1))


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("lr = 0.1", "lr = 0.1\nmometum = 0.9", ["optimizer.mometum = 0.9", "did you mean 'momentum'"]),
        ("[training]", "[trainig]", ["unknown key trainig", "did you mean 'training'", "also wrong: training"]),
        ("lr = 0.1", "lr = -1", ["optimizer.lr is -1", "greater than 0", "learning rate"]),
        ("lr = 0.1", "lr = nan", ["optimizer.lr is nan", "finite"]),
        ("lr = 0.1", 'lr = "0.1"', ["optimizer.lr is '0.1'", "number"]),
        ("lr = 0.1", "", ["optimizer.lr is absent", "learning rate"]),
        ("lr = 0.1", "lr = 0.1\nnesterov = true", ["optimizer", "nesterov", "momentum > 0"]),
        ("lr = 0.1", 'lr = 0.1\nname = "adam"\nmomentum = 0.5', ["optimizer", "belong to sgd"]),
        ("steps = 100", "", ["training.steps is absent"]),
        ("steps = 100", "steps = 1.5", ["training.steps is 1.5", "integer"]),
        ("steps = 100", "steps = true", ["training.steps is True", "integer"]),
        ("steps = 100", "steps = 0", ["training.steps is 0", "greater than or equal to 1"]),
        (
            "steps = 100",
            'steps = 1\nsampling = "reshufle"',
            ["'reshufle'", "'replacement'", "did you mean 'reshuffle'"],
        ),
        ("steps = 100", "steps = 1\nrecord = 3", ["training.record is 3", "string"]),
        ("steps = 100", "steps = 1\n[measure]\nlaws = 7", ["measure.laws is 7"]),
        ("steps = 100", 'steps = 1\n[training.schedule]\nnme = "StepLR"', ["training.schedule.nme", "'name'"]),
        ('name = "digits"', 'name = "digits"\nlabel_noise = 2', ["data.label_noise is 2", "less than or equal to 1"]),
        ("[model]", 'model = "mlp"\n[x]', ["unknown key x", "also wrong: model"]),
    ],
)
def test_faults_are_named_with_what_was_expected(tmp_path: Path, old: str, new: str, words: list[str]) -> None:
    path = write(tmp_path, MINIMAL.replace(old, new))
    with pytest.raises(ConfigError) as caught:
        load(path)
    message = str(caught.value)
    assert "experiment.toml" in message
    assert "\n" not in message
    for word in words:
        assert word in message


def test_syntax_errors_give_line_and_column(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="line 3, column 9"):
        load(write(tmp_path, "[model]\n\nname =  mlp\n"))


def test_absent_and_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"there is no file .*none\.toml"):
        load(tmp_path / "none.toml")
    with pytest.raises(ConfigError, match="cannot be read"):
        load(tmp_path)
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="cannot be read"):
        load(tmp_path / "binary.toml")


def test_a_section_that_is_not_a_table() -> None:
    values = tomllib.loads(MINIMAL)
    with pytest.raises(ConfigError, match="model is 'mlp' in the configuration"):
        Config.from_dict({**values, "model": "mlp"})
    with pytest.raises(ConfigError, match=r"measure\.laws is 'al'.* or a list"):
        Config.from_dict({**values, "measure": {"laws": "al"}})
