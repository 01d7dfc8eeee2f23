"""What if: from one measured run, what training would do at other hyperparameters.

The question is answered in two steps: :func:`measure` looks at the run (curvature, noise, the noise-free flow from its
last weights) and keeps what it finds in the run's store; :func:`predict` turns it into losses, times, variances and
margins for any learning rate, batch size, momentum, weight decay and sampling scheme.
"""

from __future__ import annotations

from .advice import Advice, advise
from .forecast import Excess, Forecast
from .measuring import measure
from .moments import BlockMoments, block_moments
from .predicting import Predictions, predict, predictions
from .validation import Validation, validate

__all__ = [
    "Advice",
    "BlockMoments",
    "Excess",
    "Forecast",
    "Predictions",
    "Validation",
    "advise",
    "block_moments",
    "measure",
    "predict",
    "predictions",
    "validate",
]
