"""The common shape of results: small frozen dataclasses of named arrays with dimensions and units."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from .errors import NotAvailableError

if TYPE_CHECKING:
    import xarray
    from matplotlib.axes import Axes

__all__ = ["Measurement", "quantity"]


def quantity(*dims: str, units: str = "1", long_name: str = "", default: Any = dataclasses.MISSING) -> Any:
    """Declare one field of a :class:`Measurement`: its dimensions, units and description.

    A field without dimensions is a scalar. A field whose only dimension carries the field's own name
    becomes a coordinate of the xarray dataset.
    """
    return dataclasses.field(default=default, metadata={"dims": dims, "units": units, "long_name": long_name})


@dataclass(frozen=True)
class Measurement:
    """Base of every result: frozen, printable, convertible to xarray, plottable.

    A subclass declares its arrays with :func:`quantity`; fields declared otherwise become attributes of
    the dataset. ``_primary`` names the field that stands for the whole result, which lets a result be used
    directly where an array is wanted (``np.asarray(result)``, ``result[0]``, ``result.shape``, ``float(result)``).

    >>> @dataclass(frozen=True)
    ... class Trace(Measurement):
    ...     value: float = quantity(units="loss", long_name="trace")
    ...     stderr: float = quantity(units="loss", long_name="standard error of the trace")
    ...     _primary = "value"
    >>> float(Trace(2.0, 0.1))
    2.0
    >>> Trace(2.0, 0.1).to_xarray()["value"].attrs["units"]
    'loss'
    """

    _primary: ClassVar[str | None] = None

    def to_xarray(self) -> xarray.Dataset:
        """The result as an :class:`xarray.Dataset` with dims, coords, and units in attrs."""
        import xarray

        variables: dict[str, Any] = {}
        coords: dict[str, Any] = {}
        attrs: dict[str, Any] = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value is None:
                continue
            if "dims" not in field.metadata:
                attrs[field.name] = value if isinstance(value, str | int | float | bool) else str(value)
                continue
            dims = field.metadata["dims"]
            described = {k: field.metadata[k] for k in ("units", "long_name") if field.metadata[k]}
            array = xarray.Variable(dims, _as_numpy(value), described)
            (coords if dims == (field.name,) else variables)[field.name] = array
        return xarray.Dataset(variables, coords, {"measurement": type(self).__name__, **attrs})

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw the result on ``ax`` (a new one by default) and return it."""
        raise NotAvailableError(f"{type(self).__name__} has no picture", remedy="plot its fields")

    def _primary_array(self) -> np.ndarray:
        if self._primary is None:
            raise TypeError(f"{type(self).__name__} has several fields; name the one you want")
        return _as_numpy(getattr(self, self._primary))

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.array(self._primary_array(), dtype=dtype)

    def __getitem__(self, index: Any) -> Any:
        return self._primary_array()[index]

    def __len__(self) -> int:
        return len(self._primary_array())

    def __float__(self) -> float:
        return float(self._primary_array())

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the primary field."""
        return self._primary_array().shape


def _as_numpy(value: Any) -> np.ndarray:
    if hasattr(value, "detach"):
        value = value.detach().cpu().numpy()
    return np.asarray(value)


def new_axes(ax: Axes | None) -> Axes:
    """``ax``, or the axes of a new figure that is not registered with pyplot (so nothing leaks)."""
    if ax is not None:
        return ax
    from matplotlib.figure import Figure

    return Figure(layout="constrained").add_subplot()
