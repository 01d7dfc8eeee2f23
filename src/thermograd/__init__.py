"""thermograd: measure and predict the statistical physics of SGD training.

>>> import thermograd as tg
>>> tg.SGD(lr=0.1, momentum=0.5).effective_lr
0.2
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import (
        continual,
        data,
        errors,
        landscape,
        laws,
        losses,
        models,
        noise,
        papers,
        report,
        simulate,
        theory,
        trajectory,
    )
    from .hyperparameters import SGD
    from .laws import check
    from .prediction.schedule import EquilibrationLR
    from .problem import Problem
    from .trajectory import Directions, Every, Full, Layer, LogSpaced, NoiseScale, Recorder, Scalars, Sketch, open_run
    from .whatif import predict, validate

__version__ = "0.1.0"
__all__ = [
    "SGD",
    "Directions",
    "EquilibrationLR",
    "Every",
    "Full",
    "Layer",
    "LogSpaced",
    "NoiseScale",
    "Problem",
    "Recorder",
    "Scalars",
    "Sketch",
    "check",
    "continual",
    "data",
    "errors",
    "landscape",
    "laws",
    "losses",
    "models",
    "noise",
    "open_run",
    "papers",
    "predict",
    "prediction",
    "report",
    "simulate",
    "theory",
    "trajectory",
    "validate",
]

# Names are imported on first use, so that `thermograd --help` and `import thermograd` do not wait for torch.
_WHERE = {
    "SGD": "hyperparameters",
    "Problem": "problem",
    "Recorder": "trajectory",
    "Directions": "trajectory",
    "Every": "trajectory",
    "Full": "trajectory",
    "Layer": "trajectory",
    "LogSpaced": "trajectory",
    "NoiseScale": "trajectory",
    "Scalars": "trajectory",
    "Sketch": "trajectory",
    "open_run": "trajectory",
    "check": "laws",
    "EquilibrationLR": "prediction.schedule",
    "predict": "whatif",
    "validate": "whatif",
}


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        return getattr(importlib.import_module(f".{_WHERE[name]}", __name__), name)
    if name in __all__:
        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
