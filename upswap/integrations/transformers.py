"""transformers: `from_pretrained` of a folder with a patched model gives the patched model, after one call.

What is written needs no call: the plan of a patched model is in its `config`, so that `save_pretrained`, Trainer and
`push_to_hub` write it to `config.json` beside the weights.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import warnings
from pathlib import Path
from typing import Any

import transformers
from torch import nn

from ..architectures import host_config
from ..errors import UpswapWarning
from ..files.formats.folder import DESCRIPTION
from ..files.formats.host_class import patching, undo_without_weights


@dataclasses.dataclass
class _Method:
    """`from_pretrained` as transformers has it, and what is in its place, or beneath what others put over that."""

    theirs: Any
    ours: Any = None
    is_on: bool = True


_methods: list[_Method] = []


def enable() -> None:
    """From now on, `from_pretrained` of every class, and of `AutoModel` and its like, patches what was patched when it was saved.

    The upsamplers get their trained weights as the rest of the model does. A model of which `config.json` has no plan is made as
    before. No code is read from a file. A plan that does not fit the model raises `PlanError`.

    This changes `transformers.PreTrainedModel` for the whole process; `disable` undoes it.
    """
    there = vars(transformers.PreTrainedModel)["from_pretrained"]
    if _methods and there is not _methods[0].theirs:
        _methods[0].is_on = True
        return
    method = _Method(there)
    function = there.__func__

    @functools.wraps(function)
    def from_pretrained(cls: type, source: Any = None, *args: Any, **kwargs: Any) -> Any:
        if not method.is_on:
            return function(cls, source, *args, **kwargs)
        if isinstance(source, str | os.PathLike) and (Path(source) / DESCRIPTION).is_file():
            warnings.warn(
                f"{source} was written by upswap.save: transformers reads the original model in it. upswap.load({str(source)!r}) "
                "gives the patched one",
                UpswapWarning,
                stacklevel=2,
            )
        plan = None if kwargs.get("config") is None else _plan_in(source, kwargs.get("subfolder") or "")
        patched: list[nn.Module] = []
        asked = kwargs.pop("output_loading_info", False)
        model, info = function(
            patching(cls, plan=plan, patched=patched), source, *args, output_loading_info=True, **kwargs
        )
        gone = undo_without_weights(model, patched, info["missing_keys"], source)
        info["missing_keys"] = type(info["missing_keys"])(key for key in info["missing_keys"] if key not in gone)
        return (model, info) if asked else model

    method.ours = classmethod(from_pretrained)
    _methods[:] = [method]
    transformers.PreTrainedModel.from_pretrained = method.ours


def disable() -> None:
    """Undo `enable`: `from_pretrained` leaves upsamplers out again. What others put over it stays."""
    if _methods and vars(transformers.PreTrainedModel)["from_pretrained"] is _methods[0].ours:
        transformers.PreTrainedModel.from_pretrained = _methods.pop().theirs
    elif _methods:
        _methods[0].is_on = False


def _plan_in(source: Any, subfolder: str) -> str | None:
    """The plan in the configuration of a folder of weights, for which the user gives another configuration."""
    if not isinstance(source, str | os.PathLike) or not (Path(source) / subfolder / "config.json").is_file():
        return None
    entries, _ = transformers.PreTrainedConfig.get_config_dict(source, subfolder=subfolder)
    return host_config.kept_in(entries)
