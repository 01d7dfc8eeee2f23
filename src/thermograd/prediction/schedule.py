"""A learning-rate scheduler that decays when training has equilibrated, by the fluctuation-dissipation test."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from ..errors import InputError, StoreError, ThermogradWarning
from ..trajectory.equilibration import Equilibration

if TYPE_CHECKING:
    from ..trajectory import Recorder

__all__ = ["EquilibrationLR"]


class EquilibrationLR:
    r"""Multiply the learning rate by ``factor`` whenever training at the present one has equilibrated.

    As :class:`torch.optim.lr_scheduler.ReduceLROnPlateau`, but what decides is whether the run is stationary (Yaida
    2018): the fluctuation-dissipation identity holds and the loss has been shown not to drift, both on the last window
    of steps, half of all steps at this learning rate (:class:`~thermograd.trajectory.Equilibration`). Nothing else
    is evaluated: no validation pass, no metric.

    Call ``step()`` after each optimizer step or after each epoch. Only what happens within the recorder's ``with`` is
    watched. When something else changes a learning rate, the test begins anew.

    Args:
        optimizer: whose learning rates are changed, of all its groups; of any kind (see
            :attr:`thermograd.Recorder.equilibrated`).
        recorder: the recorder of the training; it need not keep all weights (``record=Scalars()`` will do).
        factor: by which the learning rate is multiplied.
        min_lr: learning rates are not lowered below this.
        max_decays: after so many decays the learning rate stays.
        total_steps: optimizer steps planned since the scheduler was made, if known. When a tenth of them is left, or
            less, and no decay has happened, one is made, so that a run never ends at its first learning rate.
        test: the test to use, with settings other than the default ones.

    Raises:
        InputError: a setting out of range, or a recorder of another optimizer.

    >>> import tempfile, torch, thermograd as tg
    >>> model = torch.nn.Linear(3, 1)
    >>> problem = tg.Problem(model, torch.nn.MSELoss(), (torch.randn(20, 3), torch.randn(20, 1)))
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> recorder = tg.Recorder(tempfile.mkdtemp(), problem, optimizer, record=tg.Scalars())
    >>> scheduler = tg.EquilibrationLR(optimizer, recorder)
    >>> scheduler.step()
    >>> scheduler.get_last_lr()
    [0.1]
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        recorder: Recorder,
        *,
        factor: float = 0.1,
        min_lr: float = 0.0,
        max_decays: int | None = None,
        total_steps: int | None = None,
        test: Equilibration | None = None,
    ):
        if not 0 < factor < 1:
            raise InputError(f"factor is {factor}", expected="a number between 0 and 1")
        if not (min_lr >= 0 and math.isfinite(min_lr)):
            raise InputError(f"min_lr is {min_lr}", expected="a number >= 0")
        if max_decays is not None and max_decays < 0:
            raise InputError(f"max_decays is {max_decays}", expected="a whole number >= 0, or None")
        if total_steps is not None and total_steps < 1:
            raise InputError(f"total_steps is {total_steps}", expected="a whole number >= 1, or None")
        if recorder.optimizer is not optimizer:
            raise InputError("the recorder watches another optimizer", expected="the optimizer that is scheduled")
        self.optimizer, self.recorder = optimizer, recorder
        self.factor, self.min_lr, self.max_decays, self.total_steps = factor, min_lr, max_decays, total_steps
        self.decays: list[int] = []
        if test is not None:
            recorder.equilibration = test
        self._taken = 0
        self._looked = (0, self._test.steps)  # steps taken and steps watched when last looked; begins the test
        self._told = False
        optimizer.register_step_post_hook(self._count)

    @property
    def _test(self) -> Equilibration:
        return self.recorder.equilibration

    def _count(self, *_: Any) -> None:
        self._taken += 1

    def step(self, metrics: Any = None) -> None:
        """Decay if training has equilibrated since the last decay. ``metrics`` is ignored."""
        self._warn_unless_watched()
        late = self.total_steps is not None and not self.decays and self.steps >= math.ceil(0.9 * self.total_steps)
        if not (self._test.equilibrated or late):
            return
        if self.max_decays is not None and len(self.decays) >= self.max_decays:
            return
        before = self.get_last_lr()
        for group in self.optimizer.param_groups:
            rate = float(group["lr"])
            lower = max(rate * self.factor, min(rate, self.min_lr))
            if isinstance(group["lr"], torch.Tensor):  # as compiled optimizers want it
                group["lr"].fill_(lower)
            else:
                group["lr"] = lower
        if self.get_last_lr() != before:
            self.decays.append(self.steps)
        self._test.reset()

    def _warn_unless_watched(self) -> None:
        """Steps that the recorder does not see would never lower the rate: say so once."""
        now = (self._taken, self._test.steps)
        if now[0] > self._looked[0] and now[1] == self._looked[1] and not self._told:
            self._told = True
            warnings.warn(
                "the optimizer makes steps that the recorder of EquilibrationLR does not see, so that the learning "
                "rate will not be lowered; train within `with recorder:`",
                ThermogradWarning,
                stacklevel=3,
            )
        self._looked = now

    @property
    def steps(self) -> int:
        """Optimizer steps since the scheduler was made, those before a checkpoint included."""
        return self._taken

    def get_last_lr(self) -> list[float]:
        """The learning rate of each parameter group."""
        return [float(group["lr"]) for group in self.optimizer.param_groups]

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must hold to go on in the same way; loads with ``weights_only=True``."""
        return {"decays": list(self.decays), "taken": self._taken, "test": self._test.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint. The learning rates themselves are in the optimizer's state.

        Raises:
            StoreError: the state is of something else.
        """
        if set(state) != {"decays", "taken", "test"}:
            raise StoreError("the state is not that of an EquilibrationLR", expected="what state_dict() returned")
        self.decays, self._taken = list(state["decays"]), int(state["taken"])
        self._test.load_state_dict(state["test"])
