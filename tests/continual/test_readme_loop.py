"""The loop in the README runs as it stands there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import thermograd as tg

ROOT = Path(__file__).resolve().parents[2]


def test_the_readmes_loop_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    (block,) = [block for block in blocks if "tg.continual" in block]
    ours = [line for line in block.splitlines() if "ldc" in line]
    assert len(ours) <= 5
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3))
    sets = [TensorDataset(torch.randn(60, 5), torch.randint(3, (60,))) for _ in range(2)]
    space = {
        "tg": tg,
        "torch": torch,
        "model": model,
        "loss": nn.CrossEntropyLoss(),
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1),
        "tasks": [DataLoader(one, batch_size=20, shuffle=True) for one in sets],
    }
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "README.md", "exec"), space)
    assert space["ldc"].tasks == 2
    again = tg.continual.LayerLandscape()
    again.load_state_dict(torch.load("constraint.pt", weights_only=True))
    assert again.penalty(model).item() == space["ldc"].penalty(model).item()
