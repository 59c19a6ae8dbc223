"""Run a model without leaving a trace on it."""

from __future__ import annotations

import contextlib
import random
import sys
from collections.abc import Iterator

import torch
from torch import nn


@contextlib.contextmanager
def preserved(model: nn.Module, *, training: bool | None = False) -> Iterator[None]:
    """Leave `model` and the random generators exactly as found.

    Inside, every module's training flag is `training` (None leaves them be). On the way out the flags, the attributes,
    the registered parameters, buffers, children and hooks of every module, its dicts and lists, the values of the
    buffers, and the state of Python's, NumPy's and torch's generators (CPU and the model's own devices) are what they
    were, also after an exception.

    Flags are written directly: models override `train()` with behaviour of their own (SMP's frozen encoders).
    """
    modules = list(model.modules())
    attributes = [dict(module.__dict__) for module in modules]
    # Every registry of an nn.Module is a dict attribute: children, parameters, buffers and all kinds of hooks.
    registries = [registry for saved in attributes for registry in saved.values() if isinstance(registry, dict)]
    contents = [dict(registry) if registry else None for registry in registries]
    buffers = [
        (buffer, buffer.detach().clone())
        for module in modules
        for buffer in module._buffers.values()
        if buffer is not None and not buffer.is_meta
    ]
    lists = [(value, list(value)) for saved in attributes for value in saved.values() if isinstance(value, list)]
    trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    tensors = (t for module in modules for t in (*module._parameters.values(), *module._buffers.values()))
    devices = {tensor.device for tensor in tensors if tensor is not None}
    numpy_random = getattr(sys.modules.get("numpy"), "random", None)
    states = random.getstate(), None if numpy_random is None else numpy_random.get_state()
    try:
        with torch.random.fork_rng(devices=[d for d in devices if d.type == "cuda"]):
            if training is not None:
                for module in modules:
                    module.__dict__["training"] = training
            yield
    finally:
        random.setstate(states[0])
        if numpy_random is not None:
            numpy_random.set_state(states[1])
        for module, saved in zip(modules, attributes, strict=True):
            module.__dict__.clear()
            module.__dict__.update(saved)
        for registry, content in zip(registries, contents, strict=True):
            if registry or content:
                registry.clear()
                registry.update(content or {})
        for items, kept in lists:
            items[:] = kept
        for parameter, required in trained:
            if parameter.requires_grad != required:
                parameter.requires_grad_(required)
        with torch.no_grad():
            for buffer, value in buffers:
                if not torch.equal(buffer, value):
                    buffer.copy_(value)
