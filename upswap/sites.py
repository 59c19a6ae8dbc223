"""The plain data every part of upswap speaks: `Site`, `Options`, `Plan`, and their JSON.

Nothing here imports torch. A `Plan` says, for every resize call a model makes, what it is, what was decided and why, and
how the decision is carried out. The dry run prints it, a saved file carries it, undo reads it.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Annotated, Any

from . import schema as _schema
from .errors import OptionError, PlanError
from .schema import Rule

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

#: The path of a module, as `get_submodule` takes it; that of the model itself is empty.
ModulePath = Annotated[str, Rule("the path of a module", re.compile(r"([^.]+(\.[^.]+)*)?").fullmatch)]
Name = Annotated[str, Rule("a name", bool)]
Dtype = Annotated[str, Rule("the name of a torch.dtype", str.isidentifier)]
Count = Annotated[int, Rule("zero or a positive number", lambda value: value >= 0)]
Positive = Annotated[int, Rule("a positive number", lambda value: value > 0)]
Ratio = Annotated[float, Rule("a positive number", lambda value: value > 0)]


@dataclasses.dataclass(frozen=True)
class Step:
    """One function on the way to a resize call, and the expression in its source that leads on.

    `function` is its qualified name in `module`, `ordinal` tells apart functions of one name (lambdas); `index` tells
    apart calls written alike in it, of which there are `alike`. `around` has the loops and branches that the call stands
    in, outermost first, as they are written. `fresh` says that something else calls it than the function before
    (`torch.utils.checkpoint`), `inner` the same of a function in its text that holds the expression: runs are counted
    anew in those.
    """

    function: Name
    expression: Name
    index: Count
    module: str = ""
    ordinal: Count = 0
    fresh: bool = False
    inner: bool = False
    alike: Positive = 1
    around: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Location:
    """Where a call stands: the steps from a method of the owner to the function with the call in it, mostly one.

    `occurrence` counts the runs of the call within one run of the first step (a loop), and is None where every run is
    meant, because how many there are follows the input; `file` and `line` are those of the call.
    """

    steps: Annotated[tuple[Step, ...], Rule("a list of one step or more", len)]
    occurrence: Count | None
    file: str
    line: Count

    @property
    def function(self) -> str:
        """The qualified name of the owner's method that the way starts in."""
        return self.steps[0].function


@dataclasses.dataclass(frozen=True)
class Site:
    """One resize call of one module, what was decided about it, and why.

    `name` is the path of the owner, the module whose code makes the call ("root" for the model itself), with `ordinal`
    after a colon where the owner makes several calls. Shapes are those seen at the example size; `scale` is the (h, w)
    ratio of output to input there, or the scale factor the caller gave, `sized_by` which of the two; `fixed_ratio` says
    whether the ratio is the same at every input size (None: not known). `other_channels` are further channel counts the
    same call has; each gets an upsampler. `calls` is how often it ran. `module` is the path of the upsampler: a child of
    the owner, or of the nearest module above that does not run its children one after the other.
    """

    name: Name
    owner: ModulePath
    owner_class: Name
    ordinal: Count
    kind: Annotated[str, _schema.one_of(*KINDS)]
    op: Annotated[str, _schema.one_of("interpolate", "module")]
    mode: Name
    align_corners: bool
    antialias: bool
    sized_by: Annotated[str, _schema.one_of("size", "scale_factor")]
    scale: tuple[Ratio, Ratio]
    fixed_ratio: bool | None
    channels: Positive
    other_channels: tuple[Positive, ...]
    in_shape: tuple[Count, ...]
    out_shape: tuple[Count, ...]
    dtype: Dtype
    calls: Count
    location: Location | None
    swap: bool = False
    reason: str = ""
    route: Annotated[str, _schema.one_of(*ROUTES)] | None = None
    module: ModulePath | None = None
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
    groups: Positive | None = None
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

    @property
    def exact(self) -> bool:
        """Whether the model computes at step 0 what it did before, as the upsampler of that name declares.

        Raises `OptionError` where no upsampler of that name is known.
        """
        from .upsamplers import is_exact  # imports torch

        return is_exact(self)


@dataclasses.dataclass(frozen=True)
class Plan:
    """Every resize call of a model and what is done about each.

    `calls` holds, for owners that take the graph route, what their trace needs: their forward's arguments and what their
    children gave. `inputs` describes the example inputs of the model. Tensors are described by shape and dtype.
    """

    model_class: Name
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
        check_schema(data.get("schema"), "this plan", data.get("upswap_version"))
        plan = _schema.made(cls, data, "plan")
        repeated = [name for name, count in Counter(site.name for site in plan.sites).items() if count > 1]
        if repeated:
            raise PlanError(f"this is not a plan upswap wrote: several sites are named {', '.join(repeated)}")
        return plan.replace_sites(
            dataclasses.replace(site, settings={key: _frozen(value) for key, value in site.settings.items()})
            for site in plan.sites
        )

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """The plan in a JSON text."""
        try:
            data = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise PlanError(f"this is not JSON: {error}") from error
        return cls.from_dict(data)


def check_schema(found: Any, what: str, version: Any) -> None:
    """`PlanError` unless `what`, written by upswap `version`, has the schema of plans that this upswap reads."""
    if found == PLAN_SCHEMA and type(found) is int:
        return
    if type(found) is int and found > PLAN_SCHEMA:
        by = f", upswap {version}" if isinstance(version, str) and version else ""
        raise PlanError(
            f"{what} has schema {found} and was written by a newer upswap{by}; this one reads schema {PLAN_SCHEMA}: "
            "pip install -U upswap"
        )
    raise PlanError(f"{what} has schema {found!r:.60}, this upswap reads schema {PLAN_SCHEMA}: make the plan again")


def _frozen(value: Any) -> Any:
    """JSON has lists where these settings have tuples."""
    return tuple(value) if isinstance(value, list) else value


def _choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise OptionError(f"{name}={value!r} is not one of {', '.join(choices)}")
