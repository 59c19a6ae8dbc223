"""Run a model without leaving a trace on it."""

from __future__ import annotations

import contextlib
import random
import sys
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import nn

from .snapshot import Snapshot


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
    with contextlib.ExitStack() as restorers:  # each does its part whatever becomes of the others
        restorers.callback(_keep_random_states())
        restorers.callback(_keep_gradients(model))
        restorers.callback(Snapshot(model).restore)
        restorers.enter_context(torch.random.fork_rng(devices=[d for d in _devices(modules) if d.type == "cuda"]))
        if training is not None:
            for module in modules:
                module.__dict__["training"] = training
        yield


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


def _keep_gradients(model: nn.Module) -> Callable[[], None]:
    """What puts back which parameters require gradients, and which gradients they have."""
    # Those of a copied TorchScript module are no leaves: they have no gradients.
    trained = [
        (parameter, parameter.requires_grad, parameter.grad) for parameter in model.parameters() if parameter.is_leaf
    ]

    def restore() -> None:
        for parameter, required, grad in trained:
            if parameter.requires_grad != required:
                parameter.requires_grad_(required)
            if parameter.grad is not grad:
                parameter.grad = grad

    return restore


def _devices(modules: Sequence[nn.Module]) -> set[torch.device]:
    tensors = (t for module in modules for t in (*module._parameters.values(), *module._buffers.values()))
    return {tensor.device for tensor in tensors if tensor is not None}
