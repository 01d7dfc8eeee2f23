"""Layers that couple the samples of a batch, or draw random numbers: with them there is no loss of a sample."""

from __future__ import annotations

from torch import nn

from .errors import ModelError

__all__ = ["refuse_coupling"]


def refuse_coupling(model: nn.Module) -> None:
    """Refuse a model some layer of which, as it stands, couples samples or is random.

    Raises:
        ModelError: batch normalisation or dropout in train mode; the layer is named.
    """
    for name, module in model.named_modules():
        kind = type(module).__name__
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and (module.training or module.running_mean is None):
            why = "in train mode" if module.training else "without running statistics"
            raise ModelError(
                f"layer {name!r} is {kind} {why}: it couples the samples of a batch, so no per-sample loss exists",
                expected="batch normalisation in eval mode with running statistics",
                remedy="call model.eval() before building the problem (its statistics are then constants)",
            )
        if isinstance(module, nn.modules.dropout._DropoutNd) and module.training and module.p > 0:
            raise ModelError(
                f"layer {name!r} is {kind}(p={module.p}) in train mode: the loss would be random",
                expected="dropout off",
                remedy="call model.eval() before building the problem, or set p=0",
            )
        if isinstance(module, nn.MultiheadAttention) and module.training and module.dropout > 0:
            raise ModelError(
                f"layer {name!r} is {kind}(dropout={module.dropout}) in train mode: the loss would be random",
                expected="dropout off",
                remedy="call model.eval() before building the problem, or set dropout=0",
            )
