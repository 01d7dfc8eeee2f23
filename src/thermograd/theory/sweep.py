"""Any formula of the theory over many hyperparameters at once, as one array with named dimensions."""

from __future__ import annotations

import dataclasses
import itertools
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import DataError, NonFiniteError, ThermogradWarning, UnstableError
from ..hyperparameters import SGD
from .arrays import Array

if TYPE_CHECKING:
    import xarray

__all__ = ["Sweep", "sweep"]


@dataclass(frozen=True)
class Sweep:
    """Results of :func:`sweep`: every quantity as an array whose first axes are the hyperparameters.

    Quantities are read by name, ``found["position"]`` or ``found.position``; a formula that returns one array is
    ``found.values``.
    """

    over: dict[str, Array]
    quantities: dict[str, Array]
    dims: dict[str, tuple[str, ...]]

    def __getitem__(self, name: str) -> Array:
        return self.quantities[name]

    def __getattr__(self, name: str) -> Array:
        if name.startswith("_") or name not in self.__dict__.get("quantities", {}):
            raise AttributeError(name)
        return self.quantities[name]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.array(next(iter(self.quantities.values())), dtype=dtype)

    def to_xarray(self) -> xarray.Dataset:
        """The same as an :class:`xarray.Dataset` with the hyperparameters as coordinates."""
        import xarray

        data = {name: (self.dims[name], value) for name, value in self.quantities.items()}
        return xarray.Dataset(data, {name: (name, value) for name, value in self.over.items()})


def sweep(
    formula: Callable[..., Any],
    sgd: SGD | Sequence[SGD],
    *args: Any,
    over: Mapping[str, Sequence[Any]] | None = None,
    unstable: str = "raise",
    **options: Any,
) -> Sweep:
    """Evaluate a formula at every combination of hyperparameters.

    Formulas are vectorised over modes; this adds the hyperparameters, in a plain loop (tens of microseconds a
    setting).

    Args:
        formula: any function of the theory that takes an :class:`~thermograd.SGD` first.
        sgd: the setting to vary, or a sequence of settings, which become the dimension ``setting``.
        args: further arguments of the formula.
        over: values of each hyperparameter, named as in :class:`~thermograd.SGD`; all combinations are taken.
        unstable: "raise", or "nan": settings that diverge become NaN, with a warning that counts them.
        options: keyword arguments of the formula.

    Returns:
        Arrays of shape [*over, ...], for instance [lr, momentum, mode].

    Raises:
        UnstableError: a setting diverges and ``unstable`` is "raise" (or all do).
        HyperparameterError: a value out of range.
        DataError: nothing to sweep over, or results of different shapes.

    >>> from thermograd.theory import limiting
    >>> found = sweep(limiting.stationary_moments, SGD(lr=0.1), [1.0, 0.1], 1.0,
    ...               over={"lr": [0.1, 0.2], "momentum": [0.0, 0.5, 0.9]})
    >>> found.position.shape, found.to_xarray()["position"].dims
    ((2, 3, 2), ('lr', 'momentum', 'mode'))
    """
    if unstable not in ("raise", "nan"):
        raise DataError(f"unstable is {unstable!r}", expected="'raise' or 'nan'")
    if isinstance(sgd, SGD):
        if not over or any(len(values) == 0 for values in over.values()):
            raise DataError("there is nothing to sweep over", expected="over={'lr': [...], ...} with values")
        names, axes = list(over), {name: np.asarray(values) for name, values in over.items()}
        settings = [
            sgd.replace(**dict(zip(names, values, strict=True))) for values in itertools.product(*over.values())
        ]
    else:
        if over or len(sgd) == 0:
            raise DataError("a sequence of settings is swept as it is", expected="settings, and no 'over'")
        settings, axes = list(sgd), {"setting": np.arange(len(sgd))}
    results: list[dict[str, Any] | None] = []
    dims: dict[str, tuple[str, ...]] = {}
    failure: UnstableError | NonFiniteError | None = None
    for setting in settings:
        try:
            found, dims = _named(formula(setting, *args, **options))
            results.append(found)
        except (UnstableError, NonFiniteError) as error:
            if unstable == "raise":
                raise
            failure = error
            results.append(None)
    good = next((r for r in results if r is not None), None)
    if good is None:
        assert failure is not None
        raise failure
    if failure is not None:
        count = sum(r is None for r in results)
        warnings.warn(
            f"{count} of {len(results)} settings diverge and are NaN: no stationary state exists there",
            ThermogradWarning,
            stacklevel=2,
        )
    shape = tuple(len(v) for v in axes.values())
    quantities = {name: _stack([None if r is None else r[name] for r in results], shape, name) for name in good}
    return Sweep(axes, quantities, {name: (*axes, *dims[name]) for name in good})


def _named(result: Any) -> tuple[dict[str, Any], dict[str, tuple[str, ...]]]:
    """A formula's result as named arrays, and their dimensions."""
    if dataclasses.is_dataclass(result) and not isinstance(result, type):
        fields = [f for f in dataclasses.fields(result) if "dims" in f.metadata]
        return {f.name: getattr(result, f.name) for f in fields}, {f.name: f.metadata["dims"] for f in fields}
    parts = result if isinstance(result, tuple) else (result,)
    names = ["values"] if len(parts) == 1 else [f"values_{i}" for i in range(len(parts))]
    found = dict(zip(names, parts, strict=True))
    return found, {n: tuple(f"{n}_dim{i}" for i in range(np.ndim(v))) for n, v in found.items()}


def _stack(values: list[Any], shape: tuple[int, ...], name: str) -> Array:
    inner = {np.shape(v) for v in values if v is not None}
    if len(inner) != 1:
        raise DataError(f"{name} has different shapes at different settings: {sorted(inner)}", expected="one shape")
    blank = np.full(inner.pop(), np.nan)
    stacked = np.stack([blank if v is None else np.asarray(v) for v in values])
    return stacked.reshape(shape + stacked.shape[1:])
