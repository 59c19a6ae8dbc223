"""transformers: `from_pretrained` of a folder with a patched model gives the patched model, after one call.

What is written needs no call: the plan of a patched model is in its `config`, so that `save_pretrained`, Trainer and
`push_to_hub` write it to `config.json` beside the weights.
"""

from __future__ import annotations

import functools
import os
import warnings
from pathlib import Path
from typing import Any

import transformers

from ..errors import UpswapWarning
from ..files.formats.folder import DESCRIPTION
from ..files.formats.host_class import patching

#: The method as transformers has it, while another is in its place.
_theirs: list[Any] = []


def enable() -> None:
    """From now on, `from_pretrained` of every class, and of `AutoModel` and its like, patches what was patched when it was saved.

    The upsamplers get their trained weights as the rest of the model does. A model of which `config.json` has no plan is made as
    before. No code is read from a file. A plan that does not fit the model raises `PlanError`.

    This changes `transformers.PreTrainedModel` for the whole process; `disable` undoes it.
    """
    if _theirs:
        return
    theirs = vars(transformers.PreTrainedModel)["from_pretrained"]
    function = theirs.__func__

    @functools.wraps(function)
    def from_pretrained(cls: type, source: Any = None, *args: Any, **kwargs: Any) -> Any:
        if isinstance(source, str | os.PathLike) and (Path(source) / DESCRIPTION).is_file():
            warnings.warn(
                f"{source} was written by upswap.save: transformers reads the original model in it. upswap.load({str(source)!r}) "
                "gives the patched one",
                UpswapWarning,
                stacklevel=2,
            )
        return function(patching(cls), source, *args, **kwargs)

    _theirs.append(theirs)
    transformers.PreTrainedModel.from_pretrained = classmethod(from_pretrained)


def disable() -> None:
    """Undo `enable`: `from_pretrained` leaves upsamplers out again."""
    if _theirs:
        transformers.PreTrainedModel.from_pretrained = _theirs.pop()
