r"""The Hessian and the Gauss-Newton matrix of a problem, by their products with vectors.

Both are computed chunk by chunk over the data, in one of two ways. The *linearised* way (:mod:`.engine`) traces the
gradient, evaluates it once, and pushes a block of vectors through its derivative, layer by layer: the primal is
computed once and kept as memory allows. The *reverse* way differentiates the gradient once more by backward passes,
one (Hessian) or three (Gauss-Newton) a vector, which every torch layer supports; it serves small problems, where
tracing costs more than it saves, functions of the weights, and models that cannot be traced or that do not give the
same either way.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any, Literal, Self

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError, NonFiniteError, NotAvailableError
from ..problem import Problem
from .engine import Engine, free_memory, out_of_memory, worth_tracing
from .linearised import NotLinearisableError
from .operators import Operator, all_finite
from .precision import Precision, lowered, matrix_precision

__all__ = ["Curvature", "GaussNewton", "Hessian", "Method", "gauss_newton", "hessian", "pull"]

_Kept = tuple[Tensor, ...]
Method = Literal["auto", "linearised", "reverse"]


class Curvature(Operator):
    """A mean over samples of per-sample curvatures, plus weight decay on the diagonal.

    Args:
        problem: the problem.
        theta: weights ``[P]``; default: where the model stands now.
        index: the samples to average over; default all N.
        weight_decay: added on the diagonal.
        method: "auto", "linearised" or "reverse".
        precision: None for the problem's own; see :func:`hessian`.
        compiled: whether the tangent part is compiled.
    """

    def __init__(
        self,
        problem: Problem,
        theta: Any = None,
        index: Any = None,
        weight_decay: float = 0.0,
        method: Method = "auto",
        precision: Precision | None = None,
        compiled: bool = False,
    ):
        if not (np.isfinite(weight_decay) and weight_decay >= 0):
            raise InputError(f"weight_decay is {weight_decay}", expected="a finite number >= 0")
        if method not in ("auto", "linearised", "reverse"):
            raise InputError(f"method is {method!r}", expected="'auto', 'linearised' or 'reverse'")
        super().__init__(problem.P, problem.dtype, problem.device)
        self.problem, self.weight_decay = problem, float(weight_decay)
        self.theta = problem.as_theta(theta).clone()  # [P]
        self.precision, self.compiled = precision, compiled
        self._work = lowered(problem, precision)
        self._point = self.theta.to(self._work.dtype)
        self._index = torch.cat(problem._blocks(index))
        self._count = len(self._index)
        self._split(min(problem.chunk_size, self._affordable()))
        self._graph: _Kept | None = None
        self._method: str = "linearised" if compiled and method == "auto" else method
        self._forced = method != "auto"
        self._engine: Engine | None = None
        self._error: float | None = None

    def _affordable(self) -> int:
        """Samples whose activations take a quarter of the free memory."""
        saved = max(1, getattr(self.problem, "_saved_bytes", 2**20))
        return max(1, free_memory(self.device) // 4 // saved)

    def _split(self, chunk: int) -> None:
        self._chunk_size = chunk
        self._blocks = list(self._index.split(chunk))

    def subsample(self, fraction: float, seed: int = 0) -> Self:
        """The same curvature over a random part of the samples: a cheaper operator that resembles this one.

        Args:
            fraction: of the samples, above 0 and at most 1.
            seed: of the choice.

        Raises:
            InputError: a fraction out of range.
        """
        if not 0 < fraction <= 1:
            raise InputError(f"fraction is {fraction}", expected="a number above 0 and at most 1")
        count = max(1, round(fraction * self._count))
        chosen = torch.randperm(self._count, generator=torch.Generator().manual_seed(seed))[:count].sort()[0]
        return self._on(self._index[chosen])

    def _on(self, index: Tensor, **options: Any) -> Self:
        """The same operator over other samples, or computed otherwise."""
        asked: Method = self._method if self._forced else "auto"  # type: ignore[assignment]
        options = {"method": asked, "precision": self.precision, "compiled": self.compiled, **options}
        return type(self)(self.problem, self.theta, index, self.weight_decay, **options)

    @property
    def measured_error(self) -> float:
        """Relative error of a product as computed here against the plain reverse way in the problem's own precision.

        Measured once, along a random vector over up to 64 samples: what lower precision, compilation and fast
        convolutions cost in accuracy.
        """
        if self._error is None:
            few = self._index[:: max(1, self._count // 64)][:64]
            vector = torch.randn(self.problem.P, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
            mine = (self._on(few) @ vector).double()
            plain = (self._on(few, method="reverse", precision=None, compiled=False) @ vector).double()
            self._error = float((mine - plain).norm() / plain.norm().clamp_min(torch.finfo(torch.float64).tiny))
        return self._error

    @property
    def method(self) -> str:
        """How products are computed, "linearised" or "reverse"; decided at the first product."""
        return self._method

    def _product(self, block: Tensor) -> Tensor:
        with matrix_precision(self.precision, self.device):
            total = self._sum(block)  # [P, k]
        if self.weight_decay:
            total += self.weight_decay * self._count * block
        if not all_finite(total):
            self._name_offender()
        return total.div_(self._count)

    def _sum(self, block: Tensor) -> Tensor:
        """Sum over samples of their curvature times the block."""
        engine = self._linearised(block.shape[1])
        if engine is not None:
            try:
                return engine(block)
            except NotLinearisableError as error:
                if self._forced:
                    raise NotAvailableError(f"the model cannot be linearised: {error}") from error
                self._method, self._engine = "reverse", None
        while True:
            try:
                return self._reverse_sum(block)
            except (RuntimeError, MemoryError) as error:
                if str(error).startswith("derivative for") or "the derivative for" in str(error):
                    raise NotAvailableError(
                        f"a layer of the model cannot be differentiated twice: {error}",
                        expected="layers made of operations whose second derivative torch knows",
                        remedy="replace it, such as nn.EmbeddingBag by nn.Embedding and a mean",
                    ) from error
                if not out_of_memory(error) or self._chunk_size == 1:
                    raise
            self._graph = None
            self._split(self._chunk_size // 2)

    def _reverse_sum(self, block: Tensor) -> Tensor:
        low = block.to(self._work.dtype)
        total = torch.zeros_like(block)  # [P, k], in the problem's own precision
        for index in self._blocks:
            total += self._chunk(index, low)
        return total

    def _linearised(self, columns: int) -> Engine | None:
        if self._method == "auto":
            self._method = "linearised" if worth_tracing(self.problem, self._count, columns) else "reverse"
        if self._method == "linearised" and self._engine is None:
            engine = Engine(
                self._work,
                self._point,
                self._index,
                self._function(),
                self._refuse,
                self._data,
                self.dtype,
                self.compiled,
            )
            # where factors are rounded the two ways differ by that; else by the rounding of sums
            within = torch.finfo(self._work.dtype).eps ** (0.25 if self.precision == "bfloat16" else 0.5)
            if engine.agrees(self._reverse_few, within):
                self._engine = engine
            elif self._forced:
                raise NotAvailableError(
                    "the linearised and the reverse way do not give the same product for this model",
                    expected="a model without stopped gradients",
                    remedy="use method='reverse'",
                )
            else:
                self._method = "reverse"
        return self._engine

    def _data(self, index: Tensor) -> tuple[Any, Any]:
        """What the function of the curvature takes besides weights, for the samples of a chunk."""
        first, last = int(index[0]), int(index[-1])
        whole = last - first + 1 == len(index) and bool((index.diff() == 1).all())
        # successive samples are not copied
        where = slice(first, last + 1) if whole else index
        return self._work._samples.take(where, self._work.device, self._work.dtype)

    def _reverse_few(self, index: Tensor, block: Tensor) -> Tensor:
        return self._apply(self._trace(index), block)

    @abstractmethod
    def _function(self) -> Callable[..., tuple[Tensor, Tensor]]:
        """Function of (theta, theta, inputs, targets) whose derivative by the first is the sum of curvatures."""

    def _chunk(self, index: Tensor, block: Tensor) -> Tensor:
        """Sum over the samples of a chunk of their curvature times the block."""
        if len(self._blocks) > 1:
            return self._apply(self._trace(index), block)
        if self._graph is not None:
            try:
                return self._apply(self._graph, block)
            except RuntimeError as error:
                # a frozen part of the model was changed in place since the graph was made: make it anew
                if "modified by an inplace operation" not in str(error):
                    raise
        self._graph = self._trace(index)
        return self._apply(self._graph, block)

    def _refuse(self, losses: Tensor, index: Tensor) -> None:
        bad = (~torch.isfinite(losses.detach())).nonzero().flatten()
        if len(bad):
            sample = int(index[bad[0]])
            layer = _overflowing_layer(self._work, self._point, sample)
            raise NonFiniteError(
                f"the loss of sample {sample} is {float(losses.detach()[bad[0]])}"
                + (f"; layer {layer!r} is the first whose output is not finite" if layer else ""),
                expected="a finite loss for every sample",
                remedy="check the weights (they may have diverged) and that sample",
            )

    def _name_offender(self) -> None:
        """Find the first sample whose curvature is not finite, and say so."""
        probe = torch.randn(self.problem.P, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        probe = probe.to(self.device, self._work.dtype)
        for index in self._blocks:
            if bool(torch.isfinite(self._apply(self._trace(index), probe)).all()):
                continue
            for one in index.split(1):
                if not bool(torch.isfinite(self._apply(self._trace(one), probe)).all()):
                    raise NonFiniteError(
                        f"the curvature of sample {int(one)} is not finite although its loss is",
                        expected="a loss that can be differentiated twice at every sample",
                        remedy="look for a square root, a norm or a logarithm at zero in the model or the loss",
                    )

    @abstractmethod
    def _trace(self, index: Tensor) -> _Kept:
        """Whatever does not depend on the vector."""

    @abstractmethod
    def _apply(self, graph: _Kept, block: Tensor) -> Tensor:
        """What is done for each vector."""


def _overflowing_layer(problem: Problem, theta: Tensor, sample: int) -> str | None:
    """Name of the first layer whose output for a sample is not finite, if it is a layer's doing."""
    model = getattr(problem._function, "_copy", None)
    found: list[str] = []

    def watch(name: str) -> Callable[..., None]:
        def hook(module: Any, inputs: Any, output: Any) -> None:
            if not found and isinstance(output, Tensor) and not bool(torch.isfinite(output).all()):
                found.append(name)

        return hook

    layers = [] if model is None else [(name, m) for name, m in model.named_modules() if not list(m.children())]
    handles = [module.register_forward_hook(watch(name)) for name, module in layers]
    try:
        problem.sample_losses(theta, [sample])
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else None


def pull(outputs: Tensor, inputs: Tensor, cotangent: Tensor) -> Tensor:
    """Transposed Jacobian of ``outputs`` times ``cotangent``, zero where there is no dependence."""
    if not outputs.requires_grad:
        return torch.zeros_like(inputs)
    (pulled,) = torch.autograd.grad(outputs, inputs, cotangent, retain_graph=True, materialize_grads=True)
    return pulled


class Hessian(Curvature):
    r"""Hessian of the mean loss, :math:`H = \nabla^2 L + \lambda I`; see :func:`hessian`."""

    def _function(self) -> Callable[..., tuple[Tensor, Tensor]]:
        problem = self._work

        def function(theta: Tensor, _: Tensor, inputs: Any, targets: Any) -> tuple[Tensor, Tensor]:
            def total(t: Tensor) -> tuple[Tensor, Tensor]:
                losses = problem._function.losses(problem.unflatten(t), inputs, targets)
                return losses.sum(), losses

            return torch.func.grad(total, has_aux=True)(theta)

        return function

    def _trace(self, index: Tensor) -> _Kept:
        leaf = self._point.clone().requires_grad_()
        losses = self._work.differentiable_sample_losses(leaf, index)  # [b]
        self._refuse(losses, index)
        if not losses.requires_grad:
            return leaf, torch.zeros_like(self._point)
        (gradient,) = torch.autograd.grad(losses.sum(), leaf, create_graph=True, materialize_grads=True)  # [P]
        return leaf, gradient

    def _apply(self, graph: _Kept, block: Tensor) -> Tensor:
        leaf, gradient = graph
        return torch.stack([pull(gradient, leaf, v) for v in block.T], dim=1)  # [P, k]


class GaussNewton(Curvature):
    r"""Generalised Gauss-Newton matrix; see :func:`gauss_newton`."""

    def _function(self) -> Callable[..., tuple[Tensor, Tensor]]:
        problem = self._work

        def function(theta: Tensor, fixed: Tensor, inputs: Any, targets: Any) -> tuple[Tensor, Tensor]:
            def network(t: Tensor) -> Tensor:
                return problem._function.outputs(problem.unflatten(t), inputs)

            def total(outputs: Tensor) -> tuple[Tensor, Tensor]:
                losses = problem._function.output_losses(outputs, targets)
                return losses.sum(), losses

            # J(fixed)^T slope(f(theta)): its derivative by theta alone leaves the network's own curvature out
            pull = torch.func.vjp(network, fixed)[1]
            slope, losses = torch.func.grad(total, has_aux=True)(network(theta))
            return pull(slope)[0], losses

        return function

    def _trace(self, index: Tensor) -> _Kept:
        leaf = self._point.clone().requires_grad_()
        outputs, targets = self._work.differentiable_outputs(leaf, index)  # [b, ...]
        detached = outputs.detach().requires_grad_()
        losses = self._work.output_sample_losses(detached, targets)  # [b]
        self._refuse(losses, index)
        (slope,) = torch.autograd.grad(losses.sum(), detached, create_graph=True, materialize_grads=True)
        cotangent = torch.zeros_like(outputs).requires_grad_()
        if outputs.requires_grad:
            (pulled,) = torch.autograd.grad(outputs, leaf, cotangent, create_graph=True, materialize_grads=True)
        else:
            pulled = torch.zeros_like(self._point)
        return leaf, outputs, detached, slope, cotangent, pulled

    def _apply(self, graph: _Kept, block: Tensor) -> Tensor:
        leaf, outputs, detached, slope, cotangent, pulled = graph
        columns = []
        for v in block.T:
            # J^T u is linear in u, so pulling v back through it gives J v
            pushed = pull(pulled, cotangent, v)
            columns.append(pull(outputs, leaf, pull(slope, detached, pushed)))
        return torch.stack(columns, dim=1)  # [P, k]


def hessian(
    problem: Problem,
    theta: Any = None,
    index: Any = None,
    weight_decay: float = 0.0,
    method: Method = "auto",
    precision: Precision | None = None,
    compiled: bool = False,
) -> Hessian:
    r"""Hessian of the mean loss at ``theta``, matrix-free.

    .. math:: H = \frac1N \sum_i \nabla^2 \ell_i(\theta) + \lambda I

    by differentiating the gradient along a vector (Pearlmutter 1994), exact to rounding.

    Args:
        problem: the problem, with P weights and N samples.
        theta: weights ``[P]``; default: where the model stands now.
        index: the samples to average over; default all N.
        weight_decay: :math:`\lambda`, added on the diagonal.
        method: "linearised" (traced once, blocks of vectors), "reverse" (backward passes alone), or "auto": linearised
            where that is faster (convolutions, wide blocks, large problems) and the two agree on a few samples.
        precision: lower precision of the work for each sample: "float32", or "bfloat16" (matrix products and
            convolutions round their factors to bfloat16, or to TF32 on a GPU, and add up in float32). Sums over
            chunks of samples stay in the problem's own. ``.measured_error`` states what it costs.
        compiled: compile the tangent part by ``torch.compile``, which pays for hundreds of products.

    Returns:
        An :class:`~thermograd.landscape.operators.Operator` of shape (P, P).

    Raises:
        NonFiniteError: a sample's loss or curvature is not finite; the message names the first such sample.

    >>> problem = Problem.from_function(lambda w, a: (a * w).prod(), torch.tensor([1.0, 2.0]), torch.ones(3, 2))
    >>> hessian(problem).dense()
    tensor([[0., 1.],
            [1., 0.]], dtype=torch.float64)
    """
    return Hessian(problem, theta, index, weight_decay, method, precision, compiled)


def gauss_newton(
    problem: Problem,
    theta: Any = None,
    index: Any = None,
    weight_decay: float = 0.0,
    method: Method = "auto",
    precision: Precision | None = None,
    compiled: bool = False,
) -> GaussNewton:
    r"""Generalised Gauss-Newton matrix at ``theta``, matrix-free.

    .. math::
        G = \frac1N \sum_i J_i^\top \, [\nabla_f^2 \ell_i] \, J_i + \lambda I, \quad J_i = \partial f_i/\partial\theta

    (Schraudolph 2002). It is what remains of the Hessian when the curvature of the network itself is dropped
    (Mori et al. 2022, Eqs. 10-11). For cross-entropy, binary cross-entropy and squared errors, likelihoods of an
    exponential family in the outputs, it equals the exact (type 2) Fisher matrix.

    Args:
        problem: a problem built from a model (not from a plain function, which has no outputs).
        theta: weights ``[P]``; default: where the model stands now.
        index: the samples to average over; default all N.
        weight_decay: :math:`\lambda`, added on the diagonal.
        method: "linearised" (traced once, blocks of vectors), "reverse" (backward passes alone), or "auto": linearised
            where that is faster (convolutions, wide blocks, large problems) and the two agree on a few samples.
        precision: lower precision of the work for each sample, see :func:`hessian`.
        compiled: compile the tangent part by ``torch.compile``.

    Raises:
        NotAvailableError: the problem has no outputs.
        NonFiniteError: a sample's loss or curvature is not finite.

    >>> X, y = torch.tensor([[1.0], [2.0]]), torch.zeros(2, 1)
    >>> problem = Problem(torch.nn.Linear(1, 1, bias=False), torch.nn.MSELoss(), (X, y))
    >>> gauss_newton(problem).dense()
    tensor([[5.]], dtype=torch.float64)
    """
    return GaussNewton(problem, theta, index, weight_decay, method, precision, compiled)
