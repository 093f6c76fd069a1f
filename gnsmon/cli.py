"""The command line; each command imports what it needs, so that reports start without torch."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

app = typer.Typer(
    help="Gradient noise scale of a training run: is the batch too small or too large?",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
Run = Annotated[Path, typer.Argument(help="A run folder, or its gns.jsonl.", show_default=False)]
SETUP, GOAL, WARM_UP = "Setup", "Goal", "Batch warm-up"  # panels of a help page
PROBLEMS = {"digits": "gnsmon.demo.problems:digits", "text": "gnsmon.demo.problems:text"}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; a user's mistake is one line on stderr and exit status 2."""
    try:
        app(args=arguments)
    except (ValueError, OSError, ImportError) as error:
        Console(stderr=True).print(Text(str(error), style="red"), soft_wrap=True)
        sys.exit(2)


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib import metadata

        Console().print(f"gnsmon {metadata.version('gnsmon')}", highlight=False)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version."
        ),
    ] = False,
) -> None:
    pass


@app.command()
def demo(
    task: Annotated[str | None, typer.Option(help="digits or text.", show_default="digits")] = None,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Examples in a step.")] = None,
    data_dir: Annotated[
        Path | None, typer.Option(help="Folder with the MNIST files, instead of bundled digits.")
    ] = None,
    run_dir: Annotated[
        Path | None, typer.Option(help="Where to write.", show_default="runs/demo-TASK-TIME")
    ] = None,
    config: Annotated[Path | None, typer.Option(help="TOML file, as in configs/.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of weights and batches.")] = None,
) -> None:
    """Train a small model with the monitor attached: a minute or two on a laptop."""
    from gnsmon.demo.config import load_config

    settings = load_config(
        config,
        task=task,
        steps=steps,
        batch_size=batch_size,
        data_dir=data_dir,
        run_dir=run_dir,
        seed=seed,
    )
    from gnsmon.demo.train import run

    run(settings, Console())


@app.command()
def report(run: Run) -> None:
    """Print what a run's log says, and write report.md and gns.png beside it."""
    from gnsmon.report import render, summarise, write_report
    from gnsmon.sinks import read_log

    console = Console()
    log = read_log(run)
    render(console, summarise(log))
    console.print(Text(f"\n{write_report(log)}", style="dim"), soft_wrap=True)


@app.command()
def advise(
    run: Run,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="The present batch, if not the log's.")
    ] = None,
    microbatch: Annotated[
        int | None,
        typer.Option(min=1, help="Examples per worker and backward.", rich_help_panel=SETUP),
    ] = None,
    largest_microbatch: Annotated[
        int | None,
        typer.Option(
            min=1, help="Examples that fit into a worker's memory.", rich_help_panel=SETUP
        ),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(min=1, help="Workers that average their gradients.", rich_help_panel=SETUP),
    ] = None,
    any_size: Annotated[
        bool,
        typer.Option(
            "--any-size",
            help="Not powers of two times the smallest batch alone.",
            rich_help_panel=SETUP,
        ),
    ] = False,
    optimizer: Annotated[
        str | None,
        typer.Option(
            help="SGD, momentum, Adam, Lion, Muon, ..., if not the log's.", rich_help_panel=SETUP
        ),
    ] = None,
    data_overhead: Annotated[
        float | None,
        typer.Option(
            help="Examples above the fewest, 0.2 for 20 %, at most.", rich_help_panel=GOAL
        ),
    ] = None,
    step_overhead: Annotated[
        float | None, typer.Option(help="Steps above the fewest, at most.", rich_help_panel=GOAL)
    ] = None,
    step_price: Annotated[
        float | None,
        typer.Option(help="Of a step, whatever its batch: the cheapest run.", rich_help_panel=GOAL),
    ] = None,
    example_price: Annotated[
        float | None, typer.Option(help="Of an example in it.", rich_help_panel=GOAL)
    ] = None,
    wall_clock: Annotated[
        bool,
        typer.Option(
            "--wall-clock", help="The fastest run, by the log's step times.", rich_help_panel=GOAL
        ),
    ] = False,
    times: Annotated[
        list[Path],
        typer.Option(
            help="Further runs, of other batch sizes, for --wall-clock.", rich_help_panel=GOAL
        ),
    ] = [],  # noqa: B006
    curve: Annotated[bool, typer.Option("--curve", help="Print steps against examples.")] = False,
    plot: Annotated[Path | None, typer.Option(help="Draw them, as PNG.")] = None,
    schedule: Annotated[
        Path | None,
        typer.Option(help="Write the batch warm-up of this run, as JSON.", rich_help_panel=WARM_UP),
    ] = None,
    snippet: Annotated[
        str | None,
        typer.Option(help="Print its code: loop, lightning or hf.", rich_help_panel=WARM_UP),
    ] = None,
    start: Annotated[
        int | None,
        typer.Option(
            min=1, help="The warm-up's first batch, if not the log's.", rich_help_panel=WARM_UP
        ),
    ] = None,
    largest: Annotated[
        int | None, typer.Option(min=1, help="Its largest batch.", rich_help_panel=WARM_UP)
    ] = None,
    factor: Annotated[
        int, typer.Option(min=2, help="By which it grows.", rich_help_panel=WARM_UP)
    ] = 2,
    dwell: Annotated[
        int, typer.Option(min=1, help="Steps at each size, at least.", rich_help_panel=WARM_UP)
    ] = 100,
) -> None:
    """Say what the last reading of a run means for its batch size, and plan its warm-up."""
    import numpy as np
    import orjson

    from gnsmon.advice import BatchSizeSchedule, Goal, StepTime, export, planned
    from gnsmon.advice import advise as advise_on
    from gnsmon.report import curve_table
    from gnsmon.sinks import read_log

    console, log = Console(), read_log(run)
    reading = log.latest()
    if reading is None:
        raise ValueError(f"{log.path} has no reading yet, so there is nothing to advise on")
    if wall_clock and (step_price, example_price) != (None, None):
        raise ValueError("--wall-clock takes its prices from the log: drop the others")
    if (schedule or snippet) and largest_microbatch and not microbatch:
        raise ValueError(
            "--largest-microbatch is for one batch, and a warm-up keeps its microbatch: give that "
            "as --microbatch"
        )
    there = log.header.get("world_size") or 1
    layout = {
        "microbatch": microbatch or log.header.get("microbatch"),
        "world_size": workers or there,
    }
    limits = {"data_overhead": data_overhead, "step_overhead": step_overhead}
    if wall_clock:
        timed = [of.step_times() for of in (log, *map(read_log, times))]
        examples, seconds = map(np.concatenate, zip(*timed, strict=True))
        line = StepTime.fit(examples, seconds, world_size=there).on(layout["world_size"])
        goal = line.goal(**limits)
        console.print(Text(f"{line}\n"))
    else:
        goal = Goal(**limits, step_price=step_price, example_price=example_price)
    optimizer = optimizer or " and ".join(log.header.get("optimizer") or [])
    words = advise_on(
        reading,
        present=batch_size,
        goal=goal,
        optimizer=optimizer,
        in_metric=log.in_metric(),
        largest_microbatch=largest_microbatch,
        powers_of_two=not any_size,
        **layout,
    )
    console.print(Text(str(words)))
    if curve:
        table = curve_table(words) if words.curve() else "No curve without a noise scale."
        console.print(Text(), table)
    if plot is not None:
        from gnsmon.plots import plot_curve

        console.print(Text(f"\n{plot_curve(words, plot)}", style="dim"), soft_wrap=True)
    if schedule is None and snippet is None:
        return
    start = start or int(log.of()["examples"][0])
    warm_up = BatchSizeSchedule(
        start,
        largest=largest,
        factor=factor,
        dwell=dwell,
        goal=goal,
        optimizer=optimizer,
        **layout,
    )
    stages = planned(log.known(), warm_up)
    if schedule is not None:
        schedule.write_bytes(orjson.dumps(export.to_json(stages), option=orjson.OPT_INDENT_2))
        console.print(Text(f"\n{schedule}", style="dim"), soft_wrap=True)
    if snippet is not None:
        print(export.snippet(stages, snippet))  # as it is: rich would wrap it


@app.command()
def check(
    problem: Annotated[
        str,
        typer.Argument(
            metavar="MODULE:FACTORY|digits|text",
            help="A function that returns (model, loss, batch), loss(model, batch) being a mean "
            "over the examples; or a model of the demo.",
            show_default=False,
        ),
    ],
    method: Annotated[str, typer.Option(help="The source of per-example norms.")] = "pepgns",
) -> None:
    """Examine a model, its loss and its data: exit status 1 if something is wrong."""
    model, loss, batch = _factory(PROBLEMS.get(problem, problem))()
    from gnsmon.checking import check as prove

    result = prove(model, loss, batch, method=method)
    Console().print(result)
    raise typer.Exit(0 if result.passed else 1)


@app.command()
def simulate(
    b_simple: Annotated[
        float, typer.Option(min=1e-9, max=1e12, help="The true noise scale, in examples.")
    ] = 100,
    b_big: Annotated[int, typer.Option(help="Examples in a step.")] = 64,
    b_small: Annotated[int, typer.Option(help="Examples in each of its parts.")] = 1,
    d_eff: Annotated[int, typer.Option(help="Directions that the noise comes to.")] = 100,
    dimension: Annotated[
        int | None,
        typer.Option(help="Directions in all, of unequal noise.", show_default="d_eff"),
    ] = None,
    steps: Annotated[int, typer.Option(help="Measured steps of a run.")] = 1000,
    repeat: Annotated[int, typer.Option(help="Independent runs.")] = 500,
    decay: Annotated[float, typer.Option(help="Of the averages, per measured step.")] = 0.99,
    seed: Annotated[int, typer.Option(help="Of the draws.")] = 0,
) -> None:
    """Say how well a noise scale would be known, from Gaussian gradients of known truth."""
    from gnsmon.simulation import gradients
    from gnsmon.simulation import simulate as run

    of = gradients(b_simple, d_eff=d_eff, dimension=dimension)
    sizes = {"b_big": b_big, "b_small": b_small, "steps": steps, "repeat": repeat}
    Console().print(run(of, **sizes, decay=decay, seed=seed), highlight=False)


@app.command()
def figures(
    only: Annotated[
        str | None, typer.Option(help="Such as 1,2a; of 1, 2a, 2b, 3, 4, 5, 6.", show_default="all")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder to write into.")] = Path("docs/figures"),
    checkpoint: Annotated[
        Path | None, typer.Option(help="Folder of a Hugging Face language model, for figure 3.")
    ] = None,
    tokens: Annotated[
        Path | None, typer.Option(help="A .npy file of token indices [N, T] for that model.")
    ] = None,
    validation: Annotated[
        Path, typer.Option(help="Measured critical batches, for figure 2b, if it exists.")
    ] = Path("docs/validation.json"),
    quick: Annotated[bool, typer.Option("--quick", help="Smaller models, fewer steps.")] = False,
) -> None:
    """Draw the figures of the SOGNS paper anew, each with its numbers beside it."""
    from gnsmon.figures import NAMES, make

    console = Console()
    names = NAMES if only is None else tuple(name.strip() for name in only.split(","))
    for path in make(
        names,
        out=out,
        quick=quick,
        checkpoint=checkpoint,
        tokens=tokens,
        validation=validation,
        options=" --quick" * quick,
        say=lambda line: console.print(line, style="dim", highlight=False),
    ):
        console.print(Text(str(path)), soft_wrap=True)


def _factory(name: str) -> Callable[[], Any]:
    module, colon, attribute = name.partition(":")
    if not (module and colon and attribute):
        raise ValueError(f"expected MODULE:FACTORY, such as my_model:for_check, got {name!r}")
    sys.path.insert(0, str(Path.cwd()))  # an installed command does not look there by itself
    factory = getattr(importlib.import_module(module), attribute, None)
    if not callable(factory):
        raise ValueError(f"{module}: expected a function {attribute}, got {factory!r}")
    return factory  # type: ignore[no-any-return]
