"""The upsamplers that are measured side by side: a name, and what makes the module."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from ...errors import FilterError, OptionError
from ...nn.configs import DEFAULT_GROUPS, Style
from ...nn.dysample import DySample
from ...nn.registry import create_upsampler
from . import reference_kernels
from .reference import ReferenceDySample

#: What the others are compared with.
BASELINE = "bilinear"


class Settings(NamedTuple):
    """What an upsampler is made for."""

    channels: int
    scale: int = 2
    groups: int | None = None
    """Of DySample; None for the default of its style."""


class Contender(NamedTuple):
    """One upsampler: how it is made, and what a call of it cannot do without reading."""

    name: str
    make: Callable[[Settings], nn.Module]
    predicted: Callable[[Settings], int] = lambda settings: 0
    """Values that it predicts for every input pixel and then reads: offsets, with their scope, or kernels."""
    guided: bool = False
    """Whether it is called with a guide, of the map's channels and the output's size."""


def contenders(patterns: Iterable[str] = ()) -> list[Contender]:
    """All of them, or those whose names match one of the patterns; `FilterError` for a pattern that matches none."""
    chosen: set[str] = set()
    for pattern in patterns:
        matching = fnmatch.filter([contender.name for contender in CONTENDERS], pattern)
        if not matching:
            names = ", ".join(contender.name for contender in CONTENDERS)
            raise FilterError(f"--only {pattern!r} matches no upsampler; there are {names}")
        chosen.update(matching)
    return [contender for contender in CONTENDERS if not chosen or contender.name in chosen]


class _Shuffled(nn.Sequential):
    """Sub-pixel convolution, https://arxiv.org/abs/1609.05158: 3x3 convolution C -> C * s * s, then pixel shuffle."""

    def __init__(self, channels: int, scale: int) -> None:
        super().__init__(nn.Conv2d(channels, channels * scale**2, 3, padding=1), nn.PixelShuffle(scale))


def _transposed(settings: Settings) -> nn.Module:
    """As FCN upsamples: a kernel of 2 s (4x4 for 2), one less where s is odd, so that the output is s times as large."""
    channels, scale = settings.channels, settings.scale
    kernel = 2 * scale - scale % 2
    return nn.ConvTranspose2d(channels, channels, kernel, stride=scale, padding=(kernel - scale) // 2)


def _ours(settings: Settings, style: Style, dyscope: bool) -> DySample:
    """With random weights, which move points by a few tenths of a pixel, for inputs with a variance of 1."""
    groups = settings.groups or DEFAULT_GROUPS[style]
    module = DySample(settings.channels, settings.scale, style=style, groups=groups, dyscope=dyscope, strict=True)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for convolution in filter(None, (module.offset, module.scope)):
            convolution.weight.normal_(std=math.sqrt(1 / convolution.in_channels), generator=generator)
            convolution.note_values()  # no initialisation of a host's, which a forward in training would warn of
    return module


def _theirs(settings: Settings, style: Style, dyscope: bool) -> nn.Module:
    """The definition, with the weights of ours."""
    ours = _ours(settings, style, dyscope)
    module = ReferenceDySample(settings.channels, settings.scale, style, ours.groups, dyscope)
    module.load_state_dict(ours.state_dict())
    return module


def _field(settings: Settings, style: Style, dyscope: bool) -> int:
    groups = settings.groups or DEFAULT_GROUPS[style]
    return 2 * groups * settings.scale**2 * (2 if dyscope else 1)


def _resize(mode: str) -> Callable[[Settings], nn.Module]:
    return lambda settings: nn.Upsample(scale_factor=settings.scale, mode=mode)


def _dysample(
    family: str, make: Callable[[Settings, Style, bool], nn.Module], style: Style, dyscope: bool
) -> Contender:
    return Contender(
        f"{family}-{style}" + ("-scope" if dyscope else ""),
        lambda settings: make(settings, style, dyscope),
        lambda settings: _field(settings, style, dyscope),
    )


class _Operator(NamedTuple):
    """One of upswap's operators with predicted kernels, as it is published."""

    formula: Callable[..., torch.Tensor]
    """Its definition, of twice the size."""
    predicted: int
    """Values that it predicts for every output pixel."""
    guided: bool = True
    options: Mapping[str, Any] | None = None

    def ours(self, name: str, settings: Settings) -> nn.Module:
        """upswap's module, with the authors' initialisation."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return create_upsampler(name, settings.channels, scale=settings.scale, init="paper", **(self.options or {}))

    def theirs(self, name: str, settings: Settings) -> nn.Module:
        """The definition, with the weights of ours."""
        if settings.scale != 2:
            raise OptionError(f"the published {name} has a scale of 2, not {settings.scale}")
        return reference_kernels.ReferenceOperator(self.ours(name, settings), self.formula)


# FADE without its gate, as the authors' detectors have it. FreqFusion: low-pass kernels, offsets and their scope of 4 groups.
_OPERATORS = {
    "carafe": _Operator(reference_kernels.carafe, 25, guided=False),
    "lda_aqu": _Operator(reference_kernels.lda_aqu, 9 + 2 * 2 * 9, guided=False),
    "fade": _Operator(reference_kernels.fade, 25, options={"gating": False}),
    "sapa-b": _Operator(reference_kernels.sapa, 25),
    "freqfusion": _Operator(reference_kernels.freqfusion, 25 + 2 * 4 * 2),
}


def _operator(family: str, name: str, make: Callable[[str, Settings], nn.Module]) -> Contender:
    predicted, guided = _OPERATORS[name].predicted, _OPERATORS[name].guided
    return Contender(
        f"{family}{name}",
        lambda settings: make(name, settings),
        lambda settings: predicted * settings.scale**2,
        guided,
    )


_STYLES: tuple[Style, ...] = ("lp", "pl")

CONTENDERS = [
    Contender("nearest", _resize("nearest")),
    Contender(BASELINE, _resize("bilinear")),
    Contender("conv-transpose", _transposed),
    Contender("conv-shuffle", lambda settings: _Shuffled(settings.channels, settings.scale)),
    *(
        _dysample(family, make, style, dyscope)
        for family, make in (("reference", _theirs), ("dysample", _ours))
        for style in _STYLES
        for dyscope in (False, True)
    ),
    *(
        _operator(family, name, make)
        for name, operator in _OPERATORS.items()
        for family, make in (("reference-", operator.theirs), ("", operator.ours))
    ),
]
