"""Learning tasks one after the other without forgetting: penalties that follow the landscape, and their baselines.

>>> import thermograd as tg, torch
>>> model, loss = torch.nn.Linear(4, 3), torch.nn.CrossEntropyLoss()
>>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
>>> tasks = [(torch.randn(30, 4), torch.randint(3, (30,))) for _ in range(2)]
>>> ldc = tg.continual.LayerLandscape(strength=100.0)
>>> for X, y in tasks:
...     for _ in range(20):
...         optimizer.zero_grad()
...         loss(model(X), y).backward()
...         _ = optimizer.step()
...         ldc.proximal_step(model, optimizer)
...     _ = ldc.fit(model, loss, (X, y))
>>> ldc.tasks
2
"""

from __future__ import annotations

from .comparison import Comparison
from .constraint import Constraint
from .diagonal import EWC, L2ToAnchor
from .landscape_constraint import LandscapeConstraint, RandomDirections
from .layer_landscape import LayerLandscape
from .protocol import run
from .settings import Settings, load
from .streams import Stream, Task, stream
from .synaptic import SynapticIntelligence

__all__ = [
    "EWC",
    "Comparison",
    "Constraint",
    "L2ToAnchor",
    "LandscapeConstraint",
    "LayerLandscape",
    "RandomDirections",
    "Settings",
    "Stream",
    "SynapticIntelligence",
    "Task",
    "load",
    "run",
    "stream",
]
