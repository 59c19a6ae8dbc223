"""A copy of a model whose upsamplers read as a runtime can, for whatever exporter."""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..errors import OptionError, UpswapWarning
from ..nn.dysample import DySample
from ..nn.sampling.samplers import SamplerName, far_from_nearest
from ..probe.inputs.inputs import as_inputs
from ..surgery.apply import is_patched
from ..surgery.wrappers import unwrapped
from .targets import WHOLE_ROWS, Target, sampler_for, target_named

M = TypeVar("M", bound=nn.Module)

#: The widest reach of a window: 49 weighted copies of the map.
_WIDEST = 3


def exportable(
    model: M, target: str = "onnxruntime", sampler: str = "auto", calibration: Iterable[Any] | None = None
) -> M:
    """A copy of a model, in eval mode, for an exporter of your own: its upsamplers read as `target` does best.

    It computes what the model computes, to the rounding of float32. A model that is not patched is copied as it is, with a
    warning.

    Args:
        model: a patched model, or an object that holds one: a YOLO of ultralytics, a wrapper.
        target: the runtime: a name among those of `export_onnx`.
        sampler: "gridsample", "gather", "window", or "auto".
        calibration: for "window", example inputs as the model will see them; its reach is what their offsets need.

    Raises:
        OptionError: an unknown target or sampler, one that the target lacks, or a window without calibration or too small for it.
    """
    made = copy.deepcopy(model).eval()
    runtime = target_named(target)
    choose(made, runtime, sampler_for(runtime, sampler), calibration)
    return made


def choose(model: nn.Module, target: Target, sampler: SamplerName, calibration: Iterable[Any] | None = None) -> None:
    """Have the upsamplers read by `sampler` as `target` does it best; a window gets the reach that the calibration asks for."""
    upsamplers = [module for module in model.modules() if isinstance(module, DySample)]
    if not any(map(is_patched, model.modules())):
        warnings.warn(UpswapWarning(f"{type(model).__name__} is not patched: it is exported as it is"), stacklevel=3)
    reaches = {id(module): 1 for module in upsamplers}
    if sampler == "window":
        if calibration is None:
            raise OptionError(
                "sampler 'window' needs calibration inputs: the offsets on them say how far it has to reach"
            )
        reaches = _reaches(model, upsamplers, calibration)
    for module in upsamplers:
        rows = target.rows if target.rows is not None else module.in_channels // module.groups >= WHOLE_ROWS
        module.sampler = (sampler, rows, reaches[id(module)])


def _reaches(model: nn.Module, upsamplers: list[DySample], calibration: Iterable[Any]) -> dict[int, int]:
    """By the id of each upsampler, how many pixels around that of nearest sampling its points lie on the given inputs."""
    farthest: dict[int, float] = {id(module): 0.0 for module in upsamplers}

    def measure(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        with contextlib.suppress(OptionError):  # a smaller target, which the original resize computes
            note(module, args[0], module.points(*args, **kwargs))

    def note(module: DySample, x: Tensor, points: tuple[Tensor, Tensor]) -> None:
        for positions, axis in zip(points, (2, 3), strict=True):
            away = far_from_nearest(positions, x.shape[axis], axis).abs().max()
            farthest[id(module)] = max(farthest[id(module)], float(away))

    handles = [module.register_forward_pre_hook(measure, with_kwargs=True) for module in upsamplers]
    try:
        with torch.no_grad():
            for inputs in map(as_inputs, calibration):
                inner = unwrapped(model)
                inner(*inputs.args, **inputs.kwargs)
    finally:
        for handle in handles:
            handle.remove()
    worst = max(farthest.values(), default=0.0)
    if worst > _WIDEST:
        raise OptionError(
            f"points lie up to {worst:.1f} pixels from the pixel of nearest sampling, and a window reaches {_WIDEST} at most: "
            "use sampler='gather'"
        )
    return {key: max(1, int(-(-away // 1))) for key, away in farthest.items()}


def upsampler_paths(model: nn.Module) -> Iterator[str]:
    """The paths of what reads at positions of its own."""
    for path, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, DySample):
            yield path
