"""PEFT: an adapter that trains the upsamplers too, and has them in its file.

`get_peft_model` freezes all that is not its own. What its configuration lists as `modules_to_save` it trains whole, as a copy
that the adapter's file has, and that `disable_adapter` turns off.
"""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

from ..errors import OptionError
from ..surgery.apply import plan_of
from ..surgery.wrappers import patched_models
from ..training.groups import upsamplers


def with_upsamplers(model: nn.Module, config: Any) -> Any:
    """A PEFT configuration that trains the upsamplers too: `get_peft_model(model, with_upsamplers(model, config))`.

    Args:
        model: a patched model, as `get_peft_model` takes it after this.
        config: of a method that has `modules_to_save`: `LoraConfig` and its like. It is copied, not changed.

    Returns:
        `config` with the upsamplers' paths in its `modules_to_save`.

    Raises:
        OptionError: an upsampler cannot be named to PEFT.
        PlanError: the model is not patched.
    """
    if not hasattr(config, "modules_to_save"):
        raise OptionError(f"a {type(config).__name__} has no modules_to_save, by which PEFT would train the upsamplers")
    config = copy.copy(config)
    known = list(config.modules_to_save or ())
    config.modules_to_save = known + [name for name in _names(model) if name not in known]
    return config


def _names(model: nn.Module) -> list[str]:
    """The upsamplers' paths; `OptionError` where PEFT, which looks at how paths end, would take others for them."""
    _check_in_their_owners(model)
    found = list(upsamplers(model))
    for path, _ in model.named_modules(remove_duplicate=False):
        meant = next((name for name in found if path.endswith(name) and path not in found), None)
        if meant is not None:
            raise OptionError(
                f"PEFT would take {path} for the upsampler at {meant}, since the paths end alike. Patch with exclude=, or train "
                "the upsamplers beside the adapter: after get_peft_model, for p in upswap.parameters(model): "
                "p.requires_grad_(True), and upswap.save the model"
            )
    return found


def _check_in_their_owners(model: nn.Module) -> None:
    """`OptionError` for upsamplers that stand above the module whose code calls them: that code would not call PEFT's copy."""
    for prefix, patched in patched_models(model).items():
        for site in plan_of(patched).swapped:
            if site.op != "module" and (site.module or "").rpartition(".")[0] != site.owner:
                path = f"{prefix}.{site.owner}" if prefix else site.owner
                raise OptionError(
                    f"site {site.name}: {path} runs all its children, so that its upsampler is not one of them, and it would not "
                    f"run the copy that PEFT trains. Patch with exclude=[{site.name!r}]"
                )
