"""docs/theory.md lists every public function of the theory, and the tests that it names do hold it."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest

from thermograd import theory

ROOT = Path(__file__).resolve().parents[2]
MODULES = [name for name in theory.__all__ if inspect.ismodule(getattr(theory, name))]


def rows() -> dict[str, dict[str, list[str]]]:
    """Module -> function -> cells of its row."""
    found: dict[str, dict[str, list[str]]] = {}
    for line in (ROOT / "docs" / "theory.md").read_text().splitlines():
        if heading := re.match(r"## .*`theory\.(\w+)`", line):
            table = found.setdefault(heading[1], {})
        elif row := re.match(r"\| `(\w+)` \| (.*) \|$", line):
            table[row[1]] = row[2].split(" | ")
    return found


@pytest.mark.parametrize("module", MODULES)
def test_the_index_is_complete(module):
    functions = {n for n in getattr(theory, module).__all__ if inspect.isfunction(getattr(getattr(theory, module), n))}
    assert set(rows()[module]) == functions


def test_the_tests_that_the_index_names_exist_and_speak_of_the_function():
    texts = {path.name: path.read_text() for path in (ROOT / "tests" / "theory").glob("test_*.py")}
    for table in rows().values():
        for function, cells in table.items():
            assert len(cells) == 3, function
            for name in re.findall(r"`(test_\w+\.py)`", cells[-1]):
                assert re.search(rf"\b{function}\b", texts[name]), (function, name)


@pytest.mark.parametrize("module", MODULES)
def test_every_public_function_has_a_full_docstring(module):
    for name in getattr(theory, module).__all__:
        thing = getattr(getattr(theory, module), name)
        if inspect.isfunction(thing):
            doc = inspect.getdoc(thing) or ""
            assert ">>>" in doc, name
            assert len(doc.split("\n")[0]) > 20, name
