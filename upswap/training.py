"""Whether a model may resize in train mode what it does not in eval mode: then it has to be run in both."""

from __future__ import annotations

from torch import nn

from .wrapped import names_by_function

#: Parts of the names that functions which resize go by.
_RESIZES = ("interp", "upsampl", "resize", "upscale", "rescale")


def training_matters(model: nn.Module, called: set[str]) -> bool:
    """Whether some module's own code reads `training`, and names a resize or has parts that can resize and did not run in
    eval mode.

    `called` are the paths of the modules that ran in eval mode. Layers that only drop or normalise in train mode read it
    too, but do neither.
    """
    names: dict[type, set[str]] = {}
    resizing: list[str] = []
    reading: list[str] = []
    for path, module in model.named_modules():
        cls = type(module)
        if cls.__module__.startswith("torch."):
            if isinstance(module, nn.Upsample) and path not in called:
                resizing.append(path)
            continue
        if cls not in names:
            names[cls] = set().union(*names_by_function(cls))
        resizes = any(part in name.lower() for name in names[cls] for part in _RESIZES)
        if "training" in names[cls]:
            if resizes:
                return True
            reading.append(path)
        if resizes and path not in called:
            resizing.append(path)
    return any(path.startswith(f"{above}." if above else "") for path in resizing for above in reading)
