"""Layers that torch cannot differentiate twice correctly, replaced by their plain formula."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import _WeightNorm

__all__ = ["write_plainly"]


def write_plainly(model: nn.Module) -> None:
    """Replace them in a private copy of a model; parameters keep their names.

    Weight norm: the second derivative of torch's fused kernel takes the norm for a constant (torch 2.13 on the CPU),
    which makes a Hessian that is wrong by ten percent.
    """
    for module in model.modules():
        if isinstance(module, _WeightNorm):
            module.forward = partial(_weight, dim=module.dim)  # type: ignore[method-assign]


def _weight(size: Tensor, direction: Tensor, dim: int) -> Tensor:
    """The weight of a length and a direction, the length of each slice along ``dim``, of the whole where it is -1."""
    kept = [d for d in range(direction.ndim) if d != dim]
    norm = torch.linalg.vector_norm(direction, dim=kept, keepdim=dim != -1)
    return direction * (size / norm)
