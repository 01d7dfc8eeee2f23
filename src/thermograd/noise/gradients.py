"""Per-sample gradients in blocks, and their products with directions."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError, NonFiniteError, ThermogradWarning
from ..landscape.displaced import as_directions
from ..landscape.engine import out_of_memory
from ..problem import Problem
from ..progress import bar
from .perlayer import PerLayer

__all__ = [
    "by_layers",
    "combinations",
    "deviations",
    "gradient_blocks",
    "losses_and_slopes",
    "projections",
    "projections_so_far",
    "sample_index",
    "subsample",
]


_LARGE = 2**22  # numbers in all per-sample gradients from which they are not formed if layers allow it

_CANCELS = 100.0  # |g|^2 over Tr C up to which squared distances are had from lengths


def by_layers(problem: Problem, samples: int) -> bool:
    """Whether the per-sample gradients are so many numbers that they are better taken layer by layer."""
    return problem.model is not None and samples * problem.P > _LARGE


def sample_index(problem: Problem, index: Any) -> Tensor:
    """The chosen samples as one vector of indices."""
    return torch.cat(problem._blocks(index))


def subsample(problem: Problem, index: Any, n: int | None, seed: int) -> Tensor:
    """``n`` of the chosen samples without replacement, in order; all of them when n is None or larger."""
    chosen = sample_index(problem, index)
    if n is None or n >= len(chosen):
        return chosen
    if n < 2:
        raise InputError(f"n is {n}", expected="at least 2 samples")
    picked = np.random.default_rng(seed).choice(len(chosen), size=int(n), replace=False)
    return chosen[torch.as_tensor(np.sort(picked))]


def gradient_blocks(problem: Problem, theta: Tensor, index: Any, description: str) -> Iterator[tuple[Tensor, Tensor]]:
    """Blocks of sample indices with their gradients ``[b, P]``, as memory allows; out of memory halves the block."""
    chosen = sample_index(problem, index)
    size, start = problem.gradient_chunk, 0
    memory = size * problem.P * torch.finfo(problem.dtype).bits // 8
    with bar(description, len(chosen), bytes=memory) as progress:
        while start < len(chosen):
            block = chosen[start : start + size]
            try:
                gradients = problem.sample_gradients(theta, block)
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error) or size == 1:
                    raise
                size = max(1, size // 2)
                continue
            yield block, gradients
            start += len(block)
            progress.advance(len(block))


def projections(problem: Problem, directions: Any, theta: Any = None, index: Any = None) -> Tensor:
    """Per-sample gradients along directions, ``[n, k]``: the derivative of each sample's loss along each."""
    theta, columns = problem.as_theta(theta), as_directions(problem, directions)
    chosen = sample_index(problem, index)
    if by_layers(problem, len(chosen)):
        return PerLayer(problem, theta, chosen).project(columns.T.contiguous())
    blocks = gradient_blocks(problem, theta, chosen, "gradients along directions")
    return torch.cat([gradients @ columns for _, gradients in blocks])


def projections_so_far(problem: Problem, directions: Any, theta: Any = None, index: Any = None) -> Tensor:
    """As :func:`projections`; after Ctrl-C of the samples that are done, a random part, with a warning."""
    theta, columns = problem.as_theta(theta), as_directions(problem, directions)
    chosen = sample_index(problem, index)
    order = torch.randperm(len(chosen), generator=torch.Generator().manual_seed(0)).to(chosen.device)
    rows = columns.T.contiguous()  # [k, P]
    found: list[Tensor] = []
    try:
        if by_layers(problem, len(chosen)):
            layers = PerLayer(problem, theta, chosen[order])
            memory = layers.block_size * layers.sample_bytes
            with bar("gradients along directions", len(chosen), bytes=memory) as progress:
                while (start := sum(map(len, found))) < len(chosen):
                    pieces = layers.block_from(start)
                    found.append(torch.stack([piece.project(rows) for piece in pieces]).sum(0))
                    progress.advance(len(found[-1]))
        else:
            for _, gradients in gradient_blocks(problem, theta, chosen[order], "gradients along directions"):
                found.append(gradients @ columns)
    except KeyboardInterrupt:
        done = sum(map(len, found))
        if done < 2:
            raise
        warnings.warn(f"interrupted: {done} of {len(chosen)} samples are used", ThermogradWarning, stacklevel=3)
    slopes = torch.cat(found)
    return slopes if len(slopes) < len(chosen) else slopes[order.argsort().to(slopes.device)]


def combinations(problem: Problem, theta: Tensor, chosen: Tensor, count: int, seed: int) -> Tensor:
    """Random signed sums of the deviations of per-sample gradients from their mean, ``[P, count]``.

    Each has the covariance of the per-sample gradients (over the samples' number, not one less).
    """
    random = torch.Generator().manual_seed(seed)
    signs = (2 * torch.randint(0, 2, (len(chosen), count), generator=random) - 1).to(problem.device, problem.dtype)
    signs = signs - signs.mean(0)  # takes the mean gradient off
    if by_layers(problem, len(chosen)):
        return PerLayer(problem, theta, chosen).lift(signs).T / math.sqrt(len(chosen))
    out = torch.zeros(problem.P, count, dtype=problem.dtype, device=problem.device)  # [P, count]
    start = 0
    for block, rows in gradient_blocks(problem, theta, chosen, "combinations of per-sample gradients"):
        out += rows.T @ signs[start : start + len(block)]
        start += len(block)
    return out / math.sqrt(len(chosen))


def deviations(problem: Problem, theta: Tensor, chosen: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    """Squared distances of per-sample gradients from their mean, and products with the mean: ``[n]`` each.

    In a random order of the samples; after Ctrl-C those of the samples that are done, a random part, with a warning.
    """
    order = torch.randperm(len(chosen), generator=torch.Generator().manual_seed(0))
    shuffled, far, inner = chosen[order.to(chosen.device)], [], []
    size = float(gradient.double().square().sum())
    try:
        for squares, along in _squares_and_products(problem, theta, shuffled, gradient, size):
            far.append(squares)
            inner.append(along)
    except KeyboardInterrupt:
        if not far:
            raise
        done = sum(map(len, far))
        warnings.warn(f"interrupted: {done} of {len(chosen)} samples are used", ThermogradWarning, stacklevel=3)
    return torch.cat(far), torch.cat(inner)


def _squares_and_products(
    problem: Problem, theta: Tensor, chosen: Tensor, gradient: Tensor, size: float
) -> Iterator[tuple[Tensor, Tensor]]:
    """Blocks of squared distances and of products with the mean gradient, whose squared length is ``size``."""
    if not by_layers(problem, len(chosen)):
        yield from _from_rows(problem, theta, chosen, gradient)
        return
    layers, start = PerLayer(problem, theta, chosen), 0
    memory = layers.block_size * layers.sample_bytes
    with bar("lengths of per-sample gradients", len(chosen), bytes=memory) as progress:
        while start < len(chosen):
            pieces = layers.block_from(start)
            squares = torch.stack([piece.squares() for piece in pieces]).sum(0).double()
            stop = start + len(squares)
            if size < _CANCELS * (float(squares.mean()) - size):
                along = torch.stack([piece.project(gradient[None]) for piece in pieces]).sum(0)[:, 0].double()
                yield (squares - 2 * along + size).clamp_min(0), along
            else:  # rounding would be left of the difference
                yield from _from_rows(problem, theta, chosen[start:stop], gradient)
            start = stop
            progress.advance(len(squares))


def _from_rows(problem: Problem, theta: Tensor, chosen: Tensor, gradient: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    for _, rows in gradient_blocks(problem, theta, chosen, "per-sample gradients"):
        yield (rows - gradient).square().sum(1).double(), (rows @ gradient).double()


def losses_and_slopes(problem: Problem, theta: Tensor, block: Tensor, direction: Tensor) -> tuple[Tensor, Tensor]:
    """Sample losses ``[b]`` and their derivatives along one direction ``[b]``, by differentiating twice backwards.

    The gradient of the sum of u_i l_i is linear in u; pulling the direction back through it gives the slopes.

    Raises:
        NonFiniteError: a loss is not finite; the message names the first such sample.
    """
    leaf = theta.clone().requires_grad_()
    losses = problem.differentiable_sample_losses(leaf, block)  # [b]
    bad = (~torch.isfinite(losses.detach())).nonzero().flatten()
    if len(bad):
        raise NonFiniteError(
            f"the loss of sample {int(block[bad[0]])} is {float(losses.detach()[bad[0]])} at displaced weights",
            remedy="use smaller offsets",
        )
    if not losses.requires_grad:
        return losses, torch.zeros_like(losses)
    weights = torch.ones_like(losses).requires_grad_()
    (gradient,) = torch.autograd.grad(losses, leaf, weights, create_graph=True, materialize_grads=True)
    (slopes,) = torch.autograd.grad(gradient, weights, direction, materialize_grads=True)
    return losses.detach(), slopes
