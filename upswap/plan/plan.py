"""The plain data every part of upswap speaks: `Site`, `Options`, `Plan`, and their JSON.

Nothing here imports torch. A `Plan` says, for every resize call a model makes, what it is, what was decided and why, and
how the decision is carried out. The dry run prints it, a saved file carries it, undo reads it.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from ..errors import OptionError, PlanError
from ..shown import one_line, tag
from . import decode as _schema
from . import schema1
from .site import KINDS, Name, Site


def by_owner(sites: Iterable[Site]) -> dict[str, list[Site]]:
    """Sites grouped by their owner's path, in order."""
    owners: dict[str, list[Site]] = {}
    for site in sites:
        owners.setdefault(site.owner, []).append(site)
    return owners


class Rewritten(NamedTuple):
    """What is to be done in one module: its own sites, and the swapped sites of others that it hands a guide on to."""

    sites: list[Site]
    handing: list[Site]

    @property
    def is_changed(self) -> bool:
        """Whether anything is to be done at all."""
        return bool(self.handing) or any(site.swap for site in self.sites)


def by_module(sites: Sequence[Site]) -> dict[str, Rewritten]:
    """What is to be done by the paths of modules: those of the owners, and of those that hand guides down to them."""
    modules = {path: Rewritten(own, []) for path, own in by_owner(sites).items()}
    for site in sites:
        for path in site.handed_by if site.swap else ():
            modules.setdefault(path, Rewritten([], [])).handing.append(site)
    return modules


PLAN_SCHEMA = 2


@dataclasses.dataclass(frozen=True)
class Override:
    """Options of the upsampler that differ at some sites: those of the name `sites`, or matching it.

    `sites` is the exact name of a site, or `re:` and a regular expression that matches whole names.
    """

    sites: Name
    options: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Options:
    """What the user asked for: the keyword arguments of `upswap.patch` that a Plan depends on.

    `config` has the options of the upsampler, as plain data; its own class checks them (`nn.configs`). `unguided` is the
    upsampler that sites without a guide get where `upsampler` takes one.
    """

    upsampler: Name = "dysample"
    config: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    kinds: tuple[str, ...] = ("feature",)
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    overrides: tuple[Override, ...] = ()
    strict: bool = False
    share_layers: bool = False
    unguided: Name = "dysample"

    def __post_init__(self) -> None:
        for kind in self.kinds:
            if kind not in KINDS:
                raise OptionError(f"kinds={kind!r} is not one of {', '.join(KINDS)}")
        if not self.kinds:
            raise OptionError("kinds is empty: name at least one of " + ", ".join(KINDS))


@dataclasses.dataclass(frozen=True, repr=False)
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

    @property
    def summary(self) -> str:
        """In a line: `5 to swap, 2 to keep (1 logits, 1 context)`."""
        if not self.sites:
            return "it ran without a resize call, so that there is nothing to swap"
        kept = Counter(site.kind for site in self.kept)
        kinds = ", ".join(f"{count} {kind}" for kind, count in kept.items())
        return f"{len(self.swapped)} to swap, {len(self.kept)} to keep" + (f" ({kinds})" if kinds else "")

    @property
    def _title(self) -> str:
        return one_line(f"{self.model_class.rpartition('.')[2]}: {self.summary}")

    def __repr__(self) -> str:
        return f"<Plan of {self._title}>"

    def __str__(self) -> str:
        from . import table  # with it rich, which `import upswap` does without

        # A notebook or a file has no width to ask for: then there is room for a row a site.
        width = shutil.get_terminal_size((table.WIDE, 24)).columns
        return "\n\n".join([self._title, table.as_text(self.sites, width)] if self.sites else [self._title])

    def _repr_html_(self) -> str:
        """The table in a notebook."""
        from . import table

        return tag("p", self._title) + table.as_html(self.sites)

    def site(self, name: str) -> Site:
        """The site of that name; `PlanError` where there is none."""
        for site in self.sites:
            if site.name == name:
                return site
        raise PlanError(f"no site {name!r} in this plan; it has: {', '.join(s.name for s in self.sites) or 'none'}")

    def upsampler_of(self, site: Site) -> str:
        """The name of the upsampler of a site that is swapped."""
        return site.upsampler or self.options.upsampler

    def replace_sites(self, sites: Iterable[Site]) -> Plan:
        """The same plan over other sites."""
        return dataclasses.replace(self, sites=tuple(sites))

    def to_dict(self) -> dict[str, Any]:
        """Plain lists, dicts, strings and numbers: what `to_json` writes."""
        data = dataclasses.asdict(self.replace_sites(()))
        data["sites"] = [site.to_dict() for site in self.sites]
        if self.options.unguided == Options.unguided:  # as in `Site.to_dict`
            del data["options"]["unguided"]
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
        plan = _schema.made(cls, schema1.upgrade_plan(data) if data["schema"] == 1 else data, "plan")
        repeated = [name for name, count in Counter(site.name for site in plan.sites).items() if count > 1]
        if repeated:
            raise PlanError(
                f"this is not a plan upswap wrote: several sites are named {one_line(', '.join(repeated[:5]), 300)}"
            )
        before = _BEFORE.get(plan.options.upsampler, {})
        return dataclasses.replace(plan, options=_frozen_options(plan.options, before)).replace_sites(
            _completed(site, before) for site in plan.sites
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
    """`PlanError` unless `what`, written by upswap `version`, has a schema of plans that this upswap reads."""
    if type(found) is int and 1 <= found <= PLAN_SCHEMA:
        return
    if type(found) is int and found > PLAN_SCHEMA:
        by = f", upswap {version}" if isinstance(version, str) and version else ""
        raise PlanError(
            f"{what} has schema {found} and was written by a newer upswap{by}; this one reads schema {PLAN_SCHEMA}: "
            "pip install -U upswap"
        )
    raise PlanError(f"{what} has schema {found!r:.60}, this upswap reads schema {PLAN_SCHEMA}: make the plan again")


#: What an option was before upsamplers had it. A plan has every option written out: one that it lacks is newer than the plan.
_BEFORE: dict[str, dict[str, Any]] = {"carafe": {"init": "paper"}}


def _frozen(values: Mapping[str, Any], before: Mapping[str, Any]) -> dict[str, Any]:
    """JSON has lists where options have tuples."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in {**before, **values}.items()}


def _completed(site: Site, before: Mapping[str, Any]) -> Site:
    known = before if site.swap or site.config else {}
    return dataclasses.replace(site, config=_frozen(site.config, known), settings=_frozen(site.settings, known))


def _frozen_options(options: Options, before: Mapping[str, Any]) -> Options:
    overrides = (dataclasses.replace(override, options=_frozen(override.options, {})) for override in options.overrides)
    return dataclasses.replace(options, config=_frozen(options.config, before), overrides=tuple(overrides))
