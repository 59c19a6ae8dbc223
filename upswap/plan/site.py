"""`Site`: one resize call of one module, what was decided about it, and why."""

from __future__ import annotations

import dataclasses
import keyword
import re
from collections.abc import Mapping
from typing import Annotated, Any

from ..errors import PlanError
from . import decode as _schema
from .decode import Rule


def is_plain(name: object) -> bool:
    """Whether a name is an identifier that Python itself gives no meaning, or a number as containers of modules have them."""
    if type(name) is not str or (name.startswith("__") and name.endswith("__")):
        return False
    return name.isidentifier() or (name.isascii() and name.isdigit())


def child_of(site: Site) -> str:
    """The name of a site's upsampler in its owner.

    Raises `PlanError` for what is no plain name: a plan may come from a stranger's file, and names become code.
    """
    name = (site.module or "").rpartition(".")[2]
    if not name.isidentifier() or keyword.iskeyword(name) or name.startswith("__"):
        raise PlanError(f"site {site.name}: {name!r} cannot be the name of a module")
    return name


#: What a resize call is for; FACTS on how each is recognised are in `kinds.py`.
KINDS: dict[str, str] = {
    "feature": "a learned feature map, made larger",
    "logits": "reaches the output with no convolution, linear or norm after it, or is an output that later layers also read",
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
#: The runs of a call in one forward are counted in a list.
Run = Annotated[int, Rule("the number of a run below 10000", lambda value: 0 <= value < 10_000)]
Positive = Annotated[int, Rule("a positive number", lambda value: value > 0)]
Ratio = Annotated[float, Rule("a positive number", lambda value: value > 0)]
#: What leads from a container to something in it.
Key = Annotated[
    Any, Rule("a whole number that is not negative, or a string", lambda key: type(key) is str or _is_index(key))
]


def _is_index(value: object) -> bool:
    return type(value) is int and 0 <= value < 10_000


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
    occurrence: Run | None
    file: str
    line: Count

    @property
    def function(self) -> str:
        """The qualified name of the owner's method that the way starts in."""
        return self.steps[0].function


#: How an upsampler gets its guide: where the two are fused, by a local name, or from a module above.
WAYS = ("fusion", "local", "handed")


def _is_local(name: str) -> bool:
    return name == "" or (name.isidentifier() and not keyword.iskeyword(name) and not name.startswith("__"))


@dataclasses.dataclass(frozen=True)
class Relay:
    """A module that hands a guide on, by its path, and where its code calls the next one; None for an `nn.Sequential`."""

    path: ModulePath
    location: Location | None


@dataclasses.dataclass(frozen=True)
class Guide:
    """The feature that the result of a call is fused with: a guided upsampler reads it, of the size of its output.

    `channels` are the guide's, `fusion` says whether the two are added or concatenated. `way` says how the upsampler gets it:

    - "fusion": where the two are fused, by the expression `fusing` in the function of the site's step number `level`. The operand
      that is the result is corrected there; the guide is the tensor number `operand` of those that are fused.
    - "local": the local `name` of the function with the call has it, or holds it at `path`, a list of indices and keys.
    - "handed": so does a local name in the code of the module `holder`, at the call in `location`, from which it is handed down
      by the modules `through`, outermost first, to the owner.

    `source` says that the guide is not what is fused, which is nowhere at hand, but the map that it is computed from.
    """

    channels: Positive
    fusion: Annotated[str, _schema.one_of("add", "cat")]
    way: Annotated[str, _schema.one_of(*WAYS)]
    name: Annotated[str, Rule("a local name", _is_local)] = ""
    path: tuple[Key, ...] = ()
    source: bool = False
    fusing: Step | None = None
    level: Count = 0
    operand: Count = 0
    holder: ModulePath | None = None
    through: tuple[Relay, ...] = ()
    location: Location | None = None

    @property
    def place(self) -> str:
        """Where it comes from, as code would have it: `y[6]`, or the expression that fuses."""
        if self.fusing is not None:
            return self.fusing.expression
        return self.name + "".join(f"[{key!r}]" for key in self.path)


@dataclasses.dataclass(frozen=True)
class Site:
    """One resize call of one module, what was decided about it, and why.

    `name` is the path of the owner, the module whose code makes the call ("root" for the model itself), with `ordinal`
    after a colon where the owner makes several calls. Shapes are those seen at the example size; `scale` is the (h, w)
    ratio of output to input there, or the scale factor the caller gave, `sized_by` which of the two; `fixed_ratio` says
    whether the ratio is the same at every input size (None: not known). `other_channels` are further channel counts the
    same call has; each gets an upsampler. `calls` is how often it ran. `module` is the path of the upsampler: a child of
    the owner, or of the nearest module above that does not run its children one after the other. `config` has the options
    asked for at this site, `settings` those the upsampler was made with, which fit it. `reason` says why the site is
    swapped or kept, `notes` what else there is to say. `seen_in` is "train" where only a run in train mode
    made the call, "nowhere" where none did, and the site is that of a module like this one that ran. `guide` is looked for where
    the upsampler asked for takes one; `no_guide` says why there is none. `upsampler` is the one that the site has instead of the
    one asked for, None where it has that.
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
    config: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    notes: tuple[str, ...] = ()
    seen_in: Annotated[str, _schema.one_of("eval", "train", "nowhere")] = "eval"
    guide: Guide | None = None
    no_guide: str = ""
    upsampler: Name | None = None

    @property
    def all_channels(self) -> tuple[int, ...]:
        """The numbers of channels that its upsamplers are made for, of guides too."""
        return (self.channels, *self.other_channels, *(() if self.guide is None else (self.guide.channels,)))

    @property
    def handed_by(self) -> tuple[str, ...]:
        """The paths of the modules that hand the site's guide down to its owner, outermost first."""
        guide = self.guide
        return () if guide is None or guide.holder is None else (guide.holder, *(relay.path for relay in guide.through))

    def to_dict(self) -> dict[str, Any]:
        """As plain lists and dicts. Entries that came later are left out where they say nothing, so that versions of before can
        read what they can carry out."""
        data = dataclasses.asdict(self)
        return {name: value for name, value in data.items() if name not in _LATER or value != _LATER[name]}

    @property
    def why(self) -> str:
        """The reason, and what else is to be said of the site, in a line."""
        return "; ".join(filter(None, (self.reason, *self.notes)))

    @property
    def ratio(self) -> str:
        """The ratio as people write it: `x2`, `x1.5`, `x3,x2`."""
        height, width = (f"x{value:g}" for value in self.scale)
        return height if height == width else f"{height},{width}"


#: The entries of a Site that schema 2 did not have at first, and what each was then.
_LATER: dict[str, Any] = {"guide": None, "no_guide": "", "upsampler": None}
