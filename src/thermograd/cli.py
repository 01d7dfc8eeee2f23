"""The command line. Heavy imports wait until a command needs them, so that ``--help`` answers at once."""

from __future__ import annotations

import contextlib
import functools
import os
import shlex
import shutil
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table

from . import __version__
from .errors import InputError, StoreError, ThermogradError, ThermogradWarning

if TYPE_CHECKING:
    from .config import Config
    from .laws import LawSheet

__all__ = ["app", "main"]

app = typer.Typer(
    name="thermograd",
    help="Measure and predict the statistical physics of SGD training.",
    epilog="Start with: thermograd demo",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
# into a file or a pipe rich writes 80 columns, too few for the law sheet
_wide = None if sys.stdout.isatty() or "COLUMNS" in os.environ else 118
out, err = Console(width=_wide), Console(stderr=True)
_DEMO = Path(__file__).with_name("demo.toml")
_settings = {"debug": False}

RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run.")]
Out = Annotated[Path | None, typer.Option("--out", "-o", help="Folder of the run.")]
Laws = Annotated[list[str] | None, typer.Option("--law", metavar="LAW", help="Check this law only; may be repeated.")]


def _explained(command: Callable[..., None]) -> Callable[..., None]:
    """Turn what a command raises into one paragraph and an exit code: 2 for bad input, 1 otherwise, 130 on Ctrl-C."""

    @functools.wraps(command)
    def wrapped(*args: Any, **keywords: Any) -> None:
        try:
            with _shown_warnings():
                command(*args, **keywords)
        except KeyboardInterrupt as interrupt:
            _fail(str(interrupt) or "Interrupted.", 130)
        except ThermogradError as error:
            _fail(str(error), 2 if isinstance(error, InputError | StoreError) else 1, label="Error: ")
        except (typer.Exit, typer.Abort, BrokenPipeError):
            raise
        except Exception as error:  # a defect: still one paragraph, and a way to the traceback
            _fail(
                f"{type(error).__name__}: {error}. This should not happen; please report it with the output of the "
                "same command with --debug.",
                1,
                label="Unexpected error: ",
            )

    return wrapped


def _fail(message: str, code: int, label: str = "") -> NoReturn:
    if _settings["debug"]:
        traceback.print_exc()
    err.print(f"[bold red]{label}[/]{escape(message)}", highlight=False, soft_wrap=True)
    raise typer.Exit(code)


@contextlib.contextmanager
def _shown_warnings() -> Iterator[None]:
    """Show our own warnings as one line each; keep those of the libraries below to ourselves unless debugging."""

    def show(message: Warning | str, category: type[Warning], *place: Any, **_: Any) -> None:
        if issubclass(category, ThermogradWarning):
            err.print(f"[yellow]Warning: [/]{escape(str(message))}", highlight=False, soft_wrap=True)
        elif _settings["debug"]:
            err.print(warnings.formatwarning(message, category, *place[:2]), highlight=False)

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield


def _version(asked: bool) -> None:
    if asked:
        out.print(f"thermograd {__version__}", highlight=False)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", metavar="", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", metavar="", help="Show the traceback of an error.")] = False,
) -> None:
    _settings["debug"] = debug


@app.command(epilog="Example: thermograd demo --out runs/demo --seed 1")
@_explained
def demo(
    out_folder: Annotated[Path, typer.Option("--out", "-o", help="Folder of the run.")] = Path("runs/demo"),
    seed: Annotated[int, typer.Option(min=0, help="Of weights and minibatches: same seed, same numbers.")] = 0,
    quick: Annotated[bool, typer.Option("--quick", metavar="", help="A shorter run, with wider error bars.")] = False,
) -> None:
    """Train a network on handwritten digits, check every law, write a report."""
    _say("[bold]thermograd demo[/]: a small network on 1500 handwritten digits, trained until it fluctuates")
    _say("around a standstill, then measured and held against the theory. This takes one to three minutes.")
    from . import config as configuration

    config = configuration.load(_DEMO).replace("run", seed=seed)
    if quick:
        config = config.replace("training", burn_in_steps=1000, steps=3000)
    _run(
        config, out_folder, overwrite=_is_other_demo(out_folder, config), again=f"{_program()} demo --out {out_folder}"
    )


@app.command(epilog="Example: thermograd run examples/fashion_mnist_mlp.toml --out runs/fashion")
@_explained
def run(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="Configuration in TOML.")],
    out_folder: Out = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", metavar="", help="Start anew in a folder that holds a run.")
    ] = False,
) -> None:
    """Train and record what CONFIG says, then check the laws.

    An interrupted run is resumed by the same command, to the same numbers as without the interruption.
    """
    from . import config as configuration

    settings = configuration.load(config)
    folder = out_folder or Path(settings.run.out or "runs/run")
    again = f"{_program()} run {config}" + (f" --out {out_folder}" if out_folder else "")
    _run(settings, folder, overwrite=overwrite, again=again)


@app.command(epilog="Example: thermograd check runs/demo --law weight_variance")
@_explained
def check(
    path: RunFolder,
    law: Laws = None,
    modes: Annotated[int | None, typer.Option(min=1, help="Leading Hessian modes to look at.")] = None,
) -> None:
    """Measure a run made by `thermograd run` and hold the laws against it.

    With --law the answer is shown only: a sheet and a report that the run holds stay as they are.
    """
    from . import config as configuration
    from .runfolder import CONFIG, rebuild

    _known_laws(law)
    problem = rebuild(path)
    settings = configuration.load(path / CONFIG)
    changes: dict[str, Any] = ({"laws": law} if law else {}) | ({"modes": modes} if modes else {})
    _check(settings.replace("measure", **changes), path, problem, keep=bool(law) and _has_sheet(path))


@app.command(epilog="Example: thermograd report runs/demo")
@_explained
def report(
    paths: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Folders of runs.")],
    out_file: Annotated[
        Path | None, typer.Option("--out", "-o", help="File to write; by default report.html in the run's folder.")
    ] = None,
) -> None:
    """Write the report from the law sheets that runs hold; several runs are put side by side. Nothing is measured."""
    from .laws import LawSheet
    from .report import compare_html

    if len(paths) == 1:
        from .whatif_show import kept_page

        _write_report(LawSheet.load(paths[0]), out_file or paths[0] / "report.html")
        what_if = kept_page(paths[0])
        return None if what_if is None else _say_report(what_if)
    sheets = {str(path): LawSheet.load(path) for path in paths}
    return _say_report(compare_html(sheets, out_file or paths[0].parent / "comparison.html"))


@app.command(epilog="Example: thermograd predict runs/demo --lr 0.01 --batch-size 256")
@_explained
def predict(
    path: RunFolder,
    lr: Annotated[list[float] | None, typer.Option(help="Learning rate; may be repeated.")] = None,
    batch_size: Annotated[list[int] | None, typer.Option(help="Batch size; may be repeated.")] = None,
    momentum: Annotated[list[float] | None, typer.Option(help="Momentum; may be repeated.")] = None,
    weight_decay: Annotated[list[float] | None, typer.Option(help="Weight decay; may be repeated.")] = None,
    sampling: Annotated[str | None, typer.Option(help="replacement, reshuffle or shuffle-once.")] = None,
    steps: Annotated[int | None, typer.Option(help="How many steps after the change.")] = None,
    maps: Annotated[bool, typer.Option("--sweep", metavar="", help="Draw maps over rate and batch size.")] = False,
    budget: Annotated[int | None, typer.Option(help="Steps left: when should the rate be lowered?")] = None,
) -> None:
    """Predict what a run would do at other hyperparameters, from the run's folder alone.

    The first call measures the run; later ones use what was measured. The page is written to predict.html.
    """
    from .whatif_show import predict_and_show

    several = {"lr": lr, "batch_size": batch_size, "momentum": momentum, "weight_decay": weight_decay}
    asked: dict[str, Any] = {
        name: values[0] if len(values) == 1 else values for name, values in several.items() if values
    }
    if sampling is not None:
        asked["sampling"] = sampling
    try:
        _say_report(predict_and_show(out, path, asked, steps=steps, sweep=maps, budget=budget))
    except KeyboardInterrupt:
        raise KeyboardInterrupt("Interrupted; what was measured is kept. Give the same command to go on.") from None


@app.command(epilog="Example: thermograd validate runs/demo --replicas 4")
@_explained
def validate(
    path: RunFolder,
    replicas: Annotated[int, typer.Option(min=2, help="Trainings of each setting.")] = 4,
    steps: Annotated[int | None, typer.Option(help="Steps of each training.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the minibatches.")] = 0,
    fresh: Annotated[bool, typer.Option("--fresh", metavar="", help="Predict and train anew.")] = False,
) -> None:
    """Branch a run, really train at sixteen settings, and compare with predictions frozen beforehand.

    An interrupted validation goes on where it stopped when the same command is given again.
    """
    from .whatif_show import validate_and_show

    try:
        _say_report(validate_and_show(out, path, replicas=replicas, steps=steps, seed=seed, fresh=fresh))
    except KeyboardInterrupt:
        options = (
            f" --replicas {replicas}" + (f" --steps {steps}" if steps else "") + (f" --seed {seed}" if seed else "")
        )
        raise KeyboardInterrupt(
            f"Interrupted; finished trainings are kept. Go on with: {_program()} validate {path}{options}"
        ) from None


@app.command(epilog="Example: thermograd laws weight_variance")
@_explained
def laws(
    names: Annotated[list[str] | None, typer.Argument(metavar="[LAW]...", help="Show these only.")] = None,
) -> None:
    """List the laws: name, statement, source."""
    from .laws import catalogue, find

    for law in [find(name) for name in names] if names else catalogue():
        _say(f"[bold cyan]{law.name}[/]  [bold]{escape(law.title)}[/]")
        out.print(Padding(escape(law.statement), (0, 0, 0, 4)), highlight=False)
        out.print(Padding(f"[dim]{escape(law.source)}[/]", (0, 0, 1, 4)), highlight=False)


@app.command(epilog="Example: thermograd reproduce mori/fig3b --seeds 5")
@_explained
def reproduce(
    names: Annotated[list[str] | None, typer.Argument(metavar="[ITEM]...", help="As paper/figure.")] = None,
    show: Annotated[bool, typer.Option("--list", metavar="", help="List the items and what they cost.")] = False,
    every: Annotated[bool, typer.Option("--all", metavar="", help="Every item.")] = False,
    full: Annotated[bool, typer.Option("--full", metavar="", help="At the paper's scale.")] = False,
    page: Annotated[bool, typer.Option("--report", metavar="", help="Write all results on one page.")] = False,
    fresh: Annotated[bool, typer.Option("--fresh", metavar="", help="Run again what was run before.")] = False,
    seeds: Annotated[int, typer.Option(min=2, help="Independent repetitions.")] = 5,
    seed: Annotated[int, typer.Option(min=0, help="First source of all random numbers.")] = 0,
    workers: Annotated[int, typer.Option(min=1, help="Items at once.")] = 1,
    data: Annotated[Path | None, typer.Option(help="Folder of the data sets; default: $THERMOGRAD_DATA.")] = None,
    out_folder: Annotated[Path, typer.Option("--out", "-o", help="Folder of the results.")] = Path("reproductions"),
) -> None:
    """Run figures and tables of the papers again; say in numbers whether they hold.

    What was run before with the same settings is shown at once; an interrupted item goes on where it stopped.
    """
    from .papers import find, items
    from .papers.show import listing, run_and_show

    if show or not (names or every):
        out.print(listing(items().values()))
        if not show:
            _say("Name an item, or pass --all.")
        return
    wanted = list(items()) if every else [find(name).name for name in names or []]
    again = [_program(), "reproduce", *(["--all"] if every else wanted), *(["--full"] if full else [])]
    again += ["--seeds", str(seeds), "--seed", str(seed)]
    try:
        found = run_and_show(
            out,
            wanted,
            full=full,
            seeds=seeds,
            seed=seed,
            workers=workers,
            data_folder=data,
            out=out_folder,
            fresh=fresh,
        )
    except KeyboardInterrupt:
        here = ["--out", str(out_folder), *(["--data", str(data)] if data else []), *(["--report"] if page else [])]
        here += ["--workers", str(workers)] if workers > 1 else []
        told = shlex.join(again + here)
        raise KeyboardInterrupt(f"Interrupted; finished parts are kept. Go on with: {told}") from None
    if page:
        from .papers import write_gallery

        target = write_gallery(found, out_folder / "report", command=shlex.join(["thermograd", *again[1:]]))
        _say(f"Report: [bold]{escape(str(target))}[/] (one file; open it in a browser)")


@app.command(
    epilog="Examples: thermograd continual examples/continual_short.toml;  "
    "thermograd continual mine.toml --out runs/mine.  The keys of a configuration: docs/continual.md."
)
@_explained
def continual(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="Configuration in TOML.")],
    out_folder: Annotated[Path | None, typer.Option("--out", "-o", help="Folder of the results.")] = None,
    fresh: Annotated[bool, typer.Option("--fresh", metavar="", help="Run again what was run before.")] = False,
) -> None:
    """Compare constraints against forgetting on a sequence of tasks.

    Hyperparameters are chosen on validation data, then each method is repeated with other seeds. What was run before
    with the same settings is kept; an interrupted comparison goes on where it stopped.
    """
    from .continual import load
    from .continual import run as run_comparison

    settings = load(config)
    folder = out_folder or Path(settings.protocol.out or "runs/continual")
    try:
        found = run_comparison(settings, folder, fresh=fresh)
    except KeyboardInterrupt:
        again = f"{_program()} continual {config}" + (f" --out {out_folder}" if out_folder else "")
        raise KeyboardInterrupt(f"Interrupted; finished runs are kept. Go on with: {again}") from None
    rows = found.rows()
    out.print(_table(f"{found.title}, {len(found.seed)} seeds", found.columns[:-1], [row[:-1] for row in rows]))
    _say("Chosen on validation data:")
    for row in rows:
        if row[-1]:
            _say(f"  {escape(row[0])}: {escape(row[-1])}")
    _say("± is half a 95 % interval over seeds; p is of a paired t test; memory and times are one run's.")
    _say(f"Table, figure, JSON and data set: [bold]{escape(str(folder))}[/]")


# ---------------------------------------------------------------------- what the commands share


def _table(title: str, columns: list[str], rows: list[list[str]]) -> Table:
    table = Table(title=title, box=box.SIMPLE, title_justify="left")
    for i, name in enumerate(columns):
        table.add_column(name, justify="left" if i in (0, len(columns) - 1) else "right", overflow="fold")
    for row in rows:
        table.add_row(*(escape(cell) for cell in row))
    return table


def _program() -> str:
    """How to call this program again: by its path when the shell would not find it (``make demo``)."""
    called = sys.argv[0]
    return called if Path(called).name == "thermograd" and shutil.which("thermograd") is None else "thermograd"


def _say(text: str) -> None:
    out.print(text, highlight=False, soft_wrap=True)


def _run(config: Config, folder: Path, *, overwrite: bool, again: str) -> None:
    _known_laws(None if config.measure.laws == "all" else config.measure.laws)
    from .runfolder import refuse_other_run, write_config
    from .training import is_complete, rebuild, records_all_weights, train

    if not overwrite:
        refuse_other_run(folder, config)
        if is_complete(folder):
            _say(f"{escape(str(folder))} is trained already; measuring it again.")
            write_config(folder, config)  # what to measure may have changed
    try:
        train(config, folder, overwrite=overwrite)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"Interrupted; what was trained is kept. Resume with: {again}") from None
    if config.measure.laws == []:
        _say(f"Recorded in {escape(str(folder))}. The configuration asks for no laws.")
        return
    if not records_all_weights(config):
        _say(f"Recorded in {escape(str(folder))}. The laws look at all weights, which [record] leaves out.")
        return
    try:
        _check(config, folder, rebuild(folder))
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"Interrupted; the training is complete. Measure with: {_again(folder)}") from None


def _again(folder: Path) -> str:
    return f"{_program()} check {folder}"


def _has_sheet(folder: Path) -> bool:
    from .laws import LawSheet

    try:
        LawSheet.load(folder)
    except StoreError:
        return False
    return True


def _check(config: Config, folder: Path, problem: Any, *, keep: bool = False) -> None:
    from .laws import check as check_laws

    wanted = config.measure
    options = {k: getattr(wanted, k) for k in ("modes", "window_epochs") if getattr(wanted, k) is not None}
    sheet = check_laws(folder, problem, laws=wanted.laws, seed=wanted.seed, save=not keep, **options)
    out.print()
    out.print(sheet)
    out.print()
    if not keep:
        _write_report(sheet, folder / "report.html")


def _write_report(sheet: LawSheet, target: Path) -> None:
    _say_report(sheet.to_html(target))


def _say_report(target: Path) -> None:
    _say(f"Report: [bold]{escape(str(target))}[/] (one file; open it in a browser)")


def _known_laws(names: list[str] | None) -> None:
    """Refuse an unknown law before hours of training, not after."""
    from .laws import find

    for name in names or []:
        find(name)


def _is_other_demo(folder: Path, config: Config) -> bool:
    """Whether the folder holds a finished demo, or a demo of another seed or length: that may be replaced."""
    from . import config as configuration
    from .runfolder import CONFIG, is_complete

    if not (folder / CONFIG).is_file():
        return False
    present = configuration.load(folder / CONFIG)
    if present.trains_like(config):
        return is_complete(folder)
    steps = {"burn_in_steps": present.training.burn_in_steps, "steps": present.training.steps}
    return config.replace("run", seed=present.run.seed).replace("training", **steps).trains_like(present)


def main() -> None:
    """Entry point of the ``thermograd`` command; ``--debug`` may stand anywhere."""
    arguments = sys.argv[1:]
    if "--debug" in arguments:
        arguments = ["--debug", *(a for a in arguments if a != "--debug")]
    app(args=arguments, prog_name="thermograd")


if __name__ == "__main__":
    main()
