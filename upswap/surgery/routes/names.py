"""Which names of modules, parameters and buffers may be traced, and which a file may have."""

from __future__ import annotations

import re
from collections.abc import Iterator

from torch import nn

#: What is plain in any source code.
TRACED = re.compile(r"[A-Za-z_][A-Za-z0-9_]*|[0-9]+")
#: torchvision's RegNet has `block1-0`, MONAI's DiNTS `(0, 1)`. None of these characters can end a text, and none is traced.
STORED = re.compile(r"[A-Za-z0-9_ ,()\-]+")


def odd_names(model: nn.Module, plain: re.Pattern[str]) -> Iterator[tuple[str, str]]:
    """(class of the holder, name) for every name in a tree of modules that is not as `plain` has it."""
    for module in model.modules():
        for table in (module._modules, module._parameters, module._buffers):
            for name in map(str, table):  # a file can have anything for a key
                if not plain.fullmatch(name):
                    yield type(module).__name__, name
