"""What a run's attributes say of its batches: declared, known from the data loader, or observed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, get_args

import torch

from ..errors import HyperparameterError, InputError
from ..hyperparameters import SGD, Sampling
from .sampling_observer import SamplingObserver

if TYPE_CHECKING:
    from ..problem import Problem

__all__ = ["SamplingFacts"]

_ENOUGH = 8  # steps from which on the batches that were seen go before the data loader's


class SamplingFacts:
    """Batch size and sampling scheme: declared, observed, or known from the data loader.

    What training is seen to do goes before what the problem's data loader says: it may be another loader, or several
    of its batches may make up a step.
    """

    def __init__(self, problem: Problem, sgd: SGD | None, batch_size: int | None, sampling: Sampling | None):
        if sampling is not None and sampling not in get_args(Sampling):
            raise InputError(f"sampling is {sampling!r}", expected=f"one of {', '.join(map(repr, get_args(Sampling)))}")
        if batch_size is not None and not (int(batch_size) == batch_size and batch_size >= 1):
            raise InputError(f"batch_size is {batch_size}", expected="a whole number >= 1")
        self.problem, self.sgd = problem, sgd
        self.batch_size = batch_size or (sgd.batch_size if sgd else None)
        self.scheme = sampling or (sgd.sampling if sgd else None)
        self.source = "declared" if self.scheme else "unknown"
        self._observer: SamplingObserver | None = None
        self._earlier: int | None = None

    def watch(self) -> None:
        """Begin to observe what is not known."""
        if self.scheme is None or self.batch_size is None:
            inputs = None if self.scheme else self.problem.inputs
            self._observer = SamplingObserver(self.problem.model, inputs)

    def adopt(self, attrs: Mapping[str, Any]) -> None:
        """Take over what was found out before, in a run that is resumed."""
        source = attrs.get("sampling_source")
        if self.scheme is None and source in ("declared", "observed"):
            self.scheme, self.source = attrs["sampling"], source
        self._earlier = attrs.get("batch_size")

    def conclude(self) -> None:
        """Tell the sampling scheme from what was seen so far."""
        if self._observer is not None:
            self._observer.conclude()

    def heard_backward(self) -> None:
        """A backward pass has ended."""
        if self._observer is not None:
            self._observer.heard_backward()

    def discard(self) -> None:
        """The backward passes since the last step do not count."""
        if self._observer is not None:
            self._observer.discard()

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
        seen = self._observer.batch_size if self._observer is not None else None
        if self.problem.batch_size and self._observer is not None and self._observer.steps < _ENOUGH:
            seen = None  # a short last batch among few
        loader = min(self.problem.batch_size, self.problem.N) if self.problem.batch_size else None
        batch_size = batch_size or seen or self._earlier or loader
        if scheme is None and loader is not None and (seen is None or seen % loader == 0):
            # also where several of the loader's batches accumulate to a step
            scheme, source = self.problem.sampling, "data loader" if self.problem.sampling else source
        found = self._observer.scheme if self._observer is not None else None
        if found is not None and (scheme is None or (source == "data loader" and seen == loader)):
            if scheme != found:
                source = "observed"
            scheme = found
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
