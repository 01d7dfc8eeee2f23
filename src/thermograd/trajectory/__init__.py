"""What the weights do: recording a trajectory, and the statistics of its fluctuations."""

from __future__ import annotations

from .recorder import Recorder
from .run import open_run, write_group
from .store import TrajectoryStore

__all__ = ["Recorder", "TrajectoryStore", "open_run", "write_group"]
