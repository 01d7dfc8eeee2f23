"""The one way into a network: a model, a per-sample loss and data as pure functions of one flat weight vector."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from .errors import DataError, InputError, ModelError, NonFiniteError
from .functional import Function, ModelFunction, PlainFunction, checked_dtype
from .hyperparameters import Sampling
from .samples import Samples, as_index

__all__ = ["Problem"]

_CHUNK_BYTES = 2**28  # what the saved activations of one chunk, or one block of per-sample gradients, may take


class Problem:
    r"""A network, a per-sample loss and data, as pure functions of a flat weight vector.

    .. math::
        L(\theta) = \frac1N \sum_{i=1}^N \ell_i(\theta), \qquad \theta \in \mathbb{R}^P

    The model is never changed: it is copied, in ``dtype``, and evaluated functionally. Wherever a ``theta`` is
    taken, None means the weights that the user's model has at that moment.

    Args:
        model: any module whose output for a sample does not depend on the other samples of the batch and is not
            random: batch norm in eval mode, dropout off (``model.eval()``).
        loss: a torch loss module with ``reduction="mean"``, or a callable on ``(output, target)`` for one sample
            or for a batch.
        data: ``(X, y)``, a ``torch.utils.data.Dataset`` or a ``DataLoader`` (whose order and batches do not matter;
            its batch size and sampler are noted as :attr:`batch_size` and :attr:`sampling`).
        params: which parameters make up theta: a name pattern (``"layer1.*"``, ``"*.weight"``, or a prefix such as
            ``"layer1"``) or several; default: all that require a gradient.
        device: where to compute; default: where the model is.
        dtype: precision of the computation, default float64.
        chunk_size: samples evaluated at once; default: as memory allows.

    Attributes:
        P: number of weights in theta.
        N: number of samples.

    Raises:
        ModelError: coupled samples (batch norm in train mode), dropout on, random output, no weights.
        LossError: a loss that is not a mean over samples; OutputMismatchError: an output that does not fit it.
        DataError: empty, non-finite, out-of-range or non-repeatable data.

    >>> import torch, thermograd as tg
    >>> X, y = torch.randn(20, 3), torch.randn(20, 1)
    >>> problem = tg.Problem(torch.nn.Linear(3, 1), torch.nn.MSELoss(), (X, y))
    >>> problem.P, problem.N, problem.sample_gradients(index=[0, 1]).shape
    (4, 20, torch.Size([2, 4]))
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Any,
        data: Any,
        *,
        params: str | Sequence[str] | None = None,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        chunk_size: int | None = None,
    ):
        if not isinstance(model, nn.Module):
            raise ModelError(
                f"model is a {type(model).__name__}",
                expected="a torch.nn.Module",
                remedy="for a plain function of the weights use Problem.from_function",
            )
        samples = Samples.from_any(data)
        dtype = checked_dtype(dtype)
        first = next(model.parameters(), None)
        where = torch.device(device) if device is not None else first.device if first is not None else None
        function = ModelFunction(model, params, where or torch.device("cpu"), dtype)
        self._set_up(function, samples, chunk_size)
        function.bind_loss(loss, self)
        self._finish()

    @classmethod
    def from_function(
        cls,
        sample_loss: Callable[..., Tensor],
        theta0: Any,
        data: Any,
        *,
        dtype: torch.dtype | None = None,
        chunk_size: int | None = None,
    ) -> Problem:
        """A problem from any differentiable function of the weights and one sample.

        Args:
            sample_loss: ``sample_loss(theta, *sample)`` -> scalar, with ``theta`` of the shape of ``theta0``.
            theta0: the weights; when it is a tensor that an optimizer updates in place, it stays "where the model
                stands now".
            data: a tensor [N, ...] or a tuple of such tensors; ``sample_loss`` gets row i of each.
            dtype: precision of the computation, default float64.
            chunk_size: samples evaluated at once.

        >>> centres = torch.tensor([[0.0, 0.0], [2.0, 0.0]])
        >>> problem = Problem.from_function(lambda w, a: 0.5 * (w - a).square().sum(), torch.zeros(2), centres)
        >>> problem.gradient()
        tensor([-1.,  0.], dtype=torch.float64)
        """
        problem = cls.__new__(cls)
        function = PlainFunction(sample_loss, theta0, checked_dtype(dtype))
        problem._set_up(function, Samples.from_tree(data), chunk_size)
        function.probe(problem)
        problem._finish()
        return problem

    def _set_up(self, function: Function, samples: Samples, chunk_size: int | None) -> None:
        if chunk_size is not None and chunk_size < 1:
            raise InputError(f"chunk_size is {chunk_size}", expected="a whole number >= 1")
        self._function, self._samples = function, samples
        self.N = len(samples)
        self.names, self.shapes = list(function.shapes), dict(function.shapes)
        self._sizes = [math.prod(shape) for shape in self.shapes.values()]
        self.P = sum(self._sizes)
        self.dtype, self.device = function.dtype, function.device
        self._chunk_size = chunk_size
        self._vmap_works = True
        if self.P == 0:
            raise ModelError("the model has no trainable weights", expected="at least one weight in theta")

    def _finish(self) -> None:
        """Checks that need the whole function: finite loss, and whether per-sample gradients can be mapped."""
        probe = self._probe_index()
        with torch.no_grad():
            losses = self.sample_losses(index=probe)
        bad = (~torch.isfinite(losses)).nonzero().flatten()
        if len(bad):
            raise NonFiniteError(
                f"the loss of sample {int(probe[bad[0]])} at the current weights is {float(losses[bad[0]])}",
                expected="a finite loss",
                remedy="check the weights, the data and the loss's domain",
            )
        self._saved_bytes = self._measure_saved_bytes(probe)
        self._vmap_works = self._try_vmap(probe)

    # ------------------------------------------------------------------ what the problem is made of

    @property
    def model(self) -> nn.Module | None:
        """The user's own model; None for :meth:`from_function`."""
        return self._function.model

    @property
    def criterion(self) -> Any:
        """The user's own loss; None for :meth:`from_function`."""
        return self._function.criterion

    @property
    def parameters(self) -> dict[str, Tensor]:
        """The live tensors that make up theta, by name: those that an optimizer updates."""
        return self._function.live()

    @property
    def theta(self) -> Tensor:
        """The weights where the user's model stands now, [P]."""
        return self.flatten(self.parameters)

    @property
    def inputs(self) -> Any:
        """The inputs of all samples as given, [N, ...]."""
        return self._samples.inputs

    @property
    def targets(self) -> Any:
        """The targets of all samples as given, [N, ...]; None for :meth:`from_function`."""
        return self._samples.targets

    @property
    def batch_size(self) -> int | None:
        """Batch size of the DataLoader that the problem was built from, else None."""
        return self._samples.batch_size

    @property
    def sampling(self) -> Sampling | None:
        """Sampling scheme of the DataLoader that the problem was built from, else None."""
        return self._samples.sampling

    @property
    def drop_last(self) -> bool:
        """Whether the DataLoader that the problem was built from drops a short last batch."""
        return self._samples.drop_last

    def flatten(self, named: Mapping[str, Tensor]) -> Tensor:
        """Named tensors to one flat vector [P].

        Raises:
            InputError: a name is missing or a shape differs.
        """
        for name, shape in self.shapes.items():
            if name not in named or tuple(named[name].shape) != tuple(shape):
                found = tuple(named[name].shape) if name in named else "nothing"
                raise InputError(f"parameter {name!r} is {found}", expected=f"a tensor of shape {tuple(shape)}")
        parts = [named[name].detach().to(self.device, self.dtype).reshape(-1) for name in self.names]
        return torch.cat(parts)

    def unflatten(self, theta: Tensor) -> dict[str, Tensor]:
        """A flat vector [P] to named tensors (views)."""
        parts = theta.split(self._sizes)
        return {name: part.view(shape) for (name, shape), part in zip(self.shapes.items(), parts)}

    def as_theta(self, theta: Any = None) -> Tensor:
        """A validated weight vector [P] in the problem's dtype and device; None gives the current weights.

        Raises:
            InputError: wrong shape; NonFiniteError: NaN or Inf.
        """
        if theta is None:
            theta = self.theta
        if isinstance(theta, Mapping):
            return self.flatten(theta)
        tensor = torch.as_tensor(theta).detach().to(self.device, self.dtype)
        if tensor.shape != (self.P,):
            raise InputError(
                f"theta has shape {tuple(tensor.shape)}",
                expected=f"({self.P},): one number for each of the problem's weights",
            )
        if not bool(torch.isfinite(tensor).all()):
            where = int((~torch.isfinite(tensor)).nonzero()[0])
            raise NonFiniteError(f"theta[{where}] ({self._name_of(where)}) is {float(tensor[where])}")
        return tensor

    def set_weights(self, theta: Any) -> None:
        """Write a weight vector [P] into the user's own model."""
        values = self.unflatten(self.as_theta(theta))
        with torch.no_grad():
            for name, live in self.parameters.items():
                live.copy_(values[name].to(live.device, live.dtype))

    def _name_of(self, position: int) -> str:
        for name, size in zip(self.names, self._sizes):
            if position < size:
                return name
            position -= size
        return "?"

    # ------------------------------------------------------------------ pure functions of theta

    def sample_losses(self, theta: Any = None, index: Any = None) -> Tensor:
        """Losses of single samples, l_i(theta): [b] for the samples in ``index`` (default all N)."""
        theta = self.as_theta(theta)
        with torch.no_grad():
            parts = [self.differentiable_sample_losses(theta, block) for block in self._blocks(index)]
        return torch.cat(parts)

    def loss(self, theta: Any = None, index: Any = None) -> Tensor:
        """Mean loss over the samples in ``index`` (default all N), a 0-dim tensor.

        Raises:
            NonFiniteError: the loss is NaN or Inf; the message names the first offending sample.
        """
        losses = self.sample_losses(theta, index)
        self._refuse_non_finite(losses, index)
        return losses.mean()

    def minibatch_loss(self, theta: Any, index: Any) -> Tensor:
        """Mean loss over a minibatch, L^mu(theta)."""
        return self.loss(theta, index)

    def gradient(self, theta: Any = None, index: Any = None) -> Tensor:
        """Gradient of the mean loss over the samples in ``index`` (default all N), [P].

        Raises:
            NonFiniteError: the gradient has a NaN or an Inf.
        """
        leaf = self.as_theta(theta).clone().requires_grad_()
        total = torch.zeros(self.P, dtype=self.dtype, device=self.device)
        count = 0
        for block in self._blocks(index):
            losses = self.differentiable_sample_losses(leaf, block)
            (part,) = torch.autograd.grad(losses.sum(), leaf)
            total += part
            count += len(losses)
        if not bool(torch.isfinite(total).all()):
            self.loss(theta, index)  # names the sample where the loss itself is not finite
            where = int((~torch.isfinite(total)).nonzero()[0])
            raise NonFiniteError(f"the gradient with respect to {self._name_of(where)} is {float(total[where])}")
        return total / count

    def sample_gradients(self, theta: Any = None, index: Any = None) -> Tensor:
        """Gradients of single samples' losses, [b, P], for the samples in ``index`` (default all N).

        The whole block is held in memory (b * P numbers): for large problems ask for blocks of
        :attr:`gradient_chunk` samples, see :meth:`chunks`.
        """
        theta = self.as_theta(theta)
        blocks = [
            block[start : start + self.gradient_chunk]
            for block in self._blocks(index)
            for start in range(0, len(block), self.gradient_chunk)
        ]
        out = torch.empty(sum(map(len, blocks)), self.P, dtype=self.dtype, device=self.device)  # [b, P]
        start = 0
        for block in blocks:
            out[start : start + len(block)] = self._gradient_block(theta, block)
            start += len(block)
        if not bool(torch.isfinite(out.sum())):
            bad = (~torch.isfinite(out)).any(1).nonzero().flatten()
            if len(bad):
                raise NonFiniteError(f"the gradient of sample {int(torch.cat(blocks)[bad[0]])} is not finite")
        return out

    def _gradient_block(self, theta: Tensor, index: Tensor) -> Tensor:
        inputs, targets = self._samples.take(index, self.device, self.dtype)
        if self._vmap_works:
            with self._function.context():
                single = torch.func.grad(self._flat_single())
                return torch.func.vmap(single, in_dims=(None, 0, 0 if targets is not None else None))(
                    theta, inputs, targets
                ).detach()
        rows = []
        leaf = theta.clone().requires_grad_()
        for i in range(len(index)):
            losses = self.differentiable_sample_losses(leaf, index[i : i + 1])
            rows.append(torch.autograd.grad(losses.sum(), leaf)[0])
        return torch.stack(rows)

    def _flat_single(self) -> Callable[[Tensor, Any, Any], Tensor]:
        def single(theta: Tensor, inputs: Any, targets: Any) -> Tensor:
            one = tree_map(lambda leaf: leaf[None], (inputs, targets) if targets is not None else (inputs,))
            return self._function.losses(self.unflatten(theta), *one).reshape(())

        return single

    # ------------------------------------------------------------------ what operators differentiate

    def differentiable_sample_losses(self, theta: Tensor, index: Any) -> Tensor:
        """Sample losses [b] as a differentiable function of ``theta`` [P], evaluated as one batch.

        The graph may be differentiated twice (attention uses its plain formula here).
        """
        inputs, targets = self._samples.take(as_index(index, self.N), self.device, self.dtype)
        with self._function.context():
            return self._function.losses(self.unflatten(theta), inputs, targets)

    def differentiable_outputs(self, theta: Tensor, index: Any) -> tuple[Tensor, Any]:
        """Network outputs [b, ...] with a graph from ``theta``, and the targets.

        Raises:
            NotAvailableError: the problem is a plain function of the weights and has no outputs.
        """
        inputs, targets = self._samples.take(as_index(index, self.N), self.device, self.dtype)
        with self._function.context():
            return self._function.outputs(self.unflatten(theta), inputs), targets

    def output_sample_losses(self, outputs: Tensor, targets: Any) -> Tensor:
        """Sample losses [b] as a function of the outputs [b, ...]."""
        with self._function.context():
            return self._function.output_losses(outputs, targets)

    # ------------------------------------------------------------------ chunks

    def chunks(self, size: int | None = None) -> Iterator[Tensor]:
        """Index blocks that cover all samples in order, each as large as memory comfortably allows."""
        return iter(torch.arange(self.N).split(size or self.chunk_size))

    @property
    def chunk_size(self) -> int:
        """Samples evaluated at once, by default such that the saved activations of a chunk stay below 256 MiB."""
        if self._chunk_size is not None:
            return self._chunk_size
        return max(1, min(self.N, _CHUNK_BYTES // max(1, getattr(self, "_saved_bytes", _CHUNK_BYTES // 64))))

    @property
    def gradient_chunk(self) -> int:
        """How many per-sample gradients are computed at once (at most 256 MiB of them)."""
        per_gradient = self.P * torch.finfo(self.dtype).bits // 8
        return max(1, min(self.chunk_size, _CHUNK_BYTES // per_gradient))

    def _blocks(self, index: Any) -> list[Tensor]:
        chosen = as_index(index, self.N)
        if isinstance(chosen, slice):
            chosen = torch.arange(self.N)[chosen]
            if len(chosen) == 0:
                raise DataError(f"the sample index {index} selects no sample")
        return list(chosen.split(self.chunk_size))

    def _probe_index(self) -> Tensor:
        """A few samples to check on: the ends of the data, and the smallest and largest label."""
        chosen = {0, self.N // 2, self.N - 1}
        if isinstance(self.targets, Tensor) and not self.targets.is_floating_point() and self.targets.ndim == 1:
            chosen |= {int(self.targets.argmin()), int(self.targets.argmax())}
        return torch.tensor(sorted(chosen))

    def _measure_saved_bytes(self, probe: Tensor) -> int:
        """Bytes of activations that autograd keeps for one sample."""
        saved = 0

        def pack(tensor: Tensor) -> Tensor:
            nonlocal saved
            if tensor.ndim and tensor.shape[0] == len(probe):
                saved += tensor.numel() * tensor.element_size()
            return tensor

        leaf = self.theta.requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            self.differentiable_sample_losses(leaf, probe)
        return max(1, 3 * saved // len(probe))  # a second derivative keeps about three times as much

    def _try_vmap(self, probe: Tensor) -> bool:
        """Whether per-sample gradients by vmap work for this model, and agree with plain autograd."""
        probe = probe[:2]
        try:
            mapped = self._gradient_block(self.theta, probe)
        except Exception:  # models may use anything that vmap does not know
            return False
        leaf = self.theta.requires_grad_()
        (plain,) = torch.autograd.grad(self.differentiable_sample_losses(leaf, probe).sum(), leaf)
        return bool(torch.allclose(mapped.sum(0), plain, rtol=1e-4, atol=1e-6 * float(plain.abs().max() + 1e-30)))

    def _refuse_non_finite(self, losses: Tensor, index: Any) -> None:
        if bool(torch.isfinite(losses).all()):
            return
        where = int((~torch.isfinite(losses)).nonzero()[0])
        sample = int(torch.cat(self._blocks(index))[where])
        raise NonFiniteError(
            f"the loss of sample {sample} is {float(losses[where])}",
            expected="a finite loss",
            remedy="the weights may have diverged; check them and the data",
        )

    def __repr__(self) -> str:
        return f"Problem(P={self.P}, N={self.N}, {self._function.describe()}, dtype={self.dtype})"
