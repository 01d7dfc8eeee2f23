"""Holding every law against a run."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..errors import HyperparameterError, NotAvailableError, TooShortError
from ..hyperparameters import SGD
from ..progress import bar
from .catalogue import catalogue, find
from .evidence import Evidence
from .law import Comparison, Law
from .sheet import LawSheet

if TYPE_CHECKING:
    from ..problem import Problem

__all__ = ["check"]

_SMALL = 20_000  # weights


def check(
    run: Any,
    problem: Problem,
    *,
    laws: str | Sequence[str] = "all",
    window: Any = None,
    sgd: SGD | None = None,
    modes: int = 150,
    window_epochs: int = 10,
    seed: int = 0,
    save: bool = True,
) -> LawSheet:
    """Hold the laws against a recorded run and return the law sheet.

    Args:
        run: the run's folder (or its open tree).
        problem: the network, loss and data that the run was made with.
        laws: ``"all"``, or names from :func:`thermograd.laws.catalogue`.
        window: which recorded rows to look at, as in :func:`thermograd.trajectory.select`: by default from
            where the loss has settled; a number for the last rows, a fraction for the last part, ``slice(None)`` for
            all.
        sgd: hyperparameters, when the recorder could not find out batch size or sampling scheme.
        modes: how many of the sharpest Hessian modes the per-mode laws look at.
        window_epochs: length, in epochs, of the windows in which fluctuations are measured.
        seed: of every random draw.
        save: write the sheet and what was measured into the run's store.

    Returns:
        The sheet: ``print`` it, or use ``.to_xarray()``, ``.plot()``, ``.to_html(path)``.

    Raises:
        StoreError: no such run; InputError: run and problem do not fit, unknown law; DivergedError: NaN in the run.
    """
    chosen: list[Law] = (
        list(catalogue()) if laws == "all" else [find(n) for n in ([laws] if isinstance(laws, str) else laws)]
    )
    comparisons = []
    with _threads_for(problem), bar("checking laws", total=len(chosen)) as progress:
        evidence = Evidence(run, problem, window=window, sgd=sgd, modes=modes, window_epochs=window_epochs, seed=seed)
        for law in chosen:
            progress.advance(0, f"law: {law.title}")
            comparisons.append(_compare(law, evidence))
            progress.advance()
    sheet = LawSheet(tuple(comparisons), facts(evidence))
    if save and isinstance(run, str | os.PathLike):
        save_measurements(evidence, run)
        sheet.save(Path(run))
    return sheet


@contextlib.contextmanager
def _threads_for(problem: Problem) -> Iterator[None]:
    """One thread for small networks, where handing work to others costs more than it saves."""
    before = torch.get_num_threads()
    if problem.P < _SMALL:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _compare(law: Law, evidence: Evidence) -> Comparison:
    """One law; what it cannot be asked on this run becomes a verdict, not an error."""
    try:
        return law.compare(evidence)
    except TooShortError as error:
        return Comparison(math.nan, math.nan, math.nan, "undecided", str(error), law.name)
    except (NotAvailableError, HyperparameterError) as error:
        return Comparison(math.nan, math.nan, math.nan, "not in its regime", str(error), law.name)


def facts(evidence: Evidence) -> dict[str, Any]:
    """What the run is, for the head of the sheet."""
    from .. import __version__

    problem = evidence.problem
    noted = evidence._given.to_dict() if evidence._given else evidence.recorded_sgd
    known = {k: v for k, v in noted.items() if v not in (None, False) and not (k == "dampening" and v == 0)}
    source = evidence.attrs.get("sampling_source")
    if known.get("sampling") and source not in (None, "unknown") and evidence._given is None:
        known["sampling"] = f"{known['sampling']} ({source})"
    return {
        **_names(problem),
        "weights": problem.P,
        **({"other weights": "trained too, not recorded; held as at the end"} if evidence.others_trained else {}),
        "samples": problem.N,
        "steps looked at": f"{evidence.steps[0]} to {evidence.steps[-1]} ({len(evidence.steps)} recorded)",
        "optimizer": evidence.optimizer,
        **{k.replace("_", " "): v for k, v in known.items()},
        "loss at the centre": f"{evidence.loss:.4g}",
        "runs": 1,
        "seed": evidence.seed,
        "thermograd": __version__,
    }


def _names(problem: Problem) -> dict[str, str]:
    """Model and loss by name."""
    if problem.model is None:
        return {"model": "a function of the weights"}
    loss = getattr(problem.criterion, "__name__", type(problem.criterion).__name__)
    return {"model": type(problem.model).__name__, "loss": loss}


def save_measurements(evidence: Evidence, run: str | os.PathLike[str]) -> None:
    """Write what was measured for the laws into the run: groups ``landscape`` and ``noise``."""
    import xarray

    from ..trajectory import write_group

    done = evidence.__dict__
    path = Path(run)
    if "pairs" in done:
        write_group(path, "landscape", evidence.pairs.to_xarray())
    if "_noise_at_points" in done:
        along, traces = done["_noise_at_points"]
        write_group(
            path,
            "noise",
            xarray.Dataset(
                {
                    "variance": (
                        ("point", "mode"),
                        along,
                        {
                            "units": "(loss/weight)^2",
                            "long_name": "per-sample gradient variance along the Hessian modes",
                        },
                    ),
                    "strength": (
                        "point",
                        traces,
                        {"units": "(loss/weight)^2", "long_name": "trace of the gradient covariance"},
                    ),
                },
            ),
        )
