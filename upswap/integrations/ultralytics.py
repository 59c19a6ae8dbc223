"""ultralytics: what it trains, loads and predicts with keeps the upsamplers.

Its trainers build a model anew from its YAML, and copy the weights whose names fit. `register` lets three methods of its see to
the upsamplers too; models without any are treated as before. It is called where this module is imported: by the user, where a
model of ultralytics is patched, and where a file with a patched one is opened, by ultralytics too.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn
from ultralytics.engine.model import Model
from ultralytics.nn import tasks

from .. import api
from ..errors import OptionError, UpswapError, UpswapWarning
from ..nn import DySample as _DySample
from ..plan.plan import Plan
from ..surgery.apply import added_keys, is_patched, plan_of

#: An attribute of the methods that are wrapped.
_WRAPPED = "_upswap_wrapped"


class Mark:
    """In the attributes of a patched model: a pickle of it names this class, and so imports this module."""


class DySample(_DySample):
    """A row of a model's YAML: `[-1, 1, DySample, [c2, 2, nearest, {style: lp, groups: 4}]]`.

    ultralytics puts the number of channels of the row before for `c2`, at every scale of the model. The options are those of
    `upswap.DySample`.
    """

    def __init__(
        self, channels: int, scale: float = 2, mode: Any = "nearest", options: Mapping[str, Any] | None = None
    ) -> None:
        super().__init__(channels, scale, mode=mode, **(options or {}))


def register() -> None:
    """Let ultralytics keep upsamplers, and know the rows of `upswap yaml`; once is enough, and importing this module does it.

    Raises:
        OptionError: ultralytics has a `DySample` of the user's own, which it would build of those rows.
    """
    _wrap()
    if not _add_row():
        other = tasks.DySample
        raise OptionError(
            f"ultralytics would build the rows of upswap as {other.__module__}.{other.__qualname__}, which was put into "
            "ultralytics.nn.tasks as DySample. Give it another name there and in its YAML: "
            "tasks.Other = tasks.DySample; del tasks.DySample. Or patch in Python, which needs no rows: "
            "upswap.patch(YOLO(...))"
        )


def _wrap() -> None:
    methods = ((tasks.BaseModel, "load", _loading), (Model, "train", _training), (Model, "predict", _predicting))
    for owner, name, wrapped in methods:
        original = getattr(owner, name)
        if not hasattr(original, _WRAPPED):  # as it has where this module is loaded again
            function = wrapped(original)
            setattr(function, _WRAPPED, True)
            setattr(owner, name, function)


def _add_row() -> bool:
    """Whether `DySample` in a YAML is the one here: it is put there unless another is."""
    there = tasks.__dict__.get("DySample", DySample)
    is_ours = (getattr(there, "__module__", None), getattr(there, "__qualname__", None)) == (
        __name__,
        DySample.__qualname__,
    )
    if is_ours:
        tasks.DySample = DySample
    return is_ours


def _loading(original: Callable[..., Any]) -> Callable[..., Any]:
    """`BaseModel.load`, which copies the weights that fit: those of a patched model into one that is patched alike."""

    @functools.wraps(original)
    def load(self: nn.Module, weights: Any, *args: Any, **kwargs: Any) -> Any:
        source = (weights.get("ema") or weights.get("model")) if isinstance(weights, dict) else weights
        if not (isinstance(source, nn.Module) and is_patched(source)):
            return original(self, weights, *args, **kwargs)
        why = _patched_as(self, source)
        result = original(self, weights, *args, **kwargs)
        here, there = self.state_dict(), source.state_dict()
        lost = [key for key in added_keys(source) if key not in here or here[key].shape != there[key].shape]
        if lost:
            warnings.warn(
                f"the weights have upsamplers that this {type(self).__name__} does not take ({len(lost)} tensors, such as "
                f"{min(lost)}){f': {why}' if why else ''}. upswap.patch(model) gives it upsamplers of its own",
                UpswapWarning,
                stacklevel=2,
            )
        return result

    return load


def _patched_as(model: nn.Module, source: nn.Module) -> str:
    """Patch a model as another is, if it is not patched; why that is not possible, where it is not."""
    if not is_patched(model):
        try:
            api.patch(model, plan=plan_of(source))
        except UpswapError as error:
            return str(error)
    return ""


def _training(original: Callable[..., Any]) -> Callable[..., Any]:
    """`YOLO.train`, of which a patched model is trained patched."""

    @functools.wraps(original)
    def train(self: Model, trainer: Any = None, **kwargs: Any) -> Any:
        if isinstance(self.model, nn.Module) and any(isinstance(module, DySample) for module in self.model.modules()):
            register()  # the trainer builds the rows anew
        if isinstance(self.model, nn.Module) and is_patched(self.model):
            chosen = trainer or self._smart_load("trainer")
            plan = plan_of(self.model).to_json()
            trainer = _keeping(chosen, plan) if isinstance(chosen, type) else functools.partial(_made, chosen, plan)
        return original(self, trainer=trainer, **kwargs)

    return train


def _made(make: Callable[..., Any], plan: str, *args: Any, **kwargs: Any) -> Any:
    trainer = make(*args, **kwargs)
    trainer.__class__ = _keeping(type(trainer), plan)
    return trainer


def _keeping(base: type, plan: str) -> type:
    """A trainer whose models are patched as the weights are that they get, or else as `plan` says.

    It is made anew for each training, and so pickled as a whole for the processes of several devices.
    """

    def get_model(self: Any, cfg: Any = None, weights: Any = None, verbose: bool = True) -> nn.Module:
        model: nn.Module = base.get_model(self, cfg=cfg, weights=weights, verbose=verbose)  # type: ignore[attr-defined]
        if not is_patched(model):  # its weights are of no patched model, or were not loaded
            trained = weights if isinstance(weights, nn.Module) and is_patched(weights) else None
            api.patch(model, plan=Plan.from_json(plan) if trained is None else plan_of(trained))
            if trained is not None:
                state, added = trained.state_dict(), added_keys(trained)
                model.load_state_dict({key: state[key] for key in added}, strict=False)
        return model

    return type(base.__name__, (base,), {"__module__": base.__module__, "get_model": get_model})


def _predicting(original: Callable[..., Any]) -> Callable[..., Any]:
    """`YOLO.predict`, which keeps a copy of the model: made anew where the model was patched, or disabled, in between."""

    @functools.wraps(original)
    def predict(self: Model, source: Any = None, stream: bool = False, predictor: Any = None, **kwargs: Any) -> Any:
        state = _switched(self.model)
        if self.predictor is not None and getattr(self.predictor, "_upswap_state", None) != state:
            predictor = predictor or type(self.predictor)
            self.predictor = None
        result = original(self, source, stream, predictor, **kwargs)
        if self.predictor is not None:
            self.predictor._upswap_state = state
        return result

    return predict


def _switched(model: Any) -> Any:
    """What a copy of a model depends on: its plan, and which upsamplers are disabled. None of one that is not patched."""
    if not (isinstance(model, nn.Module) and is_patched(model)):
        return None
    disabled = [path for path, module in model.named_modules() if "forward" in module.__dict__]
    return plan_of(model), disabled


_wrap()
_add_row()
