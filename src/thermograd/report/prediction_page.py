"""What if: predictions, maps and the validation of a run as one self-contained HTML page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from ..prediction.show import columns, heading, maps, number, raised, rows
from ..prediction.validation import Validation
from .figure import inline_svg
from .page import _render, _write, fact_rows

if TYPE_CHECKING:
    import xarray

__all__ = ["prediction_html", "render_prediction", "unflagged"]

_FACTS = ("steps", "bottom", "run_loss", "run_loss_stderr", "kappa", "kappa_stderr")
_NAMES = {
    "steps": "steps ahead",
    "bottom": "loss at the bottom",
    "run_loss": "loss of the run",
    "run_loss_stderr": "its standard error",
    "kappa": "the run's fluctuation, measured over predicted",
    "kappa_stderr": "its error",
}


def render_prediction(
    found: xarray.Dataset, swept: xarray.Dataset | None = None, validation: Validation | None = None
) -> str:
    """The page of predictions: a table for each setting, maps where a sweep is given, and what training showed.

    Args:
        found: what :func:`thermograd.predict` returned.
        swept: predictions over learning rate and batch size.
        validation: predicted against observed.
    """
    settings = columns(found)
    figures = [
        (one.title, Markup(inline_svg(one, f"map-{i}-", f"Map of the {one.title} over learning rate and batch size.")))
        for i, one in enumerate(maps(swept) if swept is not None else [])
    ]
    return _render(
        "prediction.html.j2",
        title="What if",
        facts=fact_rows({_NAMES[name]: found.attrs[name] for name in _FACTS}),
        headings=[heading(one) for one in settings],
        table=_side_by_side([rows(one) for one in settings]),
        flags=raised(settings),
        figures=figures,
        checked=_checked(validation) if validation is not None else None,
    )


def prediction_html(
    found: xarray.Dataset, path: str | Path, swept: xarray.Dataset | None = None, validation: Validation | None = None
) -> Path:
    """Write the page of predictions; a folder gets ``predict.html``. See :func:`render_prediction`.

    Raises:
        InputError: the file cannot be written.
    """
    path = Path(path)
    return _write(render_prediction(found, swept, validation), path / "predict.html" if path.is_dir() else path)


def _side_by_side(tables: Sequence[Sequence[tuple[str, str]]]) -> list[tuple[str, list[str]]]:
    return [(label, [dict(table).get(label, "–") for table in tables]) for label, _ in tables[0]]


def unflagged(found: Validation) -> str:
    """The median error of the settings without a flag, in words."""
    if not found.ok.any():
        return "a flag was up at each"
    return f"{100 * found.median_error_ok:.1f}% where no flag was up"


def _checked(found: Validation) -> dict[str, Any]:
    error = found.relative_error
    return {
        "svg": Markup(inline_svg(found, "validation-", "Predicted against observed excess loss.")),
        "summary": (
            f"Median relative error of the excess {100 * found.median_error:.0f}% over {len(error)} settings "
            f"({unflagged(found)}), rank correlation "
            f"{found.rank_correlation:.3f}."
        ),
        "frozen": found.frozen[:16],
        "rows": [
            (
                number(found.lr[i]), f"{found.batch_size[i]:.0f}", number(found.momentum[i]),
                f"{number(found.predicted[i])} ± {number(found.predicted_stderr[i])}",
                f"{number(found.observed[i])} ± {number(found.observed_stderr[i])}",
                f"{100 * error[i]:+.0f}%" if error[i] == error[i] else "–", found.flags[i],
            )
            for i in range(len(error))
        ],
    }  # fmt: skip
