"""`upswap zoo`: many models in one go, with a journal to go on from and a report at the end."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..zoo.rows import FORMATS, STATUSES
from .options import common_options, patch_flags, patch_options
from .output import note, progress, say, say_json, stderr, stdout

if TYPE_CHECKING:
    from rich.console import RenderableType

    from ..zoo.journal import Journal
    from ..zoo.rows import Row, Settings, Task

_OPTIONS = [
    click.option("-o", "--out", "out", metavar="DIR", help="Folder for the models, the journal and the report."),
    click.option(
        "--format",
        "output",
        type=click.Choice(list(FORMATS)),
        default="pt",
        show_default=True,
        help="What is written for each model; plan: its sites and decisions as JSON.",
    ),
    click.option("--check", is_flag=True, help="Run the five checks on each model and write no models."),
    click.option("--dry-run", is_flag=True, help="List the models and what they would cost, and stop."),
    click.option("--force", is_flag=True, help="Replace files in DIR that are of no run there. A journal never is."),
    click.option("--retry-failed", is_flag=True, help="Do those again that failed in an earlier run."),
    click.option("--timeout", type=click.FloatRange(min=0.1), default=600.0, show_default=True, metavar="SECONDS"),
    click.option(
        "--memory",
        type=click.FloatRange(min=0.1),
        metavar="GIB",
        help="Memory that one model may take.  [default: an equal share of the machine's]",
    ),
    click.option("--jobs", type=int, default=1, show_default=True, help="Models at the same time; -1: one a core."),
    click.option("--backend", type=click.Choice(["local", "ray", "dask"]), default="local", show_default=True),
    click.option("--address", metavar="URL", help="Of the Ray or Dask cluster; it has to share the folder DIR."),
]

_SET = click.option(
    "--set", "extra", multiple=True, metavar="KEY=VALUE", help="An argument for each model: classes=3. Repeatable."
)

_PRETRAINED = click.option(
    "--pretrained", is_flag=True, help="The library's own weights, which it fetches; random ones without."
)


@click.group(short_help="Convert, check or list many models in one go.")
def zoo() -> None:
    """Convert many models in one go, each in a process of its own.

    Run the same command again to go on with a run that was stopped: what is in its journal is not done twice.
    """


def _run_options(command: Callable[..., None]) -> Callable[..., None]:
    for option in reversed([*_OPTIONS, *patch_flags("--set-upsampler")]):
        command = option(command)
    return common_options(command)


@zoo.command(short_help="Models of segmentation_models_pytorch.")
@click.option("--arch", default="*", show_default=True, metavar="GLOBS", help="Architectures, comma-separated.")
@click.option("--encoder", default="resnet18", show_default=True, metavar="GLOBS", help="Encoders, comma-separated.")
@_SET
@_PRETRAINED
@_run_options
def smp(arch: str, encoder: str, extra: tuple[str, ...], pretrained: bool, **options: Any) -> None:
    """Every architecture of segmentation_models_pytorch on every encoder that matches.

    \b
    upswap zoo smp --arch '*' --encoder 'resnet*,mit_b*,tu-convnext_*' -o out/
    """
    from ..zoo import catalog

    weights = {"encoder_weights": "imagenet"} if pretrained else {}
    _run(catalog.smp(arch, encoder, {**weights, **_extra(extra)}), options)


@zoo.command(short_help="Models of timm whose code resizes.")
@click.option("--match", default="*", show_default=True, metavar="GLOBS", help="Models, comma-separated.")
@_SET
@_PRETRAINED
@_run_options
def timm(match: str, extra: tuple[str, ...], pretrained: bool, **options: Any) -> None:
    """Every model of timm that matches and whose code resizes anything.

    \b
    upswap zoo timm --match 'hrnet*' --set features_only=True -o out/
    """
    from ..zoo import catalog

    weights = {"pretrained": True} if pretrained else {}
    _run(catalog.timm(match, {**weights, **_extra(extra)}), options)


@zoo.command(short_help="Detection, segmentation and flow models of torchvision.")
@click.option("--match", default="*", show_default=True, metavar="GLOBS", help="Models, comma-separated.")
@_SET
@_PRETRAINED
@_run_options
def torchvision(match: str, extra: tuple[str, ...], pretrained: bool, **options: Any) -> None:
    """Every detection, segmentation and optical flow model of torchvision that matches.

    \b
    upswap zoo torchvision --match 'fasterrcnn*' -o out/
    """
    from ..zoo import catalog

    weights = {"weights": "DEFAULT"} if pretrained else {}
    _run(catalog.torchvision(match, {**weights, **_extra(extra)}), options)


@zoo.command("list", short_help="The files and specs listed in a text file.")
@click.argument("file", metavar="FILE")
@_run_options
def listed(file: str, **options: Any) -> None:
    """Every source in FILE, a path or a spec a line.

    \b
    upswap zoo list models.txt -o out/
    """
    from ..zoo import catalog

    _run(catalog.listed(Path(file)), options)


@zoo.command(short_help="The report of a run: a table, report.csv and report.html.")
@click.argument("folder", metavar="DIR")
@click.option("--json", "as_json", is_flag=True, help="The totals and rows as JSON on stdout.")
@click.option("--debug", is_flag=True, expose_value=False, help="Show tracebacks and others' warnings.")
def report(folder: str, as_json: bool) -> None:
    """Write report.csv and report.html for the journal in DIR, finished or not, and print the table."""
    from ...errors import SourceError
    from ..zoo.journal import FILE, Journal

    if not os.path.lexists(Path(folder) / FILE):
        raise SourceError(f"{folder} has no {FILE}: no run was made there")
    journal = Journal(Path(folder))
    _report(journal, list(journal.rows().values()), as_json)


# -- a run ----------------------------------------------------------------------------------------------------------------


def _run(sources: Sequence[str], options: dict[str, Any]) -> None:
    from ..zoo import catalog
    from ..zoo.journal import Journal

    settings = _settings(options)
    suffix = FORMATS.get(settings.output or "", "")
    folder = Path(options["out"] or ".")
    journal = Journal(folder)

    def targets(claimed: Mapping[str, str]) -> dict[str, Path]:
        return catalog.targets(sources, folder, suffix, claimed)

    if options["dry_run"]:
        _dry_run(targets(journal.targets()), options["as_json"])
        return
    if options["out"] is None:
        raise click.UsageError("name a folder for the journal and the models: -o DIR")
    from ..zoo.engine import run
    from ..zoo.rows import Task

    files = journal.start(settings, targets if settings.output else lambda _: {}, force=options["force"])
    if options["retry_failed"]:
        journal.forget(row.source for row in journal.rows().values() if not row.ok)
    home = os.getcwd()
    tasks = [
        Task(source, str(files.get(source, folder).absolute()), settings, home) for source in dict.fromkeys(sources)
    ]
    before = len(_of(journal, tasks))
    if before:
        note(f"{before} of {len(tasks)} are in the journal already")
    try:
        with _progress(journal, tasks):
            run(tasks, folder, jobs=options["jobs"], backend=options["backend"], address=options["address"])
    except KeyboardInterrupt:
        done = len(_of(journal, tasks))
        say(f"\nstopped: {done} of {len(tasks)} are done. The same command goes on from there", err=True)
        raise click.Abort from None
    rows = _of(journal, tasks)
    _report(journal, rows, options["as_json"])
    if not all(row.ok for row in rows):
        raise click.exceptions.Exit(1)


def _settings(options: dict[str, Any]) -> Settings:
    from ..zoo.rows import Settings

    cores = os.cpu_count() or 1
    jobs = cores if options["jobs"] < 0 else max(1, options["jobs"])
    memory = options["memory"]
    share = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // jobs if hasattr(os, "sysconf") else None
    return Settings(
        options=patch_options(options),
        output=None if options["check"] else options["output"],
        check=options["check"],
        input_size=options["input_size"],
        trust=options["trust"],
        timeout=options["timeout"],
        memory=int(memory * 2**30) if memory else share,
        threads=max(1, cores // jobs),
    )


def _extra(pairs: tuple[str, ...]) -> dict[str, Any]:
    from ...architectures.spec import read_value

    found = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key.isidentifier():
            raise click.BadParameter(f"{pair!r} is not of the form KEY=VALUE", param_hint="--set")
        found[key] = read_value(value)
    return found


def _of(journal: Journal, tasks: Sequence[Task]) -> list[Row]:
    """The rows of these tasks that there are, in their order."""
    rows = journal.rows()
    return [rows[task.source] for task in tasks if task.source in rows]


@contextmanager
def _progress(journal: Journal, tasks: Sequence[Task]) -> Iterator[None]:
    """A bar that follows the journal: how many are done, how many of them failed, and how long the rest will take."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    from ...shown import one_line

    console = stderr()
    bar = Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    )
    ended = threading.Event()

    def follow() -> None:
        started = len(_of(journal_seen, tasks))
        line = bar.add_task("models", total=len(tasks), completed=started)
        while True:
            rows = _of(journal_seen, tasks)
            failed = sum(not row.ok for row in rows)
            last = rows[-1].source if rows else ""
            text = f"models ({failed} failed)" if failed else "models"
            bar.update(line, completed=len(rows), description=f"{text} {one_line(last[-40:])}")
            if ended.is_set():
                return
            ended.wait(0.3)

    from ..zoo.journal import Journal

    journal_seen = Journal(journal.path.parent)  # its own: one journal is not for two threads
    with bar:
        thread = threading.Thread(target=follow, daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()


# -- what is printed ------------------------------------------------------------------------------------------------------


def _dry_run(targets: dict[str, Path], as_json: bool) -> None:
    from rich.table import Table

    from ...console import words
    from ..zoo.cost import costs

    with progress(f"counting the parameters of {len(targets)} models"):
        found = costs(targets)
    if as_json:
        say_json(found)
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("model", overflow="fold")
    table.add_column("parameters", justify="right")
    table.add_column("MB", justify="right")
    table.add_column("would be written to", overflow="fold")
    for cost in found:
        numbers = (
            (f"{cost['parameters']:,}", f"{cost['bytes'] / 1e6:,.0f}") if cost["parameters"] is not None else ("", "")
        )
        table.add_row(
            words(cost["source"]),
            *numbers,
            words(cost["target"] if not cost["error"] else (_first_line(cost["error"]), "red")),
        )
    console = stdout()
    console.print(table)
    size = sum(cost["bytes"] or 0 for cost in found)
    bad = sum(bool(cost["error"]) for cost in found)
    text = f"{len(found)} models, {size / 1e9:,.1f} GB as .pt or .safetensors"
    console.print(f"\n{text}" + (f"; {bad} of them cannot be built" if bad else ""))


def _report(journal: Journal, rows: list[Row], as_json: bool) -> None:
    from ...files import atomic
    from ..zoo.journal import REPORTS, check_no_links
    from ..zoo.page import to_html
    from ..zoo.report import to_csv, totals

    folder = journal.path.parent
    page = to_html(rows, f"upswap zoo: {folder.resolve().name}", journal.header())
    check_no_links(folder, REPORTS)
    for name, text in zip(REPORTS, (to_csv(rows), page), strict=True):
        atomic.write_text(folder / name, text, force=True)
    if as_json:
        say_json({"totals": totals(rows), "rows": [row.to_dict() for row in rows]})
        return
    _print(rows)
    say(f"\n{folder / 'report.html'}, report.csv and {journal.path.name} have all of it")


def _print(rows: list[Row]) -> None:
    from ...console import words

    console = stdout()
    console.print(_table_of(rows))
    broken = [row for row in rows if not row.ok]
    for row in broken:
        problems = [row.error, *(f"check {name}: {message}" for name, message in row.checks.items() if message)]
        if row is broken[0]:
            console.print()
        console.print(words((row.source, "red"), f": {_first_line(next(filter(None, problems), ''))}"))
    console.print()
    console.print(words(_totals_line(rows)))


def _first_line(text: str) -> str:
    return next(iter(text.splitlines()), "")[:300]


def _table_of(rows: list[Row]) -> RenderableType:
    from rich.table import Table

    from ...console import words

    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("model", overflow="fold", ratio=3)
    table.add_column("status", no_wrap=True)
    for name in ("swapped", "kept", "added", "step 0", "s"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        added = row.parameters_after - row.parameters
        table.add_row(
            words(row.source),
            words((row.status, "green" if row.ok else "red")),
            f"{row.swapped}/{row.sites}",
            str(sum(row.kept.values())),
            f"{added / row.parameters:+.2%}" if added and row.parameters else "",
            "" if row.max_rel_diff is None else f"{row.max_rel_diff:.0e}",
            f"{row.total_seconds:.1f}",
        )
    return table


def _totals_line(rows: list[Row]) -> str:
    from ..zoo.report import totals

    counts = totals(rows)
    by_status = ", ".join(f"{counts[name]} {name}" for name in STATUSES if counts[name])
    kinds = ", ".join(f"{count} {kind}" for kind, count in counts["kept"].items())
    return f"{counts['models']} models: {by_status}. {counts['swapped']} of {counts['sites']} sites swapped" + (
        f", kept {kinds}" if kinds else ""
    )
