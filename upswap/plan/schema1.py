"""Plans of schema 1, as data, made into plans of schema 2.

Schema 1 had DySample's options beside those of every plan, one set for all sites, and said in a site's reason what is a note
or a field now.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

#: The options that each upsampler read then.
_OPTIONS = {"dysample": ("style", "groups", "dyscope", "init", "cascade"), "carafe": ("cascade",)}
_ALL = _OPTIONS["dysample"]

_NOTE = "in train mode only"
_TRAIN_ONLY = f" ({_NOTE})"


def upgrade_plan(data: Mapping[str, Any]) -> dict[str, Any]:
    """The same plan in schema 2; what is not as schema 1 had it is left for the decoder to name."""
    options = data.get("options")
    if not isinstance(options, Mapping):
        return {**data, "schema": 2}
    read = _OPTIONS.get(str(options.get("upsampler", "dysample")), ())
    config = {name: options[name] for name in read if name in options}
    kept = {name: value for name, value in options.items() if name not in _ALL}
    upgraded = {**data, "schema": 2, "options": {**kept, "config": config}}
    if isinstance(data.get("sites"), list | tuple):
        upgraded["sites"] = [upgrade_site(site, config) for site in data["sites"]]
    return upgraded


def upgrade_site(site: Any, config: Mapping[str, Any]) -> Any:
    """A site with the options it was swapped with, and with `seen_in` instead of words for it."""
    if not isinstance(site, Mapping):
        return site
    upgraded = {**site, **({"config": dict(config)} if site.get("swap") is True else {})}
    reason = site.get("reason")
    if isinstance(reason, str) and _TRAIN_ONLY in reason:
        upgraded |= {"reason": reason.replace(_TRAIN_ONLY, ""), "notes": [_NOTE], "seen_in": "train"}
    return upgraded
