"""The plain data every part of upswap speaks: `Site`, `Options`, `Plan`, and their JSON.

Nothing here imports torch. A `Plan` says, for every resize call a model makes, what it is, what was decided and why, and
how the decision is carried out. The dry run prints it, a saved file carries it, undo reads it.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping
from typing import Any

from .errors import OptionError, PlanError

PLAN_SCHEMA = 1

#: What a resize call is for; FACTS on how each is recognised are in `kinds.py`.
KINDS: dict[str, str] = {
    "feature": "a learned feature map, made larger",
    "logits": "reaches the output with no convolution, linear or norm after it",
    "image": "comes from the input with no learned operation between",
    "parameter": "nothing of the model's input flows into it",
    "context": "a 1x1 or fixed pooled grid: the ratio follows the input size",
    "mask": "integer or boolean, or consumed by a comparison",
    "gate": "every consumer is a multiplication or a sigmoid",
    "identity": "the output has the size of the input",
    "downsample": "the output is smaller than the input",
    "sequence": "a 3-D tensor",
    "volume": "a 5-D tensor",
    "other": "a resize upswap has no equivalent for",
}

ROUTES = ("module", "graph", "source")


@dataclasses.dataclass(frozen=True)
class Step:
    """One function on the way to a resize call, and the expression in its source that leads on.

    `function` is its qualified name in `module`, `ordinal` tells apart functions of one name (lambdas); `index` tells
    apart calls written alike in it. `fresh` says that something else calls it than the function before
    (`torch.utils.checkpoint`), `inner` the same of a function in its text that holds the expression: runs are counted
    anew in those.
    """

    function: str
    expression: str
    index: int
    module: str = ""
    ordinal: int = 0
    fresh: bool = False
    inner: bool = False


@dataclasses.dataclass(frozen=True)
class Location:
    """Where a call stands: the steps from a method of the owner to the function with the call in it, mostly one.

    `occurrence` counts the runs of the call within one run of the first step (a loop), and is None where every run is
    meant, because how many there are follows the input; `file` and `line` are those of the call.
    """

    steps: tuple[Step, ...]
    occurrence: int | None
    file: str
    line: int

    @property
    def function(self) -> str:
        """The qualified name of the owner's method that the way starts in."""
        return self.steps[0].function


@dataclasses.dataclass(frozen=True)
class Site:
    """One resize call of one module, what was decided about it, and why.

    Shapes are those seen at the example size; `scale` is the (h, w) ratio of output to input there, or the scale factor
    the caller gave. `other_channels` are further channel counts the same call has; each gets an upsampler. `module` is
    the path of the upsampler: a child of the owner, or of the nearest module above that does not run its children one
    after the other.
    """

    name: str
    owner: str
    owner_class: str
    ordinal: int
    kind: str
    op: str
    mode: str
    align_corners: bool
    antialias: bool
    sized_by: str
    scale: tuple[float, float]
    fixed_ratio: bool | None
    channels: int
    other_channels: tuple[int, ...]
    in_shape: tuple[int, ...]
    out_shape: tuple[int, ...]
    dtype: str
    calls: int
    location: Location | None
    swap: bool = False
    reason: str = ""
    route: str | None = None
    module: str | None = None
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def ratio(self) -> str:
        """The ratio as people write it: `x2`, `x1.5`, `x3,x2`."""
        height, width = (f"x{value:g}" for value in self.scale)
        return height if height == width else f"{height},{width}"


@dataclasses.dataclass(frozen=True)
class Options:
    """What the user asked for; the keyword arguments of `upswap.patch` that a Plan depends on."""

    upsampler: str = "dysample"
    style: str = "lp"
    groups: int | None = None
    dyscope: bool = False
    init: str = "match"
    cascade: bool = False
    kinds: tuple[str, ...] = ("feature",)
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    strict: bool = False

    def __post_init__(self) -> None:
        _choice("style", self.style, ("lp", "pl"))
        _choice("init", self.init, ("match", "paper"))
        for kind in self.kinds:
            _choice("kinds", kind, tuple(KINDS))
        if not self.kinds:
            raise OptionError("kinds is empty: name at least one of " + ", ".join(KINDS))
        if self.groups is not None and (type(self.groups) is not int or self.groups < 1):
            raise OptionError(f"groups must be a positive integer, got {self.groups!r}")


@dataclasses.dataclass(frozen=True)
class Plan:
    """Every resize call of a model and what is done about each.

    `calls` holds, for owners that take the graph route, what their trace needs: their forward's arguments and what their
    children gave. `inputs` describes the example inputs of the model. Tensors are described by shape and dtype.
    """

    model_class: str
    options: Options
    sites: tuple[Site, ...]
    inputs: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    calls: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    hints: tuple[str, ...] = ()
    upswap_version: str = ""
    schema: int = PLAN_SCHEMA

    @property
    def swapped(self) -> tuple[Site, ...]:
        """The sites that are replaced."""
        return tuple(site for site in self.sites if site.swap)

    @property
    def kept(self) -> tuple[Site, ...]:
        """The sites that stay as they are."""
        return tuple(site for site in self.sites if not site.swap)

    def site(self, name: str) -> Site:
        """The site of that name; `PlanError` where there is none."""
        for site in self.sites:
            if site.name == name:
                return site
        raise PlanError(f"no site {name!r} in this plan; it has: {', '.join(s.name for s in self.sites) or 'none'}")

    def replace_sites(self, sites: Iterable[Site]) -> Plan:
        """The same plan over other sites."""
        return dataclasses.replace(self, sites=tuple(sites))

    def to_dict(self) -> dict[str, Any]:
        """Plain lists, dicts, strings and numbers: what `to_json` writes."""
        data = dataclasses.asdict(self)
        data["sites"] = [dataclasses.asdict(site) for site in self.sites]
        return data

    def to_json(self, indent: int | None = None) -> str:
        """The plan as JSON; `from_json` gives an equal plan back."""
        return json.dumps(self.to_dict(), indent=indent, sort_keys=True)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Plan:
        """The plan that `to_dict` described; `PlanError` names what is wrong with data of another shape."""
        if not isinstance(data, Mapping):
            raise PlanError(f"a plan is a JSON object, got {type(data).__name__}")
        schema = data.get("schema")
        if schema != PLAN_SCHEMA:
            raise PlanError(
                f"this plan has schema {schema!r}, this upswap reads schema {PLAN_SCHEMA}: "
                "it was written by another version of upswap; update upswap or make the plan again"
            )
        try:
            sites = tuple(site_from_dict(site) for site in data["sites"])
            options = Options(**{key: _frozen(value) for key, value in data["options"].items()})
            plan = _known(cls, {**data, "sites": sites, "options": options, "hints": tuple(data.get("hints", ()))})
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise PlanError(f"this is not a plan upswap wrote: {error}") from error
        return plan

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """The plan in a JSON text."""
        try:
            data = json.loads(text)
        except ValueError as error:
            raise PlanError(f"this is not JSON: {error}") from error
        return cls.from_dict(data)


def site_from_dict(data: Mapping[str, Any]) -> Site:
    """The site that `dataclasses.asdict` described."""
    location = data.get("location")
    values = {key: _frozen(value) for key, value in data.items()}
    values["settings"] = {key: _frozen(value) for key, value in data["settings"].items()}
    if location is not None:
        steps = tuple(_known(Step, step) for step in location["steps"])
        values["location"] = _known(Location, {**location, "steps": steps})
    return _known(Site, values)


def _known(cls: type, values: Mapping[str, Any]) -> Any:
    """`cls(**values)`, with unknown names reported as such."""
    unknown = set(values) - {field.name for field in dataclasses.fields(cls)}
    if unknown:
        raise PlanError(f"unknown entries in a {cls.__name__}: {', '.join(sorted(unknown))}")
    return cls(**values)


def _frozen(value: Any) -> Any:
    """JSON has lists where these dataclasses have tuples."""
    return tuple(value) if isinstance(value, list) else value


def _choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise OptionError(f"{name}={value!r} is not one of {', '.join(choices)}")
