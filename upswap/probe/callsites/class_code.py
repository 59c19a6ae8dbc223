"""What the code of a model's classes says about the modules in it: who runs whatever is put into it, who asks for a
layer's class, which layers only resize, whose forward cannot be another."""

from __future__ import annotations

import ast
from typing import TypeGuard

from torch import fx, nn

from .functions import methods, names_by_function
from .syntax import calls_in, function_node, has_source

CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
_CHILDREN = {"children", "named_children", "_modules"}


def is_resize_layer(module: object) -> TypeGuard[nn.Upsample]:
    """Whether a module is one whose forward is a resize call and nothing else: `nn.Upsample` and its subclasses."""
    return isinstance(module, nn.Upsample) and type(module).forward is nn.Upsample.forward


def why_fixed(module: nn.Module) -> str | None:
    """Why a subclass's forward would not be the one that runs; None where it would."""
    if "forward" in module.__dict__:
        return "its forward was set on the instance, and would hide a rewritten one"
    if isinstance(module, fx.GraphModule):
        # Copies, compilers and exporters go by the graph.
        return "torch.fx makes its forward of a graph: patch the model before it is traced, and trace the patched one"
    return None


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


#: Parts of the names that functions which resize go by.
_RESIZES = ("interp", "upsampl", "resize", "upscale", "rescale")


def names_a_resize(cls: type) -> bool:
    """Whether the code of a class mentions a function or layer that resizes, by the names such have."""
    return _names_a_resize(set().union(*names_by_function(cls)))


def _names_a_resize(names: set[str]) -> bool:
    return any(part in name.lower() for name in names for part in _RESIZES)


def calls_a_resize(cls: type) -> bool:
    """Whether the code of a class calls what goes by such a name: `rescale_coords` may be a setting."""
    return names_a_resize(cls) and any(
        _names_a_resize({ast.unparse(call.func).rpartition(".")[2]})
        for function in methods(cls)
        for call in (calls_in(function_node(function.__code__)) if has_source(function.__code__) else ())
    )


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
        resizes = _names_a_resize(names[cls])
        if "training" in names[cls]:
            if resizes:
                return True
            reading.append(path)
        if resizes and path not in called:
            resizing.append(path)
    return any(path.startswith(f"{above}." if above else "") for path in resizing for above in reading)
