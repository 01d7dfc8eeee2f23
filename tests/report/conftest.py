"""Small laws about a simulated quadratic, one for each verdict, so that pages are tested on computed sheets."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import ClassVar

import numpy as np
import pytest

from thermograd.laws.law import Assumption, Comparison, Law, Measured
from thermograd.laws.sheet import LawSheet

LR = 0.1


class Walk:
    """SGD with white noise on a quadratic of several curvatures: positions [T, n]."""

    def __init__(self, steps: int = 20_000, seed: int = 0):
        rng = np.random.default_rng(seed)
        self.curvature = np.geomspace(0.3, 5, 8)  # [n]
        kick = rng.normal(size=(steps, 8))  # [T, n]
        position = np.zeros(8)
        self.positions = np.empty_like(kick)
        for k in range(steps):
            position = position - LR * (self.curvature * position + kick[k])
            self.positions[k] = position

    def ratios(self, blocks: int) -> np.ndarray:
        """Variance in blocks over the stationary one, mean over modes [blocks]."""
        parts = np.array_split(self.positions[1000:], blocks)
        return np.array([(p.var(0) / self.expected).mean() for p in parts])

    @property
    def expected(self) -> np.ndarray:
        """Stationary variance of each mode [n]."""
        return LR / (self.curvature * (2 - LR * self.curvature))


class Variance(Law):
    name = "toy_variance"
    title = "Variance of a <toy>"
    statement = "The variance of mode i falls with h_i & nothing else."
    formula = "Var θ_i = η / (h_i(2 − ηh_i)),   h_i < 2/η"
    source = "A textbook, Eq. (1)"
    quantity = "measured / predicted"
    tolerance = 0.2
    xlabel = "curvature h_ii"
    ylabel = "variance of the weights"
    caveats = ("Only for a <quadratic>.",)
    sentences: ClassVar = {
        "holds": "The weights jitter as the theory says.",
        "fails": "The weights jitter by another amount.",
        "undecided": "The run is too short to tell.",
        "not in its regime": "The theory does not speak of this run.",
    }
    scale = 1.0

    def assumptions(self, evidence: Walk) -> list[Assumption]:
        return [Assumption("stable", bool((LR * evidence.curvature < 2).all()), "ηh < 2 & finite")]

    def measure(self, evidence: Walk) -> Measured:
        ratios = evidence.ratios(20)
        details = {"x": evidence.curvature, "measured_y": evidence.positions[1000:].var(0)}
        error = float(ratios.std(ddof=1) / np.sqrt(20))
        return Measured(float(ratios.mean()), error, 19, details, "From 20 blocks <each>.")

    def predict(self, evidence: Walk) -> Measured:
        return Measured(self.scale, details={"predicted_y": self.scale * evidence.expected})


class Wrong(Variance):
    name, title, scale = "toy_wrong", "Twice the variance", 2.0


class Precise(Variance):
    name, title, tolerance = "toy_precise", "Variance to four digits", 1e-4


class Absent(Variance):
    name, title = "toy_absent", "A law of something else"

    def assumptions(self, evidence: Walk) -> list[Assumption]:
        return [Assumption("needs a network", False, "a quadratic <form>"), *super().assumptions(evidence)]


class Bounded(Variance):
    name, title, kind, scale = "toy_bounded", "At most a bound", "bound", 1.5


TOYS = {law.name: law for law in (Variance(), Wrong(), Precise(), Absent(), Bounded())}


@pytest.fixture(scope="module", autouse=True)
def _toy_catalogue() -> Iterator[None]:
    # by name: the package's attribute of this name is the function, not the module
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(importlib.import_module("thermograd.laws.catalogue"), "find", TOYS.__getitem__)
        yield


@pytest.fixture(scope="session")
def comparisons() -> dict[str, Comparison]:
    walk = Walk()
    return {name: law.compare(walk) for name, law in TOYS.items()}


@pytest.fixture(scope="module")
def sheet(comparisons: dict[str, Comparison]) -> LawSheet:
    facts = {
        "model": "MLP <64-32-10>",
        "P": 12345,
        "sgd": {"lr": LR, "momentum": 0.0},
        "seed": 0,
        "final_loss": float("nan"),
        "note": '<script>alert("x")</script>',
    }
    return LawSheet(tuple(comparisons.values()), facts)
