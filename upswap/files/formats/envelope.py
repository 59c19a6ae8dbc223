"""What a library's own loader wants around the model in a `.pt`: some open a dict with the model alone."""

from __future__ import annotations

from typing import Any

from torch import nn


def enveloped(model: nn.Module) -> nn.Module | dict[str, Any]:
    """What to pickle so that the model's library opens it, which is the model itself for most."""
    if any(base.__module__ == "ultralytics.nn.tasks" for base in type(model).__mro__):
        arguments = getattr(model, "args", None) or {}  # of the training: a dict, or a namespace while it runs
        return {
            "model": model,
            "ema": None,
            "train_args": dict(arguments if isinstance(arguments, dict) else vars(arguments)),
        }
    return model
