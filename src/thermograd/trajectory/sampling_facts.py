"""What a run's attributes say of its batches: declared, known from the data loader, or observed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from ..errors import HyperparameterError
from ..hyperparameters import SGD, Sampling
from .sampling_observer import SamplingObserver

if TYPE_CHECKING:
    from ..problem import Problem

__all__ = ["SamplingFacts"]


class SamplingFacts:
    """Batch size and sampling scheme: declared, known from the data loader, or observed."""

    def __init__(self, problem: Problem, sgd: SGD | None, batch_size: int | None, sampling: Sampling | None):
        self.problem, self.sgd = problem, sgd
        self.batch_size = batch_size or (sgd.batch_size if sgd else None)
        self.scheme = sampling or (sgd.sampling if sgd else None)
        self.source = "declared" if self.scheme else "unknown"
        if self.scheme is None and problem.sampling is not None:
            self.scheme, self.source = problem.sampling, "data loader"
        if self.batch_size is None:
            self.batch_size = problem.batch_size
        self._observer: SamplingObserver | None = None

    def watch(self) -> None:
        """Begin to observe what is not known."""
        if self.scheme is None or self.batch_size is None:
            inputs = None if self.scheme else self.problem.inputs
            self._observer = SamplingObserver(self.problem.model, inputs)

    def adopt(self, attrs: Mapping[str, Any]) -> None:
        """Take over what was found out before, in a run that is resumed."""
        if self.scheme is None and attrs.get("sampling"):
            self.scheme, self.source = attrs["sampling"], attrs["sampling_source"]
        self.batch_size = self.batch_size or attrs.get("batch_size")

    def conclude(self) -> None:
        """Tell the sampling scheme from what was seen so far."""
        if self._observer is not None:
            self._observer.conclude()

    def heard_backward(self) -> None:
        """A backward pass has ended."""
        if self._observer is not None:
            self._observer.heard_backward()

    def end_step(self) -> None:
        """The optimizer has made a step."""
        if self._observer is not None:
            self._observer.end_step()

    def stop(self) -> None:
        """Observe no longer."""
        if self._observer is not None:
            self._observer.stop()

    def attrs(self, optimizer: torch.optim.Optimizer, lr: float | None) -> dict[str, Any]:
        """The attributes ``sgd`` (JSON; null for an optimizer that is not SGD) and ``sampling_source``."""
        batch_size, scheme, source = self.batch_size, self.scheme, self.source
        if self._observer is not None:
            batch_size = batch_size or self._observer.batch_size
            if scheme is None and (scheme := self._observer.scheme) is not None:
                source = "observed"
        values = self._hyperparameters(optimizer)
        if values is not None:
            values |= {"batch_size": batch_size, "dataset_size": self.problem.N, "sampling": scheme}
            if lr and self.sgd is None:
                values["lr"] = lr
        facts = {"batch_size": batch_size, "dataset_size": self.problem.N, "sampling": scheme}
        return {"sgd": json.dumps(values), "sampling_source": source, **facts}

    def _hyperparameters(self, optimizer: torch.optim.Optimizer) -> dict[str, Any] | None:
        if self.sgd is not None:
            return self.sgd.to_dict()
        try:
            return SGD.from_optimizer(optimizer).to_dict()
        except HyperparameterError:  # another optimizer, or SGD in a form that the theory does not describe
            return None
