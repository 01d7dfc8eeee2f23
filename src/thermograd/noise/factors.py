"""Per-sample gradients of single layers in the form in which a layer gives them, and what can be done with each form.

A form stands for a matrix G ``[n, d]`` of per-sample gradients without holding it where that can be avoided:
:class:`Outer` holds activations and back-signals, :class:`Tokens` the rows of an embedding that occur, and
:class:`Rows` the matrix itself. Vectors over weights have their direction first here, ``[k, P]``.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Factors", "Outer", "Rows", "Tokens", "joined", "tiles"]

_TILE = 128  # samples whose inner products are computed at once
_WORK = 2**24  # numbers in a temporary array
_RUN = 256  # samples summed up at once: their part stays in the cache


class Factors(ABC):
    """Per-sample gradients of some of the weights, for n samples."""

    name: str

    @abstractmethod
    def __len__(self) -> int:
        """Number of samples."""

    @abstractmethod
    def part(self, samples: slice) -> Factors:
        """The same for some of the samples, without a copy."""

    @abstractmethod
    def gram(self, other: Factors) -> Tensor:
        """Inner products with another such piece of the same layer, ``[n, m]``."""

    @abstractmethod
    def squares(self) -> Tensor:
        """Squared lengths of the per-sample gradients, ``[n]``."""

    @abstractmethod
    def lift(self, coefficients: Tensor, out: Tensor) -> None:
        """Add combinations of the per-sample gradients, coefficients ``[n, k]``, to ``out`` ``[k, P]``."""

    @abstractmethod
    def project(self, directions: Tensor) -> Tensor:
        """Per-sample gradients along directions ``[k, P]``: ``[n, k]``."""

    @abstractmethod
    def add_squares(self, out: Tensor) -> None:
        """Add the sums over samples of the squared components to ``out`` ``[P]``."""

    @abstractmethod
    def finite(self) -> Tensor:
        """Whether each sample's gradient is finite, ``[n]``."""


@dataclass(frozen=True)
class Rows(Factors):
    """The matrix of per-sample gradients itself, of one or more parameters side by side.

    With ``turned`` = (K, C) the last dimensions of the one parameter are held as [K, C], and are [C, K] in theta.
    """

    name: str
    gradients: Tensor  # [n, d]
    places: tuple[slice, ...]  # where in theta the columns belong, in order
    turned: tuple[int, int] | None = None

    def __len__(self) -> int:
        return len(self.gradients)

    def part(self, samples: slice) -> Rows:
        return Rows(self.name, self.gradients[samples], self.places, self.turned)

    def gram(self, other: Factors) -> Tensor:
        assert isinstance(other, Rows)
        return self.gradients @ other.gradients.T

    def squares(self) -> Tensor:
        return torch.linalg.vector_norm(self.gradients, dim=1).square()

    def _columns(self) -> Iterator[tuple[slice, Tensor]]:
        start = 0
        for place in self.places:
            width = place.stop - place.start
            yield place, self.gradients[:, start : start + width]
            start += width

    def _ordered(self, found: Tensor) -> Tensor:
        """Columns [k, d] in the order of theta."""
        return found if self.turned is None else found.unflatten(1, (-1, *self.turned)).mT.flatten(1)

    def lift(self, coefficients: Tensor, out: Tensor) -> None:
        for place, columns in self._columns():
            out[:, place] += self._ordered(coefficients.T @ columns)

    def project(self, directions: Tensor) -> Tensor:
        if self.turned is not None:
            places, channels = self.turned
            held = directions[:, self.places[0]].unflatten(1, (-1, channels, places)).mT.flatten(1)
            return self.gradients @ held.T
        parts = [columns @ directions[:, place].T for place, columns in self._columns()]
        return torch.stack(parts).sum(0) if len(parts) > 1 else parts[0]

    def add_squares(self, out: Tensor) -> None:
        for place, columns in self._columns():
            out[place] += self._ordered(columns.square().sum(0)[None])[0]

    def finite(self) -> Tensor:
        return torch.isfinite(self.gradients.sum(1))


@dataclass(frozen=True)
class Outer(Factors):
    r"""Gradients of a weight matrix as sums of outer products over positions, :math:`\sum_t f_{it} s_{it}^\top`.

    Inner products between samples need no gradient: :math:`\sum_{tu} (f_{it} \cdot f_{ju})(s_{it} \cdot s_{ju})`.
    With a bias, whose gradient is that of a column of ones, 1 is added to the second bracket.
    """

    name: str
    first: Tensor  # [n, T, r]
    second: Tensor  # [n, T, s]
    place: slice  # of the weight [r, s] in theta
    bias: slice | None = None  # of the bias [r]

    def __len__(self) -> int:
        return len(self.first)

    def part(self, samples: slice) -> Outer:
        return Outer(self.name, self.first[samples], self.second[samples], self.place, self.bias)

    def _pieces(self, numbers: int) -> Iterator[slice]:
        """Slices of the samples such that ``numbers`` a sample fit the work space."""
        step = max(1, _WORK // max(1, numbers))
        return (slice(i, min(i + step, len(self))) for i in range(0, len(self), step))

    def gram(self, other: Factors) -> Tensor:
        assert isinstance(other, Outer)
        positions, width = self.first.shape[1], other.first.shape[0] * other.first.shape[1]
        if positions == 1:
            return self._products(other)
        parts = []
        for piece in self._pieces(positions * width):
            product = self.part(piece)._products(other)  # [b T, m T]
            parts.append(product.view(piece.stop - piece.start, positions, len(other), -1).sum((1, 3)))
        return torch.cat(parts)

    def _products(self, other: Outer) -> Tensor:
        product = self.second.flatten(0, 1) @ other.second.flatten(0, 1).T
        if self.bias is not None:
            product += 1
        return product.mul_(self.first.flatten(0, 1) @ other.first.flatten(0, 1).T)

    def squares(self) -> Tensor:
        if self.first.shape[1] == 1:
            size = self.second.square().sum((1, 2)) + (self.bias is not None)
            return size * self.first.square().sum((1, 2))
        inner = self.second @ self.second.mT + float(self.bias is not None)  # [n, T, T]
        return (inner * (self.first @ self.first.mT)).sum((1, 2))

    def lift(self, coefficients: Tensor, out: Tensor) -> None:
        r, s = self.first.shape[2], self.second.shape[2]
        if self.bias is not None:
            out[:, self.bias] += coefficients.T @ self.first.sum(1)
        if self.first.shape[1] == 1:
            first, second = self.first[:, 0], self.second[:, 0]
            few = max(1, _WORK // (r * s))  # directions summed up at once
            for i in range(0, coefficients.shape[1], few):
                some = coefficients[:, i : i + few]
                total = first.new_zeros(some.shape[1] * r, s)
                for j in range(0, len(self), _RUN):
                    scaled = some[j : j + _RUN, :, None] * first[j : j + _RUN, None]  # [b, k, r]
                    total.addmm_(scaled.flatten(1).T, second[j : j + _RUN])
                out[i : i + few, self.place] += total.view(-1, r * s)
            return
        for piece in self._pieces(r * s):
            out[:, self.place] += coefficients[piece].T @ self._gradients(piece)

    def project(self, directions: Tensor) -> Tensor:
        r, s = self.first.shape[2], self.second.shape[2]
        weight = directions[:, self.place]  # [k, r s]
        if self.first.shape[1] == 1:
            first, second = self.first[:, 0], self.second[:, 0]
            found = first.new_empty(len(self), len(directions))
            step = max(1, 2 * _WORK // (r * len(self)))
            for i in range(0, len(directions), step):
                along = second @ weight[i : i + step].reshape(-1, s).T  # [n, k r]
                found[:, i : i + step] = torch.bmm(along.view(len(self), -1, r), first[:, :, None])[..., 0]
        else:
            found = torch.cat([self._gradients(piece) @ weight.T for piece in self._pieces(r * s)])
        if self.bias is not None:
            found = found + self.first.sum(1) @ directions[:, self.bias].T
        return found

    def _gradients(self, samples: slice) -> Tensor:
        """The gradients themselves, [b, r s]."""
        return (self.first[samples].mT @ self.second[samples]).flatten(1)

    def add_squares(self, out: Tensor) -> None:
        if self.bias is not None:
            out[self.bias] += self.first.sum(1).square().sum(0)
        if self.first.shape[1] == 1:
            out[self.place] += (self.first[:, 0].square().T @ self.second[:, 0].square()).flatten()
            return
        for piece in self._pieces(self.first.shape[2] * self.second.shape[2]):
            out[self.place] += self._gradients(piece).square().sum(0)

    def finite(self) -> Tensor:
        return torch.isfinite(self.first.sum((1, 2))) & torch.isfinite(self.second.sum((1, 2)))


@dataclass(frozen=True)
class Tokens(Factors):
    """Gradients of an embedding: for each sample, the rows of the tokens that occur in it."""

    name: str
    sample: Tensor  # [M] ascending: which sample
    token: Tensor  # [M] which row of the embedding
    signals: Tensor  # [M, d] the gradient there; no pair of sample and token occurs twice
    samples: int
    place: slice  # of the weight [V, d] in theta

    def __len__(self) -> int:
        return self.samples

    def part(self, samples: slice) -> Tokens:
        start, stop, _ = samples.indices(self.samples)
        ends = torch.searchsorted(self.sample, torch.tensor([start, stop], device=self.sample.device))
        chosen = slice(int(ends[0]), int(ends[1]))
        sample = self.sample[chosen] - start
        return Tokens(self.name, sample, self.token[chosen], self.signals[chosen], stop - start, self.place)

    def _by_token(self) -> dict[int, Tensor]:
        """Which of the M pairs belong to each token that occurs."""
        order = torch.argsort(self.token, stable=True)
        tokens, counts = torch.unique_consecutive(self.token[order], return_counts=True)
        return dict(zip(tokens.tolist(), order.split(counts.tolist())))

    def gram(self, other: Factors) -> Tensor:
        assert isinstance(other, Tokens)
        out = self.signals.new_zeros(self.samples, other.samples)
        theirs = other._by_token()
        for token, mine in self._by_token().items():
            if token in theirs:
                i, j = mine, theirs[token]
                product = self.signals[i] @ other.signals[j].T
                out.index_put_((self.sample[i][:, None], other.sample[j][None]), product, accumulate=True)
        return out

    def squares(self) -> Tensor:
        return self.signals.new_zeros(self.samples).index_add_(0, self.sample, self.signals.square().sum(1))

    def lift(self, coefficients: Tensor, out: Tensor) -> None:
        width = self.signals.shape[1]
        for i, column in enumerate(coefficients.T):
            table = out[i, self.place].view(-1, width)
            table.index_add_(0, self.token, column[self.sample][:, None] * self.signals)

    def project(self, directions: Tensor) -> Tensor:
        width = self.signals.shape[1]
        columns = []
        for direction in directions:
            along = (direction[self.place].view(-1, width)[self.token] * self.signals).sum(1)
            columns.append(along.new_zeros(self.samples).index_add_(0, self.sample, along))
        return torch.stack(columns, dim=1)

    def add_squares(self, out: Tensor) -> None:
        out[self.place].view(-1, self.signals.shape[1]).index_add_(0, self.token, self.signals.square())

    def finite(self) -> Tensor:
        bad = self.signals.new_zeros(self.samples).index_add_(
            0, self.sample, (~torch.isfinite(self.signals.sum(1))).to(self.signals.dtype)
        )
        return bad == 0


def joined(parts: list[Factors], room: Tensor | None) -> Factors:
    """Chunks of samples of one entry as one; ``room`` holds the rows already where it was given."""
    head = parts[0]
    if room is not None and isinstance(head, Rows):
        return Rows(head.name, room, head.places, head.turned)
    if len(parts) == 1:
        return head
    if isinstance(head, Rows):
        rows = torch.cat([p.gradients for p in parts if isinstance(p, Rows)])
        return Rows(head.name, rows, head.places, head.turned)
    if isinstance(head, Outer):
        first = torch.cat([p.first for p in parts if isinstance(p, Outer)])
        second = torch.cat([p.second for p in parts if isinstance(p, Outer)])
        return Outer(head.name, first, second, head.place, head.bias)
    tokens = [p for p in parts if isinstance(p, Tokens)]
    starts = itertools.accumulate((len(p) for p in tokens), initial=0)
    sample = torch.cat([p.sample + start for p, start in zip(tokens, starts)])
    token, signals = torch.cat([p.token for p in tokens]), torch.cat([p.signals for p in tokens])
    return Tokens(head.name, sample, token, signals, sum(map(len, tokens)), tokens[0].place)


def tiles(rows: int, columns: int, same: bool) -> Iterator[tuple[slice, slice]]:
    """Tiles of rows of a block of inner products; of a symmetric one only what lies left of the diagonal."""
    for start in range(0, rows, _TILE):
        stop = min(start + _TILE, rows)
        yield slice(start, stop), slice(0, stop if same else columns)
