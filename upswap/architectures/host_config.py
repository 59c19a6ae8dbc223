"""The plan of a patched model in the configuration that its host keeps with its weights.

transformers writes `model.config` wherever it writes weights (save_pretrained, Trainer, push_to_hub), and reads it before it
builds a model. What is not the host's own in it, it keeps and does not read. segmentation_models_pytorch does the same with
the options that a model was made with; there it passes by names that begin with an underscore.
"""

from __future__ import annotations

from typing import Any

from torch import nn

_ENTRY = "upswap_plan"
_SMP_ENTRY = "_upswap_plan"


def keep(model: nn.Module, plan: str) -> None:
    """Put the plan of a model, as JSON, into its configuration; nothing where its host keeps none."""
    options = _options_of(model)
    config = _config_of(model)
    if options is not None:
        options[_SMP_ENTRY] = plan
    elif config is not None:
        put(config, plan)


def drop(model: nn.Module) -> None:
    """Take the plan of a model out of its configuration again."""
    options = _options_of(model)
    if options is not None:
        options.pop(_SMP_ENTRY, None)
    config = _config_of(model)
    if config is not None:
        vars(config).pop(_ENTRY, None)


def put(config: Any, plan: str) -> None:
    """Put a plan into a configuration: as text, in which the host takes no entry for one of its own settings."""
    setattr(config, _ENTRY, plan)


def kept_in(config: Any) -> str | None:
    """The plan in a configuration, or in what its `config.json` holds; None where there is none."""
    entries = config if isinstance(config, dict) else vars(config)
    found = entries.get(_ENTRY, entries.get(_SMP_ENTRY))
    return found if isinstance(found, str) else None


def kept_by(model: nn.Module) -> str | None:
    """The plan in the configuration of a model."""
    config = _options_of(model)
    config = _config_of(model) if config is None else config
    return None if config is None else kept_in(config)


def came_without(model: nn.Module) -> bool:
    """Whether the host loaded a model of which its configuration has a plan, and left the upsamplers out."""
    named = _options_of(model) is not None or bool(getattr(_config_of(model), "name_or_path", ""))
    loaded = kept_by(model) is not None and named
    return loaded and not any(parameter.is_meta for parameter in model.parameters())  # on meta it is being built


def without_plan(config: Any) -> Any:
    """A configuration that is the caller's own, without a plan in it."""
    vars(config).pop(_ENTRY, None)
    return config


def _config_of(model: nn.Module) -> Any:
    config = model.__dict__.get("config")
    ancestors = {cls.__module__.partition(".")[0] for cls in type(config).__mro__}
    return config if "transformers" in ancestors else None


def _options_of(model: nn.Module) -> dict[str, Any] | None:
    """The options that a model of SMP was made with, which it keeps; None for any other."""
    options = model.__dict__.get("_hub_mixin_config")
    ancestors = {cls.__module__.partition(".")[0] for cls in type(model).__mro__}
    return options if isinstance(options, dict) and "segmentation_models_pytorch" in ancestors else None
