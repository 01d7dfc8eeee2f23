"""Items and outcomes in the terminal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .gallery import number
from .item import Item
from .outcome import Outcome
from .reproduce import find, is_kept, reproduce, reproduce_all

__all__ = ["listing", "outcome_table", "run_and_show"]

_COLOUR = {
    "reproduced": "green",
    "reproduced with a caveat": "yellow",
    "not reproduced": "red",
    "cannot be run here": "dim",
}


def listing(items: Iterable[Item]) -> Table:
    """All items: paper, item, statement, data, cost at either scale."""
    table = Table(title="What can be reproduced", title_justify="left")
    for name in ("item", "paper", "statement", "data", "cost", "--full"):
        table.add_column(name, overflow="fold", no_wrap=name == "item")
    for item in items:
        table.add_row(item.name, item.paper, item.statement, item.data, item.cost, item.full_cost)
    return table


def outcome_table(name: str, outcome: Outcome) -> Table:
    """The numbers of an outcome, with the verdict as title."""
    colour = _COLOUR[outcome.verdict]
    table = Table(title=f"{name}: [bold {colour}]{outcome.verdict}[/]", title_justify="left")
    table.add_column("number", overflow="fold")
    for column in ("published", "exact", "ours", "seeds"):
        table.add_column(column, justify="right")
    for row in outcome.rows:
        mark = {None: "", True: " [green]✓[/]", False: " [red]✗[/]"}[row.agrees]
        published = "–" if row.published is None else str(row.published)
        theory = "–" if row.theory is None else f"{row.theory:.4g}"
        table.add_row(row.quantity, published, theory, number(row) + mark, str(row.seeds))
    return table


def _announce(
    console: Console, name: str, out: Path, *, full: bool, seeds: int, seed: int, fresh: bool, **_: Any
) -> None:
    """What an item will cost, unless its result is kept."""
    item = find(name)
    if fresh or not is_kept(item, out, "full" if full else "default", seeds, seed):
        scale, cost = (" at the paper's scale", item.full_cost) if full else ("", item.cost)
        console.print(f"[dim]{name}{scale} takes {cost}[/]", highlight=False)


def run_and_show(
    console: Console, names: Sequence[str], *, workers: int, out: Path, **options: Any
) -> dict[str, Outcome]:
    """Run items and print each as it is done."""
    found: dict[str, Outcome] = {}
    if workers > 1:
        for name in names:
            _announce(console, name, out, **options)
        found = reproduce_all(names, workers=workers, out=out, **options)
    for name in names:
        if workers == 1:
            _announce(console, name, out, **options)
        outcome = found.get(name) or reproduce(name, out=out, **options)
        found[name] = outcome
        if outcome.unavailable:
            console.print(f"{name}: [bold {_COLOUR[outcome.verdict]}]{outcome.verdict}[/]")
            console.print(f"{escape(outcome.unavailable)}\n", highlight=False)
            continue
        console.print(outcome_table(name, outcome))
        console.print(escape(outcome.reason), highlight=False)
        console.print(f"[dim]{escape(outcome.note)}[/]\n", highlight=False)
    return {name: found[name] for name in names}
