r"""A traced function split into a primal part, run once, and a tangent part, run for a block of directions.

:func:`linearise` records the elementary operations of a function (its ATen graph), evaluates them once at a point,
and keeps for each operation that depends on the point a closure that maps tangents to tangents: what JAX calls
linearize. Applied to the gradient of a loss this gives Hessian products whose forward pass and first backward pass
are never repeated. A block of k directions goes through at once, so that a matrix product with k tangents is one
large matrix product, and piecewise linear layers cost nothing but their mask.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch._decomp import get_decompositions
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_flatten, tree_map

from ..errors import ThermogradWarning
from .tangent_rules import CONSTANT, FRESH, RULES, Push, Tangents, channels_last_arguments, generic_push

__all__ = ["Linearised", "NotLinearisableError", "linearise", "trace"]

_aten = torch.ops.aten
# operations whose own derivative rule is missing in forward mode, or that fuse what is cheaper apart
_DECOMPOSED = [
    *(_aten.mse_loss, _aten.mse_loss_backward, _aten.huber_loss, _aten.huber_loss_backward),
    *(_aten.smooth_l1_loss, _aten.smooth_l1_loss_backward, _aten.binary_cross_entropy),
    *(_aten.binary_cross_entropy_backward, _aten.binary_cross_entropy_with_logits, _aten.soft_margin_loss),
    *(_aten.soft_margin_loss_backward, _aten.native_layer_norm, _aten.native_layer_norm_backward),
    *(_aten.native_group_norm, _aten.native_group_norm_backward, _aten.native_batch_norm),
    *(_aten.native_batch_norm_backward, _aten._native_batch_norm_legit_no_training, _aten.gelu_backward),
    *(_aten.silu_backward, _aten.tanh_backward, _aten.sigmoid_backward, _aten.elu_backward, _aten.hardtanh_backward),
    *(_aten.leaky_relu_backward, _aten.softplus_backward, _aten.mish_backward, _aten.hardswish_backward),
    *(_aten._softmax_backward_data, _aten._log_softmax_backward_data, _aten.select_backward, _aten.slice_backward),
    *(_aten.log_sigmoid_forward, _aten.log_sigmoid_backward, _aten.rsub, _aten.addcmul, _aten.addcdiv),
]


class NotLinearisableError(Exception):
    """The function cannot be traced, or does something that has no tangent rule; not an error of the user's."""


class Linearised:
    """The derivative of a traced function at a point, as a map of blocks of tangents.

    Attributes:
        value: the function's first value at the point.
        others: its further values.
        kept_bytes: memory of the primal values that the tangent part needs.
        compiled: whether the tangent part is compiled, for each width of the block, before it runs.
    """

    compiled = False

    def __init__(self, graph: fx.GraphModule, point: Tensor, *constants: Tensor):
        self._steps: list[tuple[fx.Node, Push, list[fx.Node]]] = []
        self._input: Any = None
        self._output: Any = None
        self.kept_bytes = 0
        self._programs: dict[torch.Size, Callable[[Tensor], Tensor]] = {}
        with torch.no_grad():
            self._evaluate(graph, [point, *constants])
        self._only_what_counts()
        self._last_uses()

    def _evaluate(self, graph: fx.GraphModule, given: list[Tensor]) -> None:
        """Run the primal once; note a tangent rule for each node that depends on the point."""
        remaining = iter(given)
        values: dict[fx.Node, Any] = {}
        active: set[fx.Node] = set()
        dead = _dying(graph.graph)
        seen: set[int] = set()
        for node in graph.graph.nodes:
            if node.op == "placeholder":
                values[node] = next(remaining)
                if self._input is None:
                    self._input = node
                    active.add(node)
            elif node.op == "get_attr":
                values[node] = _attribute(graph, str(node.target))
            elif node.op == "output":
                results: Any = node.args[0]
                self._output = results[0]
                self.value, *self.others = (values[n] for n in results)
            elif node.op == "call_function":
                self._call(node, values, active, seen)
            else:
                raise NotLinearisableError(f"node {node.op}")
            for gone in dead.get(node, ()):
                values.pop(gone, None)

    def _call(self, node: fx.Node, values: dict[fx.Node, Any], active: set[fx.Node], seen: set[int]) -> None:
        arguments = fx.node.map_arg(node.args, lambda n: values[n])
        keywords = fx.node.map_arg(node.kwargs, lambda n: values[n])
        target: Any = node.target
        schema = getattr(target, "_schema", None)
        if schema is not None and schema.is_mutable:
            target = _out_of_place(target)
            written: Any = node.args[0]
            for other, held in values.items():
                if other is not written and isinstance(held, Tensor) and _overlap(values[written], held):
                    raise NotLinearisableError(f"{node.target} writes into a view of another tensor")
        arguments = channels_last_arguments(target, arguments)
        run = _aten.reshape.default if target in (_aten.view.default, _aten._unsafe_view.default) else target
        value = run(*arguments, **keywords)
        values[node] = value
        parents = [n for n in node.all_input_nodes if n in active]
        if not parents or target in CONSTANT or not _differentiable(value):
            return
        active.add(node)
        which = tree_map(lambda n: _Slot(n) if isinstance(n, fx.Node) and n in active else None, node.args)
        if any(n in active for n in tree_flatten(node.kwargs)[0] if isinstance(n, fx.Node)):
            raise NotLinearisableError(f"{target} depends on the weights by a keyword")
        rule = RULES.get(run, generic_push)
        push = rule(run, arguments, keywords, which, value)
        self._steps.append((node, push, parents))
        for leaf in tree_flatten((arguments, value))[0]:
            if isinstance(leaf, Tensor) and leaf.untyped_storage().data_ptr() not in seen:
                seen.add(leaf.untyped_storage().data_ptr())
                # of a view of the user's data only what it shows
                self.kept_bytes += min(leaf.untyped_storage().nbytes(), leaf.numel() * leaf.element_size())

    def _only_what_counts(self) -> None:
        """Steps that the first result does not depend on are left out."""
        needed = {self._output}
        kept = []
        for node, push, parents in reversed(self._steps):
            if node in needed:
                needed.update(parents)
                kept.append((node, push, parents))
        self._steps = kept[::-1]

    def _last_uses(self) -> None:
        """Tangents are dropped after their last use, so that a block takes no more memory than it must."""
        self._drop: list[list[fx.Node]] = [[] for _ in self._steps]
        uses = Counter(parent for _, _, parents in self._steps for parent in set(parents))
        # a tangent that a product made anew and that one step alone reads may be overwritten by that step
        self._spare = [
            {n for n in parents if uses[n] == 1 and n.target in FRESH and n is not self._output}
            for _, _, parents in self._steps
        ]
        seen = {self._output}
        for position in range(len(self._steps) - 1, -1, -1):
            node, _, parents = self._steps[position]
            for used in {*parents, node}:
                if used not in seen:
                    seen.add(used)
                    self._drop[position].append(used)

    @torch.no_grad()
    def __call__(self, tangents: Tensor) -> Tensor:
        """Derivative along each row of ``tangents`` [k, P], as [k, ...] of the function's value."""
        if not self.compiled:
            return self._push(tangents)
        program = self._programs.get(tangents.shape)
        if program is None:
            program = self._programs[tangents.shape] = self._compile(tangents)
        return program(tangents)

    def _compile(self, tangents: Tensor) -> Callable[[Tensor], Tensor]:
        """The tangent part as one compiled program; as it is, with a warning, where the compiler fails."""
        try:
            graph = make_fx(lambda rows: self._push(rows))(tangents)
            program: Callable[[Tensor], Tensor] = torch.compile(graph, dynamic=False)
            program(tangents)
        except (torch.OutOfMemoryError, KeyboardInterrupt):
            raise
        except Exception as error:  # compilers fail in many ways
            message = f"the tangent part runs uncompiled: {type(error).__name__}: {str(error)[:200]}"
            warnings.warn(message, ThermogradWarning, stacklevel=2)
            return self._push
        return program

    def _push(self, tangents: Tensor) -> Tensor:
        env = Tangents({self._input: tangents})
        for position, (node, push, _) in enumerate(self._steps):
            env.spare = self._spare[position]
            env[node] = push(env)
            for gone in self._drop[position]:
                env.pop(gone, None)
        result = env.get(self._output)
        return tangents.new_zeros(len(tangents), *self.value.shape) if result is None else result


class _Slot:
    """Stands in a node's arguments for an input that carries a tangent."""

    __slots__ = ("node",)

    def __init__(self, node: fx.Node):
        self.node = node


def trace(function: Callable[..., tuple[Tensor, ...]], *arguments: Tensor) -> fx.GraphModule:
    """The operations of a function of tensors that returns a tuple of tensors.

    The graph holds for any arguments of the same shapes: a function whose control flow depends on values is refused.

    Raises:
        NotLinearisableError: the function cannot be traced.
    """
    try:
        # in-place writes inside an operation's decomposition become operations of their own
        whole = torch.func.functionalize(function)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # torch's decompositions script themselves
            table: Any = get_decompositions(_DECOMPOSED)
        graph = make_fx(whole, decomposition_table=table, tracing_mode="real")(*arguments)
        graph.graph.eliminate_dead_code()
    except (torch.OutOfMemoryError, KeyboardInterrupt):
        raise
    except Exception as error:  # tracing meets whatever a user's model does
        raise NotLinearisableError(f"{type(error).__name__}: {error}") from error
    return graph


def linearise(
    function: Callable[..., tuple[Tensor, ...]], point: Tensor, *constants: Tensor, graph: fx.GraphModule | None = None
) -> Linearised:
    r"""Split off the derivative :math:`\dot x \mapsto \partial f(x)\,\dot x` of a function at ``point``.

    Args:
        function: of a flat tensor and some constants, returns a tuple of tensors, the first of which is
            differentiated; its control flow must not depend on values.
        point: ``[P]`` where to evaluate.
        constants: further arguments, with respect to which nothing is differentiated.
        graph: what :func:`trace` made of the function with arguments of the same shapes.

    Returns:
        :class:`Linearised`, a map of blocks ``[k, P]``; the further results of the function are its ``.others``.

    Raises:
        NotLinearisableError: the function cannot be traced or holds an operation without a tangent rule.

    >>> square = linearise(lambda x: (x * x,), torch.tensor([1.0, 3.0]))
    >>> square(torch.eye(2))
    tensor([[2., 0.],
            [0., 6.]])
    """
    graph = trace(function, point, *constants) if graph is None else graph
    try:
        return Linearised(graph, point, *constants)
    except (torch.OutOfMemoryError, KeyboardInterrupt, NotLinearisableError):
        raise
    except Exception as error:
        raise NotLinearisableError(f"{type(error).__name__}: {error}") from error


def _out_of_place(target: Any) -> Any:
    """The twin of an in-place operation that returns a new tensor; later nodes of the graph take its result."""
    name, overload = str(target).removeprefix("aten.").split(".")
    twin = getattr(getattr(_aten, name.removesuffix("_"), None), overload, None)
    if not name.endswith("_") or twin is None or twin._schema.is_mutable:
        raise NotLinearisableError(f"{target} writes in place")
    return twin


def _overlap(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors share elements in memory."""
    if a.untyped_storage().data_ptr() != b.untyped_storage().data_ptr() or a.element_size() != b.element_size():
        return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()
    taken = torch.zeros(a.untyped_storage().nbytes() // a.element_size(), dtype=torch.bool, device=a.device)
    taken.as_strided(a.shape, a.stride(), a.storage_offset()).fill_(True)
    return bool(taken.as_strided(b.shape, b.stride(), b.storage_offset()).any())


def _attribute(graph: fx.GraphModule, name: str) -> Any:
    found: Any = graph
    for part in name.split("."):
        found = getattr(found, part)
    return found


def _dying(graph: fx.Graph) -> dict[fx.Node, list[fx.Node]]:
    """For each node, the nodes whose values are needed by no later one."""
    last: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        for used in node.all_input_nodes:
            last[used] = node
        last.setdefault(node, node)
    dead: dict[fx.Node, list[fx.Node]] = {}
    for node, at in last.items():
        dead.setdefault(at, []).append(node)
    return dead


def _differentiable(value: Any) -> bool:
    return any(isinstance(leaf, Tensor) and leaf.is_floating_point() for leaf in tree_flatten(value)[0])
