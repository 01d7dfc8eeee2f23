"""README and examples say what is true."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
import yaml

import thermograd as tg
from thermograd.building import build
from thermograd.config import load

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT.parent / "shared" / "data"


def test_readme_lists_every_law_and_no_other() -> None:
    rows = re.findall(r"^\| (.+) \(`(\w+)`\) \|", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert [(law.title, law.name) for law in tg.laws.catalogue()] == rows


def test_readme_and_contributing_link_to_what_exists() -> None:
    for document in ("README.md", "CONTRIBUTING.md"):
        for target in re.findall(r"\]\((?!http)([^)#]+)\)", (ROOT / document).read_text()):
            assert (ROOT / target).exists(), target


def test_readme_python_is_valid_and_names_what_exists() -> None:
    for block in re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.Attribute):
                words = ast.unparse(node).split(".")
                found = tg
                for word in words[1:] if words[0] == "tg" else []:
                    found = getattr(found, word)


def test_the_citation_file_is_valid() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == tg.__version__
    assert len(citation["references"]) == 4


def test_a_loop_of_ones_own_takes_under_20_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = (ROOT / "examples" / "your_own_loop.py").read_text()
    lines = [line for line in source.splitlines() if line.strip() and not line.startswith('"""')]
    assert len(lines) < 20
    monkeypatch.chdir(tmp_path)
    shorter = source.replace("range(200)", "range(12)")
    assert shorter != source
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("builtins.print", lambda sheet: None)
        exec(compile(shorter, "your_own_loop.py", "exec"), {})
    sheet = tg.laws.LawSheet.load("runs/mine")
    assert len(sheet) == len(tg.laws.catalogue())
    assert tg.open_run("runs/mine")["trajectory"].sizes["step"] == 12 * 18
    assert Path("runs/mine/report.html").is_file()


@pytest.mark.parametrize("name", ["fashion_mnist_mlp", "cifar10_small_cnn"])
def test_example_configurations(name: str) -> None:
    config = load(ROOT / "examples" / f"{name}.toml")
    assert config.data.folder == str(DATA)
    if not DATA.is_dir():
        pytest.skip("the real data sets are not beside this repository")
    problem, _, batches = build(config)
    assert config.data.n == problem.N
    assert problem.P * config.training.steps * 8 < 500e6  # bytes of weights and velocities in float32
    assert len(next(batches)) == config.training.batch_size
