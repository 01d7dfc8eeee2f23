r"""Curvature products by a traced gradient: chunks of samples, blocks of vectors, and what is kept between products.

A chunk is made small enough that its activations stay near the processor's caches and memory; chunks of one length
share one traced graph. The primal of each chunk is kept when all of them fit a quarter of the free memory, and made
anew for each product otherwise. Running out of memory halves the block of vectors, then the chunk.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from ..problem import Problem
from .linearised import Linearised, linearise, trace

__all__ = ["Engine", "free_memory", "out_of_memory", "worth_tracing"]

_PRIMAL_BYTES = 24 * 2**20  # activations of one chunk
_MOST_SAMPLES = 2048  # of one chunk: with more the tangents of a block leave the caches
_TANGENT_BYTES = 2**26  # their tangents for one block of vectors
_MOST_VECTORS = 20  # matrix products gain nothing from larger blocks
_WORTH = 2**25  # samples times numbers a sample touches below which tracing costs more than it saves
_WIDE = 8  # vectors at once from which tracing pays also without convolutions
_KEPT_SHARE = 4  # at most one over this of the free memory holds primals from one product to the next

_Function = Callable[..., tuple[Tensor, Tensor]]
_verdicts: WeakKeyDictionary[Problem, dict[str, bool]] = WeakKeyDictionary()


def worth_tracing(problem: Problem, samples: int, columns: int) -> bool:
    """Whether the linearised way is faster: for convolutions, whose second derivatives torch is slow at; for blocks.

    Single products with networks of matrix products alone take the same time either way, and the reverse way needs no
    tracing (benchmarks/README.md).
    """
    if problem.model is None or samples * max(problem.P, _saved(problem)) < _WORTH:
        return False
    if columns >= _WIDE:
        return True
    return any(isinstance(module, nn.modules.conv._ConvNd) for module in problem.model.modules())


def free_memory(device: torch.device) -> int:
    """Bytes of free memory on a device; on systems that do not tell, 4 GiB."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        return 2**32


def _saved(problem: Problem) -> int:
    """Bytes that one sample's forward pass keeps."""
    return max(1, getattr(problem, "_saved_bytes", 2**20) // 3)


class Engine:
    """Sums over samples of curvature times a block of vectors, by linearised chunks.

    Args:
        problem: a problem made from a model.
        theta: ``[P]`` where the curvature is taken.
        index: samples to sum over.
        function: of (theta, theta, inputs, targets), returns what is to be linearised and the sample losses.
        refuse: called with the sample losses and their index; raises where they are not finite.
        data: inputs and targets of a chunk of samples.
        dtype: precision of the sums over chunks.
        compiled: compile the tangent part.
    """

    def __init__(
        self,
        problem: Problem,
        theta: Tensor,
        index: Tensor,
        function: _Function,
        refuse: Callable[[Tensor, Tensor], None],
        data: Callable[[Tensor], tuple[Any, Any]],
        dtype: torch.dtype,
        compiled: bool = False,
    ):
        self.problem, self.theta, self.index = problem, theta, index
        self._function, self._refuse, self._data = function, refuse, data
        self._dtype, self._compiled = dtype, compiled
        fitting = max(1, min(_MOST_SAMPLES, _PRIMAL_BYTES // _saved(problem)))
        self.chunk = min(len(index), problem._chunk_size or fitting)
        # equal chunks share one graph
        self.chunk = -(-len(index) // -(-len(index) // self.chunk))
        room = min(
            _TANGENT_BYTES // (self.chunk * _saved(problem)), 2**30 // (4 * theta.numel() * theta.element_size())
        )
        self.width = max(1, min(_MOST_VECTORS, room))
        self._forget()
        self._state = self._versions()

    def __call__(self, block: Tensor) -> Tensor:
        """Sum over samples of curvature times ``block`` [P, k], as [P, k]."""
        state = self._versions()
        if state != self._state:  # a frozen part of the model or the data was changed in place
            self._forget()
            self._state = state
        while True:
            try:
                return self._sum(block).T
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error) or (self.width == 1 and self.chunk == 1):
                    raise
            self._shrink()

    def agrees(self, reverse: Callable[[Tensor, Tensor], Tensor], within: float) -> bool:
        """Whether a product over a few samples equals that of another way, relatively; decided once for a problem."""
        verdicts = _verdicts.setdefault(self.problem, {})
        name = self._function.__qualname__
        if name not in verdicts:
            few = self._telling_samples()
            vector = torch.randn(1, self.problem.P, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
            vector = vector.to(self.theta.device, self.theta.dtype)
            try:
                mine = self._linearise(few)(vector)[0]
            except (torch.OutOfMemoryError, KeyboardInterrupt):
                raise
            except Exception:  # what fails here, where the losses themselves were fine, is the linearised way's own
                verdicts[name] = False
                return False
            theirs = reverse(few, vector.T)[:, 0]
            bound = within * float(theirs.norm())
            verdicts[name] = bool((mine - theirs).norm() <= bound) or not bool(torch.isfinite(theirs).all())
            self._graphs.clear()
        return verdicts[name]

    def _telling_samples(self) -> Tensor:
        """Of some samples the three of largest loss: at saturated ones the curvature is lost in rounding."""
        some = self.index[:: max(1, len(self.index) // 64)]
        losses = self.problem.sample_losses(self.theta, some)
        self._refuse(losses, some)
        return some[losses.argsort(descending=True)[:3].to(some.device)]

    # ------------------------------------------------------------------ the pieces

    def _sum(self, block: Tensor) -> Tensor:
        """The sum for ``block`` [P, k], as [k, P]."""
        total = torch.zeros(block.shape[1], block.shape[0], dtype=self._dtype, device=block.device)
        groups = -(-len(total) // self.width)
        width = -(-len(total) // groups)  # equal blocks: a small last one would be slow
        starts = range(0, len(total), width)
        chunks = self.index.split(self.chunk)
        linear = self._chunk(0, chunks[0])

        def rows(start: int) -> Tensor:
            return block[:, start : start + width].T.to(self.theta.dtype).contiguous()

        if self._keep:  # a few rows at a time need no second copy of the block
            for start in starts:
                part = rows(start)
                for number, chunk in enumerate(chunks):
                    total[start : start + width] += self._chunk(number, chunk)(part)
            return total
        parts = [(start, rows(start)) for start in starts]
        for number, chunk in enumerate(chunks):
            linear = linear if number == 0 else self._chunk(number, chunk)
            for start, part in parts:
                total[start : start + width] += linear(part)
        return total

    def _chunk(self, number: int, chunk: Tensor) -> Linearised:
        found = self._kept.get(number)
        if found is None:
            found = self._linearise(chunk)
            found.compiled = self._compiled
            if number == 0:
                chunks = -(-len(self.index) // self.chunk)
                self._keep = chunks * found.kept_bytes < free_memory(self.theta.device) // _KEPT_SHARE or chunks == 1
            if self._keep:
                self._kept[number] = found
        return found

    def _linearise(self, chunk: Tensor) -> Linearised:
        problem = self.problem
        leaves, spec = tree_flatten(self._data(chunk))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]

        def function(theta: Tensor, fixed: Tensor, *given: Tensor) -> tuple[Tensor, Tensor]:
            remaining = iter(given)
            whole = [next(remaining) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
            return self._function(theta, fixed, *tree_unflatten(whole, spec))

        with problem._function.context():
            graph = self._graphs.get(len(chunk))
            if graph is None:
                graph = self._graphs[len(chunk)] = trace(function, self.theta, self.theta.clone(), *tensors)
            linear = linearise(function, self.theta, self.theta, *tensors, graph=graph)
        self._refuse(linear.others[0], chunk)
        return linear

    def _forget(self) -> None:
        self._graphs: dict[int, fx.GraphModule] = {}
        self._kept: dict[int, Linearised] = {}
        self._keep = False

    def _shrink(self) -> None:
        self._forget()
        if self.width > 1:
            self.width //= 2
        else:
            self.chunk = max(1, self.chunk // 2)
        if self.theta.device.type == "cuda":
            torch.cuda.empty_cache()

    def _versions(self) -> list[tuple[int, int]]:
        """What tells that something other than theta was replaced or written to."""
        source: Any = getattr(self.problem._function, "_source", None)
        held: list[Any] = []
        if source is not None:
            held += [p for name, p in source.named_parameters() if name not in self.problem.shapes]
            held += [b for _, b in source.named_buffers()]
        held += tree_flatten((self.problem.inputs, self.problem.targets))[0]
        return [(id(t), t._version) for t in held if isinstance(t, Tensor)]


def out_of_memory(error: BaseException) -> bool:
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)
