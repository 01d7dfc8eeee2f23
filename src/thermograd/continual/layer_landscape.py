r"""Thousands of landscape directions for the memory of two: outer products of each layer's own directions."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..errors import InputError
from ..noise.factors import Factors, Outer, Rows
from ..noise.perlayer import PerLayer
from ..problem import Problem
from .constraint import Constraint
from .curvature import check_temperature, pulled_back
from .forms import Blocks, Diagonal, Form
from .kronecker import Kronecker, principal, principal_of

__all__ = ["LayerLandscape"]

_LEFT_SHARE = 0.5  # of the memory that output directions may take


class LayerLandscape(Constraint):
    r"""A landscape-dependent constraint whose directions are outer products of a layer's output and input directions.

    .. math::
        R(\theta) = \mathrm{strength} \sum_\ell \tfrac12 \sum_{ij} h^\ell_{ij}
        \bigl[u^{\ell\top}_i (W_\ell - W_{\ell,t})\, v^\ell_j\bigr]^2, \qquad
        h_{ij} = \frac1N \sum_{n,m} \bigl(u_i^\top G_{nm} v_j\bigr)^2

    with :math:`G_{nm} = \sum_\tau g_{nm\tau} x_{n\tau}^\top` the gradient of the score m of sample n in the layer's
    weight (bias included), h the Gauss-Newton curvature along each direction, exactly, and v, u the eigenvectors of
    :math:`\sum G^\top G` and :math:`\sum G G^\top`. With all directions this is the eigenvalue-corrected Kronecker
    curvature (George et al. 2018), which Ritter et al. (2018) used against forgetting in its plain form; here the
    input directions are cut by the spectrum to a given memory. Output directions are always complete, or the network
    would find a way around; where their rotations would take more than half of the memory, the outputs' own axes
    stand in for them. Weights of linear and convolution layers are held so;
    all others by the diagonal, as in :class:`EWC`.

    Args:
        strength: see :class:`Constraint`.
        memory_per_weight: numbers stored, over P: 2 is what EWC takes. Input directions of all layers compete by the
            curvature that they hold per number stored. None keeps all of them.
        temperature: of the Gauss-Newton matrix, see :mod:`.curvature`.
        draws: scores drawn from the model's own labels (temperature 1 only); None takes the expectation, at a backward
            pass for each output.
        options: ``anchors``, ``params``, ``samples``, ``seed``, see :class:`Constraint`.

    >>> import torch
    >>> model, data = torch.nn.Linear(3, 2), (torch.randn(50, 3), torch.randint(2, (50,)))
    >>> held = LayerLandscape(memory_per_weight=None).fit(model, torch.nn.CrossEntropyLoss(), data)
    >>> {name: tuple(form.curvature.shape) for name, (_, form) in held.form.parts.items()}
    {'weight': (2, 4)}
    """

    name: ClassVar[str] = "layer_landscape"

    def __init__(
        self, strength: float = 1.0, *, memory_per_weight: float | None = 2.0, temperature: float = 1.0,
        draws: int | None = None, **options: Any,
    ):  # fmt: skip
        super().__init__(strength, **options)
        if memory_per_weight is not None and not 0 < memory_per_weight < math.inf:
            raise InputError(f"memory_per_weight is {memory_per_weight!r}", expected="a positive number, or None")
        self.memory_per_weight, self.draws = memory_per_weight, draws
        self.temperature = check_temperature(temperature)

    def _measure(self, problem: Problem, index: Tensor, **measured_on: Any) -> Form:
        budget = math.inf if self.memory_per_weight is None else self.memory_per_weight * problem.P
        moments: dict[str, _Moments] = {}
        single = torch.zeros(problem.P, dtype=problem.dtype, device=problem.device)  # squares of all other weights
        for block in self._matrices(problem, index):
            for name, matrices in block.items():
                if isinstance(matrices, _Gradients):
                    moments.setdefault(name, _Moments(matrices)).add(matrices)
                else:
                    matrices.add_squares(single)
        rotated = sum(moment.outputs**2 for moment in moments.values()) <= _LEFT_SHARE * budget
        for moment in moments.values():
            moment.choose_bases(rotated, budget)
        for block in self._matrices(problem, index):
            for name, matrices in block.items():
                if isinstance(matrices, _Gradients):
                    moments[name].add_curvature(matrices)
        theta = problem.theta
        parts: dict[str, tuple[Tensor, Form]] = {}
        rest = torch.ones(problem.P, dtype=torch.bool)
        for name, moment in moments.items():
            form = Kronecker(
                moment.left, moment.right, moment.curvature / len(index), 0 * moment.curvature, moment.bias
            )
            parts[name] = moment.positions, form.centred(theta[moment.positions])
            rest[moment.positions] = False
        if bool(rest.any()):
            at = rest.nonzero().flatten()
            parts["other weights"] = at, Diagonal(single[at] / len(index), theta[at])
        return Blocks(problem.P, parts)

    def _matrices(self, problem: Problem, index: Tensor) -> Iterator[dict[str, _Gradients | Factors]]:
        """Block by block the gradients of every weight matrix by name, and what is left as it comes."""
        for layers, scores in pulled_back(problem, index, self.temperature, self.draws, self.seed + self.tasks):
            for samples, pieces in layers.kept():
                yield _by_matrix(pieces, layers, problem, scores if len(samples) == len(layers) else 1)

    def _bounded(self, total: Form) -> Form:
        """Cut the input directions of all layers to the memory, those that hold the least curvature per number."""
        assert isinstance(total, Blocks)
        if self.memory_per_weight is None:
            return total
        room = self.memory_per_weight * total.P
        offers: list[tuple[float, str]] = []
        for name, (_, form) in total.parts.items():
            if isinstance(form, Kronecker):
                room -= 0 if form.left is None else form.left.numel()
                cost = form.right.shape[0] + 2 * len(form.curvature)
                offers += [(float(held) / cost, name) for held in form.curvature.sum(0)]
            else:
                room -= form.memory
        kept = dict.fromkeys(total.parts, 0)
        for _, name in sorted(offers, key=lambda offer: -offer[0]):
            form = total.parts[name][1]
            assert isinstance(form, Kronecker)
            cost = form.right.shape[0] + 2 * len(form.curvature)
            if cost <= room:
                kept[name] += 1
                room -= cost
        parts = {
            n: (at, _strongest(f, kept[n]) if isinstance(f, Kronecker) else f) for n, (at, f) in total.parts.items()
        }
        return Blocks(total.P, parts)


def _strongest(form: Kronecker, count: int) -> Kronecker:
    """The form with the input directions that hold the most curvature."""
    chosen = form.curvature.sum(0).argsort(descending=True, stable=True)[:count]
    return replace(
        form, right=form.right[:, chosen], curvature=form.curvature[:, chosen], target=form.target[:, chosen]
    )


@dataclass(frozen=True)
class _Gradients:
    """Gradients in one layer's weight matrix, G_n = sum over positions of signals x inputs^T."""

    signals: Tensor  # [n, T, out]; with inputs None the gradients themselves, [n, out, in]
    inputs: Tensor | None  # [n, T, in], a one last where there is a bias
    positions: Tensor  # of the weight, then the bias, in theta
    bias: bool
    repeats: int = 1  # the inputs are so many equal parts, one after the other

    def along(self, left: Tensor | None, right: Tensor) -> Tensor:
        """Sums over samples of the squared components along outer products, [q, r]; left None: the own axes."""
        if self.inputs is None:
            whole = self.signals @ right
            return (whole if left is None else left.T @ whole).square().sum(0)
        g = self.signals if left is None else self.signals @ left  # [n, T, q]
        if g.shape[1] == 1:
            squares = g[:, 0].square().unflatten(0, (self.repeats, -1)).sum(0)
            return squares.T @ (self._distinct @ right).square()
        return (g.mT @ (self.inputs @ right)).square().sum(0)

    @property
    def _distinct(self) -> Tensor:
        """The inputs at the only position, each once, [b, in]."""
        assert self.inputs is not None
        return self.inputs[: len(self.inputs) // self.repeats, 0]

    def outer(self) -> Tensor:
        """Sum of G G^T, [out, out]."""
        if self.inputs is not None and self.inputs.shape[1] == 1:
            by_x = (self._apart * self._distinct.norm(dim=1, keepdim=True)).flatten(0, 1)
            return by_x.T @ by_x
        rows = self._whole.movedim(1, 0).flatten(1)
        return rows @ rows.T

    def inner_rows(self) -> Tensor:
        """Rows [n', in] whose x x^T add up to the sum of G^T G."""
        if self.inputs is not None and self.inputs.shape[1] == 1:
            return self._distinct * self._apart.square().sum((0, 2))[:, None].sqrt()
        return self._whole.flatten(0, 1)

    @property
    def _apart(self) -> Tensor:
        """The signals at the only position, apart for every repetition of the inputs, [m, b, out]."""
        return self.signals[:, 0].unflatten(0, (self.repeats, -1))

    @property
    def _whole(self) -> Tensor:
        """The gradients written out, [n, out, in]."""
        return self.signals if self.inputs is None else self.signals.mT @ self.inputs


class _Moments:
    """One layer: first what its gradients span, then the curvature along the bases chosen from that."""

    def __init__(self, first: _Gradients):
        self.positions, self.bias = first.positions, first.bias
        self.outer: Tensor | None = None
        self.inner: Tensor | None = None  # [n, in] while rows are fewer than inputs, then a square that is their sum
        self.summed = False

    def add(self, gradients: _Gradients) -> None:
        outer, rows = gradients.outer(), gradients.inner_rows()
        self.outer = outer if self.outer is None else self.outer + outer
        if self.inner is not None and self.summed:
            self.inner = self.inner + rows.T @ rows
            return
        rows = rows if self.inner is None else torch.cat([self.inner, rows])
        self.summed = len(rows) >= rows.shape[1]
        self.inner = rows.T @ rows if self.summed else rows

    @property
    def outputs(self) -> int:
        """Number of the layer's outputs."""
        assert self.outer is not None
        return len(self.outer)

    def choose_bases(self, rotated: bool, budget: float) -> None:
        """All output directions, and as many input directions as the budget could ever hold.

        A part of the output directions would leave the network a way around: what is not held there is free whatever
        the input. Where their rotation is too large, the outputs' own axes do, which take no memory.
        """
        assert self.outer is not None
        assert self.inner is not None
        inputs, outputs = self.inner.shape[1], self.outputs
        right = inputs if math.isinf(budget) else min(inputs, max(1, int(budget / (inputs + 2 * outputs))))
        self.left = principal(self.outer, outputs) if rotated else None
        self.right = principal(self.inner, right) if self.summed else principal_of(self.inner, right)
        self.curvature = self.right.new_zeros(outputs, right)

    def add_curvature(self, gradients: _Gradients) -> None:
        self.curvature += gradients.along(self.left, self.right)


def _by_matrix(
    pieces: list[Factors], layers: PerLayer, problem: Problem, repeats: int
) -> dict[str, _Gradients | Factors]:
    found: dict[str, _Gradients | Factors] = {}
    for piece in pieces:
        if isinstance(piece, Outer):
            found[piece.name] = _of_outer(piece, repeats)
        elif isinstance(piece, Rows):
            found |= _of_rows(piece, layers)
        else:
            found[piece.name] = piece
    return _with_shapes(found, problem)


def _of_outer(piece: Outer, repeats: int) -> _Gradients:
    positions, inputs = torch.arange(piece.place.start, piece.place.stop), piece.second
    if piece.bias is not None:
        positions = torch.cat([positions, torch.arange(piece.bias.start, piece.bias.stop)])
        inputs = torch.cat([inputs, inputs.new_ones(*inputs.shape[:2], 1)], dim=2)
    return _Gradients(piece.first, inputs, positions, piece.bias is not None, repeats)


def _of_rows(piece: Rows, layers: PerLayer) -> dict[str, _Gradients | Factors]:
    """Parameters whose gradients were formed, each by itself in the order of theta."""
    names = {place.start: name for name, place in layers.places.items()}
    columns = {names[place.start]: (place, piece._ordered(part)) for place, part in piece._columns()}
    return {name: Rows(name, part, (place,)) for name, (place, part) in columns.items()}


def _with_shapes(found: dict[str, _Gradients | Factors], problem: Problem) -> dict[str, _Gradients | Factors]:
    """Formed gradients of matrices and kernels as matrices, with the bias of the same module as one more input."""
    out = dict(found)
    for name, piece in found.items():
        if not isinstance(piece, Rows) or len(shape := problem.shapes[name]) < 2:
            continue
        (place,), columns = piece.places, piece.gradients.view(len(piece), shape[0], -1)
        positions = torch.arange(place.start, place.stop)
        bias = out.get(f"{name.rpartition('.')[0]}.bias".removeprefix("."))
        if isinstance(bias, Rows) and bias.gradients.shape[1] == shape[0]:
            columns = torch.cat([columns, bias.gradients[:, :, None]], dim=2)
            positions = torch.cat([positions, torch.arange(bias.places[0].start, bias.places[0].stop)])
            del out[bias.name]
        out[name] = _Gradients(columns, None, positions, len(positions) > place.stop - place.start)
    return out
