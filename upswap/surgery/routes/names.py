"""Which names of modules, parameters and buffers may be traced: those that are plain in any source code."""

from __future__ import annotations

import re
from collections.abc import Iterator

from torch import nn

_PLAIN = re.compile(r"[A-Za-z_][A-Za-z0-9_]*|[0-9]+")


def odd_names(model: nn.Module) -> Iterator[tuple[str, str]]:
    """(class of the holder, name) for every name in a tree of modules that is neither a plain identifier nor a number."""
    for module in model.modules():
        for table in (module._modules, module._parameters, module._buffers):
            for name in map(str, table):  # a file can have anything for a key
                if not _PLAIN.fullmatch(name):
                    yield type(module).__name__, name
