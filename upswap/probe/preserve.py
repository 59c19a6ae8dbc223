"""Run a model without leaving a trace on it."""

from __future__ import annotations

import contextlib
import random
import sys
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import nn


@contextlib.contextmanager
def leaving_no_trace(model: nn.Module, *, training: bool | None = False) -> Iterator[None]:
    """Leave `model` and the random generators exactly as found.

    Inside, every module's training flag is `training` (None leaves them be). On the way out the flags, the attributes,
    the registered parameters, buffers, children and hooks of every module, its dicts and lists, the values of the
    buffers, and the state of Python's, NumPy's and torch's generators (CPU and the model's own devices) are what they
    were, also after an exception.

    Flags are written directly: models override `train()` with behaviour of their own (SMP's frozen encoders).
    """
    modules = list(model.modules())
    restorers = [
        _keep_random_states(),
        _keep_attributes(modules),
        _keep_requires_grad(model),
        _keep_buffers(modules),
    ]
    try:
        with torch.random.fork_rng(devices=[d for d in _devices(modules) if d.type == "cuda"]):
            if training is not None:
                for module in modules:
                    module.__dict__["training"] = training
            yield
    finally:
        for restore in restorers:
            restore()


def _keep_random_states() -> Callable[[], None]:
    """What puts the states of Python's and NumPy's generators back; torch's are forked."""
    numpy_random = getattr(sys.modules.get("numpy"), "random", None)
    of_python = random.getstate()
    of_numpy = None if numpy_random is None else numpy_random.get_state()

    def restore() -> None:
        random.setstate(of_python)
        if numpy_random is not None:
            numpy_random.set_state(of_numpy)

    return restore


def _keep_attributes(modules: Sequence[nn.Module]) -> Callable[[], None]:
    """What puts the attributes of the modules back, and what is in those that are dicts or lists.

    Every registry of an nn.Module is a dict attribute: children, parameters, buffers and all kinds of hooks.
    """
    attributes = [dict(module.__dict__) for module in modules]
    values = [value for saved in attributes for value in saved.values()]
    dicts = [(value, dict(value)) for value in values if isinstance(value, dict)]
    lists = [(value, list(value)) for value in values if isinstance(value, list)]

    def restore() -> None:
        for module, saved in zip(modules, attributes, strict=True):
            module.__dict__.clear()
            module.__dict__.update(saved)
        for registry, content in dicts:
            if registry or content:
                registry.clear()
                registry.update(content)
        for items, kept in lists:
            items[:] = kept

    return restore


def _keep_requires_grad(model: nn.Module) -> Callable[[], None]:
    trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]

    def restore() -> None:
        for parameter, required in trained:
            if parameter.requires_grad != required:
                parameter.requires_grad_(required)

    return restore


def _keep_buffers(modules: Sequence[nn.Module]) -> Callable[[], None]:
    """What puts the values of the buffers back; those on the meta device have none."""
    buffers = [buffer for module in modules for buffer in module._buffers.values() if buffer is not None]
    values = [(buffer, buffer.detach().clone()) for buffer in buffers if not buffer.is_meta]

    @torch.no_grad()
    def restore() -> None:
        for buffer, value in values:
            if not torch.equal(buffer, value):
                buffer.copy_(value)

    return restore


def _devices(modules: Sequence[nn.Module]) -> set[torch.device]:
    tensors = (t for module in modules for t in (*module._parameters.values(), *module._buffers.values()))
    return {tensor.device for tensor in tensors if tensor is not None}
