"""Recording what the weights do while the user trains as usual."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..coupling import refuse_coupling
from ..errors import InputError, ModelError, StoreError, ThermogradWarning
from ..hyperparameters import SGD, Sampling
from .backward import BackwardListener
from .equilibration import WatchesEquilibrium
from .interrupts import HeldInterrupt
from .noise_meter import NoiseMeter, is_adaptive
from .opening import facts_of, groups_of, open_store
from .parts import Full, NoiseScale, Part
from .place import is_remote
from .plan import chosen, make_plan, single_layer
from .ranks import is_writer
from .resume import Present, digest, find_start
from .rows import AxisRows, first_non_finite, gradient_factor, to_numpy
from .sampling_facts import SamplingFacts
from .store import TrajectoryStore
from .tracker import Tracker, flat_weights
from .writer import Writer

if TYPE_CHECKING:
    from ..problem import Problem

__all__ = ["Recorder"]

_FLUSH_BYTES = 8 * 2**20  # of pending rows
_FLUSH_ROWS = 4096
_FEW_PARTS = (
    "the gradient noise of a step cannot be told: it takes at least two microbatches (backward passes) or ranks in a "
    "step, and their sizes (give batch_size where the model is compiled or there is none); NaN is stored instead"
)
_SECONDS = 10.0  # between flushes: each takes some 40 ms of a core, however little there is to write
_REMOTE_SECONDS = 30.0  # between flushes where each takes many round trips


class Recorder(WatchesEquilibrium, AbstractContextManager["Recorder"]):
    r"""Records a training run: ``with Recorder(path, problem, optimizer): train_as_usual()``.

    It attaches to the optimizer's step hooks, so that the loop stays as it is. Each recorded row holds the weights
    after the step, the velocity

    .. math:: v_k = (\theta_k - \theta_{k-1}) / \eta

    (Kunin et al. 2024, section 2), the minibatch loss (the scalar whose gradient the step used: what was
    backpropagated since the step before, added up; without the factor of a gradient scaler), the learning rate,
    momentum and weight decay. Where weights are too many for that, ``record`` says what to keep instead, and when:

    .. code-block:: python

        record=[Scalars(), Sketch(512), Directions(V), Every(10, NoiseScale()), LogSpaced(20, Layer("head"))]

    Rows are gathered in blocks and written by a thread of their own; what is written survives a ``kill -9``. In
    distributed training each process makes the recorder, and that of rank 0 writes.

    Args:
        path: folder of the run, or a URL that fsspec knows (``s3://bucket/run``).
        problem: the problem being trained; its ``parameters`` are what is recorded.
        optimizer: the optimizer that trains it, of any kind; gradient accumulation, closures, schedulers, gradient
            scalers and parameter groups are fine.
        record: what to record: one or several of :class:`~.parts.Full`, :class:`~.parts.Layer`,
            :class:`~.parts.Sketch`, :class:`~.parts.Directions`, :class:`~.parts.Scalars`,
            :class:`~.parts.NoiseScale`, each as it is or within :class:`~.parts.Every` or
            :class:`~.parts.LogSpaced`; default ``Full()``. The layout of the store is that of
            :mod:`thermograd.trajectory.store`.
        every: record each ``every``-th step, where ``record`` does not say otherwise.
        params: record these parameters only: a name pattern as in :class:`~thermograd.Problem`, or several.
        velocity: whether to record velocities, where ``record`` is not given.
        resume: None or True: append to a run that exists, from where the present weights say that training stands;
            False: refuse when the run exists.
        overwrite: replace a run that exists.
        sgd: hyperparameters that describe the dynamics, when they are not those of the optimizer.
        batch_size: samples a step; default: as observed, else as the problem's DataLoader says.
        sampling: how samples are drawn; default: as the problem's DataLoader says if training is seen to use its
            batches, else as observed.
        flush_seconds: write what is pending at least this often (checked at each recorded step); default 10, or 30
            where the run lies elsewhere.
        start_step: steps that training had taken when it begins here; with a checkpoint's step, rows recorded after
            it are dropped and recorded anew.

    Attributes:
        step: steps counted so far.
        equilibrated: whether training at this learning rate has equilibrated, tested live once it is asked for.

    Raises:
        StoreError: the run exists and must not be touched, holds another kind of rows, is being written by another
            process, or the disk is full (what was committed is kept).
        InputError: the optimizer does not train the problem's weights, or ``record`` is not understood.

    >>> import tempfile, torch, thermograd as tg
    >>> X, y = torch.randn(20, 3), torch.randn(20, 1)
    >>> model = torch.nn.Linear(3, 1)
    >>> problem = tg.Problem(model, torch.nn.MSELoss(), (X, y))
    >>> optimizer, folder = torch.optim.SGD(model.parameters(), lr=0.1), tempfile.mkdtemp()
    >>> with tg.Recorder(folder, problem, optimizer):
    ...     for _ in range(5):
    ...         optimizer.zero_grad()
    ...         torch.nn.functional.mse_loss(model(X[:4]), y[:4]).backward()
    ...         _ = optimizer.step()
    >>> tg.open_run(folder)["trajectory/theta"].shape
    (5, 4)
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        problem: Problem,
        optimizer: torch.optim.Optimizer,
        *,
        record: Part | Sequence[Part] | None = None,
        every: int = 1,
        params: str | Sequence[str] | None = None,
        velocity: bool = True,
        resume: bool | None = None,
        overwrite: bool = False,
        sgd: SGD | None = None,
        batch_size: int | None = None,
        sampling: Sampling | None = None,
        flush_seconds: float | None = None,
        start_step: int | None = None,
    ):
        if start_step is not None and start_step < 0:
            raise InputError(f"start_step is {start_step}", expected="a whole number of steps >= 0")
        if flush_seconds is not None and not flush_seconds >= 0:
            raise InputError(f"flush_seconds is {flush_seconds}", expected="a number of seconds >= 0")
        self.path: Any = path if is_remote(path) else Path(path)
        self.problem, self.optimizer = problem, optimizer
        usual = _REMOTE_SECONDS if is_remote(path) else _SECONDS
        self.flush_seconds = usual if flush_seconds is None else flush_seconds
        self.step = start_step or 0
        wanted = Full(velocity) if record is None else record
        if params is None and single_layer(wanted) is not None:  # one layer in full is a run of that layer
            params, wanted = single_layer(wanted), Full()
        self._plan = make_plan(wanted, every)
        self._parameters = chosen(problem.parameters, params)
        self._groups = groups_of(self._parameters, optimizer)
        self._resume, self._overwrite = resume, overwrite
        self._start_step, self._expected = start_step, None
        self._sampling = SamplingFacts(problem, sgd, batch_size, sampling)
        self._listener = BackwardListener(self._heard_backward, self._discarded)
        self._axes = self._make_axes()
        self._meter = self._make_meter()
        self._interrupt = HeldInterrupt()
        self._diverged: int | None = None
        self._store: TrajectoryStore | None = None
        self._writer: Writer | None = None
        self._recording = self._begun = False
        self._rates: list[float] | None = None
        self._has_closure = self._told_of_parts = False

    # ------------------------------------------------------------------ what is recorded

    def _make_axes(self) -> dict[str, AxisRows]:
        """For each axis its trackers: one for all weights, and one for each layer."""
        axes = {}
        for name, schedule in self._plan.axes.items():
            parts: dict[str, list[Part]] = {}
            patterns: dict[str, str | None] = {}
            for item in self._plan.items:
                if item.schedule == schedule and not isinstance(item.part, NoiseScale):
                    parts.setdefault(item.label, []).append(item.part)
                    patterns[item.label] = item.pattern
            trackers = [
                Tracker(chosen(self._parameters, patterns[label]), several, label) for label, several in parts.items()
            ]
            axes[name] = AxisRows(name, schedule, trackers, len(self.optimizer.param_groups))
        return axes

    def _make_meter(self) -> NoiseMeter | None:
        item = next((item for item in self._plan.items if isinstance(item.part, NoiseScale)), None)
        if item is None:
            return None
        axis = self._axes[self._plan.axis(item.schedule)]
        axis.meters_noise, axis.adaptive = True, is_adaptive(self.optimizer)
        scheme = self._sampling.scheme or self.problem.sampling
        return NoiseMeter(
            list(self._parameters.values()),
            self.problem.model,
            dataset_size=self.problem.N if scheme in ("reshuffle", "shuffle-once") else None,
            batch_size=self._sampling.batch_size,
            microbatch_size=self.problem.batch_size,
        )

    # ------------------------------------------------------------------ opening and closing

    def __enter__(self) -> Recorder:
        if is_writer():
            self._store = self._open(to_numpy(self._weights()))
            self._writer = Writer(self._write)
        self._recording = True
        self._handles = [
            self.optimizer.register_step_pre_hook(self._before),
            self.optimizer.register_step_post_hook(self._after),
        ]
        self._listener.__enter__()
        self._sampling.watch()
        if self._meter is not None:
            self._meter.watch()
        self._listen_to_noise()
        self._flushed = time.monotonic()
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: Any) -> None:
        self._interrupt.hold()  # an impatient second Ctrl-C does not lose what is pending; a third one may
        try:
            self._listener.__exit__()
            for handle in self._handles:
                handle.remove()
            self._sampling.stop()
            if self._meter is not None:
                self._meter.close()
            self._finish(kind)
        finally:
            self._recording = False
            self._store = self._writer = None
            self._interrupt.release()

    def _finish(self, kind: type[BaseException] | None) -> None:
        store, writer = self._store, self._writer
        if store is None or writer is None:
            return
        try:
            writer.check()  # what may have failed since the last step
            if not store.failed:
                self._submit(writer, closing=True)
                writer.wait()
        except StoreError:
            if kind is None:
                raise
        finally:
            writer.close()
            store.close()
        self._tell_divergence()

    def _open(self, theta: np.ndarray) -> TrajectoryStore:
        facts = facts_of(self._parameters, self._groups, self.optimizer, self._axes)
        facts |= self._sampling.attrs(self.optimizer, None)
        store, existed = open_store(
            self.path, theta, self._plan.axes, self._axes, facts, resume=self._resume, overwrite=self._overwrite
        )
        if existed:
            self._sampling.adopt(store.attrs)
        self._overwrite = False  # done; entered again, it goes on
        return store

    # ------------------------------------------------------------------ the step hooks

    def _weights(self) -> Tensor:
        """The live weights, a copy [P] in the dtype that is stored."""
        return flat_weights(list(self._parameters.values()))

    def _heard_backward(self) -> None:
        self._sampling.heard_backward()
        if self._meter is not None:
            self._meter.end_backward()

    def _discarded(self) -> bool:
        """Whether ``zero_grad`` threw away what was backpropagated before, a diagnostic gradient say."""
        if any(p.grad is not None for p in self._parameters.values()):
            return False
        self._sampling.discard()
        if self._meter is not None:
            self._meter.discard()
        return True

    def _before(self, optimizer: torch.optim.Optimizer, args: Any, keywords: Any) -> tuple[Any, Any] | None:
        if not self._begun:
            self._begin()
        self._interrupt.hold()  # until the step is recorded
        self._watch_before()
        due = [axis for axis in self._axes.values() if axis.schedule.due(self.step + 1)]
        self._rates = [float(group["lr"]) for group in optimizer.param_groups] if due else None
        for axis in due:
            axis.before(self.step)
        heard = self._listen_to_closure(args, keywords)
        self._has_closure = heard is not None
        if due and heard is None:
            self._measure_gradient(due)
        return heard

    def _measure_gradient(self, due: Sequence[AxisRows]) -> None:
        """Norms of the gradient that the step uses, while it is as the step finds it."""
        for axis in due:
            if any(tracker.scalars for tracker in axis.trackers):
                axis.note_gradient(self.optimizer)
            if axis.meters_noise and self._meter is not None:
                found = self._meter.result()
                factor = gradient_factor(self.optimizer)
                axis.note_noise(found and {name: value * factor for name, value in found.items()})
                if found is None and not self._told_of_parts:
                    self._told_of_parts = True
                    warnings.warn(_FEW_PARTS, ThermogradWarning, stacklevel=2)

    def _listen_to_closure(self, args: Any, keywords: Any) -> tuple[Any, Any] | None:
        """An optimizer may evaluate its closure several times: the last evaluation is what counts."""
        closure = keywords.get("closure", args[1] if len(args) > 1 else None)
        if not callable(closure):
            return None

        def heard() -> Any:
            self._listener.take()
            if self._meter is not None:
                self._meter.discard()
            return closure()

        if "closure" in keywords:
            return args, {**keywords, "closure": heard}
        return (args[0], heard, *args[2:]), keywords

    def _after(self, optimizer: torch.optim.Optimizer, args: Any, keywords: Any) -> None:
        try:
            self._record(optimizer)
        finally:
            self._interrupt.release()
        if self._writer is not None:
            self._write_if_due(self._writer)

    def _record(self, optimizer: torch.optim.Optimizer) -> None:
        self.step += 1
        loss = self._listener.take()
        self._watch_after(loss)
        self._sampling.end_step()
        rates, self._rates = self._rates, None
        if rates is not None:
            due = [axis for axis in self._axes.values() if axis.schedule.due(self.step)]
            if self._has_closure:
                self._measure_gradient(due)
            each = {name: rates[group] for name, group in zip(self._parameters, self._groups)}
            for axis in due if self._store is not None else ():
                axis.after(self.step, self._segment, loss, optimizer, rates, each)
        self._listen_to_noise()

    def _listen_to_noise(self) -> None:
        """Have the noise of the coming step measured when it is due."""
        if self._meter is None:
            return
        due = any(axis.meters_noise and axis.schedule.due(self.step + 1) for axis in self._axes.values())
        self._meter.stop()
        if due:
            self._meter.listen(self.optimizer)

    def _write_if_due(self, writer: Writer) -> None:
        writer.check()
        self._tell_divergence()
        size = sum(axis.waiting_bytes for axis in self._axes.values())
        count = max(len(axis) for axis in self._axes.values())
        late = time.monotonic() - self._flushed >= self.flush_seconds
        if size >= _FLUSH_BYTES or late or count >= _FLUSH_ROWS:
            self._submit(writer)

    # ------------------------------------------------------------------ beginning and resuming

    def _begin(self) -> None:
        """Just before the first step: find where in the recorded trajectory training stands."""
        self._warn_of_another_mode()
        self._begun, self._segment = True, 0
        start_step, self._start_step = self._start_step, None
        if self._store is None:
            self.step = start_step or 0
            return
        store, weights = self._store, self._weights()
        if not any(store.axes.values()):
            store.set_initial(to_numpy(weights))
        self._set_origins(torch.from_numpy(store.theta_initial))
        row = {k: v for axis in self._axes.values() for k, v in axis.describe().items()}
        start = find_start(store, Present(to_numpy(weights), row), start_step, self._expected)
        diverged = store.attrs.get("diverged_at")
        kept = diverged if diverged and diverged <= start.step else None
        store.truncate(start.rows, end=None, diverged_at=kept)
        self.step, self._segment, self._expected = start.step, start.segment, None
        for axis in self._axes.values():
            axis.begin(store, start.step, start.segment)
        if start.gap:
            warnings.warn(start.gap, ThermogradWarning, stacklevel=2)

    def _set_origins(self, theta: Tensor) -> None:
        """Give each tracker its part of the weights before the first step."""
        parts = dict(zip(self._parameters, theta.split([p.numel() for p in self._parameters.values()])))
        for axis in self._axes.values():
            for tracker in axis.trackers:
                tracker.set_origin(torch.cat([parts[name] for name in tracker.names]))

    def _warn_of_another_mode(self) -> None:
        """Say so when training runs with batch statistics or dropout that the problem leaves out."""
        if self.problem.model is None:
            return
        try:
            refuse_coupling(self.problem.model)
        except ModelError as error:
            message = (
                f"training is not of the problem that was given: {error.what}. The path is recorded all the same, but "
                "landscape and noise will be measured with the model in eval mode, which training does not see. "
                "To study that dynamics, keep the model in eval mode while it trains (no model.train() in the loop)."
            )
            warnings.warn(message, ThermogradWarning, stacklevel=2)

    def state_dict(self) -> dict[str, Any]:
        """What to put into a checkpoint, so that recording resumes from it. Writes what is pending."""
        self.flush()
        return {"step": self.step, "weights": digest(to_numpy(self._weights()))}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint: rows recorded after it are dropped at the next step, and recorded anew.

        Restore the model's weights as well, before or after; they are compared at the next step.
        """
        if self._recording:
            self.flush()
        self._start_step = self.step = int(state["step"])
        self._expected = state.get("weights")
        self._begun = False

    # ------------------------------------------------------------------ writing

    def note_loss(self, loss: Any) -> None:
        """Say what the minibatch loss of the coming step is, in loops that do not call ``backward``."""
        self._listener.hear(torch.as_tensor(loss))

    def flush(self) -> None:
        """Write what is pending; on return it survives a kill.

        Raises:
            StoreError: writing failed; what was committed before is kept.
        """
        if not self._recording:
            raise StoreError("the recorder is not recording", remedy="use it as `with Recorder(...) as recorder:`")
        if self._writer is None:
            return
        self._submit(self._writer)
        self._writer.wait()
        self._tell_divergence()

    def _submit(self, writer: Writer, closing: bool = False) -> None:
        """Hand what was found so far to the writing thread."""
        if closing:
            self._sampling.conclude()
        handover = HeldInterrupt()
        handover.hold()  # until the rows that leave here are queued
        try:
            self._put(writer, closing)
        finally:
            handover.release()

    def _put(self, writer: Writer, closing: bool) -> None:
        rows = {name: axis.take() for name, axis in self._axes.items() if len(axis)}
        attrs: dict[str, Any] = {}
        if self._begun:
            attrs = self._sampling.attrs(self.optimizer, self._last_rate(rows))
            attrs["committed_step"] = self.step
            if closing:
                attrs["end"] = {"step": self.step, "weights": digest(to_numpy(self._weights()))}
        self._flushed = time.monotonic()
        if rows or attrs:
            writer.put((rows, attrs))

    @staticmethod
    def _last_rate(rows: Mapping[str, Mapping[str, Any]]) -> float | None:
        return float(rows["step"]["learning_rate"][-1]) if "step" in rows else None

    def _write(self, batch: tuple[dict[str, dict[str, Any]], dict[str, Any]]) -> None:
        """In the writing thread: one batch of rows, and what the attributes are to say after it."""
        store, (rows, attrs) = self._store, batch
        assert store is not None
        arrays = {axis: {name: to_numpy(value) for name, value in found.items()} for axis, found in rows.items()}
        attrs = dict(attrs)
        if "end" in attrs:
            attrs["end"]["rows"] = store.rows + len(arrays.get("step", {}).get("step", ()))
        if store.attrs.get("diverged_at") is None:
            bad = [step for axis, found in arrays.items() if (step := first_non_finite(axis, found)) is not None]
            if bad:
                attrs["diverged_at"] = self._diverged = min(bad)
        if arrays:
            store.append(arrays, **attrs)
        else:
            store.update_attrs(**attrs)

    def _tell_divergence(self) -> None:
        diverged, self._diverged = self._diverged, None
        if diverged is not None:
            message = f"the weights or the loss are not finite from step {diverged} on; recording goes on"
            warnings.warn(message, ThermogradWarning, stacklevel=3)
