"""The options of the upsamplers with predicted kernels, as `nn/configs.py` has DySample's. Nothing here imports torch."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator
from typing import Any, Literal, Self

from ...errors import OptionError
from ...plan.site import Site
from ..configs import CASCADE, INIT, Init, Shapes, UpsamplerConfig, means

#: The two released forms of SAPA-B.
SAPAForm = Literal["conv", "linear"]


def init_of(shapes: Shapes) -> Init:
    """What an upsampler with a gain was made with: only those that start at the original resize have one."""
    return "match" if any(name.rpartition(".")[2] == "gain" for name in shapes) else "paper"


@dataclasses.dataclass(frozen=True)
class CARAFEConfig(UpsamplerConfig):
    """The options of `upsampler="carafe"` (ICCV 2019, arXiv 1905.02188)."""

    up_kernel: int = dataclasses.field(default=5, metadata=means("side of the window that is summed, odd"))
    encoder_kernel: int = dataclasses.field(
        default=3, metadata=means("side of the convolution that predicts kernels, odd")
    )
    compressed_channels: int = dataclasses.field(default=64, metadata=means("channels that kernels are predicted from"))
    init: Init = dataclasses.field(default="match", metadata=INIT)
    cascade: bool = dataclasses.field(default=False, metadata=CASCADE)

    @classmethod
    def is_of(cls, shapes: Shapes) -> bool:
        """As the base class."""
        parts = ("channel_compressor", "content_encoder")
        return shapes.keys() - {"gain"} == {f"{part}.{name}" for part in parts for name in ("weight", "bias")}

    @classmethod
    def candidates(cls, shapes: Shapes) -> Iterator[dict[str, Any]]:
        """As the base class; the encoder's output has the window's pixels, for each cell of the ratio."""
        init = init_of(shapes)
        for shape in (shape for name, shape in shapes.items() if name.endswith("content_encoder.weight")):
            for side, cascade in itertools.product(range(1, math.isqrt(shape[0]) + 1, 2), (False, True)):
                if shape[0] % side**2 == 0:
                    yield dataclasses.asdict(cls(side, shape[2], shape[1], init, cascade))


@dataclasses.dataclass(frozen=True)
class LDAAQUConfig(UpsamplerConfig):
    """The options of `upsampler="lda_aqu"` (ACM MM 2024, arXiv 2411.19585)."""

    reduction_factor: int = dataclasses.field(
        default=4, metadata=means("by how much queries and keys have fewer channels")
    )
    nh: int = dataclasses.field(default=1, metadata=means("heads of the attention"))
    k_u: int = dataclasses.field(default=3, metadata=means("side of the grid of points that are read, odd"))
    k_e: int = dataclasses.field(default=3, metadata=means("side of the convolutions that predict where, odd"))
    n_groups: int = dataclasses.field(default=2, metadata=means("groups of channels with points of their own"))
    range_factor: float = dataclasses.field(default=11, metadata=means("how far points can move, in output pixels"))
    rpb: bool = dataclasses.field(default=True, metadata=means("give each point of the grid a bias"))
    init: Init = dataclasses.field(default="match", metadata=INIT)
    cascade: bool = dataclasses.field(default=False, metadata=CASCADE)

    def fit(self, site: Site, *, strict: bool = False) -> tuple[Self, tuple[str, ...]]:
        """The options for the channels of a site: fewer groups and heads where these do not divide them."""
        found: dict[str, Any] = {}
        reduction = min(self.reduction_factor, site.channels)
        depth = site.channels // max(reduction, 1)
        both = math.gcd(site.channels, depth)
        found["reduction_factor"] = reduction
        for name in ("n_groups", "nh"):
            wanted = getattr(self, name)
            found[name] = max((n for n in range(1, min(wanted, both) + 1) if both % n == 0), default=1)
        notes = [
            f"{name} {value}, for {site.channels} channels"
            for name, value in found.items()
            if value != getattr(self, name)
        ]
        if strict and notes:
            raise OptionError(
                f"{site.name}: {', '.join(notes)} would be needed; give these, exclude the site, or drop strict"
            )
        return dataclasses.replace(self, **found), tuple(notes)

    @classmethod
    def is_of(cls, shapes: Shapes) -> bool:
        """As the base class."""
        return shapes.keys() - {"gain", "relative_position_bias_table"} == _LDA_AQU

    @classmethod
    def candidates(cls, shapes: Shapes) -> Iterator[dict[str, Any]]:
        """As the base class. How far points can move leaves no trace in shapes: it is taken to be the default."""
        init, rpb = init_of(shapes), any(name.endswith("relative_position_bias_table") for name in shapes)
        ends = ("proj_q.weight", "conv_offset.0.weight", "conv_offset.3.weight")
        found = {end: shape for name, shape in shapes.items() for end in ends if name.endswith(end)}
        heads = {shape[1] for name, shape in shapes.items() if name.endswith("relative_position_bias_table")} or {1}
        if len(found) < len(ends) or any(len(shape) != 4 for shape in found.values()):
            return
        (depth, channels, *_), (per_group, _, side, _), (taps, *_) = (found[end] for end in ends)
        for nh, cascade in itertools.product(sorted(heads), (False, True)):
            yield dataclasses.asdict(
                cls(
                    channels // max(depth, 1),
                    nh,
                    math.isqrt(taps // 2),
                    side,
                    depth // max(per_group, 1),
                    11,
                    rpb,
                    init,
                    cascade,
                )
            )


_LDA_AQU = {
    "layer_norm.norm.weight",
    "layer_norm.norm.bias",
    "proj_q.weight",
    "proj_k.weight",
    "conv_offset.0.weight",
    "conv_offset.1.norm.weight",
    "conv_offset.1.norm.bias",
    "conv_offset.3.weight",
    "conv_offset.3.bias",
}


@dataclasses.dataclass(frozen=True)
class _Gated(UpsamplerConfig):
    """Options with a gate, which mixes the guide into the output."""

    gating: bool = dataclasses.field(
        default=True, metadata=means("mix the guide, of as many channels, into the output")
    )

    def fit(self, site: Site, *, strict: bool = False) -> tuple[Self, tuple[str, ...]]:
        """The options for a site and its guide: no gate where the two have other channels."""
        if not self.gating or site.guide is None or site.guide.channels == site.channels:
            return self, ()
        why = f"the guide has {site.guide.channels} channels, and the map {site.channels}"
        if strict:
            raise OptionError(f"{site.name}: {why}: give gating=False, exclude the site, or drop strict")
        return dataclasses.replace(self, gating=False), (f"gating False, because {why}",)


@dataclasses.dataclass(frozen=True)
class FADEConfig(_Gated):
    """The options of `fade` (ECCV 2022, arXiv 2207.10392)."""

    up_kernel_size: int = dataclasses.field(default=5, metadata=means("side of the window that is summed, odd"))
    embedding_dim: int = dataclasses.field(default=64, metadata=means("channels that kernels are predicted from"))
    init: Init = dataclasses.field(default="match", metadata=INIT)


@dataclasses.dataclass(frozen=True)
class FADELiteConfig(_Gated):
    """The options of `fade-lite` (ECCV 2022, arXiv 2207.10392)."""

    up_kernel_size: int = dataclasses.field(default=5, metadata=means("side of the window that is summed, odd"))
    init: Init = dataclasses.field(default="match", metadata=INIT)


@dataclasses.dataclass(frozen=True)
class SAPAConfig(UpsamplerConfig):
    """The options of `sapa-b` (NeurIPS 2022, arXiv 2209.12866)."""

    form: SAPAForm = dataclasses.field(
        default="conv",
        metadata=means("which of the two released forms: GroupNorm and 1x1 convolutions, or LayerNorm and linear"),
    )
    norm: bool = dataclasses.field(
        default=True, metadata=means("normalise map and guide; only the form conv can do without")
    )
    up_kernel_size: int = dataclasses.field(default=5, metadata=means("side of the window that is compared, odd"))
    embedding_dim: int | None = dataclasses.field(
        default=None, metadata=means("channels of what is compared; 32 for conv and 64 for linear where not given")
    )
    init: Init = dataclasses.field(default="match", metadata=INIT)


@dataclasses.dataclass(frozen=True)
class FreqFusionConfig(UpsamplerConfig):
    """The options of `freqfusion` (TPAMI 2024, arXiv 2408.12879)."""

    compressed: int | None = dataclasses.field(
        default=None,
        metadata=means("channels that kernels are predicted from; an eighth of those of map and guide where not given"),
    )
    hamming: bool = dataclasses.field(default=True, metadata=means("weigh the kernels by Hamming windows"))
    resample: bool = dataclasses.field(default=True, metadata=means("sample the upsampled map at predicted offsets"))
    norm: bool = dataclasses.field(default=True, metadata=means("normalise what offsets are predicted from"))
    groups: int = dataclasses.field(default=4, metadata=means("groups of channels with offsets of their own"))
    padding: Literal["zero", "reflect"] = dataclasses.field(
        default="zero", metadata=means("what windows read outside: zero, as released weights were trained, or reflect")
    )
    additive: bool | None = dataclasses.field(
        default=None,
        metadata=means(
            "add to the output what the guide gains; where not given, if the host adds the two, of as many channels"
        ),
    )
    init: Init = dataclasses.field(default="match", metadata=INIT)

    def fit(self, site: Site, *, strict: bool = False) -> tuple[Self, tuple[str, ...]]:
        """The options for a site and its guide: groups that divide the channels, and what is added."""
        notes: list[str] = []
        found: dict[str, Any] = {}
        if self.resample:
            groups = max(n for n in range(1, max(self.groups, 1) + 1) if site.channels % n == 0)
            if groups != self.groups:
                found["groups"] = groups
                notes.append(f"groups {groups}, the largest divisor of {site.channels} channels up to {self.groups}")
        alike = site.guide is not None and site.guide.channels == site.channels
        if self.additive is None:
            added = site.guide is not None and site.guide.fusion == "add" and not site.guide.source
            found["additive"] = alike and added
        elif self.additive and site.guide is not None and not alike:
            found["additive"] = False
            notes.append(
                f"additive False, because the guide has {site.guide.channels} channels, and the map {site.channels}"
            )
        if strict and notes:
            raise OptionError(f"{site.name}: {'; '.join(notes)}; give these, exclude the site, or drop strict")
        return dataclasses.replace(self, **found), tuple(notes)
