r"""Does the size of a sample's loss go along with the size of its output gradient?"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError, ThermogradWarning
from ..measurement import Measurement, new_axes, quantity
from ..problem import Problem
from ..progress import bar
from ..statistics import bootstrap_weights, correlation
from .gradients import by_layers, subsample
from .perlayer import PerLayer

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["Decoupling", "decoupling"]

_STREAM = 2**30  # numbers in all output gradients that are looked at by default, block by block
_MOMENTS = 2**25  # numbers in the per-sample [K, K] matrices
_NUMBERS = 2**26  # numbers in the output gradients that are kept for the spectra where a layer has no rule
_GRAM = 2000  # rows of the Gram matrices of the spectra, samples times outputs
_RESAMPLES = 400


@dataclass(frozen=True)
class Decoupling(Measurement):
    """Noise covariance against its decoupled form; see :func:`decoupling`."""

    ratio: float = quantity(long_name="Tr C / Tr C_dec")
    stderr: float = quantity(long_name="standard error of the ratio, bootstrap over samples")
    trace: float = quantity(units="loss^2", long_name="Tr C")
    decoupled_trace: float = quantity(units="loss^2", long_name="Tr C_dec")
    eigenvalues: np.ndarray = quantity("mode", units="loss^2", long_name="eigenvalues of C")
    decoupled_eigenvalues: np.ndarray = quantity("mode", units="loss^2", long_name="eigenvalues of C_dec")
    spectrum_distance: float = quantity(long_name="median |log ratio| of the eigenvalues")
    correlation: float = quantity(long_name="correlation of l_i with |J_i|^2")
    correlation_stderr: float = quantity(long_name="its standard error, bootstrap over samples")
    samples: int = quantity(long_name="number of samples used for ratio and correlation")
    spectrum_samples: int = quantity(long_name="number of these used for the spectra")

    _primary = "ratio"

    def plot(self, ax: Axes | None = None) -> Axes:
        """Eigenvalues of both matrices against rank."""
        ax = new_axes(ax)
        for values, label in ((self.eigenvalues, "C"), (self.decoupled_eigenvalues, "decoupled")):
            kept = values > 1e-15 * max(values.max(), 1e-300)
            ax.loglog(np.arange(1, len(values) + 1)[kept], values[kept], "o-", ms=3, label=label)
        ax.set(xlabel="rank", ylabel="eigenvalue")
        ax.legend()
        return ax


def decoupling(
    problem: Problem, theta: Any = None, index: Any = None, n: int | None = None, k: int = 50, seed: int = 0
) -> Decoupling:
    r"""Test of the decoupling approximation behind "noise proportional to loss times curvature".

    With the output gradients :math:`r_i = \partial\ell_i/\partial f_i` and Jacobians :math:`J_i` ``[K, P]``,

    .. math::
        C = \frac1N \sum_i J_i^\top r_i r_i^\top J_i, \qquad
        C_\mathrm{dec} = \frac1N \sum_i J_i^\top R\, J_i, \quad R = \frac1N \sum_i r_i r_i^\top

    For one output and squared error, R is proportional to the mean loss and this is Mori et al. 2022, Eq. 7:
    :math:`\frac1N\sum \ell_i C_f^i \approx L\, \frac1N \sum C_f^i`. The mean gradient is not subtracted, as there.
    ``ratio`` is 1 where decoupling holds; above 1, samples with large loss have large output gradients.

    Args:
        problem: a problem built from a model.
        theta: weights ``[P]``; default: where the model stands now.
        index: the samples to draw from; default all N.
        n: how many samples to use; default all, or as many as can be gone through in reasonable time. The spectra
            take a random part of these when the Gram matrices of n K rows would be large, and a smaller one where
            a layer's inner products cannot be had without its gradients and those of all samples are too many to keep.
        k: how many eigenvalues to compare.
        seed: of the draw and the bootstrap.

    Raises:
        NotAvailableError: the problem has no outputs.
        InputError: k is not positive, or every output gradient vanishes.

    After Ctrl-C the samples that are done, a random part, are used, with a warning.

    >>> torch.manual_seed(0) is not None
    True
    >>> problem = Problem(torch.nn.Linear(3, 1), torch.nn.MSELoss(), (torch.randn(50, 3), torch.randn(50, 1)))
    >>> result = decoupling(problem)
    >>> abs(result.ratio - 1) < 1, result.samples
    (True, 50)
    """
    if k < 1:
        raise InputError(f"k is {k}", expected="at least 1")
    theta = problem.as_theta(theta)
    outputs = problem.differentiable_outputs(theta, [0])[0].numel()  # K
    if n is None:
        n = max(16, min(_STREAM // (outputs * problem.P), _MOMENTS // outputs**2))
    chosen = subsample(problem, index, n, seed)
    held = max(16, _NUMBERS // (outputs * problem.P))  # samples whose output gradients may be kept
    few = subsample(problem, chosen, max(16, _GRAM // outputs), seed)  # those of the spectra
    fewer = subsample(problem, chosen, min(len(few), held), seed)
    chosen = chosen[torch.randperm(len(chosen), generator=torch.Generator().manual_seed(seed))]
    losses, slopes = _output_gradients(problem, theta, chosen)  # [n], [n, K]
    second = slopes.T @ slopes / len(chosen)  # R [K, K]
    if not float(second.abs().max()) > 0:
        raise InputError("the loss does not depend on the outputs", expected="some output gradient that is not zero")
    root = _root(second)
    spectra = None
    if len(few) > held or by_layers(problem, len(few) * outputs):
        spectra = _by_layers(problem, theta, few, root, k)
    if spectra is None:
        few = fewer
    kept = torch.isin(chosen, few)  # [n]
    rows, decoupled, inner = [], [], []
    width = max(1, min(problem.gradient_chunk // outputs, len(chosen)))
    count, used = 0, None
    try:
        for part, jacobian in _jacobians(problem, theta, chosen, width):  # J [b, K, P]
            inner.append(jacobian @ jacobian.mT)
            count = part.stop
            if spectra is None:
                r, some = slopes[part][kept[part]], jacobian[kept[part]]
                rows.append(torch.einsum("bk,bkp->bp", r, some))
                decoupled.append(torch.einsum("jk,bkp->bjp", root, some).flatten(0, 1))
    except KeyboardInterrupt:
        if count < 16 or len(rows) + (spectra is not None) == 0 or not bool(kept[:count].any()):
            raise
        warnings.warn(f"interrupted: {count} of {len(chosen)} samples are used", ThermogradWarning, stacklevel=2)
    losses, slopes = losses[:count], slopes[:count]
    M = torch.cat(inner)[:count].double().cpu().numpy()  # [n, K, K] = J J^T
    output = slopes.double().cpu().numpy()
    ratios, traces = _ratios(output, M, np.full((1, count), 1 / count))
    weights = bootstrap_weights(count, _RESAMPLES, seed)
    spread = _ratios(output, M, weights)[0]
    sizes, sample_losses = np.trace(M, axis1=1, axis2=2), losses.double().cpu().numpy()
    pearson = correlation(sample_losses, sizes)
    if spectra is None:
        used = sum(map(len, rows))
        spectra = _spectrum(torch.cat(rows), used, k), _spectrum(torch.cat(decoupled)[: used * outputs], used, k)
    values, other = spectra
    return Decoupling(
        ratio=float(ratios[0]),
        stderr=float(spread.std(ddof=1)),
        trace=float(traces[0, 0]),
        decoupled_trace=float(traces[1, 0]),
        eigenvalues=values,
        decoupled_eigenvalues=other,
        spectrum_distance=_distance(values, other),
        correlation=pearson,
        correlation_stderr=_correlation_error(sample_losses, sizes, weights),
        samples=count,
        spectrum_samples=len(few) if used is None else used,
    )


def _output_gradients(problem: Problem, theta: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Sample losses [n] and their gradients with respect to the outputs [n, K]."""
    losses, slopes = [], []
    for block in chosen.split(problem.chunk_size):
        with torch.no_grad():
            outputs, targets = problem.differentiable_outputs(theta, block)
        outputs = outputs.detach().requires_grad_()
        part = problem.output_sample_losses(outputs, targets)
        problem._refuse_non_finite(part.detach(), block)
        (slope,) = torch.autograd.grad(part.sum(), outputs, materialize_grads=True)
        losses.append(part.detach())
        slopes.append(slope.reshape(len(block), -1))
    return torch.cat(losses), torch.cat(slopes)


def _jacobians(problem: Problem, theta: Tensor, chosen: Tensor, width: int) -> Iterator[tuple[slice, Tensor]]:
    """Output gradients [b, K, P] of blocks of samples, by vmap where the model allows it."""
    maps = problem._vmap_works
    memory = width * theta.numel() * problem.differentiable_outputs(theta, chosen[:1])[0].numel() * theta.element_size()
    with bar("output gradients", len(chosen), bytes=memory) as progress:
        for start in range(0, len(chosen), width):
            block = chosen[start : start + width]
            jacobian = None
            if maps:
                try:
                    jacobian = _mapped_jacobian(problem, theta, block)
                except Exception:  # an output that vmap cannot handle although the loss could be: go one by one
                    maps = False
            if jacobian is None:
                jacobian = torch.stack([_single_jacobian(problem, theta, one) for one in block.split(1)])
            progress.advance(len(block))
            yield slice(start, start + len(block)), jacobian.detach()


def _mapped_jacobian(problem: Problem, theta: Tensor, block: Tensor) -> Tensor:
    inputs, _ = problem._samples.take(block, problem.device, problem.dtype)

    def output(theta: Tensor, sample: Any) -> Tensor:
        one = torch.utils._pytree.tree_map(lambda leaf: leaf[None], sample)
        return problem._function.outputs(problem.unflatten(theta), one).flatten()

    with problem._function.context():
        return torch.func.vmap(torch.func.jacrev(output), in_dims=(None, 0))(theta, inputs)


def _single_jacobian(problem: Problem, theta: Tensor, one: Tensor) -> Tensor:
    leaf = theta.clone().requires_grad_()
    outputs = problem.differentiable_outputs(leaf, one)[0].flatten()
    rows = [torch.autograd.grad(f, leaf, retain_graph=True, materialize_grads=True)[0] for f in outputs]
    return torch.stack(rows)


def _root(matrix: Tensor) -> Tensor:
    """Symmetric square root of a positive semidefinite matrix."""
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp_min(0).sqrt()) @ vectors.T


def _ratios(r: np.ndarray, M: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Tr C / Tr C_dec, and both traces [2, resamples], for each set of sample weights [resamples, n]."""
    own = np.einsum("nj,njk,nk->n", r, M, r)  # |g_i|^2
    outer = np.einsum("nj,nk->njk", r, r).reshape(len(r), -1)
    trace = weights @ own
    decoupled = ((weights @ outer) * (weights @ M.reshape(len(r), -1))).sum(1)
    return trace / np.maximum(decoupled, 1e-300), np.stack([trace, decoupled])


def _correlation_error(x: np.ndarray, y: np.ndarray, weights: np.ndarray) -> float:
    """Bootstrap error of a correlation coefficient; zero when either is constant."""
    if correlation(x, y) == 0.0:
        return 0.0
    mean_x, mean_y = weights @ x, weights @ y
    cov = weights @ (x * y) - mean_x * mean_y
    size = (weights @ x**2 - mean_x**2) * (weights @ y**2 - mean_y**2)
    good = size > 0
    return float((cov[good] / np.sqrt(size[good])).std(ddof=1)) if good.sum() > 1 else 0.0


def _by_layers(
    problem: Problem, theta: Tensor, few: Tensor, root: Tensor, k: int
) -> tuple[np.ndarray, np.ndarray] | None:
    """Both spectra from inner products made layer by layer, for networks too large to hold their output gradients.

    The rows of the decoupled matrix are gradients of the combinations R^(1/2) f of the outputs. None where a
    parameter has no rule for its layer.
    """
    own = PerLayer(problem, theta, few)
    readouts = [PerLayer(problem, theta, few, readout) for readout in root]
    if not all(layers.complete for layers in (own, *readouts)):
        return None
    gram = readouts[0]._within_memory(lambda: _joint_gram(readouts))
    if gram is None:
        return None
    return _largest(own.gram(), len(few), k), _largest(gram, len(few), k)


def _joint_gram(readouts: list[PerLayer]) -> Tensor | None:
    """Inner products ``[K n, K n]`` of the gradients of K combinations of the outputs, blocks of samples at a time.

    None if the model calls other layers for other samples, so that no rule is safe.
    """
    first, outputs, count = readouts[0], len(readouts), len(readouts[0])
    blocks = list(torch.arange(count).split(max(1, first.block_size // outputs)))
    gram = torch.zeros(outputs, count, outputs, count, dtype=first.problem.dtype, device=first.problem.device)
    memory = gram.numel() * gram.element_size() + min(2, len(blocks)) * outputs * len(blocks[0]) * first.sample_bytes
    pieces = outputs * len(blocks)
    with bar("inner products of output gradients", pieces * (pieces + 1) // 2, bytes=memory) as progress:
        for a, mine in enumerate(blocks):
            left = [layers.factors(mine) for layers in readouts]
            for b, theirs in enumerate(blocks[: a + 1]):
                right = left if a == b else [layers.factors(theirs) for layers in readouts]
                if not all(layers.complete for layers in readouts):
                    return None
                rows, columns = _span(mine), _span(theirs)
                for i in range(outputs):
                    for j in range(i + 1 if a == b else outputs):
                        tile = gram[i, rows, j, columns]
                        for one, other in zip(left[i], right[j]):
                            tile += one.gram(other)
                        if (a, i) != (b, j):
                            gram[j, columns, i, rows] = tile.T
                        progress.advance()
    return gram.view(outputs * count, outputs * count)


def _span(block: Tensor) -> slice:
    """A block of successive positions as a slice."""
    return slice(int(block[0]), int(block[-1]) + 1)


def _largest(gram: Tensor, count: int, k: int) -> np.ndarray:
    values = torch.linalg.eigvalsh(gram).flip(0)[:k].clamp_min(0) / count
    return values.double().cpu().numpy()


def _spectrum(rows: Tensor, count: int, k: int) -> np.ndarray:
    """The k largest eigenvalues of rows^T rows / count, from the smaller of its two Gram matrices."""
    gram = rows @ rows.T if rows.shape[0] <= rows.shape[1] else rows.T @ rows
    values = torch.linalg.eigvalsh(gram).flip(0)[:k].clamp_min(0) / count
    return values.double().cpu().numpy()


def _distance(a: np.ndarray, b: np.ndarray) -> float:
    """Median |log(a/b)| over the eigenvalues that both have above rounding."""
    both = min(len(a), len(b))
    a, b = a[:both], b[:both]
    kept = (a > 1e-12 * a.max()) & (b > 1e-12 * b.max())
    if not kept.any():
        raise InputError("there is no positive eigenvalue to compare", expected="gradients that are not all zero")
    return float(np.median(np.abs(np.log(a[kept] / b[kept]))))
