"""The arguments and options that `inspect` and `convert` have in common."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_args, get_origin

import click

from ...errors import OptionError
from ...nn.configs import DySampleConfig, UpsamplerConfig, option_types, value_from_text
from ...plan.site import KINDS
from .output import note

if TYPE_CHECKING:
    from ...files.open_source import Source

_Command = TypeVar("_Command", bound=Callable[..., Any])

#: The upsampler whose options are flags of their own; those of any other are given by `--set`.
DEFAULT = DySampleConfig

#: What `upswap.patch` takes under the same names, whatever the upsampler, and what it takes for each that is not given.
_SHARED: dict[str, Any] = {
    "upsampler": "dysample",
    "strict": False,
    "kinds": ("feature",),
    "include": (),
    "exclude": (),
    "share_layers": False,
    "unguided": "dysample",
}


class _Size(click.ParamType):  # type: ignore[type-arg]  # click before 8.4 has none
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


def _flags(config: type[UpsamplerConfig]) -> list[Callable[[_Command], _Command]]:
    """An option of the command line for each option of a config. What is not given is None, and so the config's own default."""
    flags: list[Callable[[_Command], _Command]] = []
    kinds = option_types(config)
    for field in dataclasses.fields(config):
        kind, help_text = kinds[field.name], _sentence(field.metadata["help"])
        name = f"--{field.name.replace('_', '-')}"
        if kind is bool:
            flags.append(click.option(name, is_flag=True, default=None, help=help_text))
            continue
        choices = get_args(kind) if get_origin(kind) is Literal else None
        shown = f"  [default: {field.default}]" if field.default is not None else ""
        value: Any = click.Choice(list(choices)) if choices else click.IntRange(min=1)
        flags.append(click.option(name, type=value, help=f"{help_text}{shown}"))
    return flags


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."


def _set_option(flag: str) -> Callable[[_Command], _Command]:
    return click.option(
        flag, "settings", multiple=True, metavar="NAME=VALUE", help="Any upsampler's option, by its name. Repeatable."
    )


_SET = _set_option("--set")

_PATCH = [
    click.option(
        "--upsampler",
        metavar="NAME",
        help="dysample, carafe, lda_aqu, fade, fade-lite, sapa-b, freqfusion, or an installed package's.  [default: dysample]",
    ),
    click.option(
        "--unguided",
        metavar="NAME",
        help="The upsampler of sites without a guide, where --upsampler takes one.  [default: dysample]",
    ),
    *_flags(DEFAULT),
    _SET,
    click.option(
        "--override",
        "overrides",
        nargs=2,
        multiple=True,
        metavar="SITE NAME=VALUE[,...]",
        help="Options that differ at a site, or at those matching re:REGEX. Repeatable.",
    ),
    click.option("--strict", is_flag=True, help="Fail instead of falling back, as when groups do not divide channels."),
    click.option(
        "--share-layers", is_flag=True, help="One upsampler for an nn.Upsample that is called at several places."
    ),
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


def weights_options(source: str = "SOURCE") -> Callable[[_Command], _Command]:
    """The options that say which weights go into a source, and what of a checkpoint is meant."""
    options = [
        click.option(
            "--weights", metavar="FILE", help=f"Weights for {source}: a state dict, a model, a checkpoint of training."
        ),
        click.option(
            "--key",
            metavar="KEY",
            help=f"What to take of a checkpoint (FILE, else {source}): ema.  [default: what fits]",
        ),
    ]
    return lambda command: _with(command, options)


def model_options(command: _Command) -> _Command:
    """SOURCE and the options every command that plans a swap takes."""
    return _with(command, [_SOURCE, *_PATCH, weights_options(), *_COMMON])


def patching_options(command: _Command) -> _Command:
    """The options that say what is swapped for what, and at what input size."""
    return _with(command, _PATCH)


def common_options(command: _Command) -> _Command:
    """The options every command has: `trust` and `as_json` are passed on, `--debug` is for `run` alone."""
    return _with(command, _COMMON)


def patch_flags(set_flag: str = "--set") -> list[Callable[[_Command], _Command]]:
    """The options that say what is swapped for what, and at what input size.

    `set_flag` is the name of `--set` where that is taken.
    """
    return [_set_option(set_flag) if option is _SET else option for option in _PATCH]


def _with(command: _Command, options: Sequence[Callable[[_Command], _Command]]) -> _Command:
    for option in reversed(options):
        command = option(command)
    return command


def patch_options(options: dict[str, Any], *, given_only: bool = False) -> dict[str, Any]:
    """The keyword arguments of `upswap.patch` among the options of a command, or those that were given.

    Raises `OptionError` for a `--set` or `--override` that the upsampler has no such option for.
    """
    chosen = {name: options[name] for name in _SHARED if options[name] not in (None, False, ())}
    upsampler = chosen.get("upsampler", _SHARED["upsampler"])
    flags = {field.name: options[field.name] for field in dataclasses.fields(DEFAULT)}
    given = {name: value for name, value in flags.items() if value is not None}
    if options["settings"]:
        given |= _values(upsampler, "--set", options["settings"])
    overrides: dict[str, dict[str, Any]] = {}
    for site, text in options["overrides"]:
        values = _values(upsampler, f"--override {site}", text.split(","))
        overrides[site] = {**overrides.get(site, {}), **values}
    return {
        **({} if given_only else _SHARED),
        **chosen,
        **({"overrides": overrides} if overrides else {}),
        **given,
    }


def _values(upsampler: str, option: str, texts: Sequence[str]) -> dict[str, Any]:
    """`name=value` texts as options of an upsampler."""
    from ...nn.registry import config_class, make_config

    kinds = option_types(config_class(upsampler))
    values: dict[str, Any] = {}
    for text in texts:
        name, equals, value = (part.strip() for part in text.partition("="))
        if not (name and equals):
            raise OptionError(f"{option} {text!r}: write NAME=VALUE, groups=8 for one")
        if name not in kinds:
            make_config(upsampler, {name: value})  # which says what there is
        values[name] = value_from_text(name, value, kinds[name])
    return values


def open_model(options: dict[str, Any]) -> tuple[Source, Any]:
    """The source on the command line, and example inputs of the size asked for; None where they are found by trying."""
    from ...files.open_source import open_source
    from ...probe.inputs.infer import example_inputs_for
    from ...surgery.apply import is_patched, plan_of
    from ...surgery.options import check_same_options

    source = open_source(options["source"], trust=options["trust"], weights=options["weights"], key=options["key"])
    if is_patched(source.model):
        given = patch_options(options, given_only=True)
        check_same_options(plan_of(source.model), given, options["source"], trust=options["trust"])
    if source.said is not None:
        note(source.said)
    size = options["input_size"]
    return source, None if size is None else example_inputs_for(source.model, size)
