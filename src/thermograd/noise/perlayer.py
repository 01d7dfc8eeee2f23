r"""Per-sample gradients of a whole network, layer by layer, without forming them where a layer allows it.

For a layer whose weight multiplies activations :math:`a_{it}` at positions t and whose outputs send back signals
:math:`b_{it} = \partial \ell_i / \partial z_{it}`, the gradient of sample i is :math:`\sum_t b_{it} a_{it}^\top` and

.. math:: \langle g_i, g_j \rangle = \sum_{t u} (a_{it} \cdot a_{ju}) (b_{it} \cdot b_{ju})

(Dangel, Tatzel & Hennig 2022, section 2). Where there are many positions it is cheaper to form the layer's gradients;
the choice is made by counting operations. Every rule is compared with automatic differentiation on a few samples when
the problem is set up, and parameters for which it does not agree have their gradients formed one sample after the
other instead.
"""

from __future__ import annotations

import copy
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..errors import NonFiniteError, ThermogradError
from ..landscape.engine import free_memory, out_of_memory
from ..problem import Problem
from ..progress import Cost, bar
from .capture import Use, capture
from .factors import Factors, Outer, Rows, joined, tiles
from .rules import (
    channels_last,
    conv_rows,
    embedding_rows,
    explicit,
    mapped_rows,
    outer_factors,
    sample_dimension,
    samples_first,
    tokens,
)

__all__ = ["PerLayer"]

_PROBE = 7  # samples on which every rule is checked
_BLOCK_BYTES = 2**33  # what the factors of one block of samples may take, when there is as much
_BLOCK_SHARE = 4  # and at most one over this of the free memory
_PASS_BYTES = 2**25  # activations of the samples that pass through the network at once: what caches hold is fastest
_SMALL = 4096  # parameters up to this size are put side by side in one matrix

_Result = TypeVar("_Result")


@dataclass(frozen=True)
class _Entry:
    """How the per-sample gradients of a weight (with its bias) or of some parameters are held."""

    form: str  # "outer", "tokens", "rows" (each parameter's uses added up) or "mapped" (one sample at a time)
    names: tuple[str, ...]  # weight, bias for "outer"; the parameters side by side for "rows" and "mapped"
    use: int = -1


class PerLayer:
    """Per-sample gradients at one point, as blocks of :class:`~thermograd.noise.factors.Factors`.

    Args:
        problem: the problem.
        theta: weights ``[P]``; default: where the model stands now.
        index: the samples; default all N.
        readout: ``[K]``; when given, gradients of this combination of each sample's outputs instead of its loss.
    """

    def __init__(self, problem: Problem, theta: Any = None, index: Any = None, readout: Tensor | None = None):
        self.readout = readout
        self.problem, self.theta = problem, problem.as_theta(theta).clone()
        self.index = torch.cat(problem._blocks(index))
        self.places: dict[str, slice] = {}
        start = 0
        for name, size in zip(problem.names, problem._sizes):
            self.places[name] = slice(start, start + size)
            start += size
        self._most = len(self.index)  # samples in a block; halved when memory runs out
        self._block: int | None = None
        self._dims: list[int | None] = []
        self._kinds: list[str] = []
        self.plan = self._make_plan()
        self._kept: list[list[Factors]] | None = None

    def __len__(self) -> int:
        return len(self.index)

    # ------------------------------------------------------------------ which form for which parameter

    def _make_plan(self) -> list[_Entry]:
        names = self.problem.names
        if self.problem.model is None:
            return _side_by_side("mapped", names, self.places)
        probe = self.index[: min(_PROBE, len(self))]
        u = torch.randn(len(probe), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        u = u.to(self.problem.device, self.problem.dtype)
        try:
            uses, _, weighted = capture(self.problem, self.theta, probe, u, self.readout)
        except ThermogradError:
            raise
        except Exception:  # a model may do what a recording of its calls does not survive
            return _side_by_side("mapped", names, self.places)
        self._kinds = [use.kind for use in uses]
        self._dims = [sample_dimension(use, len(probe)) for use in uses]
        true = torch.cat([weighted[name].flatten() for name in names])  # [P]
        mapped: list[str] = []
        for _ in range(2):
            plan = self._choose(uses, mapped)
            mapped += [name for name in self._disagreeing(plan, uses, probe, u, true) if name not in mapped]
        return self._choose(uses, mapped)

    def _choose(self, uses: list[Use], mapped: Sequence[str]) -> list[_Entry]:
        found: dict[str, list[int]] = {name: [] for name in self.problem.names}
        for i, use in enumerate(uses):
            for name in (use.weight, use.bias):
                if name is not None:
                    found[name].append(i)
        entries, summed, left = [], [], list(mapped)
        done: set[str] = set(mapped)
        for name, where in found.items():
            if name in done:
                continue
            if any(self._dims[i] is None for i in where) or not where:
                left.append(name)
                continue
            use = uses[where[0]]
            if len(where) == 1 and name == use.weight and use.rows is None:
                form = self._cheapest(use, where[0])
                bias = use.bias if use.bias is not None and len(found[use.bias]) == 1 else None
                bias = None if bias in done or use.transposed else bias
                if form == "outer":
                    entries.append(_Entry("outer", (name,) if bias is None else (name, bias), where[0]))
                    done |= {name} if bias is None else {name, bias}
                    continue
                if form == "tokens":
                    entries.append(_Entry("tokens", (name,), where[0]))
                    continue
            summed.append(name)
        summed = [name for name in summed if name not in done]
        return entries + _side_by_side("rows", summed, self.places) + _side_by_side("mapped", left, self.places)

    def _cheapest(self, use: Use, i: int) -> str:
        """The form with the fewest operations for the inner products of all samples."""
        if use.kind == "embedding":
            size = self.problem.shapes[use.weight or ""]
            return "tokens" if size[0] * size[1] > _SMALL else "rows"
        if use.kind == "norm" or use.options.get("groups", 1) > 1:
            return "rows"
        use = samples_first(use, self._dims[i], min(_PROBE, len(self)))
        assert use.signals is not None
        first, second = outer_factors(replace(use, inputs=use.inputs[:1], signals=use.signals[:1]))
        positions, r, s = first.shape[1], first.shape[2], second.shape[2]
        explicit = 2 * positions * r * s + len(self) * r * s
        return "outer" if len(self) * positions**2 * (r + s + 4) <= explicit else "rows"

    def _disagreeing(self, plan: list[_Entry], uses: list[Use], probe: Tensor, u: Tensor, true: Tensor) -> list[str]:
        """Parameters whose rule does not give the gradient that automatic differentiation gives."""
        tolerance = 1e-8 if self.problem.dtype == torch.float64 else 1e-3
        wrong: list[str] = []
        for entry in plan:
            if entry.form == "mapped":
                continue
            try:
                found = true.new_zeros(1, self.problem.P)
                self._assemble(entry, probe, uses).lift(u[:, None], found)
            except ThermogradError:
                raise
            except Exception:  # a shape no rule expects
                wrong += entry.names
                continue
            scale = 1e-2 * tolerance * float(true.norm())
            for name in entry.names:
                place = self.places[name]
                error = float((found[0, place] - true[place]).norm())
                if not error <= tolerance * float(true[place].norm()) + scale:
                    wrong.append(name)
        return wrong

    @property
    def complete(self) -> bool:
        """Whether every parameter has a rule, so that no gradient is formed sample by sample."""
        return all(entry.form != "mapped" for entry in self.plan)

    # ------------------------------------------------------------------ blocks of samples

    def _numbers(self, entry: _Entry) -> int:
        return sum(self.places[name].stop - self.places[name].start for name in entry.names)

    @property
    def sample_bytes(self) -> int:
        """Bytes that one sample's factors take."""
        numbers = 0
        for entry in self.plan:
            shapes = [self.problem.shapes[name] for name in entry.names]
            numbers += self._numbers(entry) if entry.form in ("rows", "mapped") else sum(map(sum, shapes))
        return max(1, numbers * torch.finfo(self.problem.dtype).bits // 8)

    @property
    def block_size(self) -> int:
        """Samples whose factors fit comfortably in memory together."""
        if self._block is None:  # once: what is free changes meanwhile
            room = min(_BLOCK_BYTES, max(2**26, free_memory(self.problem.device) // _BLOCK_SHARE))
            self._block = max(1, min(self._most, room // self.sample_bytes))
        return self._block

    @property
    def _pass_size(self) -> int:
        """Samples that pass through the network at once."""
        saved = self.problem._saved_bytes // 3  # that estimate is for second derivatives
        return max(1, min(self.problem.chunk_size, self._most, _PASS_BYTES // max(1, saved)))

    def blocks(self) -> list[Tensor]:
        """The samples in blocks, positions in ``index``."""
        return list(torch.arange(len(self)).split(self.block_size))

    def _within_memory(self, work: Callable[[], _Result]) -> _Result:
        """Do the work; out of memory, halve the blocks of samples and do it again."""
        while True:
            size = self.block_size
            try:
                return work()
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error) or size == 1:
                    raise
            self._kept, self._block, self._most = None, None, size // 2
            if self.problem.device.type == "cuda":
                torch.cuda.empty_cache()

    def factors(self, positions: Tensor) -> list[Factors]:
        """The factors of all parameters for some samples.

        Raises:
            NonFiniteError: a loss or a gradient is not finite; the message names the sample and the layer.
        """
        chosen = self.index[positions]
        recorded = any(entry.form != "mapped" for entry in self.plan)
        gathered: dict[int, list[Factors]] = {i: [] for i in range(len(self.plan))}
        step = self._pass_size if recorded else len(chosen)
        if not recorded:  # a loss may be NaN where its gradient is not
            self.problem._refuse_non_finite(self.problem.sample_losses(self.theta, chosen), chosen)
        room = {i: self._room(entry, len(chosen)) for i, entry in enumerate(self.plan)}
        start = 0
        with bar("per-sample gradients", len(chosen), bytes=len(chosen) * self.sample_bytes) as progress:
            for part in chosen.split(step):
                uses = capture(self.problem, self.theta, part, readout=self.readout)[0] if recorded else []
                if recorded and uses and [use.kind for use in uses] != self._kinds:
                    uses = self._give_up()
                    return self.factors(positions)
                for i, entry in enumerate(self.plan):
                    rows = room[i]
                    out = None if rows is None else rows[start : start + len(part)]
                    gathered[i].append(self._assemble(entry, part, uses, out))
                start += len(part)
                progress.advance(len(part))
        pieces = [joined(parts, room[i]) for i, parts in gathered.items()]
        for piece in pieces:
            good = piece.finite()
            if not bool(good.all()):
                sample = int(chosen[(~good).nonzero()[0, 0].cpu()])
                raise NonFiniteError(f"the gradient of sample {sample} with respect to {piece.name} is not finite")
        return pieces

    def _give_up(self) -> list[Use]:
        """The model calls other layers for other samples: no rule is safe."""
        self.plan = _side_by_side("mapped", self.problem.names, self.places)
        return []

    def block_from(self, start: int) -> list[Factors]:
        """The factors of as many samples from a position on as memory allows."""
        return self._within_memory(lambda: self.factors(torch.arange(start, min(start + self.block_size, len(self)))))

    def kept(self) -> Iterator[tuple[Tensor, list[Factors]]]:
        """Blocks with their factors; held for the next time when all of them fit in memory."""
        if self._kept is not None:
            yield torch.arange(len(self)), self._kept[0]
            return
        blocks = self.blocks()
        for block in blocks:
            pieces = self.factors(block)
            if len(blocks) == 1:
                self._kept = [pieces]
            yield block, pieces

    def _room(self, entry: _Entry, count: int) -> Tensor | None:
        """Memory for the gradients of one large parameter, so that they need not be copied together."""
        if entry.form != "rows" or len(entry.names) > 1:
            return None
        return torch.empty(count, self._numbers(entry), dtype=self.problem.dtype, device=self.problem.device)

    def _assemble(self, entry: _Entry, samples: Tensor, uses: list[Use], out: Tensor | None = None) -> Factors:
        """One entry's factors for a chunk of samples, in ``out`` when there is one."""
        name, count = entry.names[0], len(samples)
        if entry.form == "mapped":
            rows = mapped_rows(self.problem, self.theta, samples, entry.names)
            return Rows(_label(entry.names), rows, tuple(self.places[n] for n in entry.names))
        if entry.form == "rows":
            if len(entry.names) == 1:
                return self._single(name, uses, count, out)
            rows = torch.cat([self._summed(n, uses, count) for n in entry.names], dim=1)
            return Rows(_label(entry.names), rows, tuple(self.places[n] for n in entry.names))
        use = samples_first(uses[entry.use], self._dims[entry.use], count)
        if entry.form == "tokens":
            return tokens(use, self.places[name], name)
        bias = self.places[entry.names[1]] if len(entry.names) > 1 else None
        return Outer(name, *outer_factors(use), self.places[name], bias)

    def _single(self, name: str, uses: list[Use], count: int, out: Tensor | None) -> Rows:
        """One large parameter; that of a convolution is left with its channels last."""
        mine = [i for i, use in enumerate(uses) if name in (use.weight, use.bias)]
        if len(mine) > 1 or not channels_last(uses[mine[0]], name):
            return Rows(name, self._summed(name, uses, count, out), (self.places[name],))
        rows = conv_rows(samples_first(uses[mine[0]], self._dims[mine[0]], count), out)
        return Rows(name, rows.view(count, -1), (self.places[name],), (rows.shape[2], rows.shape[3]))

    def _summed(self, name: str, uses: list[Use], count: int, out: Tensor | None = None) -> Tensor:
        """Per-sample gradients of one parameter [b, d], added up over its uses."""
        shape = self.problem.shapes[name]
        mine = [i for i, use in enumerate(uses) if name in (use.weight, use.bias)]
        if out is None:
            size = self.places[name].stop - self.places[name].start
            out = torch.empty(count, size, dtype=self.problem.dtype, device=self.problem.device)
        total = out.zero_().view(count, *shape)
        for i in mine:
            use = samples_first(uses[i], self._dims[i], count)
            part = embedding_rows(use, shape) if use.kind == "embedding" else explicit(use, name)
            total[:, use.rows or slice(None)] += part.view(count, -1, *shape[1:])
        return out

    # ------------------------------------------------------------------ what is asked of the gradients

    def gram(self) -> Tensor:
        """Inner products of all per-sample gradients, ``[N, N]``; half of them are computed, the rest mirrored."""
        K = self.gram_so_far()
        if len(K) < len(self):
            raise KeyboardInterrupt
        return K

    def gram_so_far(self) -> Tensor:
        """As :meth:`gram`; after Ctrl-C the inner products of the leading samples that are done, if there are two."""
        return self._within_memory(self._gram)

    def first(self, count: int) -> PerLayer:
        """The gradients of the first samples alone."""
        few = copy.copy(self)
        few.index, few._block, few._most = self.index[:count], None, min(self._most, count)
        if self._kept is not None:
            few._kept = [[piece.part(slice(0, count)) for piece in self._kept[0]]]
        return few

    def _gram(self) -> Tensor:
        n, done = len(self), 0
        K = torch.zeros(n, n, dtype=self.problem.dtype, device=self.problem.device)  # [N, N]
        blocks, size = self.blocks(), self.block_size
        memory = K.numel() * K.element_size() + 2 * size * self.sample_bytes
        try:
            with bar("inner products of per-sample gradients", n * (n + 1) // 2, bytes=memory) as progress:
                for mine, left in self.kept():
                    own = int(mine[0]) // size
                    for theirs in blocks[: own + 1]:
                        same = theirs is blocks[own]
                        right = left if same else self.factors(theirs)
                        for a, b in tiles(len(mine), len(theirs), same):
                            tile = K[mine[0] + a.start : mine[0] + a.stop, theirs[0] + b.start : theirs[0] + b.stop]
                            for one, other in zip(left, right):
                                tile += one.part(a).gram(other.part(b))
                            progress.advance(tile.numel())
                            done = int(mine[0]) + a.stop if same else done  # rows up to here are complete
        except KeyboardInterrupt:
            if done < 2:
                raise
            n, K = done, K[:done, :done]
        for i, j in itertools.combinations_with_replacement(range(0, n, 1024), 2):
            if i < j:
                K[i : i + 1024, j : j + 1024] = K[j : j + 1024, i : i + 1024].T
            else:
                square = K[i : i + 1024, i : i + 1024]
                square.copy_(square.tril() + square.tril(-1).T)
        return K

    def cost(self, k: int) -> Cost:
        """What k eigenpairs by the Gram matrix will take, from timing a few samples and a product of matrices."""
        few = torch.arange(min(len(self), self._pass_size))
        each = _timed(lambda: self.factors(few)) / len(few)
        square = torch.ones(512, 512, dtype=self.problem.dtype, device=self.problem.device)
        rate = 2 * 512**3 / min(_timed(lambda: square @ square) for _ in range(3))
        blocks = len(self.blocks())
        passes = len(self) * (1 + (blocks - 1) / 2 + (0 if blocks == 1 else 2))  # those of the Gram matrix, lift, check
        n = len(self)
        whole = n <= 700 or 5 * (k + 16) > n  # the decomposition of the Gram matrix, or block Lanczos
        eigenvectors = 10.0 * n**3 if whole else 16.0 * n**2 * k + 150.0 * n * k**2
        operations = 1.5 * (self.gram_operations + 2.0 * k * n * self.problem.P + eigenvectors)  # at two thirds of it
        size = torch.finfo(self.problem.dtype).bits // 8
        held = min(blocks, 2) * self.block_size * self.sample_bytes
        return Cost(passes * each + operations / rate, held + size * (len(self) ** 2 + 2 * k * self.problem.P))

    def lift(self, coefficients: Tensor) -> Tensor:
        """Combinations of the per-sample gradients: coefficients ``[N, k]`` to ``[k, P]``."""
        return self._within_memory(lambda: self._lift(coefficients.to(self.problem.device, self.problem.dtype)))

    def _lift(self, coefficients: Tensor) -> Tensor:
        out = coefficients.new_zeros(coefficients.shape[1], self.problem.P)
        with bar("combining per-sample gradients", len(self), bytes=self._bytes(out)) as progress:
            for block, pieces in self.kept():
                for piece in pieces:
                    piece.lift(coefficients[block], out)
                progress.advance(len(block))
        return out

    def project(self, directions: Tensor) -> Tensor:
        """Per-sample gradients along directions ``[k, P]``: ``[N, k]``."""
        return self._within_memory(lambda: self._project(directions))

    def _project(self, directions: Tensor) -> Tensor:
        parts = []
        with bar("gradients along directions", len(self), bytes=self._bytes(directions)) as progress:
            for block, pieces in self.kept():
                parts.append(torch.stack([piece.project(directions) for piece in pieces]).sum(0))
                progress.advance(len(block))
        return torch.cat(parts)

    def product(self, directions: Tensor, mean: Tensor | None) -> Tensor:
        """The second moment, or given the mean gradient the covariance, times directions ``[k, P]``."""
        return self._within_memory(lambda: self._product(directions, mean))

    def _product(self, directions: Tensor, mean: Tensor | None) -> Tensor:
        out = torch.zeros_like(directions)
        shift = torch.zeros_like(directions[:, 0]) if mean is None else directions @ mean  # [k]
        sums = torch.zeros_like(shift)
        with bar("product with the noise covariance", len(self), bytes=2 * self._bytes(out)) as progress:
            for block, pieces in self.kept():
                along = torch.stack([piece.project(directions) for piece in pieces]).sum(0) - shift  # [b, k]
                for piece in pieces:
                    piece.lift(along, out)
                sums += along.sum(0)
                progress.advance(len(block))
        if mean is not None:
            out -= torch.outer(sums, mean)  # what rounding left of a sum that is zero
        return out / len(self)

    def _bytes(self, directions: Tensor) -> int:
        return self.block_size * self.sample_bytes + directions.numel() * directions.element_size()

    @property
    def gram_operations(self) -> float:
        """Floating-point operations of :meth:`gram`, about."""
        total = 0.0
        for entry in self.plan:
            shape = self.problem.shapes[entry.names[0]]
            if entry.form == "outer":
                total += len(self) ** 2 * (shape[0] + self._numbers(entry) / shape[0])
            else:
                total += len(self) ** 2 * self._numbers(entry)
        return total

    def squares(self) -> Tensor:
        """Squared lengths of the per-sample gradients, ``[N]``."""
        return self._within_memory(
            lambda: torch.cat([torch.stack([p.squares() for p in pieces]).sum(0) for _, pieces in self.kept()])
        )

    def mean_squares(self) -> Tensor:
        """Means over samples of the squared components, ``[P]``."""
        return self._within_memory(self._mean_squares)

    def _mean_squares(self) -> Tensor:
        out = torch.zeros(self.problem.P, dtype=self.problem.dtype, device=self.problem.device)
        for _, pieces in self.kept():
            for piece in pieces:
                piece.add_squares(out)
        return out / len(self)

    def mean(self) -> Tensor:
        """The mean gradient, ``[P]``."""
        return self.lift(torch.full((len(self), 1), 1 / len(self), dtype=self.problem.dtype))[0]


def _timed(work: Callable[[], Any]) -> float:
    started = time.perf_counter()
    work()
    return max(time.perf_counter() - started, 1e-9)


def _side_by_side(form: str, names: Sequence[str], places: dict[str, slice]) -> list[_Entry]:
    """Small parameters together in one matrix, large ones on their own; mapped ones all together."""
    size = {name: places[name].stop - places[name].start for name in names}
    small = tuple(name for name in names if form == "mapped" or size[name] <= _SMALL)
    entries = [_Entry(form, (name,)) for name in names if name not in small]
    return entries + ([_Entry(form, small)] if small else [])


def _label(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"one of {', '.join(names)}"
