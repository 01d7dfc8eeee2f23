"""Layers that torch cannot differentiate twice, or not correctly, by their plain formula."""

from __future__ import annotations

from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils.parametrizations import _WeightNorm

__all__ = ["plain_attention", "write_plainly"]


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


class plain_attention(AbstractContextManager["plain_attention"]):
    """Attention by its plain formula: the fused kernels have no second derivative and no batching rule."""

    def __enter__(self) -> plain_attention:
        self._fastpath = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)
        self._kernel = sdpa_kernel(SDPBackend.MATH)
        self._kernel.__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._kernel.__exit__(*exception)
        torch.backends.mha.set_fastpath_enabled(self._fastpath)
