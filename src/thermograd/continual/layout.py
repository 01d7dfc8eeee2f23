"""Which parameters a constraint holds, where each lies in its flat vector, and how they grow with new heads."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from ..errors import InputError

__all__ = ["Layout"]

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Layout:
    """Names and shapes of parameters, in the order in which they make up one flat vector [P].

    >>> layout = Layout({"weight": (2, 3), "bias": (2,)})
    >>> layout.P, layout.places["bias"]
    (8, slice(6, 8, None))
    """

    shapes: Mapping[str, Shape]

    @property
    def names(self) -> list[str]:
        """The parameters' names."""
        return list(self.shapes)

    @cached_property
    def places(self) -> dict[str, slice]:
        """Where each parameter lies in the flat vector."""
        places, start = {}, 0
        for name, shape in self.shapes.items():
            places[name] = slice(start, start + math.prod(shape))
            start += math.prod(shape)
        return places

    @property
    def P(self) -> int:
        """Length of the flat vector."""
        return sum(math.prod(shape) for shape in self.shapes.values())

    def positions(self, names: Sequence[str]) -> Tensor:
        """Indices in the flat vector of some of the parameters, in the order of ``names``."""
        return torch.cat([torch.arange(self.places[n].start, self.places[n].stop) for n in names])

    def parameters(self, model: nn.Module) -> list[nn.Parameter]:
        """The live parameters of a model, in the order of the layout.

        Raises:
            InputError: the model has no such parameter, or it has another shape than a grown one may have.
        """
        source = getattr(model, "_orig_mod", model)  # torch.compile and data-parallel wrappers
        if isinstance(source, nn.parallel.DistributedDataParallel | nn.DataParallel):
            source = source.module
        named = dict(source.named_parameters())
        for name, shape in self.shapes.items():
            if name not in named:
                raise InputError(
                    f"the model has no parameter {name!r}",
                    expected="the model that the constraint was fitted on",
                    remedy="pass that model, with the heads of earlier tasks still in place",
                )
            if not _holds(tuple(named[name].shape), shape):
                raise InputError(
                    f"parameter {name!r} has shape {tuple(named[name].shape)}",
                    expected=f"{shape}, as when the constraint was fitted, or a larger one of as many dimensions",
                )
        return [named[name] for name in self.shapes]

    def read(self, model: nn.Module) -> Tensor:
        """The model's weights as one vector [P], with their gradient graph."""
        return self.gather(self.parameters(model))

    def gather(self, parameters: Sequence[Tensor]) -> Tensor:
        """What :meth:`parameters` found, as one vector [P]."""
        parts = []
        for parameter, shape in zip(parameters, self.shapes.values()):
            parts.append(parameter[_corner(shape)].reshape(-1) if shape else parameter.reshape(-1))
        return torch.cat(parts)

    @torch.no_grad()
    def scatter(self, parameters: Sequence[Tensor], vector: Tensor) -> None:
        """Put a vector [P] into what :meth:`parameters` found."""
        parts = vector.split([math.prod(shape) for shape in self.shapes.values()])
        for parameter, shape, part in zip(parameters, self.shapes.values(), parts):
            target = parameter[_corner(shape)] if shape else parameter
            target.copy_(part.view(shape).to(parameter.device, parameter.dtype))

    def joined(self, later: Mapping[str, Shape]) -> Layout:
        """The layout that holds these parameters and those of a later task, which may be more, or larger.

        Raises:
            InputError: a parameter has become smaller or has another number of dimensions.
        """
        shapes = dict(self.shapes)
        for name, shape in later.items():
            if name in shapes and not _holds(shape, shapes[name]):
                raise InputError(
                    f"parameter {name!r} has shape {shape}", expected=f"{shapes[name]}, as in earlier tasks, or larger"
                )
            shapes[name] = tuple(shape)
        return Layout(shapes)

    def embedded(self, in_layout: Layout) -> Tensor:
        """For each of this layout's numbers its position in a larger layout, [P]."""
        found = []
        for name, shape in self.shapes.items():
            whole = in_layout.shapes[name]
            start = in_layout.places[name].start
            grid = torch.arange(math.prod(whole)).view(whole)
            found.append(start + (grid[_corner(shape)] if shape else grid).reshape(-1))
        return torch.cat(found)


def _corner(shape: Shape) -> tuple[slice, ...]:
    return tuple(slice(0, size) for size in shape)


def _holds(shape: Shape, part: Shape) -> bool:
    return len(shape) == len(part) and all(a >= b for a, b in zip(shape, part))
