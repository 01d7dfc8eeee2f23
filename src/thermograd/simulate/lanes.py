"""What a kernel of lanes is made of: lane arrays on the stack, bits of floats, gathered rows, shared counters.

A kernel carries 16 replicas in lockstep, one a lane, so that the compiler turns each loop over lanes into vector
instructions. Nothing here may change a result between vector widths: every product that is fused is fused explicitly,
and no reassociation is allowed.
"""

# mypy: disable-error-code="operator"
from __future__ import annotations

from typing import Any

import numba.np.arrayobj as arrayobj
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

__all__ = [
    "LANES",
    "bits",
    "bits_to_float",
    "fma",
    "lane_array",
    "read_flag",
    "take",
    "transposed_rows",
    "whole_vectors",
]

LANES = 16  # replicas in lockstep; a whole number of vectors of 4 or 8 numbers
ROW = 8  # rows and columns of one transposed block
_BITS = {types.float32: types.uint32, types.float64: types.uint64}
_FLOATS = {word: number for number, word in _BITS.items()}
_I32, _I64 = ir.IntType(32), ir.IntType(64)


@intrinsic
def fma(typingctx: Any, x: Any, y: Any, z: Any) -> Any:
    """The sum x * y + z with one rounding, so that every machine and every vector width gives the same number."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.fma(*args)

    return x(x, x, x), generate


@intrinsic
def bits(typingctx: Any, x: Any) -> Any:
    """The bits of a float as an unsigned whole number of the same size."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], context.get_value_type(signature.return_type))

    return _BITS[x](x), generate


@intrinsic
def bits_to_float(typingctx: Any, x: Any) -> Any:
    """The inverse of :func:`bits`."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], context.get_value_type(signature.return_type))

    return _FLOATS[x](x), generate


@intrinsic(prefer_literal=True)
def lane_array(typingctx: Any, like: Any, size: Any) -> Any:
    """An array of a constant size on the stack, of the type of ``like``, not initialised.

    The compiler knows that it overlaps nothing, and keeps short ones in registers.
    """
    if not isinstance(size, types.IntegerLiteral):
        return None
    scalar = types.unliteral(like)
    array, count = types.Array(scalar, 1, "C"), size.literal_value

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kind = context.get_data_type(scalar)
        width = context.get_constant(types.intp, context.get_abi_sizeof(kind))
        made = context.make_array(array)(context, builder)
        arrayobj.populate_array(
            made,
            data=cgutils.alloca_once(builder, kind, size=count),
            shape=[context.get_constant(types.intp, count)],
            strides=[width],
            itemsize=width,
            meminfo=None,
        )
        return made._getvalue()

    return array(like, size), generate


@intrinsic
def whole_vectors(typingctx: Any) -> Any:
    """Let the calling function use vectors of 512 bits where there are any; compilers stop at 256 by default."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        # a set that admits only the attributes llvmlite knows by name, unless added to as a plain set
        set.add(builder.function.attributes, '"prefer-vector-width"="512"')
        return context.get_dummy_value()

    return types.void(), generate


@intrinsic
def take(typingctx: Any, counter: Any) -> Any:
    """The next number of a counter that threads share: ``counter[0]`` is raised by one at once, its old value given."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        data = context.make_array(counter)(context, builder, args[0]).data
        return builder.atomic_rmw("add", data, ir.Constant(_I64, 1), "monotonic")

    return types.int64(counter), generate


@intrinsic
def read_flag(typingctx: Any, flag: Any) -> Any:
    """``flag[0]``, read anew every time because another thread may set it."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        data = context.make_array(flag)(context, builder, args[0]).data
        return builder.load_atomic(data, "monotonic", 8)

    return types.int64(flag), generate


def _transposed(builder: Any, rows: list[Any]) -> list[Any]:
    """A square block of vectors transposed by three rounds of swaps of halves, quarters and neighbours."""
    size = len(rows)
    half = size // 2
    while half:
        swapped = list(rows)
        for i in (i for i in range(size) if not i & half):
            low = [k if not k & half else (k & ~half) + size for k in range(size)]
            high = [k | half if not k & half else k + size for k in range(size)]
            for place, mask in ((i, low), (i | half, high)):
                constant = ir.Constant(ir.VectorType(_I32, size), mask)
                swapped[place] = builder.shuffle_vector(rows[i], rows[i | half], constant)
        rows, half = swapped, half // 2
    return rows


@intrinsic
def transposed_rows(typingctx: Any, table: Any, index: Any, lane: Any, column: Any, out: Any, width: Any) -> Any:
    """Eight lanes fetch eight columns of their rows: ``out[(column + c) * width + lane + r] = table[index[lane + r], column + c]``.

    Whole rows are loaded and transposed in registers, several times faster than a gather of single numbers. The
    columns of ``table`` must be padded to a multiple of eight, and ``index`` is not checked.
    """  # noqa: E501

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        number = context.get_value_type(table.dtype)
        vector = ir.VectorType(number, ROW)
        align = context.get_abi_sizeof(number)
        rows_of, index_of, out_of = (
            context.make_array(kind)(context, builder, args[place])
            for kind, place in ((table, 0), (index, 1), (out, 4))
        )
        stride = builder.extract_value(rows_of.shape, 1)
        rows = []
        for r in range(ROW):
            place = builder.gep(index_of.data, [builder.add(args[2], ir.Constant(_I64, r))])
            begin = builder.add(builder.mul(builder.zext(builder.load(place), _I64), stride), args[3])
            pointer = builder.bitcast(builder.gep(rows_of.data, [begin]), vector.as_pointer())
            rows.append(builder.load(pointer, align=align))
        for c, values in enumerate(_transposed(builder, rows)):
            row = builder.add(args[3], ir.Constant(_I64, c))
            begin = builder.add(builder.mul(row, args[5]), args[2])
            pointer = builder.bitcast(builder.gep(out_of.data, [begin]), vector.as_pointer())
            builder.store(values, pointer, align=align)
        return context.get_dummy_value()

    whole = types.int64
    return types.void(table, index, whole, whole, out, whole), generate
