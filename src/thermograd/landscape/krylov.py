r"""The iteration behind :func:`~thermograd.landscape.spectrum.eigenpairs`: a Krylov basis grown, compressed, resumed.

A basis is kept together with its image under the operator, so that residuals are the true ones at any moment. It
opens with a few steps in blocks of two vectors and goes on with single vectors, which need the fewest products: all
wanted pairs share one polynomial. (Explicit matrices, which multiply four vectors at the cost of one, take blocks of
four.) A Krylov space of two start vectors shows each eigenvalue at most twice, so when a wanted one does appear twice
within its residuals, further copies are looked for from fresh random vectors, for as many steps as the rate of
convergence asks for. Where that rate says that gaps of the size of the tolerance are not resolved, residuals are
brought further down.
"""

from __future__ import annotations

import dataclasses
import math
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ..errors import ConvergenceError, InputError, StoreError
from ..progress import bar
from .operators import Operator

__all__ = ["Basis", "Krylov", "KrylovState", "Which", "rounding_floor", "wanted"]

Which = Literal["LA", "SA", "LM", "BE"]

_OPENING = 2  # steps in blocks of two
_WIDE = 4  # block in which more copies are looked for where a search with one vector found some
_CHECKS = {1: (8, 80), _WIDE: (5, 40)}  # fewest and most steps of a search, by its block
_GROWTH = 100  # by which a missed copy grows in a search, over what the Krylov space shows of the rest
_LEAST, _PAST = 3, 10  # steps over which the rate of convergence is measured
_RESOLVED = 30  # gaps below so many tolerances converge too slowly to tell neighbours apart at the tolerance
_MARGIN = 10  # by which residuals must then fall below it
_ROUNDING = 50  # residuals below this many units of rounding of the norm cannot be lowered
_SAVE_EVERY = 60.0  # seconds between two writes of a checkpoint


def rounding_floor(norm: Any, like: Tensor) -> float:
    """The residual below which rounding rules, for an operator of that norm."""
    return _ROUNDING * torch.finfo(like.dtype).eps * float(norm)


def wanted(values: Tensor, k: int, which: Which) -> Tensor:
    """Positions of the k wanted among ``values``, the most extreme first."""
    k = min(k, len(values))
    if which == "LM":
        return values.abs().argsort(descending=True, stable=True)[:k]
    descending = values.argsort(descending=True, stable=True)
    if which == "LA":
        return descending[:k]
    if which == "SA":
        return descending.flip(0)[:k]
    top, bottom = descending[: (k + 1) // 2], descending.flip(0)[: k // 2]
    merged = [p for pair in zip(top, bottom) for p in pair] + list(top[len(bottom) :])
    return torch.stack(merged)


@dataclass(frozen=True)
class Basis:
    """An orthonormal basis, its image under the operator, and the eigendecomposition of the projection.

    Rows of the two stores beyond ``width`` are room to grow and mean nothing. Replaced as a whole, so that an
    interrupt never finds it half changed.
    """

    V: Tensor  # [room, P], orthonormal rows
    AV: Tensor  # [room, P]
    T: Tensor  # [m, m] = V A V^T
    values: Tensor  # [m] Ritz values, ascending
    coefficients: Tensor  # [m, m]

    @classmethod
    def of(cls, V: Tensor, AV: Tensor, T: Tensor) -> Basis:
        return cls(V, AV, T, *torch.linalg.eigh(T))

    @property
    def width(self) -> int:
        return len(self.T)

    @property
    def floor(self) -> float:
        """The residual below which rounding rules, with the operator's norm taken from the Ritz values."""
        return rounding_floor(self.values.abs().max(), self.values)

    def vectors(self, chosen: Tensor) -> Tensor:
        """Ritz vectors at positions ``chosen``, [j, P]."""
        return self.coefficients[:, chosen].T @ self.V[: self.width]

    def residuals(self, chosen: Tensor) -> Tensor:
        """A v - a v of the Ritz pairs at positions ``chosen``, [j, P]."""
        turn = self.coefficients[:, chosen].T
        images = turn @ self.AV[: self.width]
        return images.addcmul_(self.vectors(chosen), self.values[chosen][:, None], value=-1)

    def compressed(self, chosen: Tensor) -> Basis:
        """The span of the Ritz vectors at positions ``chosen``, in stores of its own."""
        turn = self.coefficients[:, chosen].T
        V, AV = torch.empty_like(self.V), torch.empty_like(self.AV)
        torch.mm(turn, self.V[: self.width], out=V[: len(chosen)])
        torch.mm(turn, self.AV[: self.width], out=AV[: len(chosen)])
        return Basis.of(V, AV, torch.diag(self.values[chosen]))

    def cut(self) -> Basis:
        """A copy without room to grow."""
        return Basis(self.V[: self.width].clone(), self.AV[: self.width].clone(), self.T, *torch.linalg.eigh(self.T))


@dataclass(frozen=True)
class KrylovState:
    """Where an iteration stood: with the operator and the options, all that is needed to go on as if never stopped."""

    options: tuple[Any, ...]
    basis: Basis | None
    random: Tensor
    products: int
    settled: Tensor | None  # [k] Ritz values found converged; NaN where not yet
    opening: int  # steps left of the opening
    block: int
    checking: int  # steps left of a search for copies
    before: Tensor | None  # wanted values when that search began
    checked: bool
    copies: bool  # whether a search has found some
    trail: tuple[float, ...]  # residual of the last wanted pair over what it must be, in the last steps
    margin: float  # by which the residuals must be below the tolerance

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write to a file, whole or not at all."""
        state = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        basis = self.basis.cut() if self.basis is not None else None
        state["basis"] = None if basis is None else (basis.V, basis.AV, basis.T)
        part = Path(f"{path}.part")
        torch.save(state, part)
        part.replace(path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> KrylovState:
        """Read what :meth:`save` wrote.

        Raises:
            StoreError: the file is not such a state.
        """
        try:
            state = torch.load(path, weights_only=True)
            basis = state.pop("basis")
            return cls(basis=None if basis is None else Basis.of(*basis), **state)
        except (RuntimeError, TypeError, KeyError, EOFError, ValueError, AttributeError) as error:
            raise StoreError(
                f"{path} does not hold the state of an eigenpair iteration ({type(error).__name__})",
                remedy="remove the file to start anew",
            ) from error
        except Exception as error:  # unpickling meets whatever a file may hold
            raise StoreError(f"{path} cannot be read: {error}", remedy="remove the file to start anew") from error


class Krylov:
    """One run of thick-restart Lanczos; see the module.

    Attributes:
        basis: the basis as it stands.
        products: products with single vectors so far.
    """

    def __init__(self, operator: Operator, k: int, which: Which, tol: float, seed: int, budget: int):
        self.operator, self.k, self.which, self.tol, self.budget = operator, k, which, tol, budget
        self.size = operator.shape[0]
        self.options = (self.size, str(operator.dtype), k, which, tol, seed)
        self.keep = k + max(_WIDE, k // 2)
        self.most = max(2 * k + 6 * _WIDE, self.keep + 6 * _WIDE, 40)
        self.random = torch.Generator().manual_seed(seed)
        self.usual = operator.at_once
        self.products, self.block, self.opening = 0, max(2, self.usual), _OPENING
        self.checking, self.checked, self.copies = 0, False, False
        self.trail: tuple[float, ...] = ()
        self.margin = 1.0
        self.before: Tensor | None = None
        self.basis: Basis | None = None
        self.settled: Tensor | None = None
        self.state: KrylovState = self._state()

    # ------------------------------------------------------------------ running and resuming

    @property
    def bytes(self) -> int:
        """Memory of the basis and its image when full."""
        return 2 * (self.most + _WIDE) * self.size * torch.empty(0, dtype=self.operator.dtype).element_size()

    def run(self, start: Tensor | None, checkpoint: str | os.PathLike[str] | None = None) -> bool:
        """Iterate until all wanted pairs have converged or the budget is spent; whether it was interrupted."""
        name = f"eigenpairs, {self.k} wanted"
        saved = time.monotonic()
        try:
            with bar(f"{name}, basis up to {self.bytes / 2**20:.0f} MiB") as self.progress:
                if self.basis is None:
                    self._open(start)
                while self.products < self.budget:
                    self.state = self._state()
                    if checkpoint is not None and time.monotonic() - saved > _SAVE_EVERY:
                        self.state.save(checkpoint)
                        saved = time.monotonic()
                    if not self._step():
                        break
                self.state = self._state()
        except KeyboardInterrupt:
            if checkpoint is not None and self.state.basis is not None:
                self.state.save(checkpoint)
            self.resume(self.state)
            return True
        return False

    def _state(self) -> KrylovState:
        names = [field.name for field in dataclasses.fields(KrylovState)]
        held = {name: getattr(self, name) for name in names if name != "random"}
        return KrylovState(random=self.random.get_state(), **held)

    def resume(self, state: KrylovState) -> None:
        """Go back, or on, to a state.

        Raises:
            InputError: the state is of another operator or of other options.
        """
        if tuple(state.options) != self.options:
            names = ("size", "dtype", "k", "which", "tol", "seed")
            other = [n for n, a, b in zip(names, state.options, self.options) if a != b]
            raise InputError(
                f"the state to resume from was made with another {', '.join(other)}",
                expected="the operator and the options of the interrupted call",
            )
        for field in dataclasses.fields(state):
            if field.name != "random":
                setattr(self, field.name, getattr(state, field.name))
        self.random.set_state(state.random)
        self.state = state
        basis = self.basis
        if basis is not None and len(basis.V) < self.most + _WIDE:  # it came from a file, without room to grow
            V, AV = self._room(basis.V.to(self.operator.device)), self._room(basis.AV.to(self.operator.device))
            V[: basis.width], AV[: basis.width] = basis.V[: basis.width], basis.AV[: basis.width]
            self.basis = Basis.of(V, AV, basis.T.to(self.operator.device))

    def _room(self, like: Tensor) -> Tensor:
        return like.new_empty(self.most + _WIDE, self.size)

    # ------------------------------------------------------------------ the steps

    def _open(self, start: Tensor | None) -> None:
        if start is None:
            directions = self._normal(self.block)
        else:
            # a random vector beside the given ones, since these may miss a wanted direction altogether
            directions = torch.cat([start[: self.keep], self._normal(max(1, self.block - len(start)))])
            self.opening = self.opening if len(directions) == self.block else 0
        self._expand(directions)

    def _step(self) -> bool:
        """One block of products; False when there is nothing left to do."""
        basis = self._now()
        if self.opening:
            self.opening -= 1
            directions: Tensor | None = basis.AV[basis.width - self.block : basis.width]
        elif self.checking:
            self.checking -= 1
            # on along the Krylov space of the random vectors
            directions = basis.AV[basis.width - self.block : basis.width]
            if not self.checking:
                directions = self._after_check()
        else:
            self.block = _WIDE if self.copies else self.usual
            directions = self._unconverged()
            if directions is None and self._slow():
                self.margin, self.settled = _MARGIN, None
                directions = self._unconverged()
            if directions is None and not self.checked and self._repeated():
                directions = self._begin_check()
        if directions is None:
            return False
        self._make_room(len(directions))
        self._expand(directions)
        return True

    def _slow(self) -> bool:
        """Whether convergence was so slow that a neighbour may stand for a wanted eigenvalue.

        Lanczos converges by exp(-2 sqrt(gap / spread)) a step, so the rate tells the gap that the space resolves. Where
        that is not much more than the tolerance, a residual within it may hide an eigenvalue that lies further out but
        that the start vectors hardly contain; it grows at the same slow rate, and while it does, residuals stay.
        """
        basis = self._now()
        rate = self._rate()
        if self.margin > 1 or rate is None:
            return False
        last = float(basis.values[wanted(basis.values, self.k, self.which)[-1]])
        return float(basis.values[-1] - basis.values[0]) * rate**2 < _RESOLVED * self.tol * abs(last)

    def _rate(self) -> float | None:
        """Half the logarithm by which the residual of the slowest pair fell a step; None when that is not known."""
        steps = len(self.trail) - 1
        if steps < _LEAST or not 0 < self.trail[-1] < math.inf:
            return None
        return max(0.0, math.log(self.trail[0] / self.trail[-1]) / (2 * steps))

    def _repeated(self) -> bool:
        """Whether a wanted eigenvalue appears as often as the Krylov space can show it: twice, within the residuals."""
        basis = self._now()
        chosen = wanted(basis.values, self.k, self.which)
        values, order = basis.values[chosen].sort()
        reach = basis.residuals(chosen).norm(dim=1)[order] + 5 * basis.floor
        return len(values) < self.k or bool((values.diff() <= reach[1:] + reach[:-1]).any())

    def _begin_check(self) -> Tensor:
        basis = self._now()
        if basis.width > self.keep:
            self.basis = basis = basis.compressed(wanted(basis.values, self.keep, self.which))
        self.before = basis.values[wanted(basis.values, self.k, self.which)]
        self.block = _WIDE if self.copies or self.usual > 1 else 1
        fewest, most = _CHECKS[self.block]
        rate = self._rate() or 1.0
        self.checking = min(max(fewest, math.ceil(math.log(_GROWTH) / (2 * rate))), most)
        return self._normal(self.block)

    def _after_check(self) -> Tensor | None:
        """Whether the search found copies that were missed: then on with them, in wide blocks."""
        basis = self._now()
        after = basis.values[wanted(basis.values, self.k, self.which)]
        before: Any = self.before
        self.settled, self.before, self.trail = None, None, ()  # every pair is looked at once more
        changed = len(after) != len(before) or bool(
            ((after - before).abs() > torch.clamp(self.tol * before.abs(), min=basis.floor)).any()
        )
        self.checked, self.copies = not changed, changed or self.copies
        self.block = _WIDE if self.copies else self.usual
        directions = self._unconverged()
        if directions is None and changed:
            return self._begin_check()
        return directions

    def _unconverged(self) -> Tensor | None:
        """Residual directions of the first unconverged wanted pairs, a block of them; None when all converged."""
        basis = self._now()
        chosen = wanted(basis.values, self.k, self.which)
        values = basis.values[chosen]
        bound = torch.clamp(self.tol / self.margin * values.abs(), min=basis.floor)
        if self.settled is None or len(self.settled) != len(values):
            self.settled = torch.full_like(values, torch.nan)
        settled = self.settled.clone()
        open_ = ~((values - settled).abs() <= bound)
        found: list[Tensor] = []
        last = [chosen.new_tensor([self.k - 1])] if len(values) == self.k else []  # the slowest pair
        for part in open_.nonzero().flatten().split(self.block):
            residual = basis.residuals(chosen[torch.cat([part, *last])])
            norms = residual.norm(dim=1)
            if last:
                self.trail, last = (*self.trail[-_PAST:], float(norms[-1] / bound[-1])), []
            residual, norms = residual[: len(part)], norms[: len(part)]
            bad = norms > bound[part]
            settled[part] = torch.where(bad, torch.nan, values[part])
            found += list(residual[bad] / norms[bad][:, None])
            if len(found) >= self.block:
                break
        self.settled = settled
        if not found and len(values) == self.k:
            return None
        rows = [torch.stack(found[: self.block])] if found else []
        missing = self.block - min(len(found), self.block)
        if missing:
            # pairs just outside the wanted ones: with their residuals the block stays the next Krylov block
            guard = basis.residuals(wanted(basis.values, self.k + missing, self.which)[self.k :])
            rows += [guard, self._normal(missing - len(guard))]
        return torch.cat(rows)

    def _make_room(self, more: int) -> None:
        """Compress the basis when it is full."""
        basis = self._now()
        if basis.width + more > self.most:
            self.basis = basis.compressed(wanted(basis.values, self.keep, self.which))

    def _expand(self, directions: Tensor) -> None:
        old = self.basis
        m = old.width if old else 0
        V, AV = (old.V, old.AV) if old else (self._room(directions), self._room(directions))
        new = self._orthonormal(V[:m], directions)
        began = time.perf_counter()
        product = (self.operator @ new.T).T
        self._report(len(new), time.perf_counter() - began)
        end = m + len(new)
        V[m:end], AV[m:end] = new, product
        corner = new @ product.T
        if old is None:
            _refuse_asymmetric(corner, product)
            self.basis = Basis.of(V, AV, (corner + corner.T) / 2)
            return
        side = V[:m] @ product.T
        T = torch.cat([torch.cat([old.T, side], 1), torch.cat([side.T, (corner + corner.T) / 2], 1)], 0)
        self.basis = Basis.of(V, AV, T)

    def _report(self, columns: int, seconds: float) -> None:
        first = self.products == 0
        self.products += columns
        text = None
        if first:
            text = (
                f"eigenpairs, {self.k} wanted, {seconds / columns:.2g} s a product, basis {self.bytes / 2**20:.0f} MiB"
            )
        self.progress.advance(columns, text)

    def _orthonormal(self, V: Tensor, directions: Tensor) -> Tensor:
        """Orthonormal rows orthogonal to the basis; directions that vanish are replaced by random ones."""
        tiny = torch.finfo(directions.dtype).tiny
        lost = 1e3 * torch.finfo(directions.dtype).eps
        for _attempt in range(10):
            unit = directions / directions.norm(dim=1, keepdim=True).clamp_min(tiny)
            rows, size = _orthonormal_rows(unit - (unit @ V.T) @ V)
            gone = size < lost
            if not bool(gone.any()):
                # projecting once leaves rounding of the size of what was taken out
                for _ in range(1 if float(size.min()) > 0.1 else 2):
                    rows = _orthonormal_rows(rows - (rows @ V.T) @ V)[0]
                return rows
            directions = torch.where(gone[:, None], self._normal(len(directions)), directions)
        raise ConvergenceError("no direction orthogonal to the basis was found", remedy="ask for fewer eigenpairs")

    def _normal(self, count: int) -> Tensor:
        sample = torch.randn(self.size, count, generator=self.random, dtype=torch.float64)
        return sample.T.to(self.operator.device, self.operator.dtype).contiguous()

    def _now(self) -> Basis:
        if self.basis is None:
            raise ConvergenceError("no product was made")
        return self.basis


def _orthonormal_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Orthonormal rows of the same span, and how much of each row was new."""
    if len(rows) == 1:
        size = rows.norm(dim=1)
        return rows / size.clamp_min(torch.finfo(rows.dtype).tiny), size
    Q, R = torch.linalg.qr(rows.T)
    return Q.T.contiguous(), R.diagonal().abs()


def _refuse_asymmetric(corner: Tensor, product: Tensor) -> None:
    """Compare v.A w with w.A v on the random start vectors."""
    difference = float((corner - corner.T).abs().max())
    if difference > 3 * torch.finfo(corner.dtype).eps ** 0.5 * float(product.norm(dim=1).max()):
        raise InputError(
            f"the operator is not symmetric: v.A w and w.A v differ by {difference:.2g}",
            expected="a symmetric operator",
        )
