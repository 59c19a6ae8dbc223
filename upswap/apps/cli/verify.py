"""`upswap verify`: does a patched model compute what the original does, and where does it begin not to?"""

from __future__ import annotations

import copy
import dataclasses
from typing import TYPE_CHECKING, Any

import click

from .options import SIZE, common_options, weights_options
from .output import note, progress, say_json, stdout

if TYPE_CHECKING:
    from torch import nn

    from ...surgery.checking.first_difference import Difference
    from ...surgery.checking.verification import Report


@click.command(short_help="Compare a patched model with its original, output by output.")
@click.argument("original", metavar="ORIGINAL")
@click.argument("patched", metavar="PATCHED")
@click.option(
    "--input-size", "sizes", type=SIZE, multiple=True, help="Size of the image. Repeatable.  [default: two that run]"
)
@weights_options("ORIGINAL")
@common_options
def verify(
    original: str,
    patched: str,
    sizes: tuple[tuple[int, int], ...],
    weights: str | None,
    key: str | None,
    trust: tuple[str, ...],
    as_json: bool,
) -> None:
    """Run ORIGINAL and PATCHED on the same inputs and compare every output.

    ORIGINAL is a file or a spec, PATCHED a file or folder that upswap wrote; where that does not say how its model is
    built, it is built from ORIGINAL. Exits with 1 where an output differs by more than rounding, and names the first
    layer that does.
    """
    from ...errors import VerificationError
    from ...files.open_source import open_source
    from ...surgery.checking.verification import verify as compare

    with progress("loading"):
        opened = open_source(original, trust=trust, weights=weights, key=key)
        first = opened.model.eval()
        second = _open_patched(patched, first, trust).eval()
    if opened.said is not None:
        note(opened.said)
    with progress("running both"):
        report = compare(first, second, sizes=list(sizes) or None)
    difference = None
    if not report.ok:
        with progress("looking for the first layer that differs"):
            difference = _difference(first, second, report, sizes)
    if as_json:
        say_json(_as_dict(report, difference))
    else:
        _print(report)
    if difference is not None:
        if as_json:
            raise click.exceptions.Exit(1)
        raise VerificationError(f"{patched} does not compute what {original} does: {difference}")


def _open_patched(path: str, original: nn.Module, trust: tuple[str, ...]) -> nn.Module:
    from ...files.checkpoint import load, says_how_it_is_built

    if says_how_it_is_built(path, trust):
        return load(path, trust=trust)
    return load(path, copy.deepcopy(original), trust=trust)


def _difference(
    original: nn.Module, patched: nn.Module, report: Report, sizes: tuple[tuple[int, int], ...]
) -> Difference:
    from ...probe.inputs.infer import candidates
    from ...probe.observe import first_that_runs
    from ...surgery.checking.first_difference import first_difference

    inputs = first_that_runs(original, candidates(original, *sizes[:1])).inputs
    tolerance = max((row.tolerance for row in report.rows), default=0.0)
    return first_difference(original, patched, inputs, tolerance)


def _as_dict(report: Report, difference: Difference | None) -> dict[str, Any]:
    rows = [{**dataclasses.asdict(row), "max_rel_diff": row.max_rel_diff, "ok": row.ok} for row in report.rows]
    return {
        "ok": report.ok,
        "max_abs_diff": report.max_abs_diff,
        "max_rel_diff": report.max_rel_diff,
        "rows": rows,
        "difference": None if difference is None else dataclasses.asdict(difference),
    }


def _print(report: Report) -> None:
    from rich.table import Table

    from ...console import words

    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("inputs", "output", "shape"):
        table.add_column(name, no_wrap=True)
    for name in ("largest value", "difference", "relative", "allowed"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("")
    for row in report.rows:
        verdict = words(("equal", "green") if row.ok else (row.problem or "differs", "red"))
        table.add_row(
            row.inputs,
            str(row.output),
            "x".join(map(str, row.shape)),
            f"{row.scale:.3g}",
            f"{row.max_abs_diff:.1e}",
            f"{row.max_rel_diff:.1e}",
            f"{row.tolerance:.0e}",
            verdict,
        )
    stdout().print(table)
