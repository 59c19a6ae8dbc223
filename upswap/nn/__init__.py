"""Modules that take a resize's place, and the registry that makes one for a Site.

DySample, CARAFE, chains of them and tables of them by channel count. `sampling/` below is functions of tensors only. Nothing
here knows a model, a file or source code. A new upsampler is a file here with its factory registered.

The classes below are part of the file format under the address they have here.
"""

from .carafe import CARAFE
from .composed import ByChannels, Cascade
from .dysample import DySample
from .factories import dysample_settings as dysample_settings  # with it the upsamplers are registered
from .registry import register_upsampler

__all__ = ["CARAFE", "ByChannels", "Cascade", "DySample", "register_upsampler"]

# A pickle writes the address it finds on the class, and files outlive the file it stands in.
for _upsampler in (CARAFE, ByChannels, Cascade, DySample):
    _upsampler.__module__ = __name__
