"""The plan of a patched model in the configuration that its host keeps with its weights.

transformers writes `model.config` wherever it writes weights (save_pretrained, Trainer, push_to_hub), and reads it before it
builds a model. What is not the host's own in it, it keeps and does not read. segmentation_models_pytorch does the same with
the options that a model was made with; there it passes by names that begin with an underscore.
"""

from __future__ import annotations

import json
import warnings
from typing import Any

from torch import nn

from ..errors import UpswapWarning

_ENTRY = "upswap_plan"
_SMP_ENTRY = "_upswap_plan"


def keep(model: nn.Module, plan: str) -> None:
    """Put the plan of a model, as JSON, into its configuration; nothing where its host keeps none."""
    place = _place_of(model)
    if place is None:
        return
    entries, entry = place
    kept = plans_in(entries.get(entry))
    others = [
        text for text in kept if _class_in(text) != _class_in(plan)
    ]  # of other parts, or models, of one configuration
    if len(others) < len(kept) and plan not in kept:
        warnings.warn(
            f"the config of this {type(model).__name__} had the plan of another patch, and has this one's now. A model with "
            "the same config object would be saved with a plan that is not its own. Make each of a config of its own, "
            "Model(copy.deepcopy(config)), before any is patched",
            UpswapWarning,
            stacklevel=2,
        )
    entries[entry] = _together([*others, plan])


def drop(model: nn.Module, plan: str) -> None:
    """Take the plan of a model out of its configuration again, unless that has another."""
    place = _place_of(model)
    if place is None:
        return
    entries, entry = place
    left = [text for text in plans_in(entries.get(entry)) if text != plan]
    if left:
        entries[entry] = _together(left)
    else:
        entries.pop(entry, None)


def put(config: Any, plan: str) -> None:
    """Put what `kept_in` gave into a configuration: as text, in which the host takes no entry for one of its own settings."""
    vars(config)[_ENTRY] = plan


def plans_in(entry: Any) -> list[str]:
    """The plans in the entry of a configuration: one as its JSON, those of parts of several classes as a list of such in JSON."""
    if not isinstance(entry, str):
        return []
    try:
        found = json.loads(entry)
    except (ValueError, RecursionError):
        return [entry]
    return found if isinstance(found, list) and all(isinstance(text, str) for text in found) else [entry]


def _together(plans: list[str]) -> str:
    return plans[0] if len(plans) == 1 else json.dumps(plans)


def _class_in(plan: str) -> Any:
    try:
        return json.loads(plan)["model_class"]
    except (ValueError, RecursionError, TypeError, LookupError):  # of a file, and no plan
        return None


def kept_in(config: Any) -> str | None:
    """What a configuration has of plans, or what its `config.json` holds; None where there is none."""
    entries = config if isinstance(config, dict) else vars(config)
    found = entries.get(_ENTRY, entries.get(_SMP_ENTRY))
    return found if isinstance(found, str) else None


def kept_by(model: nn.Module) -> str | None:
    """What the configuration of a model has of plans."""
    place = _place_of(model)
    return None if place is None else kept_in(place[0])


def came_without(model: nn.Module) -> bool:
    """Whether the host loaded a model of which its configuration has a plan, and left the upsamplers out."""
    if kept_by(model) is None or any(
        parameter.is_meta for parameter in model.parameters()
    ):  # on meta it is being built
        return False
    return _options_of(model) is not None or _was_loaded(model)


def without_plan(config: Any) -> Any:
    """A configuration that is the caller's own, without a plan in it."""
    vars(config).pop(_ENTRY, None)
    return config


def _was_loaded(model: nn.Module) -> bool:
    """Whether transformers loaded this model, and did not only make it of a configuration that it loaded.

    It marks the parameters that it loads, which copies have not; releases from 5 on mark the model too, for when it is saved.
    """
    marked = any(getattr(parameter, "_is_hf_initialized", False) for parameter in model.parameters())
    return bool(model.__dict__["config"].name_or_path) and (marked or "_weight_conversions" in model.__dict__)


def _place_of(model: nn.Module) -> tuple[dict[str, Any], str] | None:
    """What a model's host keeps beside its weights, and the name of the plan in it; None where it keeps nothing."""
    for find, entry in ((_options_of, _SMP_ENTRY), (_config_of, _ENTRY)):
        entries = find(model)
        if entries is not None:
            return entries, entry
    return None


def _config_of(model: nn.Module) -> dict[str, Any] | None:
    """The entries of the configuration of a model of transformers; None for any other."""
    config = model.__dict__.get("config")
    ancestors = {cls.__module__.partition(".")[0] for cls in type(config).__mro__}
    return vars(config) if "transformers" in ancestors else None


def _options_of(model: nn.Module) -> dict[str, Any] | None:
    """The options that a model of SMP was made with, which it keeps; None for any other."""
    options = model.__dict__.get("_hub_mixin_config")
    ancestors = {cls.__module__.partition(".")[0] for cls in type(model).__mro__}
    return options if isinstance(options, dict) and "segmentation_models_pytorch" in ancestors else None
