"""The laws: published claims about SGD, each measured and predicted on a recorded run."""

from .catalogue import catalogue, find
from .checking import check
from .evidence import Evidence
from .law import Assumption, Comparison, Law, Measured, judge
from .sheet import LawSheet

__all__ = ["Assumption", "Comparison", "Evidence", "Law", "LawSheet", "Measured", "catalogue", "check", "find", "judge"]
