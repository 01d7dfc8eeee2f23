"""What a problem evaluates: a model with its loss, or a plain function of the weights, at any weights."""

from __future__ import annotations

import copy
import fnmatch
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_map

from .coupling import refuse_coupling
from .errors import InputError, LossError, ModelError, NotAvailableError, OutputMismatchError
from .losses import PerSampleLoss, per_sample_loss
from .plain_layers import plain_attention, write_plainly

if TYPE_CHECKING:
    from .problem import Problem

__all__ = ["Function", "ModelFunction", "PlainFunction", "checked_dtype"]


class Function(Protocol):
    """What both have in common; ``named`` are the weights by name."""

    shapes: dict[str, tuple[int, ...]]
    dtype: torch.dtype
    device: torch.device
    model: nn.Module | None
    criterion: Any

    def live(self) -> dict[str, Tensor]: ...
    def losses(self, named: dict[str, Tensor], inputs: Any, targets: Any) -> Tensor: ...
    def outputs(self, named: dict[str, Tensor], inputs: Any) -> Tensor: ...
    def output_losses(self, outputs: Tensor, targets: Any) -> Tensor: ...
    def context(self) -> AbstractContextManager[Any]: ...
    def describe(self) -> str: ...


class ModelFunction:
    """A module evaluated functionally on a private copy in the problem's dtype."""

    def __init__(self, model: nn.Module, params: Any, device: torch.device, dtype: torch.dtype):
        self.model: nn.Module | None = model
        self.device, self.dtype = device, dtype
        self.criterion: Any = None
        # torch.compile and data-parallel wrappers hide the module that holds the weights
        source = getattr(model, "_orig_mod", model)
        if isinstance(source, nn.parallel.DistributedDataParallel | nn.DataParallel):
            source = source.module
        self._source = source
        refuse_coupling(source)
        chosen = _select(source, params)
        self._chosen = chosen
        self.shapes = {name: tuple(parameter.shape) for name, parameter in chosen.items()}
        try:
            self._copy = copy.deepcopy(source).to(device=device, dtype=dtype)
        except RuntimeError as error:
            raise ModelError(
                f"the model cannot be copied: {error}",
                expected="a model whose tensors are parameters, buffers or plain values",
                remedy="use torch.nn.utils.parametrizations.weight_norm in place of torch.nn.utils.weight_norm",
            ) from error
        self._copy.requires_grad_(False)
        write_plainly(self._copy)
        self._output_losses: PerSampleLoss | None = None

    def describe(self) -> str:
        loss = getattr(self.criterion, "__name__", type(self.criterion).__name__)
        return f"{type(self._source).__name__}, {loss}"

    def live(self) -> dict[str, Tensor]:
        return dict(self._chosen)

    def context(self) -> AbstractContextManager[Any]:
        return plain_attention()

    def outputs(self, named: dict[str, Tensor], inputs: Any) -> Tensor:
        state = self._rest()
        state.update(named)
        arguments, keywords = _arguments(inputs)
        return functional_call(self._copy, state, arguments, keywords)

    def _rest(self) -> dict[str, Tensor]:
        """The user's present buffers and the parameters that are not in theta."""
        rest = {name: tensor for name, tensor in self._source.named_parameters() if name not in self.shapes}
        rest.update(dict(self._source.named_buffers()))
        return {
            name: tensor.detach().to(self.device, self.dtype if tensor.is_floating_point() else tensor.dtype)
            for name, tensor in rest.items()
        }

    def output_losses(self, outputs: Tensor, targets: Any) -> Tensor:
        if self._output_losses is None:
            raise LossError("the problem has no loss yet")
        return self._output_losses(outputs, targets)

    def losses(self, named: dict[str, Tensor], inputs: Any, targets: Any) -> Tensor:
        return self.output_losses(self.outputs(named, inputs), targets)

    def bind_loss(self, loss: Any, problem: Problem) -> None:
        """Check the model on a few samples, then fit the loss to its output."""
        self.criterion = loss
        probe = problem._probe_index()
        inputs, targets = problem._samples.take(probe, self.device, self.dtype)
        named = problem.unflatten(problem.as_theta())
        with torch.no_grad(), self.context():
            outputs = self._evaluate(named, inputs)
            if not isinstance(outputs, Tensor) or outputs.ndim == 0 or len(outputs) != len(probe):
                shape = tuple(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
                raise OutputMismatchError(
                    f"the model returns {shape} for {len(probe)} samples",
                    expected=f"one tensor of shape [{len(probe)}, ...]: an output for each sample",
                    remedy="wrap the model so that it returns its scores alone, samples first",
                )
            if not bool(torch.equal(torch.nan_to_num(outputs), torch.nan_to_num(self._evaluate(named, inputs)))):
                raise ModelError(
                    "the model returns something else when it is evaluated again on the same input",
                    expected="a deterministic model",
                    remedy="call model.eval(), switch dropout and other random layers off",
                )
            self._check_coupling(named, inputs, outputs)
            self._output_losses = per_sample_loss(loss, outputs, targets, problem.targets)

    def _evaluate(self, named: dict[str, Tensor], inputs: Any) -> Any:
        try:
            return self.outputs(named, inputs)
        except (RuntimeError, TypeError, ValueError, IndexError) as error:
            shapes = tree_map(lambda leaf: tuple(leaf.shape), inputs)
            raise ModelError(
                f"the model fails on a batch of inputs of shape {shapes}: {error}",
                expected="a model that takes the inputs of the data as a batch",
                remedy="check the input's shape and type against the model's first layer",
            ) from error

    def _check_coupling(self, named: dict[str, Tensor], inputs: Any, outputs: Tensor) -> None:
        tolerance = 1e-9 if self.dtype == torch.float64 else 1e-3
        for i in range(len(outputs)):
            alone = self._evaluate(named, tree_map(lambda leaf, i=i: leaf[i : i + 1], inputs))
            scale = float(outputs.abs().max()) + 1e-30
            if alone.shape[1:] != outputs.shape[1:] or float((alone[0] - outputs[i]).abs().max()) > tolerance * scale:
                raise ModelError(
                    "the model's output for a sample depends on the other samples of the batch",
                    expected="a model that treats each sample on its own, so that the loss is a sum over samples",
                    remedy="put batch normalisation into eval mode (model.eval()) and avoid operations over the batch",
                )


class PlainFunction:
    """A differentiable function of the weights and one sample."""

    model: nn.Module | None = None
    criterion: Any = None

    def __init__(self, sample_loss: Callable[..., Tensor], theta0: Any, dtype: torch.dtype):
        if not callable(sample_loss):
            raise LossError(f"sample_loss is a {type(sample_loss).__name__}", expected="a callable (theta, *sample)")
        self._sample_loss = sample_loss
        self._theta = theta0 if isinstance(theta0, Tensor) else torch.as_tensor(theta0)
        self.shapes = {"theta": tuple(self._theta.shape)}
        self.dtype, self.device = dtype, self._theta.device
        self._mapped = True

    def describe(self) -> str:
        return f"function {getattr(self._sample_loss, '__name__', type(self._sample_loss).__name__)}"

    def live(self) -> dict[str, Tensor]:
        return {"theta": self._theta}

    def context(self) -> AbstractContextManager[Any]:
        return ExitStack()

    def losses(self, named: dict[str, Tensor], inputs: Any, targets: Any = None) -> Tensor:
        theta = named["theta"]
        if self._mapped:
            return torch.func.vmap(lambda sample: self._one(theta, sample))(inputs)
        count = len(inputs[0])
        return torch.stack([self._one(theta, tree_map(lambda leaf, i=i: leaf[i], inputs)) for i in range(count)])

    def _one(self, theta: Tensor, sample: Any) -> Tensor:
        value = self._sample_loss(theta, *sample)
        if not isinstance(value, Tensor) or value.numel() != 1:
            shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise LossError(f"sample_loss returns {shape}", expected="a scalar tensor for one sample")
        return value.reshape(())

    def probe(self, problem: Problem) -> None:
        inputs, _ = problem._samples.take(problem._probe_index(), self.device, self.dtype)
        named = problem.unflatten(problem.as_theta())
        try:
            self.losses(named, inputs)
        except LossError:
            raise
        except Exception:  # whatever vmap does not know; the plain loop below raises what is really wrong
            self._mapped = False
            try:
                self.losses(named, inputs)
            except (RuntimeError, TypeError, ValueError, IndexError) as error:
                raise LossError(
                    f"sample_loss fails on the first samples: {error}",
                    expected="a callable sample_loss(theta, *sample) that returns a scalar",
                ) from error

    def outputs(self, named: dict[str, Tensor], inputs: Any) -> Tensor:
        raise NotAvailableError(
            "a problem made from a function has no network output",
            expected="Problem(model, loss, data) for Gauss-Newton, Fisher and decoupling",
        )

    def output_losses(self, outputs: Tensor, targets: Any) -> Tensor:
        raise NotAvailableError("a problem made from a function has no network output")


def checked_dtype(dtype: torch.dtype | None) -> torch.dtype:
    """The precision of a problem, float64 by default.

    Raises:
        InputError: neither float64 nor float32.
    """
    dtype = dtype or torch.float64
    if dtype not in (torch.float64, torch.float32):
        raise InputError(f"dtype is {dtype}", expected="torch.float64 or torch.float32")
    return dtype


def _select(model: nn.Module, params: Any) -> dict[str, nn.Parameter]:
    """The parameters that make up theta, in the model's own order."""
    every = dict(model.named_parameters())
    if params is None:
        chosen = {name: p for name, p in every.items() if p.requires_grad}
        if not chosen:
            raise ModelError("the model has no parameter that requires a gradient", expected="trainable weights")
        return chosen
    patterns = [params] if isinstance(params, str) else list(params)
    chosen = {}
    for pattern in patterns:
        found = {
            name: p for name, p in every.items() if fnmatch.fnmatchcase(name, pattern) or name.startswith(pattern + ".")
        }
        if not found:
            raise ModelError(
                f"params={pattern!r} matches no parameter",
                expected=f"a pattern for some of: {', '.join(every)}",
            )
        chosen.update(found)
    return {name: p for name, p in every.items() if name in chosen}


def _arguments(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(inputs, dict):
        return (), inputs
    return (inputs if isinstance(inputs, tuple) else (inputs,)), {}
