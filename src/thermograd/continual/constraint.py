"""What every constraint shares: fitted on finished tasks, it pulls the weights back while later tasks are learned."""

from __future__ import annotations

import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn

from ..errors import InputError, NonFiniteError, StoreError, ThermogradWarning
from ..problem import Problem
from ..trajectory.interrupts import HeldInterrupt
from .forms import Blocks, Diagonal, Form, LowRank, Rate
from .kronecker import Kronecker
from .layout import Layout

__all__ = ["Anchors", "Constraint"]

Anchors = Literal["latest", "own"]
_FORMAT = 1


@dataclass(frozen=True)
class _Held:
    """What the finished tasks have left: replaced as a whole, so that an interrupt leaves the one or the other."""

    layout: Layout
    form: Form
    tasks: int


class Constraint(ABC):
    r"""A quadratic penalty that stands for the losses of finished tasks.

    .. math:: R(\theta) = \mathrm{strength} \sum_{t} \tfrac12 (\theta - \theta_t)^\top A_t (\theta - \theta_t)

    Fit it when a task is finished. While the next is learned, either add :meth:`penalty` to the loss, or call
    :meth:`proximal_step` after each ``optimizer.step()``; the second cannot diverge, whatever the strength. Both
    together would count twice.

    Args:
        strength: 1 where the penalty is to stand for the mean losses of the tasks as they are.
        anchors: where the penalty of several tasks has its minimum. "latest": at the weights after the last of them,
            with the curvatures summed; where each A is its task's Hessian this is the expansion of the summed losses,
            as the weights then are at the minimum of the newest loss plus the penalty (Huszár 2018). "own": each
            task's term keeps the weights at its own end (Kirkpatrick et al. 2017).
        params: which parameters are held, as in :class:`~thermograd.Problem`; the others are free.
        samples: measure on at most so many samples of a task, drawn at random.
        seed: of every random draw; the t-th task takes seed + t.

    Attributes:
        tasks: how many tasks it holds.
        memory: numbers that it stores between tasks.
    """

    name: ClassVar[str]

    def __init__(
        self,
        strength: float = 1.0,
        *,
        anchors: Anchors = "latest",
        params: str | Sequence[str] | None = None,
        samples: int | None = None,
        seed: int = 0,
    ):
        if isinstance(strength, bool) or not isinstance(strength, int | float) or not 0 <= strength < math.inf:
            raise InputError(f"strength is {strength!r}", expected="a finite number >= 0")
        if anchors not in ("latest", "own"):
            raise InputError(f"anchors is {anchors!r}", expected="'latest' or 'own'")
        if samples is not None and not (isinstance(samples, int) and samples >= 1):
            raise InputError(f"samples is {samples!r}", expected="a whole number >= 1, or None for all")
        self.strength, self.anchors = float(strength), anchors
        self.params, self.samples, self.seed = params, samples, int(seed)
        self._held: _Held | None = None
        self._home: tuple[torch.device, torch.dtype] | None = None  # where the form is

    # ------------------------------------------------------------------ finished tasks

    def fit(self, *task: Any, **measured_on: Any) -> Self:
        """Hold on to a task that the model has just finished.

        Args:
            task: a :class:`~thermograd.Problem`, or ``model, loss, data`` as it takes them. Of a model in train mode
                batch norm and dropout are in eval mode during the measurement.
            measured_on: what some constraints need besides, such as ``run=``.

        Returns:
            Itself. After Ctrl-C or an error it is as it was before the call.

        Raises:
            InputError: neither form of a task, or one that does not go with the tasks before.
            NonFiniteError: the measurement is not finite.
        """
        with self._as_problem(task) as problem:
            if not bool(torch.isfinite(problem.theta).all()):
                raise NonFiniteError("the model's weights are not finite", remedy="lower the learning rate")
            with _whole_or_not_at_all():
                form = self._measure(problem, self._index(problem), **measured_on)
            self._held = self._with(Layout(dict(problem.shapes)), form, problem)
        return self

    @contextmanager
    def _as_problem(self, task: tuple[Any, ...]) -> Iterator[Problem]:
        if len(task) == 1 and isinstance(task[0], Problem):
            if self.params is not None:
                raise InputError(
                    "params is given to the constraint and the task as a problem",
                    expected="params in one of them",
                    remedy="choose the parameters in Problem(model, loss, data, params=...)",
                )
            yield task[0]
            return
        if len(task) != 3 or not isinstance(task[0], nn.Module):
            raise InputError(
                f"fit got {', '.join(type(part).__name__ for part in task) or 'nothing'}",
                expected="a Problem, or a model, a loss and data",
            )
        model = task[0]
        training = {module: module.training for module in model.modules()}
        model.eval()
        try:
            yield Problem(*task, params=self.params)
        finally:
            for module, mode in training.items():
                module.training = mode

    def _index(self, problem: Problem) -> Tensor:
        """The samples that are measured on."""
        if self.samples is None or self.samples >= problem.N:
            return torch.arange(problem.N)
        random = torch.Generator().manual_seed(self.seed + self.tasks)
        return torch.randperm(problem.N, generator=random)[: self.samples].sort().values

    def _with(self, layout: Layout, form: Form, problem: Problem) -> _Held:
        """This and the tasks before, in one form."""
        like = next(iter(problem.parameters.values())).detach()
        form = form.to(like)
        held = self._held
        if held is None:
            return _Held(layout, self._bounded(form), 1)
        joined = held.layout.joined(layout.shapes)
        old = held.form.to(like).grown(joined.P, held.layout.embedded(joined))
        total = self._bounded(old.plus(form.grown(joined.P, layout.embedded(joined))))
        if self.anchors == "latest":
            # read from the model: the task's own theta may lack what earlier tasks had, such as a frozen head
            now = problem.theta if problem.model is None else joined.read(problem.model).detach()
            total = total.centred(now.to(like))
        return _Held(joined, total, held.tasks + 1)

    def _bounded(self, total: Form) -> Form:
        """The sum over tasks, cut down to the memory that the constraint may take."""
        return total

    @abstractmethod
    def _measure(self, problem: Problem, index: Tensor, **measured_on: Any) -> Form:
        """The quadratic form of the task at the problem's current weights."""

    # ------------------------------------------------------------------ while a later task is learned

    def penalty(self, model: nn.Module) -> Tensor:
        """The penalty at the model's weights, to be added to the loss; zero before the first task.

        Raises:
            InputError: it is not the model that was fitted.
        """
        if self._held is None:
            first = next(model.parameters())
            return torch.zeros((), dtype=first.dtype, device=first.device)
        return self._penalty(self._held.layout.read(model))

    def _penalty(self, theta: Tensor) -> Tensor:
        # beyond the largest number strength would turn into infinity, and infinity x 0 is NaN
        return min(self.strength, torch.finfo(theta.dtype).max) * self._on(theta).value(theta)

    def proximal_step(self, model: nn.Module, rate: torch.optim.Optimizer | float) -> None:
        r"""Move the weights v to :math:`\operatorname{argmin}_\theta \frac1{2\eta}|\theta - v|^2 + R(\theta)`, exactly.

        To be called after ``optimizer.step()`` in place of adding the penalty to the loss. For SGD the iteration
        comes to rest where the gradient of loss plus penalty vanishes: :math:`\eta` is the learning rate over one
        minus the momentum. For other optimizers it is the learning rate itself.

        Args:
            model: the model.
            rate: the optimizer, or :math:`\eta`.

        Raises:
            InputError: a rate that is negative or not finite; a parameter that the optimizer does not hold.
            NonFiniteError: the weights are not finite.
        """
        if self._held is None:
            return
        layout = self._held.layout
        with torch.no_grad():
            parameters = layout.parameters(model)  # looked up once: in a small network that is half of the step
            v = layout.gather(parameters)
            eta = self._rates(layout, parameters, rate, v)
            new = self._on(v).proximal(v, eta)
            if not bool(torch.isfinite(new.sum())):
                raise NonFiniteError("the weights are not finite", remedy="lower the learning rate")
            interrupts = HeldInterrupt()
            interrupts.hold()  # all layers are moved, or none
            try:
                layout.scatter(parameters, new)
            finally:
                interrupts.release()

    def _on(self, like: Tensor) -> Form:
        """The form where the weights are; moved once when the model was."""
        assert self._held is not None
        held = self._held
        if (like.device, like.dtype) != self._home:
            self._held = held = _Held(held.layout, held.form.to(like.detach()), held.tasks)
            self._home = (like.device, like.dtype)
        return held.form

    def _rates(self, layout: Layout, parameters: Sequence[nn.Parameter], rate: Any, like: Tensor) -> Rate:
        """The strength times eta: one number, or one for each weight where groups differ."""
        largest = torch.finfo(like.dtype).max  # beyond it a number would turn into infinity, and 0 x infinity is NaN
        if not isinstance(rate, torch.optim.Optimizer):
            if not 0 <= float(rate) < math.inf:
                raise InputError(f"the rate is {rate}", expected="a finite number >= 0, or the optimizer")
            return min(self.strength * float(rate), largest)
        by_parameter = {id(p): _eta(rate, group) for group in rate.param_groups for p in group["params"]}
        rates = []
        for name, parameter in zip(layout.names, parameters):
            if id(parameter) not in by_parameter:
                raise InputError(
                    f"the optimizer does not hold parameter {name!r}",
                    expected="the optimizer that trains the constrained weights",
                    remedy="choose the constrained weights by params=..., or pass the rate as a number",
                )
            rates.append(min(self.strength * by_parameter[id(parameter)], largest))
        if len(set(rates)) == 1:
            return rates[0]
        sizes = torch.tensor([place.stop - place.start for place in layout.places.values()])
        each = torch.tensor(rates, dtype=like.dtype)
        return each.repeat_interleave(sizes).to(like.device)

    # ------------------------------------------------------------------ what it holds

    @property
    def tasks(self) -> int:
        """How many tasks it holds."""
        return 0 if self._held is None else self._held.tasks

    @property
    def memory(self) -> int:
        """Numbers that it stores between tasks."""
        return 0 if self._held is None else self._held.form.memory

    @property
    def form(self) -> Form:
        """The quadratic form of the finished tasks, before the strength.

        Raises:
            InputError: no task is finished.
        """
        if self._held is None:
            raise InputError("the constraint holds no task", remedy="call fit when a task is finished")
        return self._held.form

    def state_dict(self) -> dict[str, Any]:
        """All that a restart needs: plain containers and tensors, as ``torch.load(weights_only=True)`` reads them."""
        held = self._held
        state: dict[str, Any] = {"format": _FORMAT, "constraint": self.name, "strength": self.strength}
        if held is not None:
            shapes = {name: list(shape) for name, shape in held.layout.shapes.items()}
            state |= {"tasks": held.tasks, "shapes": shapes, "form": held.form.state()}
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what :meth:`state_dict` returned.

        Raises:
            StoreError: the state is of another kind of constraint, or of another version.
        """
        if state.get("format") != _FORMAT or state.get("constraint") != self.name:
            found = f"{state.get('constraint')!r}, format {state.get('format')}"
            raise StoreError(f"the state is of {found}", expected=f"{self.name!r}, format {_FORMAT}")
        held = None
        if "form" in state:
            layout = Layout({name: tuple(shape) for name, shape in state["shapes"].items()})
            held = _Held(layout, form_from(state["form"]), int(state["tasks"]))
        self.strength, self._held, self._home = float(state["strength"]), held, None

    def __repr__(self) -> str:
        return f"{type(self).__name__}(strength={self.strength:g}, tasks={self.tasks}, memory={self.memory})"


@contextmanager
def _whole_or_not_at_all() -> Iterator[None]:
    """Measurements that return what they have after Ctrl-C and warn of it are interrupted here after all."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "interrupted:", ThermogradWarning)
        try:
            yield
        except ThermogradWarning as partial:
            if not str(partial).startswith("interrupted:"):
                raise
            raise KeyboardInterrupt from None


def form_from(state: Mapping[str, Any]) -> Form:
    """The form that a state describes.

    Raises:
        StoreError: there is no such kind of form.
    """
    values = dict(state)
    kind = values.pop("form", None)
    plain: dict[Any, Any] = {"diagonal": Diagonal, "low rank": LowRank, "kronecker": Kronecker}
    if kind in plain:
        return plain[kind](**values)
    if kind == "blocks":
        parts = {}
        for name, part in values["parts"].items():
            inner = dict(part)
            parts[name] = (inner.pop("positions"), form_from(inner))
        return Blocks(int(values["P"]), parts)
    raise StoreError(f"the state holds a form of kind {kind!r}", expected="one that state_dict wrote")


def _eta(optimizer: torch.optim.Optimizer, group: Mapping[str, Any]) -> float:
    """The rate at which a constant gradient moves the weights."""
    lr = float(group["lr"])
    if not isinstance(optimizer, torch.optim.SGD):
        return lr
    momentum, dampening = float(group.get("momentum", 0.0)), float(group.get("dampening", 0.0))
    return lr * (1 - dampening) / (1 - momentum) if momentum else lr
