"""`upswap bench`: upsamplers side by side, or a model against itself patched."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .options import common_options, open_model, patch_flags, patch_options, weights_options
from .output import note, progress, say, say_json, stdout

if TYPE_CHECKING:
    from ..bench.upsampling import Case, Row

#: The paper's case, and two of other proportions.
SHAPES = ((1, 256, 120, 120), (2, 64, 128, 128), (8, 128, 56, 56))

#: What a whole model is measured at by default.
MODEL_SIZE = (512, 512)


class _Shape(click.ParamType):  # type: ignore[type-arg]  # click before 8.4 has none
    """`1x256x120x120`: a batch of maps, NCHW."""

    name = "shape"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, int, int, int]:
        """The four numbers."""
        match = re.fullmatch(r"(\d{1,6})x(\d{1,6})x(\d{1,6})x(\d{1,6})", str(value).strip())
        if match is None or "0" in match.groups():
            self.fail(f"{value!r} is not a shape; write NxCxHxW, 1x256x120x120 for one", param, ctx)
        batch, channels, height, width = map(int, match.groups())
        return batch, channels, height, width


class _Picture(click.ParamType):  # type: ignore[type-arg]  # as above
    """A file to draw to, in a folder that exists."""

    name = "picture"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        """The path."""
        path = Path(value)
        if path.suffix not in (".png", ".svg"):
            self.fail(f"{value!r} is no picture; write a name that ends in .png or .svg", param, ctx)
        if not path.parent.is_dir():
            self.fail(f"there is no folder {path.parent}", param, ctx)
        return path


_FOR_UPSAMPLERS = [
    click.option(
        "--shape",
        "shapes",
        type=_Shape(),
        multiple=True,
        metavar="NxCxHxW",
        help="Of the map. Repeatable.  [default: three]",
    ),
    click.option("--sweep", type=click.Choice(["hw", "channels", "scale", "groups"]), help="Vary it around the shape."),
    click.option("--scale", type=click.IntRange(2, 16), default=2, show_default=True),
    click.option("--only", multiple=True, metavar="GLOB", help="Upsamplers to measure, and bilinear. Repeatable."),
    click.option(
        "--plot", type=_Picture(), metavar="FILE.png|svg", help="Draw latency, or with --sweep ratios, to a file."
    ),
    click.option("--plot-against", type=click.Choice(["flops", "parameters"]), default="flops", show_default=True),
    click.option("--markdown", is_flag=True, help="Tables of Markdown, forward and training side by side."),
]

_FOR_BOTH = [
    click.option(
        "--what", type=click.Choice(["forward", "training"]), help="Without or with backward.  [default: both]"
    ),
    click.option(
        "--threads", type=click.IntRange(min=1), multiple=True, help="torch's threads. Repeatable.  [default: 1 and 2]"
    ),
    click.option(
        "--dtype",
        "dtypes",
        type=click.Choice(["float32", "bfloat16"]),
        multiple=True,
        help="bfloat16: under autocast. Repeatable.  [default: float32]",
    ),
    click.option(
        "--layout",
        "layouts",
        type=click.Choice(["contiguous", "channels_last"]),
        multiple=True,
        help="Memory format. Repeatable.  [default: contiguous]",
    ),
    click.option("--compile", "compiled", is_flag=True, help="Measure under torch.compile too."),
    click.option("--repeats", type=click.IntRange(min=1), default=9, show_default=True, help="Rounds."),
    click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True),
]

_FOR_MODELS = [
    click.option("--batch", type=click.IntRange(min=1), default=2, show_default=True, help="Images at a time."),
    weights_options(),
]

_UPSAMPLERS_ONLY = {"shapes", "sweep", "scale", "only", "plot", "plot_against", "markdown"}
# Of `--groups` too: how many DySample has in either case. What is in neither set is for a model.
_BOTH = {
    "source",
    "what",
    "threads",
    "dtypes",
    "layouts",
    "compiled",
    "repeats",
    "device",
    "groups",
    "as_json",
    "debug",
}


def _options(command: Callable[..., None]) -> Callable[..., None]:
    for option in reversed([*_FOR_UPSAMPLERS, *_FOR_BOTH, *_FOR_MODELS, *patch_flags()]):
        command = option(command)
    return common_options(command)


@click.command(short_help="Measure upsamplers, or what patching costs a model.")
@click.argument("source", metavar="[SOURCE]", required=False)
@_options
@click.pass_context
def bench(context: click.Context, /, **options: Any) -> None:
    """Measure upsamplers side by side; or, given SOURCE, that model against itself patched.

    Everything is timed in turn in one process; times are medians, and ratios to a bilinear resize of the same map, or of the
    patched model to the original. A model is measured at 512x512 where --input-size says nothing else.

    \b
    upswap bench --shape 1x256x120x120 --only 'dysample*' --plot cost.png
    upswap bench 'smp:unet?encoder_name=resnet34' --input-size 512
    """
    source = options["source"]
    if options["markdown"] and options["as_json"]:
        raise click.UsageError("--markdown and --json are two forms of the same; leave one out")
    for parameter in context.command.params:
        given = context.get_parameter_source(str(parameter.name)) is click.core.ParameterSource.COMMANDLINE
        for_upsamplers = parameter.name in _UPSAMPLERS_ONLY
        if given and parameter.name not in _BOTH and for_upsamplers is (source is not None):
            why = "is for upsamplers alone; leave it or SOURCE out" if source else "is for a model; name its SOURCE"
            raise click.UsageError(f"{parameter.opts[0]} {why}")
    cores = os.cpu_count() or 1
    options["threads"] = options["threads"] or (1, 2)[: cores if options["device"] == "cpu" else 1]
    options["whats"] = [options["what"]] if options["what"] else ["forward", "training"]
    options["dtypes"] = options["dtypes"] or ("float32",)
    options["layouts"] = options["layouts"] or ("contiguous",)
    from ..bench.allocator import kept_memory

    with kept_memory() as kept:
        if source is None:
            _upsamplers(options, kept)
        else:
            _model(options, kept)


# -- upsamplers -----------------------------------------------------------------------------------------------------------


def _upsamplers(options: dict[str, Any], kept: bool) -> None:
    from ..bench.contenders import contenders
    from ..bench.markdown import tables
    from ..bench.setting import check_device, environment
    from ..bench.upsampling import Bench

    picture = options["plot"]
    if picture is not None:
        from ..bench.plot import require_matplotlib

        require_matplotlib()
    device = check_device(options["device"])
    runner = Bench(
        contenders(options["only"]),
        options["layouts"],
        options["threads"],
        options["compiled"],
        options["repeats"],
        device,
    )
    rows: list[Row] = []
    for group in _measured(list(_cases(options)), lambda case: runner.run(case), _of_case):
        rows += group
        if not options["as_json"] and not options["markdown"]:
            _print_upsamplers(group)
    if options["markdown"]:
        say(tables(rows))
    if picture is not None:
        from ..bench.plot import plot, plot_sweep

        if options["sweep"]:
            plot_sweep(rows, picture, options["sweep"])
        else:
            plot(rows, picture, options["plot_against"])
        note(f"drawn to {picture}")
    _finish(options, environment(device, kept), rows)


def _cases(options: dict[str, Any]) -> Iterator[Case]:
    from ..bench.upsampling import Case, sweep

    shapes = options["shapes"] or SHAPES
    for dtype in options["dtypes"]:
        for what in options["whats"]:
            cases = [Case(shape, what, options["scale"], options["groups"], dtype) for shape in shapes]
            yield from sweep(cases[0], options["sweep"]) if options["sweep"] else cases


def _of_case(case: Case) -> str:
    return f"{_by(case.shape)} x{case.scale}, {case.what}, {case.dtype}"


def _print_upsamplers(rows: Sequence[Row]) -> None:
    first = rows[0]
    groups = "" if first.groups is None else f", groups {first.groups}"
    title = f"{_by(first.shape)} x{first.scale}{groups}, {first.what}, {first.dtype}, threads {first.threads}"
    table = _table(
        "upsampler", ["ms", "/ bilinear", "parameters", "MFLOPs", "MB moved", "/ floor", "peak MB", "saved MB"]
    )
    for row in rows:
        over = row.bytes_moved / row.bytes_floor if row.bytes_moved is not None and row.bytes_floor else None
        table.add_row(
            f"{row.contender}{_marks(row)}",
            _number(row.ms, ".3f"),
            _number(row.ratio, ".2f"),
            _number(row.parameters, ",d"),
            _number(row.flops, ",.2f", 1e6),
            _number(row.bytes_moved, ",.2f", 1e6),
            _number(over, ".2f"),
            _number(row.peak_memory, ",.2f", 1e6),
            _number(row.saved, ",.2f", 1e6),
        )
    _show(title, table, rows)


# -- a whole model --------------------------------------------------------------------------------------------------------


def _model(options: dict[str, Any], kept: bool) -> None:
    from ..bench.models import ModelBench, both, inputs_for
    from ..bench.models import Row as ModelRow
    from ..bench.setting import check_device, environment

    device = check_device(options["device"])
    with progress("loading and swapping"):
        opened, example_inputs = open_model(options)
        original, patched = both(opened.model, example_inputs, patch_options(options))
        inputs = inputs_for(original, options["input_size"] or MODEL_SIZE, options["batch"])
    settings = [
        (what, ModelBench(dtype, layout, options["threads"], options["compiled"], options["repeats"], device))
        for dtype in options["dtypes"]
        for layout in options["layouts"]
        for what in options["whats"]
    ]
    rows: list[ModelRow] = []
    for group in _measured(
        settings,
        lambda setting: setting[1].run(original, patched, inputs, setting[0]),
        lambda setting: f"{setting[0]}, {setting[1].dtype}, {setting[1].layout}",
    ):
        rows += group
        if not options["as_json"]:
            _print_models(group)
    about = {"source": options["source"], "inputs": [list(tensor.shape) for tensor in inputs.tensors()]}
    _finish(options, {**environment(device, kept), **about}, rows)


def _print_models(rows: Sequence[Any]) -> None:
    first = rows[0]
    what = "training step" if first.what == "training" else "inference"
    title = f"{what}, {first.dtype}, {first.layout}, threads {first.threads}"
    table = _table("model", ["ms", "slow-down", "/ eager", "parameters", "GFLOPs", "peak MB"])
    for row in rows:
        table.add_row(
            f"{row.model}{' compiled' if row.compiled else ''}",
            _number(row.ms, ".2f"),
            "" if row.slow_down is None else f"{row.slow_down:+.1f}%",
            _number(row.eager_ratio, ".2f"),
            _number(row.parameters, ",d"),
            _number(row.flops, ",.2f", 1e9),
            _number(row.peak_memory, ",.2f", 1e6),
        )
    _show(title, table, rows)


# -- both -----------------------------------------------------------------------------------------------------------------


def _measured(settings: Sequence[Any], run: Callable[[Any], Iterator[list[Any]]], name: Callable[[Any], str]) -> Any:
    """The groups of rows of each setting, with a line on stderr about what is being measured."""
    for index, setting in enumerate(settings, 1):
        groups = run(setting)
        while True:
            with progress(f"{index} of {len(settings)}: {name(setting)}"):
                group = next(groups, None)
            if group is None:
                break
            yield group


def _finish(options: dict[str, Any], about: dict[str, Any], rows: Sequence[Any]) -> None:
    if options["as_json"]:
        about["repeats"] = options["repeats"]
        say_json({**about, "rows": [dataclasses.asdict(row) for row in rows]}, sort_keys=False)
        return
    if not about["memory_kept"] and options["device"] == "cpu":
        note("this C library keeps no freed memory; page faults of large outputs are in all times")


def _table(first: str, numbers: Sequence[str]) -> Any:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column(first, no_wrap=True)
    for name in numbers:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _show(title: str, table: Any, rows: Sequence[Any]) -> None:
    from ...console import words

    console = stdout()
    console.print(words((title, "bold")))
    console.print(table)
    for row in rows:
        if row.problem:
            console.print(words((_who(row), "red"), f" cannot be run: {row.problem}"), soft_wrap=True)
    console.print()


def _who(row: Any) -> str:
    if hasattr(row, "contender"):
        return f"{row.contender}{_marks(row)}"
    step = "the training step of the" if row.what == "training" else "the"
    return f"{step} {'compiled ' if row.compiled else ''}{row.model} model"


def _marks(row: Any) -> str:
    return (" channels_last" if row.layout == "channels_last" else "") + (" compiled" if row.compiled else "")


def _by(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))


def _number(value: float | None, form: str, unit: float = 1) -> str:
    return "" if value is None else f"{value if unit == 1 else value / unit:{form}}"
