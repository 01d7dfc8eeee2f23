r"""Synaptic intelligence: each weight held by what it has contributed to the fall of the loss."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..errors import InputError, NonFiniteError
from ..problem import Problem
from .constraint import Constraint
from .forms import Diagonal
from .layout import Layout

__all__ = ["SynapticIntelligence"]


class SynapticIntelligence(Constraint):
    r"""Synaptic intelligence (Zenke, Poole & Ganguli 2017), measured along the path of the training.

    .. math::
        \omega_k = -\sum_s g_k(s)\,\bigl(\theta_k(s+1) - \theta_k(s)\bigr), \qquad
        \Omega_k = \frac{\max(\omega_k, 0)}{(\theta_k(\mathrm{end}) - \theta_k(\mathrm{start}))^2 + \xi}, \qquad
        R(\theta) = \mathrm{strength} \sum_t \tfrac12 \sum_k \Omega^{(t)}_k (\theta_k - \theta_k^{(t)})^2

    with the gradient g of the task's loss alone: what a :meth:`penalty` in the loss adds to it is taken off again.
    Zenke's c is strength / 2. It must see every step, so the training of each task takes place inside
    :meth:`watch`. Between tasks it stores 2 P numbers, during a task 4 P more.

    Args:
        strength: see :class:`Constraint`.
        xi: keeps weights that hardly moved from being held without bound.
        anchors: "latest" as published (the reference weights are those after the last task).
        options: ``params``, see :class:`Constraint`.

    >>> import torch
    >>> model = torch.nn.Linear(1, 1, bias=False)
    >>> data = torch.ones(4, 1), torch.zeros(4, 1)
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> si = SynapticIntelligence()
    >>> with si.watch(model, optimizer):
    ...     for _ in range(20):
    ...         optimizer.zero_grad()
    ...         (torch.nn.functional.mse_loss(model(data[0]), data[1]) + si.penalty(model)).backward()
    ...         _ = optimizer.step()
    >>> si.fit(model, torch.nn.MSELoss(), data).tasks
    1
    """

    name: ClassVar[str] = "synaptic_intelligence"

    def __init__(self, strength: float = 1.0, *, xi: float = 0.1, **options: Any):
        super().__init__(strength, **options)
        if not (isinstance(xi, int | float) and xi > 0):
            raise InputError(f"xi is {xi!r}", expected="a positive number")
        self.xi = float(xi)
        self._path: _Path | None = None
        self._own: Tensor | None = None  # gradient of the penalty since the last step, on the held layout

    @contextmanager
    def watch(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[SynapticIntelligence]:
        """Follow every step of the optimizer while a task is learned.

        Left and entered again before :meth:`fit` (after an interruption, say), it goes on with the same task.

        Raises:
            InputError: it is watching already.
        """
        if self._path is not None and self._path.watching:
            raise InputError("the steps are being watched already", expected="one watch(...) at a time")
        if self._path is None:
            self._path = _Path(Layout(_trainable(model)), model)
        path = self._path
        path.resume(model)
        handle = optimizer.register_step_pre_hook(lambda *_: self._before_step(path, model))
        try:
            yield self
        finally:
            handle.remove()
            path.pause(model)

    def penalty(self, model: nn.Module) -> Tensor:
        """The penalty at the model's weights; see :meth:`Constraint.penalty`."""
        if self._held is None or self._path is None or not torch.is_grad_enabled():
            return super().penalty(model)
        theta = self._held.layout.read(model)
        theta.register_hook(self._note)
        return self._penalty(theta)

    def _note(self, gradient: Tensor) -> None:
        self._own = gradient.detach() if self._own is None else self._own + gradient.detach()

    def _before_step(self, path: _Path, model: nn.Module) -> None:
        gradient = path.gradient(model)
        if self._own is not None and self._held is not None:
            gradient[self._held.layout.embedded(path.layout)] -= self._own
            self._own = None
        path.step(model, gradient)

    def _measure(self, problem: Problem, index: Tensor, **measured_on: Any) -> Diagonal:
        if self._path is None:
            raise InputError(
                "no step of this task was seen", expected="training inside `with si.watch(model, optimizer):`"
            )
        path, model = self._path, problem.model
        if model is None:
            raise InputError("the task is a plain function of the weights", expected="a model, whose steps are watched")
        if not set(problem.names) <= set(path.layout.names):
            raise InputError(f"the steps of {set(problem.names) - set(path.layout.names)} were not seen")
        path.close(model)
        if not bool(torch.isfinite(path.work).all()):
            raise NonFiniteError("the gradients along the path are not finite", remedy="lower the learning rate")
        moved = path.layout.read(model).detach() - path.start
        importance = path.work.clamp_min(0) / (moved.square() + self.xi)
        theta = problem.theta
        return Diagonal(importance[path.layout.positions(problem.names)].to(theta), theta)

    def fit(self, *task: Any, **measured_on: Any) -> SynapticIntelligence:
        """Hold on to the task whose steps were watched; see :meth:`Constraint.fit`."""
        super().fit(*task, **measured_on)
        self._path = self._own = None
        return self

    def state_dict(self) -> dict[str, Any]:
        """All that a restart needs; amid a task, the path so far too."""
        state = super().state_dict()
        return state if self._path is None else state | {"path": self._path.state()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what :meth:`state_dict` returned; see :meth:`Constraint.load_state_dict`."""
        super().load_state_dict(state)
        self._path = _Path.from_state(state["path"]) if "path" in state else None


class _Path:
    """The work that each weight's motion has done against the gradient since the task began."""

    def __init__(self, layout: Layout, model: nn.Module | None):
        self.layout = layout
        self.watching = False
        self._last: tuple[Tensor, Tensor] | None = None  # weights and gradient before the last step
        if model is not None:
            self.start = layout.read(model).detach().clone()
            self.work = torch.zeros_like(self.start)

    def gradient(self, model: nn.Module) -> Tensor:
        """The gradients that the optimizer is about to use, [P]; zero where there is none."""
        parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.layout.parameters(model)]
        return torch.cat([part.detach().reshape(-1) for part in parts]).clone()

    def step(self, model: nn.Module, gradient: Tensor) -> None:
        """Another step is about to be taken: the last one, with all that followed it, is complete."""
        self.close(model)
        self._last = self.layout.read(model).detach().clone(), gradient

    def close(self, model: nn.Module | None) -> None:
        """Count the last step up to where the weights are now."""
        if self._last is not None and model is not None:
            before, gradient = self._last
            self.work -= gradient * (self.layout.read(model).detach() - before)
            self._last = None

    def resume(self, model: nn.Module) -> None:
        """Begin to watch."""
        self.layout.parameters(model)  # refuses another model
        self.watching = True

    def pause(self, model: nn.Module) -> None:
        """Cease to watch."""
        self.close(model)
        self.watching = False

    def state(self) -> dict[str, Any]:
        shapes = {name: list(shape) for name, shape in self.layout.shapes.items()}
        return {"shapes": shapes, "start": self.start, "work": self.work, "last": self._last}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> _Path:
        path = cls(Layout({name: tuple(shape) for name, shape in state["shapes"].items()}), None)
        path.start, path.work = state["start"].clone(), state["work"].clone()
        path._last = None if state["last"] is None else (state["last"][0], state["last"][1])
        return path


def _trainable(model: nn.Module) -> dict[str, tuple[int, ...]]:
    source = getattr(model, "_orig_mod", model)
    if isinstance(source, nn.parallel.DistributedDataParallel | nn.DataParallel):
        source = source.module
    return {name: tuple(p.shape) for name, p in source.named_parameters() if p.requires_grad}
