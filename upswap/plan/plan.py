"""The plain data every part of upswap speaks: `Site`, `Options`, `Plan`, and their JSON.

Nothing here imports torch. A `Plan` says, for every resize call a model makes, what it is, what was decided and why, and
how the decision is carried out. The dry run prints it, a saved file carries it, undo reads it.
"""

from __future__ import annotations

import dataclasses
import html
import json
import shutil
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from ..errors import OptionError, PlanError
from . import decode as _schema
from .site import KINDS, Name, Positive, Site


def by_owner(sites: Iterable[Site]) -> dict[str, list[Site]]:
    """Sites grouped by their owner's path, in order."""
    owners: dict[str, list[Site]] = {}
    for site in sites:
        owners.setdefault(site.owner, []).append(site)
    return owners


PLAN_SCHEMA = 1


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
        kept = Counter(site.kind for site in self.kept)
        kinds = ", ".join(f"{count} {kind}" for kind, count in kept.items())
        return f"{len(self.swapped)} to swap, {len(self.kept)} to keep" + (f" ({kinds})" if kinds else "")

    @property
    def _title(self) -> str:
        return f"{self.model_class.rpartition('.')[2]}: {self.summary}"

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

        return f"<p>{html.escape(self._title)}</p>{table.as_html(self.sites)}"

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
