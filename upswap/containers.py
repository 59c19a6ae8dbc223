"""What the code of a model's classes says about the modules in it: who runs whatever is put into it, who asks for a
layer's class."""

from __future__ import annotations

from torch import nn

from .wrapped import names_by_function

CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
_CHILDREN = {"children", "named_children", "_modules"}


def runs_its_children(module: nn.Module) -> bool:
    """Whether a module is one of torch's containers, or its own code goes through its children whatever they are."""
    return isinstance(module, CONTAINERS) or any(_CHILDREN & names for names in names_by_function(type(module)))


def asks_for_layers(model: nn.Module) -> bool:
    """Whether the code of some module asks if a layer is an `nn.Upsample`."""
    classes = {type(module) for module in model.modules()}
    return any(
        {"isinstance", "Upsample"} <= names
        for cls in classes
        if not cls.__module__.startswith("torch.")
        for names in names_by_function(cls)
    )
