r"""What a finished task leaves in the weights, by way of the network's outputs.

The Gauss-Newton matrix of a mean loss is the second moment of *scores* pulled back to the weights,

.. math::
    G = \frac1N \sum_{i,m} (J_i^\top s_{im}) (J_i^\top s_{im})^\top, \quad \sum_m s_{im} s_{im}^\top = \nabla_f^2 \ell_i

with :math:`J_i = \partial f_i / \partial\theta`. For cross-entropy the second derivative is diag(p) - p p^T. It
vanishes where the network is sure, though the loss does not stay flat: a later task that raises the logit of a new
class on old inputs pays nothing up to the point where predictions turn over. A *temperature* T takes :math:`p` from
:math:`f / T` instead, that is, from further away from the corner of the simplex; at infinite temperature every logit
counts alike, and :math:`\delta\theta^\top G\, \delta\theta` is the mean square change of the centred logits over the
number of classes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from ..errors import InputError, NotAvailableError
from ..landscape import sampled_fisher
from ..noise.perlayer import PerLayer
from ..problem import Problem
from ..progress import bar

__all__ = ["check_temperature", "output_scores", "pulled_back", "tempered"]

_REPEATED = 2**25  # numbers in the inputs that are repeated for every score, at a time
_APART = 104_729  # seeds of the labels of different blocks of samples lie so far apart
_MAX_OUTPUTS = 4096  # beyond that many outputs their second derivative is not written out


def check_temperature(temperature: float) -> float:
    """A temperature as a number.

    Raises:
        InputError: it is below 1 or no number.
    """
    if isinstance(temperature, bool) or not isinstance(temperature, int | float) or not temperature >= 1:
        raise InputError(f"temperature is {temperature!r}", expected="a number >= 1; math.inf weighs all logits alike")
    return float(temperature)


class _Tempered:
    """A loss whose second derivative at the outputs f is diag(p) - p p^T with p = softmax(f / T)."""

    def __init__(self, temperature: float):
        self.temperature = temperature

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Losses [b] of outputs [b, C, ...]."""
        if math.isinf(self.temperature):
            centred = outputs - outputs.mean(1, keepdim=True)
            return 0.5 * centred.square().flatten(1).sum(1) / outputs.shape[1]
        scaled = nn.functional.cross_entropy(outputs / self.temperature, targets, reduction="none")
        return self.temperature**2 * scaled.flatten(1).mean(1) if scaled.ndim > 1 else self.temperature**2 * scaled


def _is_cross_entropy(problem: Problem) -> bool:
    kind = problem.criterion
    if isinstance(kind, nn.CrossEntropyLoss):  # smoothed labels too add up to 1: the same second derivative
        return kind.weight is None
    return kind is nn.functional.cross_entropy


def tempered(problem: Problem, temperature: float) -> Problem:
    """The same network and data with the loss at another temperature; the problem itself at T = 1.

    Raises:
        InputError: the loss is no plain cross-entropy.
    """
    if temperature == 1:
        return problem
    if not _is_cross_entropy(problem) or problem.model is None:
        raise InputError(
            f"temperature is {temperature:g} with another loss than plain cross-entropy",
            expected="torch.nn.CrossEntropyLoss() without class weights",
            remedy="leave temperature at 1",
        )
    return _like(problem, _Tempered(temperature), (problem.inputs, problem.targets))


def _like(problem: Problem, loss: object, data: tuple[object, object]) -> Problem:
    assert problem.model is not None
    return Problem(
        problem.model, loss, data, params=problem.names, device=problem.device, dtype=problem.dtype,
        chunk_size=problem._chunk_size,
    )  # fmt: skip


def output_scores(
    problem: Problem, index: Tensor, temperature: float = 1.0, draws: int | None = None, seed: int = 0
) -> Tensor:
    """Scores [m, n, C] of n samples, such that the sum over m of s s^T is the loss's second derivative at the outputs.

    With ``draws`` it is so in expectation: labels are drawn from the model's own output.

    Raises:
        InputError: outputs of another shape than [n, C], or too many.
    """
    if problem.model is None:
        raise NotAvailableError("a plain function of the weights has no outputs", remedy="build Problem(model, ...)")
    if draws is not None:
        if temperature != 1:
            raise InputError("labels are drawn at temperature 1 only", remedy="leave draws at None")
        operator = sampled_fisher(problem, index=index, draws=draws, seed=seed)
        return operator.scores.flatten(2) / math.sqrt(draws)
    parts = [_chunk_scores(tempered(problem, temperature), block) for block in index.split(problem.chunk_size)]
    return torch.cat(parts, dim=1)


def _chunk_scores(problem: Problem, index: Tensor) -> Tensor:
    with torch.no_grad():
        outputs, targets = problem.differentiable_outputs(problem.theta, index)
    if outputs.ndim > 2 or (outputs.ndim == 2 and outputs.shape[1] > _MAX_OUTPUTS):
        raise InputError(
            f"the network's output for {len(index)} samples has shape {tuple(outputs.shape)}",
            expected=f"[n] or [n, C] with C up to {_MAX_OUTPUTS}",
            remedy="draw labels instead of taking the expectation over them: draws=1, at temperature 1",
        )
    if _is_cross_entropy(problem) and not targets.is_floating_point():
        p = outputs.softmax(1)  # [n, C]; sum_c p_c (e_c - p)(e_c - p)^T = diag(p) - p p^T
        eye = torch.eye(p.shape[1], dtype=p.dtype, device=p.device)
        return p.T.sqrt()[:, :, None] * (eye[:, None] - p)  # [C, n, C]
    flat = outputs.reshape(len(outputs), -1)
    point = flat.clone().requires_grad_()
    losses = problem.output_sample_losses(point.view_as(outputs), targets)
    (slope,) = torch.autograd.grad(losses.sum(), point, create_graph=True)
    rows = [
        torch.autograd.grad(slope[:, c].sum(), point, retain_graph=True, materialize_grads=True)[0]
        for c in range(flat.shape[1])
    ]
    values, vectors = torch.linalg.eigh(torch.stack(rows, dim=1))  # [n, C], [n, C, C]
    return (vectors * values.clamp_min(0).sqrt()[:, None]).movedim(2, 0).detach()  # [C, n, C]


def _along(outputs: Tensor, scores: Tensor) -> Tensor:
    """Outputs [b, ...] along scores [b, C]: [b]."""
    return (outputs.reshape(len(outputs), -1) * scores).sum(1)


def score_problem(problem: Problem, index: Tensor, scores: Tensor) -> Problem:
    """A problem whose m n sample gradients are J_i^T s_im; its empirical Fisher matrix times m is G over the n."""
    inputs, _ = problem._samples.take(index, problem.device, problem.dtype)
    repeated = tree_map(lambda x: x.repeat(len(scores), *[1] * (x.ndim - 1)), inputs)
    return _like(problem, _along, (repeated, scores.flatten(0, 1)))


def pulled_back(
    problem: Problem, index: Tensor, temperature: float, draws: int | None, seed: int
) -> Iterator[tuple[PerLayer, int]]:
    """The gradients J_i^T s_im layer by layer for as many samples at a time as memory allows, and the number of m.

    They are in the order of m, then i; so are a layer's inputs, which are alike for all m.
    """
    with torch.no_grad():
        outputs, _ = problem.differentiable_outputs(problem.theta, index[:1])
    each = draws or outputs.numel()  # inputs are repeated for every score
    numbers = each * sum(leaf[0].numel() for leaf in tree_leaves(problem.inputs))
    blocks = index.split(max(1, _REPEATED // max(1, numbers)))
    with bar("curvature of the finished task", len(blocks)) as progress:
        for i, block in enumerate(blocks):
            scores = output_scores(problem, block, temperature, draws, seed + _APART * i)
            yield PerLayer(score_problem(problem, block, scores)), len(scores)
            progress.advance()
