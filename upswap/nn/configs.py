"""The options of the upsamplers, a frozen dataclass for each.

Nothing here imports torch: the command line makes its flags from these. A config is plain data; a Plan holds the one of every
site. What each option means stands beside it, once: `upswap.patch` and the command line say it in the same words.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any, Literal, Self, get_args

from ..errors import OptionError
from ..plan.site import Site
from ..shown import brief

#: The shapes of a module's tensors, by their names in its state dict.
Shapes = Mapping[str, tuple[int, ...]]

#: How DySample predicts offsets, and what it starts from.
Style = Literal["lp", "pl"]
Init = Literal["match", "paper"]


#: The groups of either style, as in the paper.
DEFAULT_GROUPS: dict[Style, int] = {"lp": 4, "pl": 8}


def means(text: str) -> dict[str, str]:
    """The metadata of a field: what the option means, as help texts say it."""
    return {"help": text}


#: Options that several upsamplers have mean the same in each.
INIT = means("keep the output at step 0 (match), or start as published (paper)")
CASCADE = means("make x4 and x8 chains of x2, as the authors did; not exact at step 0")


@dataclasses.dataclass(frozen=True)
class UpsamplerConfig:
    """The options of one upsampler. Subclasses are frozen dataclasses whose fields are plain values with defaults.

    Raises `OptionError` for a value that its field's type does not have.
    """

    def __post_init__(self) -> None:
        for name, kind in option_types(type(self)).items():
            check_value(name, getattr(self, name), kind)

    def fit(self, site: Site, *, strict: bool = False) -> tuple[Self, tuple[str, ...]]:
        """The options that fit one site, and what had to be changed for it, in words.

        With `strict`, what would have to be changed is an `OptionError`.
        """
        return self, ()

    @classmethod
    def is_of(cls, shapes: Shapes) -> bool:
        """Whether tensors of these names and shapes are those of such an upsampler."""
        return False

    @classmethod
    def candidates(cls, shapes: Shapes) -> Iterator[dict[str, Any]]:
        """Options that an upsampler may have whose tensors have these shapes. Each of them is tried."""
        yield dataclasses.asdict(cls())


@dataclasses.dataclass(frozen=True)
class DySampleConfig(UpsamplerConfig):
    """The options of `upsampler="dysample"` (ICCV 2023, arXiv 2308.15085)."""

    style: Style = dataclasses.field(
        default="lp", metadata=means("predict offsets by linear, then pixel shuffle (lp), or the other way round (pl)")
    )
    groups: int | None = dataclasses.field(
        default=None,
        metadata=means(
            "give so many groups of channels sampling points of their own; 4 for lp and 8 for pl where not given"
        ),
    )
    dyscope: bool = dataclasses.field(default=False, metadata=means("learn the range of the offsets too"))
    init: Init = dataclasses.field(default="match", metadata=INIT)
    cascade: bool = dataclasses.field(default=False, metadata=CASCADE)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.groups is not None and self.groups < 1:
            raise OptionError(f"groups must be a positive integer, got {self.groups!r}")

    def fit(self, site: Site, *, strict: bool = False) -> tuple[Self, tuple[str, ...]]:
        """The options for the channels of a site.

        `pl` falls back to `lp` where the square of the ratio does not divide the channels. Groups that do not divide them
        become the largest divisor below.
        """
        notes: list[str] = []
        cells = math.prod(math.ceil(value) for value in nominal_scale(site))
        style = self.style
        if style == "pl" and site.channels % cells:
            if strict:
                raise OptionError(
                    f"{site.name}: style 'pl' needs channels divisible by {cells}, the site has {site.channels}; "
                    "use style 'lp', exclude the site, or drop strict"
                )
            notes.append(f"style lp, because {site.channels} channels are not divisible by {cells}")
            style = "lp"
        wanted = self.groups or DEFAULT_GROUPS[style]
        groups = max(count for count in range(1, min(wanted, site.channels) + 1) if site.channels % count == 0)
        if groups != wanted:
            if strict and self.groups is not None:
                raise OptionError(
                    f"{site.name}: {wanted} groups do not divide {site.channels} channels; the largest that does is {groups}"
                )
            notes.append(f"groups {groups}, the largest divisor of {site.channels} channels up to {wanted}")
        return dataclasses.replace(self, style=style, groups=groups), tuple(notes)

    @classmethod
    def is_of(cls, shapes: Shapes) -> bool:
        """As the base class; the offset is a 1x1 convolution to pairs of numbers."""
        weight = shapes.get("offset.weight", ())
        pairs = len(weight) == 4 and weight[0] % 2 == 0 and weight[2:] == (1, 1)
        names = {"offset.weight", "offset.bias", "scope.weight", "scope.bias", "init_pos"}
        return pairs and shapes.get("offset.bias") == weight[:1] and shapes.keys() <= names

    @classmethod
    def candidates(cls, shapes: Shapes) -> Iterator[dict[str, Any]]:
        """As the base class; the groups divide the pairs that the offset has."""
        pairs = {shape[0] // 2 for name, shape in shapes.items() if name.endswith("offset.weight")}
        groups = {count for most in pairs for count in range(1, most + 1) if most % count == 0}
        scoped = any("scope." in name for name in shapes)
        for cascade, init, style in itertools.product((False, True), get_args(Init), get_args(Style)):
            for count in (None, *sorted(groups)):
                yield dataclasses.asdict(cls(style, count, scoped, init, cascade))


def nominal_scale(site: Site) -> tuple[float, float]:
    """The (h, w) ratio an upsampler is built for; whole ones as ints.

    Where the ratio follows the input size there is no such ratio: offsets are then predicted at twice the source's size and
    resized to the target.
    """
    height, width = site.scale if site.fixed_ratio is not False else (2.0, 2.0)
    return (_whole(height), _whole(width))


def _whole(value: float) -> float:
    return int(value) if float(value).is_integer() else value


# -- options as data and as text ------------------------------------------------------------------------------------------


def option_types(cls: type[UpsamplerConfig]) -> Mapping[str, Any]:
    """The options of a config class and their types.

    The annotations of the class are evaluated for it, once: when it is registered, and not when a file is loaded.
    """
    known: Any = cls  # mypy takes a type for unhashable
    return _option_types(known)


@functools.cache
def _option_types(cls: Any) -> dict[str, Any]:
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def from_plain(cls: type[UpsamplerConfig], values: Mapping[str, Any]) -> UpsamplerConfig:
    """The config with these values, lists standing for tuples; `OptionError` for a value that it cannot have."""
    return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})


def check_value(name: str, value: Any, kind: Any) -> None:
    """`OptionError` unless `value` is one of the type `kind`: bool, int, float, str, a Literal, tuples of these, or None."""
    if not _has_type(value, kind):
        choices = typing.get_args(kind)
        if typing.get_origin(kind) is Literal:
            raise OptionError(f"{name}={brief(value)} is not one of {', '.join(map(str, choices))}")
        raise OptionError(f"{name} must be {_type_name(kind)}, got {brief(value)}")


def value_from_text(name: str, text: str, kind: Any) -> Any:
    """The value of the type `kind` that `text` on a command line stands for; `OptionError` where it stands for none."""
    for one in _alternatives(kind):
        if one is type(None) and text.lower() == "none":
            return None
        if one is bool and text.lower() in ("true", "false"):
            return text.lower() == "true"
        if typing.get_origin(one) is Literal:
            found = [choice for choice in typing.get_args(one) if str(choice) == text]
            if found:
                return found[0]
        if one in (int, float, str):
            try:
                return one(text)
            except ValueError:
                continue
    check_value(name, text, kind)
    return text


def _alternatives(kind: Any) -> tuple[Any, ...]:
    return typing.get_args(kind) if typing.get_origin(kind) in (typing.Union, types.UnionType) else (kind,)


def _has_type(value: Any, kind: Any) -> bool:
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        return any(_has_type(value, one) for one in typing.get_args(kind))
    if typing.get_origin(kind) is Literal:
        return value in typing.get_args(kind) and not isinstance(value, list | dict)
    if typing.get_origin(kind) is tuple:
        each = typing.get_args(kind)
        if not isinstance(value, tuple):
            return False
        kinds = [each[0]] * len(value) if each[-1] is Ellipsis else list(each)
        return len(kinds) == len(value) and all(map(_has_type, value, kinds))
    if kind is float:
        return type(value) in (int, float)
    return kind is Any or (type(value) is kind if isinstance(kind, type) else True)


def _type_name(kind: Any) -> str:
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "a string", type(None): "None"}
    return " or ".join(names.get(one, str(one)) for one in _alternatives(kind))


def describe(cls: type[UpsamplerConfig], indent: str = "") -> str:
    """The options of a config class, a line each: name, choices or type, default, and what it means."""
    lines = []
    kinds = option_types(cls)
    for field in dataclasses.fields(cls):
        kind = kinds[field.name]
        shown = (
            ", ".join(f'"{choice}"' for choice in typing.get_args(kind))
            if typing.get_origin(kind) is Literal
            else " or ".join(getattr(one, "__name__", str(one)) for one in _alternatives(kind)).replace(
                "NoneType", "None"
            )
        )
        default = f'"{field.default}"' if isinstance(field.default, str) else field.default
        lines.append(f"{indent}{field.name} ({shown}; default {default}): {field.metadata.get('help', '')}.")
    return "\n".join(lines)
