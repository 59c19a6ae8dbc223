"""MMEngine: a hook that keeps the plan in the checkpoint and lets no Runner leave upsamplers out, and the way back."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.registry import HOOKS
from torch import nn

from ..api import is_patched
from ..errors import OptionError
from ..files.checkpoint import load
from ..files.formats import pt as pickled
from ..training.status import status
from .kept_plans import KEY, check_taken, patch_like, plans_in

M = TypeVar("M", bound=nn.Module)


@HOOKS.register_module()
class UpswapHook(Hook):
    """Keeps the upsamplers of a patched model, or of the patched models in it; of others it does nothing.

    Each checkpoint gets the plans, in its `meta`. Before training it is looked at whether the optimisers and an `EMAHook` have
    the upsamplers.

    Raises:
        OptionError: they have not.
        PlanError: a checkpoint that is loaded has upsamplers which the model has not. MMEngine would leave them out.
    """

    def before_train(self, runner: Any) -> None:
        """After optimisers and averages are made, and a checkpoint is loaded."""
        model = _inner(runner.model)
        if not is_patched(model):
            return
        wrapper = runner.optim_wrapper
        optimizers = [each.optimizer for each in wrapper.values()] if hasattr(wrapper, "values") else wrapper.optimizer
        averaged = [hook.ema_model for hook in runner.hooks if hasattr(hook, "ema_model")]
        for row in [row for ema in averaged or [None] for row in status(model, optimizers, ema).rows]:
            if row.in_optimizer is False or row.in_ema is False:
                raise OptionError(f"{row.path} {'; '.join(row.problems)}. Patch the model before the Runner gets it")

    def before_save_checkpoint(self, runner: Any, checkpoint: dict[str, Any]) -> None:
        """The plans as plain data."""
        plans = plans_in(_inner(runner.model))
        if plans:
            checkpoint["meta"][KEY] = plans

    def after_load_checkpoint(self, runner: Any, checkpoint: dict[str, Any]) -> None:
        """Before the weights go into the model. It is not patched here: its optimiser and averages are made already."""
        advice = ": model = upswap.integrations.mmengine.load_patched(model, path) does both before the Runner gets it"
        weights = checkpoint.get("state_dict", checkpoint)
        weights = {name.removeprefix("module."): tensor for name, tensor in weights.items()}  # as MMEngine does
        check_taken(_inner(runner.model), weights, "the checkpoint", advice)


def load_patched(model: M, path: str | Path, key: str = "state_dict") -> M:
    """Patch a model by the plans that `UpswapHook` put into a checkpoint, give it the weights there, and give it back.

    The file is read as `upswap.load` reads it: no code from it is run. Where it has upsamplers and no plans, the model is patched
    with the options that their shapes say.

    Args:
        model: the model, of the architecture that was trained; what is patched in it already stays.
        path: the checkpoint of a Runner.
        key: what to take of it: "state_dict", "ema_state_dict".

    Raises:
        PlanError: its plan does not fit the model.
        SourceError: it has no weights of this model.
    """
    contents = pickled.read(Path(path), ())
    meta = contents.found.get("meta") if isinstance(contents.found, Mapping) else None
    plans = meta.get(KEY) if isinstance(meta, Mapping) else None
    patch_like(model, plans, path)
    load(path, model, key=key)
    return model


def _inner(model: Any) -> Any:
    return model.module if is_model_wrapper(model) else model
