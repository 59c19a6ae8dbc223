"""The arguments and options that `inspect` and `convert` have in common."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import click

from ...plan.site import KINDS

if TYPE_CHECKING:
    from ...files.open_source import Source

_Command = TypeVar("_Command", bound=Callable[..., Any])

#: What `upswap.patch` takes under the same names.
PATCH_OPTIONS = ("upsampler", "style", "groups", "dyscope", "init", "cascade", "strict", "kinds", "include", "exclude")


class _Size(click.ParamType[tuple[int, int]]):
    """`512` or `512x768`: height and width in pixels."""

    name = "H[xW]"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        """The pair (height, width)."""
        match = re.fullmatch(r"(\d{1,6})(?:[x,](\d{1,6}))?", str(value).strip())
        if match is None or 0 in (int(match[1]), int(match[2] or 1)):
            self.fail(f"{value!r} is not a size in pixels; write 512 or 512x768 (height x width)", param, ctx)
        return int(match[1]), int(match[2] or match[1])


#: The type of options that take the size of an image.
SIZE = _Size()

_COMMON = [
    click.option(
        "--trust", multiple=True, metavar="PACKAGE", help="Allow a file to use a package of your own. Repeatable."
    ),
    click.option("--json", "as_json", is_flag=True, help="JSON on stdout, notes on stderr."),
    click.option("--debug", is_flag=True, expose_value=False, help="Show tracebacks and others' warnings."),
]

_PATCH = [
    click.option(
        "--upsampler",
        default="dysample",
        show_default=True,
        metavar="NAME",
        help="dysample, carafe (not exact at step 0), or an installed package's.",
    ),
    click.option(
        "--style", type=click.Choice(["lp", "pl"]), default="lp", show_default=True, help="How DySample predicts."
    ),
    click.option("--groups", type=click.IntRange(min=1), help="Channel groups.  [default: 4 for lp, 8 for pl]"),
    click.option("--dyscope", is_flag=True, help="Learn the range of the offsets too."),
    click.option(
        "--init",
        type=click.Choice(["match", "paper"]),
        default="match",
        show_default=True,
        help="match: the same output at step 0. paper: as published.",
    ),
    click.option("--cascade", is_flag=True, help="x4 and x8 as chains of x2 (not exact at step 0)."),
    click.option("--strict", is_flag=True, help="Fail instead of falling back, as when groups do not divide channels."),
    click.option("--include", multiple=True, metavar="GLOB", help="Swap only sites of such names. Repeatable."),
    click.option("--exclude", multiple=True, metavar="GLOB", help="Keep sites of such names. Repeatable."),
    click.option(
        "--kind",
        "kinds",
        multiple=True,
        type=click.Choice(list(KINDS)),
        metavar="KIND",
        help="Kinds to swap. Repeatable.  [default: feature]",
    ),
    click.option("--input-size", type=SIZE, help="Size of the example image.  [default: found by trying]"),
]

_SOURCE = click.argument("source", metavar="SOURCE")
_WEIGHTS = click.option("--weights", metavar="FILE", help="A state dict to load into SOURCE first.")


def model_options(command: _Command) -> _Command:
    """SOURCE and the options every command that plans a swap takes."""
    return _with(command, [_SOURCE, *_PATCH, _WEIGHTS, *_COMMON])


def common_options(command: _Command) -> _Command:
    """The options every command has: `trust` and `as_json` are passed on, `--debug` is for `run` alone."""
    return _with(command, _COMMON)


def patch_flags() -> list[Callable[[_Command], _Command]]:
    """The options that say what is swapped for what, and at what input size."""
    return list(_PATCH)


def _with(command: _Command, options: Sequence[Callable[[_Command], _Command]]) -> _Command:
    for option in reversed(options):
        command = option(command)
    return command


def patch_options(options: dict[str, Any]) -> dict[str, Any]:
    """The keyword arguments of `upswap.patch` among the options of a command."""
    chosen = {name: options[name] for name in PATCH_OPTIONS}
    return {**chosen, "kinds": chosen["kinds"] or ("feature",)}


def open_model(options: dict[str, Any]) -> tuple[Source, Any]:
    """The source on the command line, and example inputs of the size asked for; None where they are found by trying."""
    from ...files.open_source import open_source
    from ...probe.inputs.infer import example_inputs_for

    source = open_source(options["source"], trust=options["trust"], weights=options["weights"])
    size = options["input_size"]
    return source, None if size is None else example_inputs_for(source.model, size)
