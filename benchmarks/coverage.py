"""What upswap covers: every model of every zoo in `tests/libraries/zoos`, patched and checked, as a table.

    python benchmarks/coverage.py [--zoo timm] [--match hrnet] [--jobs 2] [--json FILE] [--markdown]
    python benchmarks/coverage.py --model 'python:my_package.models:Net?width=8' --model my_cases.py

The models have random weights, tiny configurations and small images, but for the hosts of the DySample paper, which have their
real ones. `--model` names models of your own in place of the zoos. The checks are those of `tests/support/invariants.py`. Models
run in worker processes: one that crashes or hangs costs itself alone. The exit status is 1 where anything failed. The table in
docs/models.md is what `--markdown` prints.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import importlib.metadata
import importlib.util
import json
import multiprocessing
import queue
import sys
import threading
import time
from collections import Counter
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

import click
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from upswap.errors import UpswapError
from upswap.plan.site import KINDS, WAYS

TESTS = Path(__file__).resolve().parents[1] / "tests"
SHARED = [str(TESTS / "support"), str(TESTS / "libraries")]
CHECKS = ("patch", "sites", "step 0", "stand-ins", "guides", "graphs", "keys", "training", "learning", "unpatch")


@dataclasses.dataclass
class Outcome:
    """What became of one model. `checks` maps a check to "" where it passed, else to what went wrong."""

    zoo: str
    name: str
    seconds: float = 0.0
    #: (site name, kind, route or None where it is kept)
    sites: list[tuple[str, str, str | None]] = dataclasses.field(default_factory=list)
    #: (name, how its guide comes to it, or None, and what that is, or why there is none) of the swapped sites, where guides are
    #: taken
    guides: list[tuple[str, str | None, str]] = dataclasses.field(default_factory=list)
    #: what the plan says beside its sites
    hints: list[str] = dataclasses.field(default_factory=list)
    checks: dict[str, str] = dataclasses.field(default_factory=dict)

    @property
    def failures(self) -> dict[str, str]:
        """The checks that failed."""
        return {check: problem for check, problem in self.checks.items() if problem}


class Model(NamedTuple):
    """A model to examine: what `--model` named or else its zoo, its heading in the table, and its name there.

    `upsampler` is what it is patched with, where that is not the default.
    """

    source: str
    zoo: str
    name: str
    upsampler: str | None = None


def examine(model: Model) -> Outcome:
    """Patch one model and make all checks on it."""
    import invariants
    import own_models

    outcome, start = Outcome(model.zoo, model.name), time.perf_counter()
    cases_of = invariants.cases_of if model.source in invariants.ZOOS else own_models.cases_of
    try:
        (case,) = (case for case in cases_of(model.source) if case.name == model.name)
        run = invariants.Run(case, model.upsampler)
    except BaseException as error:  # noqa: BLE001 - whatever it is goes into the report
        outcome.checks["patch"] = _words(error)
    else:
        outcome.checks["patch"] = ""
        outcome.sites = [(site.name, site.kind, site.route if site.swap else None) for site in run.plan.sites]
        outcome.hints = list(run.plan.hints)
        outcome.guides = [
            (site.name, site.guide and site.guide.way, site.guide.place if site.guide else site.no_guide)
            for site in run.plan.swapped
            if site.guide or site.no_guide
        ]
        for check, make in run.checks().items():
            try:
                make()
            except BaseException as error:  # noqa: BLE001 - as above; pytest's failures are no Exceptions
                outcome.checks[check] = _words(error)
            else:
                outcome.checks[check] = ""
    outcome.seconds = round(time.perf_counter() - start, 1)
    return outcome


def _words(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


def _serve(pipe: Connection) -> None:
    """A worker process: examine the models that come through the pipe."""
    import torch

    sys.path[:0] = SHARED
    torch.set_num_threads(1)
    with contextlib.suppress(EOFError):  # the end of whoever gives the orders
        while (order := pipe.recv()) is not None:
            pipe.send(examine(order))
            gc.collect()


class Worker:
    """A process that examines one model after the other, replaced by a new one when it dies or hangs."""

    def __init__(self, limit: float) -> None:
        self.limit = limit
        self._start()

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs,), daemon=True)
        self._process.start()
        theirs.close()

    def examine(self, model: Model) -> Outcome:
        """The outcome for a model, also where the process did not survive it."""
        start = time.perf_counter()
        self._pipe.send(model)
        try:
            if self._pipe.poll(self.limit):
                return self._pipe.recv()
            problem = f"not done after {self.limit:g} s"
        except (EOFError, OSError):
            problem = "the process died"
        self._process.kill()
        self._process.join()
        problem += f" (exit code {self._process.exitcode})"
        self._start()
        return Outcome(model.zoo, model.name, round(time.perf_counter() - start, 1), checks={"patch": problem})

    def close(self) -> None:
        """End the process."""
        self._pipe.send(None)
        self._process.join(10)
        self._process.kill()


def examine_all(models: Sequence[Model], jobs: int, limit: float, console: Console) -> list[Outcome]:
    """The outcome of every model, in the order given."""
    waiting: queue.SimpleQueue[Model] = queue.SimpleQueue()
    for model in models:
        waiting.put(model)
    outcomes: dict[Model, Outcome] = {}

    def work() -> None:
        worker = Worker(limit)
        while True:
            try:
                model = waiting.get_nowait()
            except queue.Empty:
                break
            outcomes[model] = outcome = worker.examine(model)
            progress.advance(task)
            if outcome.failures:
                console.print(f"[red]failed[/] {outcome.zoo} {outcome.name}: {', '.join(outcome.failures)}")
        worker.close()

    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("models", total=len(models))
        threads = [threading.Thread(target=work, daemon=True) for _ in range(min(jobs, len(models)))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    return [outcomes[model] for model in models]


def column_of(outcomes: Sequence[Outcome]) -> dict[str, str]:
    """What there is to say of some models, a line each: counts, and for a check how many passed and how many failed."""
    sites = [site for outcome in outcomes for site in outcome.sites]
    routes = Counter(route for _, _, route in sites if route is not None)
    kept = Counter(kind for _, kind, route in sites if route is None)
    column = {
        "models": len(outcomes),
        "with something swapped": sum(any(route for _, _, route in outcome.sites) for outcome in outcomes),
        "sites": len(sites),
        "swapped": routes.total(),
        **{f"by the {route} route": routes[route] for route in ("module", "graph", "source")},
        **_guides_of(outcomes),
        "kept": kept.total(),
        **{f"kept: {kind}": kept[kind] for kind in KINDS},
    }
    for check in CHECKS:
        results = [not outcome.checks[check] for outcome in outcomes if check in outcome.checks]
        failed = results.count(False)
        column[f"check: {check}"] = f"{results.count(True)}, {failed} failed" if failed else results.count(True)
    return {line: str(value) for line, value in column.items()}


def _guides_of(outcomes: Sequence[Outcome]) -> dict[str, int | str]:
    """How many of the swapped sites have a guide, by the ways it comes to them."""
    ways = Counter(way for outcome in outcomes for _, way, _ in outcome.guides)
    counts: dict[str, int | str] = {f"guided: {way}": ways[way] for way in WAYS}
    guided, count = ways.total() - ways[None], ways.total()
    return {**counts, "guided": f"{guided}, {guided / count:.0%}" if count else 0, "without a guide": ways[None]}


def table_of(outcomes: Sequence[Outcome]) -> list[list[str]]:
    """The headings, then a line for each thing counted, with a column for each zoo and one for all; no lines of zeros."""
    zoos = list(dict.fromkeys(outcome.zoo for outcome in outcomes))
    columns = [column_of([outcome for outcome in outcomes if outcome.zoo == zoo]) for zoo in zoos]
    if len(zoos) > 1:
        zoos.append("all")
        columns.append(column_of(outcomes))
    lines = [[line, *(column[line] for column in columns)] for line in columns[0]]
    return [["", *zoos], *(line for line in lines if any(cell != "0" for cell in line[1:]))]


def markdown(lines: Sequence[Sequence[str]]) -> str:
    """The table in Markdown."""
    rule = ["---"] + ["---:"] * (len(lines[0]) - 1)
    return "\n".join(f"| {' | '.join(line)} |" for line in (lines[0], rule, *lines[1:]))


def show(console: Console, lines: Sequence[Sequence[str]], outcomes: Sequence[Outcome]) -> None:
    """Print the table, and what failed."""
    table = Table()
    for number, heading in enumerate(lines[0]):
        table.add_column(heading, justify="right" if number else "left")
    for line in lines[1:]:
        table.add_row(*line, style="red" if any("failed" in cell for cell in line) else None)
    console.print(table)
    for outcome in outcomes:
        for check, problem in outcome.failures.items():
            console.print(f"[bold]{outcome.zoo} {outcome.name}[/], {check}: ", end="")
            console.print((problem.splitlines() or [""])[0], markup=False, highlight=False)


def models_of(zoos: Sequence[str], own: Sequence[str], console: Console) -> list[Model]:
    """What the options name; without any, the models of every zoo that is installed."""
    import invariants
    import own_models

    unknown = set(zoos) - set(invariants.ZOOS)
    if unknown:
        raise click.BadParameter(
            f"{', '.join(sorted(unknown))}: not one of {', '.join(invariants.ZOOS)}", param_hint="--zoo"
        )
    missing = [zoo for zoo, library in invariants.ZOOS.items() if importlib.util.find_spec(library) is None]
    if set(zoos) & set(missing):
        raise click.BadParameter(f"{', '.join(sorted(set(zoos) & set(missing)))}: not installed", param_hint="--zoo")
    chosen = zoos or ([] if own else [zoo for zoo in invariants.ZOOS if zoo not in missing])
    if missing and not zoos and not own:
        console.print(f"left out, since they are not installed: {', '.join(missing)}")
    models = [Model(zoo, zoo, case.name) for zoo in chosen for case in invariants.cases_of(zoo)]
    try:
        return models + [Model(source, *names) for source in own for names in own_models.names_of(source)]
    except UpswapError as error:
        raise click.BadParameter(str(error), param_hint="--model") from error


def versions() -> dict[str, str]:
    """What is installed of the libraries that the zoos are of."""
    import invariants

    installed = {}
    for library in ("torch", *invariants.ZOOS.values()):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            installed[library] = importlib.metadata.version(library)
    return installed


@click.command(help=(__doc__ or "").split("\n\n", 1)[0])
@click.option("--zoo", "zoos", multiple=True, help="Only this zoo; may be given several times.")
@click.option(
    "--model",
    "own",
    multiple=True,
    help="A model of your own in place of the zoos: a spec such as 'python:my_package.models:Net?width=8', or a Python file "
    "with CASES; may be given several times.",
)
@click.option("--upsampler", help="What to patch with.  [default: dysample]")
@click.option("--match", default="", help="Only models with this in their name.")
@click.option("--jobs", default=2, show_default=True, help="Worker processes.")
@click.option("--limit", default=600.0, show_default=True, help="Seconds after which a model is given up.")
@click.option(
    "--json", "json_file", type=click.Path(dir_okay=False), help="Write everything, model by model, to a file."
)
@click.option("--markdown", "as_markdown", is_flag=True, help="Print the table as Markdown.")
def main(
    zoos: tuple[str, ...],
    own: tuple[str, ...],
    upsampler: str | None,
    match: str,
    jobs: int,
    limit: float,
    json_file: str | None,
    as_markdown: bool,
) -> None:
    """Patch and check the models, print the table and what failed."""
    sys.path[:0] = SHARED
    console = Console(stderr=as_markdown, width=None if sys.stdout.isatty() else 130)
    models = [model._replace(upsampler=upsampler) for model in models_of(zoos, own, console) if match in model.name]
    twice = [f"{zoo} {name}" for (_, zoo, name, _), count in Counter(models).items() if count > 1]
    if twice or not models:
        raise click.ClickException(
            f"two cases of one name: {', '.join(twice)}" if twice else f"no model matches {match!r}"
        )
    outcomes = examine_all(models, jobs, limit, console)
    lines = table_of(outcomes)
    if json_file:
        data = {"versions": versions(), "models": [dataclasses.asdict(outcome) for outcome in outcomes]}
        Path(json_file).write_text(json.dumps(data, indent=1))
    if as_markdown:
        click.echo(markdown(lines))
    show(console, lines, outcomes)
    sys.exit(any(outcome.failures for outcome in outcomes))


if __name__ == "__main__":
    main()
