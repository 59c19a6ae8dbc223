"""Whether a model may resize in train mode what it does not in eval mode: then it has to be run in both."""

from __future__ import annotations

from torch import nn

from .wrapped import names_by_function

#: Parts of the names that functions which resize go by.
_RESIZES = ("interp", "upsampl", "resize", "upscale", "rescale")


def training_matters(model: nn.Module, called: set[str]) -> bool:
    """Whether some module's own code reads `training`, and names a resize or has children that eval mode did not run.

    `called` are the paths of the modules that ran in eval mode. Layers that only drop or normalise in train mode read it
    too, but do neither.
    """
    classes: dict[type, set[str]] = {}
    for path, module in model.named_modules():
        cls = type(module)
        if cls.__module__.startswith("torch."):
            continue
        if cls not in classes:
            classes[cls] = set().union(*names_by_function(cls))
        if "training" in classes[cls] and (
            any(part in name.lower() for name in classes[cls] for part in _RESIZES)
            or _has_idle_children(module, path, called)
        ):
            return True
    return False


def _has_idle_children(module: nn.Module, path: str, called: set[str]) -> bool:
    """Whether a module below, which is no container, did not run."""
    prefix = f"{path}." if path else ""
    return any(
        below
        and not isinstance(child, nn.Sequential | nn.ModuleList | nn.ModuleDict)
        and f"{prefix}{below}" not in called
        for below, child in module.named_modules()
    )
