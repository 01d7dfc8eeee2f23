r"""How tangents pass through elementary operations, a block of k at once.

A rule is called once, at the primal evaluation, with the operation, its arguments, and the same arguments with a
slot where one carries a tangent. It returns a ``push``: a function from the tangents known so far to the tangent of
the result, ``[k, ...]``, holding no more of the primal than it needs. A tangent that is known to be zero is None.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from .pooling import Places
from .products import product

__all__ = ["CONSTANT", "FRESH", "RULES", "Push", "Tangents", "channels_last_arguments", "generic_push"]


class Tangents(dict[Any, Any]):
    """The tangents known so far, by node; called with a node, gives its tangent or None.

    Attributes:
        spare: nodes whose tangents the present step may overwrite.
    """

    spare: Any = ()

    def __call__(self, node: Any) -> Any:
        return self.get(node)


Push = Callable[[Tangents], Any]
_aten = torch.ops.aten


def _is_slot(leaf: Any) -> bool:
    return hasattr(leaf, "node") and type(leaf).__name__ == "_Slot"


def _tangent(known: Tangents, slot: Any) -> Any:
    return known(slot.node) if slot is not None else None


def _slots(which: Any) -> list[Any]:
    return [leaf for leaf in tree_flatten(which)[0] if _is_slot(leaf)]


# ---------------------------------------------------------------------- anything


def generic_push(run: Any, arguments: Any, keywords: Any, which: Any, value: Any) -> Push:
    """Forward-mode derivative of one operation, mapped over the block; partial where some tangents are zero."""
    leaves, spec = tree_flatten(arguments)
    spots = _spots(arguments, which)
    outputs = tree_flatten(value)[0]
    keep = [i for i, leaf in enumerate(outputs) if isinstance(leaf, Tensor) and leaf.is_floating_point()]

    def function(known: list[int]) -> Callable[..., tuple[Tensor, ...]]:
        def inner(*given: Tensor) -> tuple[Tensor, ...]:
            filled = list(leaves)
            for position, tensor in zip(known, given):
                filled[position] = tensor
            result = tree_flatten(run(*tree_unflatten(filled, spec), **keywords))[0]
            return tuple(result[i] for i in keep)

        return inner

    def push(known: Tangents) -> Any:
        found = [(position, known(slot.node)) for position, slot in spots]
        live = [(position, tangent) for position, tangent in found if tangent is not None]
        if not live:
            return None
        positions = [position for position, _ in live]
        primals = tuple(leaves[position] for position in positions)

        def one(*tangents: Tensor) -> tuple[Tensor, ...]:
            return torch.func.jvp(function(positions), primals, tangents)[1]

        mapped = torch.func.vmap(one, randomness="error")(*[tangent for _, tangent in live])
        if isinstance(value, Tensor):
            return mapped[0]
        full: list[Any] = [None] * len(outputs)
        for position, tangent in zip(keep, mapped):
            full[position] = tangent
        return full

    return push


def _spots(arguments: Any, which: Any) -> list[tuple[int, Any]]:
    """Positions, in the flattened arguments, of those that carry a tangent."""
    found: list[tuple[int, Any]] = []
    count = 0

    def walk(argument: Any, slot: Any) -> None:
        nonlocal count
        if isinstance(argument, list | tuple):
            for i, item in enumerate(argument):
                walk(item, slot[i] if slot is not None else None)
            return
        if slot is not None and _is_slot(slot):
            found.append((count, slot))
        count += 1

    walk(list(arguments), list(which))
    return found


def _linear(run: Any, arguments: Any, keywords: Any, which: Any, value: Any) -> Push:
    """Operations that are linear in all the arguments that carry a tangent together: the operation itself, mapped."""
    spots = _spots(arguments, which)
    leaves, spec = tree_flatten(tree_map(lambda leaf: torch.empty(0) if isinstance(leaf, Tensor) else leaf, arguments))
    shapes: list[Any] = [leaf.shape if isinstance(leaf, Tensor) else None for leaf in tree_flatten(arguments)[0]]
    moving = {position for position, _ in spots}

    def push(known: Tangents) -> Any:
        tangents = [known(slot.node) for _, slot in spots]
        like = next((tangent for tangent in tangents if tangent is not None), None)
        if like is None:
            return None

        def one(*given: Any) -> Any:
            filled = list(leaves)
            for position, shape in enumerate(shapes):
                if shape is not None and position not in moving:
                    filled[position] = like.new_zeros(shape)
            for (position, _), tensor in zip(spots, given, strict=True):
                filled[position] = tensor
            rebuilt: Any = tree_unflatten(filled, spec)
            return run(*rebuilt, **keywords)

        whole = [like.new_zeros(len(like), *shapes[p]) if t is None else t for (p, _), t in zip(spots, tangents)]

        mapped: Any = torch.func.vmap(one)
        return mapped(*whole)

    return push


def _item(run: Any, arguments: Any, keywords: Any, which: Any, value: Any) -> Push:
    slot, position = which[0], arguments[1]
    slots = slot if isinstance(slot, list | tuple) else None

    def push(known: Tangents) -> Any:
        tangent = known(slot.node) if slots is None else None
        return None if tangent is None else tangent[position]

    return push


def _same(run: Any, arguments: Any, keywords: Any, which: Any, value: Any) -> Push:
    return lambda known: known(which[0].node)


def _copy(run: Any, arguments: Any, keywords: Any, which: Any, value: Any) -> Push:
    """What a tensor was filled with, spread to its shape."""
    shape, slot = tuple(value.shape), which[1]

    def push(known: Tangents) -> Any:
        tangent = _tangent(known, slot)
        return None if tangent is None else _lifted(tangent, value_dims).expand(len(tangent), *shape)

    value_dims = value.ndim
    return push


def _embedding(run: Any, arguments: Any, keywords: Any, which: Any, value: Any) -> Push:
    """Rows of the table; that of the padding takes no part in derivatives."""
    slot, indices, padding = which[0], arguments[1], arguments[2] if len(arguments) > 2 else -1
    padded = None if padding < 0 else (indices == padding)[..., None]

    def push(known: Tangents) -> Any:
        table = known(slot.node)
        if table is None:
            return None
        rows = table[:, indices]
        return rows if padded is None else rows.masked_fill_(padded, 0)

    return push


def _reshape(run: Any, arguments: Any, keywords: Any, which: Any, value: Any) -> Push:
    shape, slot = tuple(value.shape), which[0]

    def push(known: Tangents) -> Any:
        tangent = known(slot.node)
        return None if tangent is None else tangent.reshape(len(tangent), *shape)

    return push


def _transposed(run: Any, arguments: Any, keywords: Any, which: Any, value: Any) -> Push:
    slot = which[0]

    def push(known: Tangents) -> Any:
        tangent = known(slot.node)
        return tangent if tangent is None or tangent.ndim < 3 else tangent.transpose(1, 2)

    return push


# ---------------------------------------------------------------------- products


def _add(a: Any, b: Any) -> Any:
    if a is None or b is None:
        return b if a is None else a
    return a + b


def _scaled_both(run: Any, arguments: Any, keywords: Any, which: Any, value: Any) -> Push:
    """The product rule for a * b; numbers may stand for tensors."""
    (a, b), (slot_a, slot_b) = arguments[:2], which[:2]
    dims = value.ndim
    kept_b: Any = b if slot_a is not None else None
    kept_a: Any = a if slot_b is not None else None

    def push(known: Tangents) -> Any:
        da, db = _tangent(known, slot_a), _tangent(known, slot_b)
        first = None if da is None else _lifted(da, dims) * kept_b
        second = None if db is None else _lifted(db, dims) * kept_a
        total = _add(first, second)
        return None if total is None else total.expand(len(total), *value_shape)

    value_shape = tuple(value.shape)
    return push


def _lifted(tangent: Tensor, dims: int) -> Tensor:
    """A block of tangents whose shapes broadcast against ``dims`` dimensions: ones are put after the block's."""
    missing = dims + 1 - tangent.ndim
    return tangent.reshape(len(tangent), *(1,) * missing, *tangent.shape[1:]) if missing > 0 else tangent


def _rows_times(block: Tensor, matrix: Tensor) -> Tensor:
    """[k, m, p] times [p, n] as one product, in whichever of the two orders of k and m the block lies in memory."""
    k, m, p = block.shape
    if k > 1 and block.stride(1) == k * block.stride(0):  # in memory [m, k, p]
        return product(block.transpose(0, 1).reshape(m * k, p), matrix).view(m, k, -1).transpose(0, 1)
    return product(block.reshape(k * m, p), matrix).view(k, m, -1)


def _times_columns(matrix: Tensor, block: Tensor) -> Tensor:
    """[m, p] times [k, p, n] as one product; the result lies in memory as [m, k, n]."""
    k, p, n = block.shape
    return product(matrix, block.transpose(0, 1).reshape(p, k * n)).view(-1, k, n).transpose(0, 1)


def _matmul_block(a: Any, b: Any, da: Any, db: Any) -> Any:
    second = None if db is None else _times_columns(a, db)
    if da is None:
        return second
    first = _rows_times(da, b)
    return first if second is None else first.add_(second)


def _mm(run: Any, arguments: Any, keywords: Any, which: Any, value: Any) -> Push:
    slot_a, slot_b = which
    a: Any = arguments[0] if slot_b is not None else None
    b: Any = arguments[1] if slot_a is not None else None
    return lambda known: _matmul_block(a, b, _tangent(known, slot_a), _tangent(known, slot_b))


def _addmm(run: Any, arguments: Any, keywords: Any, which: Any, value: Any) -> Push:
    beta, alpha = keywords.get("beta", 1), keywords.get("alpha", 1)
    if beta != 1 or alpha != 1:
        return generic_push(run, arguments, keywords, which, value)
    slot_bias, slot_a, slot_b = which
    a = arguments[1] if slot_b is not None else None
    b = arguments[2] if slot_a is not None else None
    shape = value.shape

    def push(known: Tangents) -> Any:
        product = _matmul_block(a, b, _tangent(known, slot_a), _tangent(known, slot_b))
        bias = _tangent(known, slot_bias)
        if bias is None:
            return product
        bias = _lifted(bias, 2)
        return bias.expand(len(bias), *shape) if product is None else product.add_(bias)

    return push


def _bmm(run: Any, arguments: Any, keywords: Any, which: Any, value: Any) -> Push:
    slot_a, slot_b = which
    a: Any = arguments[0] if slot_b is not None else None
    b: Any = arguments[1] if slot_a is not None else None

    def push(known: Tangents) -> Any:
        da, db = _tangent(known, slot_a), _tangent(known, slot_b)
        return _add(None if da is None else torch.matmul(da, b), None if db is None else torch.matmul(a, db))

    return push


def _log_softmax(run: Any, arguments: Any, keywords: Any, which: Any, value: Any) -> Push:
    slot, dim = which[0], arguments[1] % value.ndim
    p = value.exp()

    def push(known: Tangents) -> Any:
        tangent = known(slot.node)
        return None if tangent is None else tangent - (p * tangent).sum(dim + 1, keepdim=True)

    return push


# ---------------------------------------------------------------------- piecewise linear


def _relu(run: Any, arguments: Any, keywords: Any, which: Any, value: Any) -> Push:
    slot = which[0]

    def push(known: Tangents) -> Any:
        return _masked(known, slot, value, 0)

    return push


def _threshold_backward(run: Any, arguments: Any, keywords: Any, which: Any, value: Any) -> Push:
    slot, x, threshold = which[0], arguments[1], arguments[2]

    def push(known: Tangents) -> Any:
        return None if slot is None else _masked(known, slot, x, threshold)

    return push


def _masked(known: Tangents, slot: Any, x: Tensor, threshold: Any) -> Any:
    """The tangent where x exceeds the threshold, zero elsewhere; in its own memory where that is free."""
    tangent = known(slot.node)
    if tangent is None:
        return None
    if slot.node in known.spare and 0 not in tangent.stride():
        return _aten.threshold_backward.grad_input(tangent, x, threshold, grad_input=tangent)
    return _aten.threshold_backward(tangent, x, threshold)


def _max_pool(run: Any, arguments: Any, keywords: Any, which: Any, value: Any) -> Push:
    if arguments[0].ndim != 4:
        return generic_push(run, arguments, keywords, which, value)
    slot, places = which[0], Places.of(value[1], arguments[0].shape)

    def push(known: Tangents) -> Any:
        tangent = known(slot.node)
        return None if tangent is None else [places.take(tangent), None]

    return push


def _max_pool_backward(run: Any, arguments: Any, keywords: Any, which: Any, value: Any) -> Push:
    slot = which[0]
    if arguments[1].ndim != 4:
        return generic_push(run, arguments, keywords, which, value)
    places = Places.of(arguments[-1], arguments[1].shape)

    def push(known: Tangents) -> Any:
        tangent = _tangent(known, slot)
        return None if tangent is None else places.put(tangent)

    return push


# ---------------------------------------------------------------------- convolutions


def channels_last_arguments(target: Any, arguments: Any) -> Any:
    """Images and kernels of two-dimensional convolutions laid out channels last, which the kernels are faster on."""
    if target not in (_aten.convolution.default, _aten.convolution_backward.default):
        return arguments
    return tuple(_laid_out(a) if isinstance(a, Tensor) else a for a in arguments)


def _laid_out(tensor: Tensor) -> Tensor:
    return tensor.contiguous(memory_format=torch.channels_last) if tensor.ndim == 4 else tensor


def _merged(block: Tensor) -> Tensor:
    """[k, N, ...] as one batch [k N, ...]."""
    return _laid_out(block.flatten(0, 1))


def _convolution(run: Any, arguments: Any, keywords: Any, which: Any, value: Any) -> Push:
    x, w, _, *rest = arguments
    slot_x, slot_w, slot_b = which[:3]
    x = x if slot_w is not None else None
    w = w if slot_x is not None else None

    def push(known: Tangents) -> Any:
        dx, dw, db = (_tangent(known, slot) for slot in (slot_x, slot_w, slot_b))
        total = None if dx is None else run(_merged(dx), w, None, *rest).unflatten(0, (len(dx), -1))
        if dw is not None:
            if total is None:
                parts = [run(x, _laid_out(one), db[i] if db is not None else None, *rest) for i, one in enumerate(dw)]
                return _stacked(parts)
            for i, one in enumerate(dw):
                total[i] += run(x, _laid_out(one), db[i] if db is not None else None, *rest)
            return total
        return total if db is None else _add(total, db.view(len(db), 1, -1, *(1,) * (value.ndim - 2)))

    return push


def _stacked(parts: list[Tensor]) -> Tensor:
    """The k images [N, C, H, W] as [k, N, C, H, W], keeping their layout in memory."""
    if len(parts) == 1:
        return parts[0][None]
    return torch.cat(parts).unflatten(0, (len(parts), -1))


def _convolution_backward(run: Any, arguments: Any, keywords: Any, which: Any, value: Any) -> Push:
    first, second, w, _, stride, padding, dilation, transposed, extra, groups, mask = arguments
    slot_g, slot_x, slot_w = which[:3]
    setting = (stride, padding, dilation, transposed, extra, groups)
    shape = second.shape[1:]
    # what no tangent meets is not held
    g: Any = first if slot_x is not None or (slot_w is not None and mask[0]) else None
    x: Any = second if (slot_g is not None and mask[1]) or (slot_w is not None and mask[0]) else None

    def back(g: Tensor, x: Tensor, w: Tensor, want: list[bool]) -> Any:
        return run(_laid_out(g), _laid_out(x), _laid_out(w), None, *setting, want)

    def to_image(dg: Any, dw: Any) -> Any:
        total: Any = None
        if dg is not None:
            merged = _merged(dg)
            # of the image, only its shape matters here
            like = merged.new_empty(1).expand(len(merged), *shape)
            total = run(merged, like, w, None, *setting, [True, False, False])[0].unflatten(0, (len(dg), -1))
        if dw is not None and total is None:
            return _stacked([back(g, x, one, [True, False, False])[0] for one in dw])
        for i, one in enumerate(dw if dw is not None else ()):
            total[i] += back(g, x, one, [True, False, False])[0]
        return total

    def to_kernel(dg: Any, dx: Any) -> Any:
        total = None
        if dg is not None:
            total = torch.stack([back(one, x, w, [False, True, False])[1] for one in dg])
        if dx is not None:
            total = _add(total, torch.stack([back(g, one, w, [False, True, False])[1] for one in dx]))
        return total

    def push(known: Tangents) -> Any:
        dg, dx, dw = (_tangent(known, slot) for slot in (slot_g, slot_x, slot_w))
        to_bias = dg.sum((1, *range(3, dg.ndim))) if mask[2] and dg is not None else None
        return [to_image(dg, dw) if mask[0] else None, to_kernel(dg, dx) if mask[1] else None, to_bias]

    return push


# results that do not depend on the values of the arguments, only on their shapes
CONSTANT = {
    *(_aten.ones_like.default, _aten.zeros_like.default, _aten.full_like.default, _aten.empty_like.default),
    *(_aten.new_zeros.default, _aten.new_ones.default, _aten.new_full.default, _aten.new_empty.default),
    *(_aten.sign.default, _aten.floor.default, _aten.ceil.default, _aten.round.default),
}

# operations whose tangents are made anew, never views of others
FRESH = {_aten.mm.default, _aten.addmm.default, _aten.convolution.default, _aten.relu.default}

RULES: dict[Any, Callable[..., Push]] = {
    operator.getitem: _item,
    _aten.detach.default: _same,
    _aten.alias.default: _same,
    _aten.clone.default: _same,
    _aten.lift_fresh_copy.default: _same,
    _aten.copy.default: _copy,
    _aten.embedding.default: _embedding,
    _aten.reshape.default: _reshape,
    _aten.t.default: _transposed,
    _aten.mul.Tensor: _scaled_both,
    _aten.mm.default: _mm,
    _aten.addmm.default: _addmm,
    _aten.bmm.default: _bmm,
    _aten._log_softmax.default: _log_softmax,
    _aten.relu.default: _relu,
    _aten.threshold_backward.default: _threshold_backward,
    _aten.max_pool2d_with_indices.default: _max_pool,
    _aten.max_pool2d_with_indices_backward.default: _max_pool_backward,
    _aten.convolution.default: _convolution,
    _aten.convolution_backward.default: _convolution_backward,
}
for _operation in (
    *(_aten.permute.default, _aten.transpose.int, _aten.expand.default, _aten.slice.Tensor, _aten.select.int),
    *(_aten.sum.dim_IntList, _aten.sum.default, _aten.mean.dim, _aten.mean.default, _aten.neg.default),
    *(_aten.unsqueeze.default, _aten.squeeze.default, _aten.squeeze.dim, _aten.cat.default, _aten.stack.default),
    *(_aten.split.Tensor, _aten.split_with_sizes.default, _aten.unbind.int),
):
    RULES[_operation] = _linear
