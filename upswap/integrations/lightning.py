"""Lightning: a callback that keeps the plan in the checkpoint and checks the optimiser, and the way back from a checkpoint.

Works with `lightning.pytorch` and with `pytorch_lightning`.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

from torch import nn

from ..api import is_patched
from ..errors import OptionError, PlanError, UpswapWarning
from ..training.status import status
from .kept_plans import KEY, check_taken, patch_like, plans_in

if TYPE_CHECKING:
    from lightning.pytorch import Callback, LightningModule, Trainer
else:
    _name = "lightning.pytorch" if importlib.util.find_spec("lightning") else "pytorch_lightning"
    Callback = importlib.import_module(_name).Callback

L = TypeVar("L", bound="LightningModule")


class UpswapCallback(Callback):
    """Keeps the upsamplers of a patched LightningModule, or of the patched models in it.

    Each checkpoint gets the plans. A module that is not patched yet is patched by them where a checkpoint is loaded into it
    (`ckpt_path=`); one without plans leaves it as it is. Before the first batch it is looked at whether the optimisers and
    averaged weights (`WeightAveraging`, `StochasticWeightAveraging`) have the upsamplers.

    Raises:
        OptionError: they have not.
        PlanError: a checkpoint's upsamplers have no place in the module. A callback that Lightning adds by itself warns where the
            checkpoint has no plans.
    """

    def __init__(self) -> None:
        self._is_checked = False
        self._is_asked_for = True

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """The module's own hooks, as a callback's comes too late for a load, and not at all with `save_weights_only`."""
        self._is_checked = False
        _hook(pl_module, self._is_asked_for)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """After every other hook in which a model may have been patched."""
        if not self._is_checked and is_patched(pl_module):
            _check(trainer, pl_module)
        self._is_checked = True

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Of `trainer.save_checkpoint` too, after the run, when the module's own hooks are gone."""
        _add_plans(pl_module, checkpoint)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """The module as it was."""
        _unhook(pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """The module as it was."""
        _unhook(pl_module)


def callbacks() -> list[Callback]:
    """What Lightning adds to every Trainer where upswap is installed, by its entry point `callbacks_factory`."""
    added = UpswapCallback()
    added._is_asked_for = False
    return [added]


def load_patched(cls: type[L], checkpoint_path: str | Path, **options: Any) -> L:
    """`cls.load_from_checkpoint(checkpoint_path, **options)` of a module that was patched outside of its own code.

    The module is made, patched by the plans that `UpswapCallback` put into the checkpoint, and then given the weights.

    Args:
        cls: the class of the LightningModule.
        checkpoint_path: the checkpoint.
        options: what `load_from_checkpoint` takes: `map_location`, `strict`, arguments of `cls`.

    Raises:
        PlanError: the checkpoint has upsamplers and no plan, or one that does not fit.
    """

    def new(_: type, *args: Any, **kwargs: Any) -> L:
        module = cls(*args, **kwargs)
        _hook(module, is_asked_for=True)
        return module

    made = type(cls.__name__, (cls,), {"__new__": new, "__module__": cls.__module__})
    module = cast(L, cast(Any, made).load_from_checkpoint(checkpoint_path, **options))
    _unhook(module)
    return module


def _check(trainer: Trainer, module: LightningModule) -> None:
    own = {id(parameter) for parameter in module.parameters()}
    optimizers = trainer.optimizers
    known = {id(parameter) for each in optimizers for group in each.param_groups for parameter in group["params"]}
    # A strategy's optimiser may have copies of its own, and manual optimisation may know others.
    found = status(module, optimizers if known & own else None)
    averaged = [
        model for each in trainer.callbacks if isinstance(model := getattr(each, "_average_model", None), nn.Module)
    ]
    missed = [row.path for row in found.rows if row.in_optimizer is False]
    if missed:
        raise OptionError(
            f"the upsamplers at {', '.join(missed)} are in no optimizer and would not be trained: the model was patched after "
            "configure_optimizers ran. Call upswap.patch in __init__ or configure_model of the LightningModule, or before fit; "
            "on_fit_start is too late"
        )
    for model in averaged:
        missed = [row.path for row in status(module, ema=model).rows if not row.in_ema]
        if missed:
            raise OptionError(
                f"the averaged weights have no upsamplers at {', '.join(missed)}: they were made before the patch. Call "
                "upswap.patch in __init__ of the LightningModule, or before fit"
            )
    problems = [f"{row.path} {problem}" for row in found.rows for problem in row.problems]
    if problems:
        warnings.warn(UpswapWarning(*problems), stacklevel=2)


def _hook(module: LightningModule, is_asked_for: bool) -> None:
    # Partials, as copies and pickles of the module get ones of their own. The first stays: Lightning's own callback is after
    # those of the user.
    module.__dict__.setdefault("on_save_checkpoint", functools.partial(_on_save, module))
    module.__dict__.setdefault("on_load_checkpoint", functools.partial(_on_load, module, is_asked_for))


def _unhook(module: LightningModule) -> None:
    for name in ("on_save_checkpoint", "on_load_checkpoint"):
        if getattr(module.__dict__.get(name), "func", None) in (_on_save, _on_load):
            del module.__dict__[name]


def _on_save(module: LightningModule, checkpoint: dict[str, Any]) -> None:
    type(module).on_save_checkpoint(module, checkpoint)
    _add_plans(module, checkpoint)


def _add_plans(module: LightningModule, checkpoint: dict[str, Any]) -> None:
    plans = plans_in(module)
    if plans:
        checkpoint[KEY] = plans


def _on_load(module: LightningModule, is_asked_for: bool, checkpoint: dict[str, Any]) -> None:
    patch_like(module, checkpoint.get(KEY), "the checkpoint")
    try:
        check_taken(module, checkpoint.get("state_dict", {}), "the checkpoint")
    except PlanError as error:
        # What looks like upsamplers may be the user's own, who left them out: nobody asked upswap to stop that.
        if is_asked_for or KEY in checkpoint:
            raise
        warnings.warn(UpswapWarning(*error.args), stacklevel=2)
    type(module).on_load_checkpoint(module, checkpoint)
