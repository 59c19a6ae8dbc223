"""FreqFusion: a map upsampled by low-pass kernels and offsets, and its guide sharpened by high-pass ones.

Chen et al., "Frequency-Aware Feature Fusion for Dense Image Prediction", TPAMI 2024, https://arxiv.org/abs/2408.12879.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, cast, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...errors import OptionError
from ...plan.site import Site
from ..arguments import check_choice, positive_int
from ..composed import keeps_step_0
from ..configs import Init, nominal_scale
from ..projection import Affine, Projection
from ..registry import register_upsampler
from ..sampling import memory_format as layout
from ..sampling import positions as sampling
from ..sampling.positions import Mapping, Mode
from ..sampling.reassembly import Padding, reassemble
from ..tracing import leaf
from .base import GuidedUpsampler, changed_by, ones, resized, xavier
from .configs import FreqFusionConfig

_LOW, _HIGH = 5, 3  # sides of the kernels
_ENCODER_STD = 0.001
_PER_GROUP = 8  # channels in a group of GroupNorm
_DILATION = 2  # of the neighbours that a pixel is compared with
_NEIGHBOURS = 8
_CELLS = (2, 2)  # sub-pixels of a pixel that offsets are predicted for


class FreqFusion(GuidedUpsampler):
    """Upsample (B, C, H, W) by low-pass kernels and offsets from map and guide, from the original resize on, or as published.

    With hr the guide, lr the map, N(z) = softmax(z) times a Hamming window, divided by its sum, and S(x, K) CARAFE's sums of x
    with the kernels K, 5 x 5 for `low` and 3 x 3 for `high`:

        a, l    = hr_channel_compressor(hr), lr_channel_compressor(lr)
        h       = high(a);               a    = 2 a - S(a, N(h))
        z       = low(a);                z    = z + S(low(l), N(z))
        U       = S(lr, N(z));           high-pass = hr - S(hr, N(h + S(high(l), N(z))))
        U       = U at offsets from a and l, as DySample reads it, where `resample`

    `both` gives the guide with its high-pass added, and the upsampled map. A call gives the map; with `additive` it gives the map
    plus the high-pass, which is what a host that adds guide and map needs: the guide itself may stay as it is. With init="match"
    the high-pass has a gain of its own, `gain_hp`, 0 for each channel of the guide at first.

    Windows read zero outside (`padding`), which is how the released weights were trained. `GuidedUpsampler` has the rest, and
    what the output is of U. Offsets are predicted at twice the map's size, and resized to the guide's where that is another.

    The state dict is that of the authors' module, with the gains where init="match".

    >>> import torch
    >>> import torch.nn.functional as F
    >>> from upswap.nn import FreqFusion
    >>> up = FreqFusion(64, 32)
    >>> x, skip = torch.randn(1, 64, 12, 16), torch.randn(1, 32, 24, 32)
    >>> changed, map = up.both(x, skip)
    >>> torch.equal(changed, skip)
    True
    >>> torch.equal(map, F.interpolate(x, scale_factor=2, mode="bilinear"))
    True
    """

    __module__ = "upswap.nn"  # the address in files, which outlive the file it stands in

    gains: ClassVar[tuple[str, ...]] = ("gain", "gain_hp")

    #: Where a host concatenates guide and map, it is asked for `both`.
    changes_guide = True

    sharpen = True  # in files of before, which do not say it

    def __init__(
        self,
        channels: int,
        guide_channels: int | None = None,
        scale: float | Sequence[float] = 2,
        *,
        compressed: int | None = None,
        hamming: bool = True,
        resample: bool = True,
        norm: bool = True,
        groups: int = 4,
        padding: Padding = "zero",
        additive: bool | None = None,
        sharpen: bool = True,
        init: Init = "match",
        mode: Mode = "bilinear",
        align_corners: bool = False,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Build the module; the defaults are those of the authors' detectors, but for `init`.

        Args:
            channels: C, of the map.
            guide_channels: channels of the guide; None for C.
            scale: the factor, or (vertical, horizontal) factors, at least 1, of the resize it stands in for.
            compressed: channels that kernels are predicted from; None for an eighth of those of map and guide, down to a
                multiple of 8, at least 8.
            hamming: whether kernels are weighed by Hamming windows.
            resample: whether the upsampled map is read at predicted offsets.
            norm: whether what offsets are predicted from is normalised, for which `compressed` is a multiple of 8.
            groups: groups of channels with offsets of their own.
            padding: what windows read outside: "zero", or "reflect".
            additive: whether a call adds the high-pass of the guide, for which it has C channels; None for not.
            sharpen: whether the high-pass of the guide is ever asked for, by `additive` or `both`; without there is no `gain_hp`,
                which would get no gradient.
            init: "match" to compute the original resize at step 0, "paper" for the published operator.
            mode: the mode of the original resize.
            align_corners: the original resize's; only bilinear and bicubic have it.
            device: the parameters' device.
            dtype: the parameters' dtype.

        Raises:
            OptionError: an option has a value that cannot be used.
        """
        super().__init__(channels, guide_channels, scale, init, mode, align_corners, device, dtype)
        check_choice("padding", padding, get_args(Padding))
        both = self.channels + self.guide_channels
        width = max(both // 8 // _PER_GROUP, 1) * _PER_GROUP if compressed is None else compressed
        self.compressed = positive_int("compressed", width)
        self.hamming, self.resample, self.norm = bool(hamming), bool(resample), bool(norm)
        self.groups = positive_int("groups", groups)
        self.padding = padding
        self.additive = bool(additive)
        self.sharpen = bool(sharpen)
        self._check_options()
        if self.sharpen:
            self._add_gain("gain_hp", self.guide_channels, device, dtype)
        else:
            self.register_parameter("gain_hp", None)
        given: dict[str, Any] = {"device": device, "dtype": dtype}
        for name, side in (("hamming_lowpass", _LOW), ("hamming_highpass", _HIGH)):
            self.register_buffer(name, torch.empty((1, 1, side, side) if self.hamming else (1,), **given))
        self.hr_channel_compressor = Projection(self.guide_channels, self.compressed, True, **given)
        self.lr_channel_compressor = Projection(self.channels, self.compressed, True, **given)
        self.content_encoder = Projection(self.compressed, _LOW**2, True, **given, kernel_size=3)
        self.content_encoder2 = Projection(self.compressed, _HIGH**2, True, **given, kernel_size=3)
        if self.resample:
            self.dysampler = self._sampler(given)
        self.reset_parameters()

    def _check_options(self) -> None:
        if self.resample and self.channels % self.groups:
            raise OptionError(f"groups={self.groups} does not divide {self.channels} channels; choose a divisor")
        if self.resample and self.norm and self.compressed % _PER_GROUP:
            raise OptionError(
                f"compressed={self.compressed} is no multiple of {_PER_GROUP}, the channels in a group of norm; choose one, or "
                "norm=False"
            )
        if self.additive and self.guide_channels != self.channels:
            raise OptionError(
                f"additive adds what the guide gains to the map, so both have to have the same channels; the guide has "
                f"{self.guide_channels}, the map {self.channels}. Leave it out, and take both()"
            )
        if self.additive and not self.sharpen:
            raise OptionError(
                "additive adds the high-pass of the guide, which sharpen=False leaves out; give one of them"
            )

    def _sampler(self, given: dict[str, Any]) -> nn.ModuleDict:
        """What predicts offsets: at the map's size those of all sub-pixels, at the guide's size those of each pixel."""
        pairs, width = 2 * self.groups, self.compressed + _NEIGHBOURS
        cells = _CELLS[0] * _CELLS[1]
        sizes = {"offset": cells, "direct_scale": cells, "hr_offset": 1, "hr_direct_scale": 1}
        sampler = nn.ModuleDict(
            {name: Projection(width, pairs * by, True, **given, kernel_size=3) for name, by in sizes.items()}
        )
        if self.norm:
            sampler.update({name: Affine((self.compressed,), **given) for name in ("norm_hr", "norm_lr")})
        sampler.register_buffer("init_pos", torch.empty((1, pairs * cells, 1, 1), **given))
        return sampler

    def _reset_published(self) -> None:
        for module in self.modules():
            if isinstance(module, Projection):
                xavier(module)
            elif isinstance(module, Affine):
                ones(module)
        for encoder in (self.content_encoder, self.content_encoder2):
            nn.init.normal_(encoder.weight, std=_ENCODER_STD)
        self.reset_positions()

    @torch.no_grad()
    def reset_positions(self) -> None:
        """Write to the buffers what the authors' module has there."""
        for buffer, side in ((self.hamming_lowpass, _LOW), (self.hamming_highpass, _HIGH)):
            window = torch.hamming_window(side, periodic=False, dtype=torch.float64, device="cpu")
            cast(Tensor, buffer).copy_(torch.outer(window, window) if self.hamming else window.new_ones(1))
        if self.resample:
            positions = sampling.initial_positions(Mapping("bilinear"), _CELLS, self.groups)
            cast(Tensor, self.dysampler.init_pos).copy_(cast(Tensor, positions))

    @leaf
    def forward(
        self,
        x: Tensor,
        size: int | Sequence[int] | None = None,
        scale_factor: float | Sequence[float] | None = None,
        guide: Tensor | None = None,
        both: bool = False,
    ) -> Any:
        """As `GuidedUpsampler.forward`; with `additive` plus the high-pass of the guide, with `both` as the method `both`."""
        if both and not self.sharpen:
            raise OptionError(
                "this FreqFusion was made with sharpen=False, and leaves the guide as it is; make one without that"
            )
        self._check(x)
        guide = self._checked(guide, x)
        size, (shape, factors, smaller) = self._target(x, size, scale_factor, guide)
        if smaller:
            out = self._original(x, size, factors)
            return (guide, out) if both else out
        published, high = self._operate_both(x, guide, both or self.additive)
        out = self._finished(x, size, factors, resized(published, shape))
        if both:
            return self._sharpened(guide, cast(Tensor, high)), out
        return out if high is None else self._sharpened(out, resized(high, shape))

    def both(self, x: Tensor, guide: Tensor) -> tuple[Tensor, Tensor]:
        """The changed guide, and the map at the guide's size: what a host fuses.

        Args:
            x: (B, C, H, W), floating point.
            guide: (B, guide_channels, h, w), at least as large as `x` along each axis.

        Returns:
            (B, guide_channels, h, w) and (B, C, h, w), of the guide's and x's dtype and memory format.

        Raises:
            ShapeError: `x` or `guide` is not what the module was built for.
            OptionError: the module was made with sharpen=False.
        """
        return cast("tuple[Tensor, Tensor]", self(x, guide=guide, both=True))

    def _sharpened(self, x: Tensor, high: Tensor) -> Tensor:
        """`x` plus the high-pass, by its gain."""
        gain = self._parameters["gain_hp"]
        out = x + high if gain is None else changed_by(gain, x, x + high)
        return out.to(x.dtype).contiguous(memory_format=layout.format_of(x))

    def _operate_both(self, x: Tensor, guide: Tensor, sharpen: bool) -> tuple[Tensor, Tensor | None]:
        """The upsampled map, and with `sharpen` the high-pass of the guide, in the dtype that sums are computed in."""
        dtype = sampling.compute_dtype(x.dtype)
        fine = self._convolved(guide, "hr_channel_compressor")
        coarse = self._convolved(x, "lr_channel_compressor")
        high = self._convolved(fine, "content_encoder2").to(dtype)
        sharp = 2 * fine.to(dtype) - self._sums(fine.to(dtype), high, "hamming_highpass")
        fine = sharp.to(fine.dtype)
        low = self._convolved(fine, "content_encoder").to(dtype)
        low = low + self._sums(self._convolved(coarse, "content_encoder").to(dtype), low, "hamming_lowpass")
        kernels = self._kernels(low, "hamming_lowpass")
        up = reassemble(x.to(dtype), kernels, self.padding)
        passed = None
        if sharpen:
            high = high + reassemble(self._convolved(coarse, "content_encoder2").to(dtype), kernels, self.padding)
            passed = guide.to(dtype) - self._sums(guide.to(dtype), high, "hamming_highpass")
        return (self._resampled(up, fine, coarse) if self.resample else up), passed

    def _kernels(self, logits: Tensor, window: str) -> Tensor:
        """(B, k^2, h, w) -> (B, h, w, k^2): normalised weights."""
        weights = cast(Tensor, self._buffers[window]).to(logits.dtype).flatten()
        kernels = logits.permute(0, 2, 3, 1).softmax(dim=-1) * weights
        return kernels / kernels.sum(dim=-1, keepdim=True)

    def _sums(self, x: Tensor, logits: Tensor, window: str) -> Tensor:
        return reassemble(x, self._kernels(logits, window), self.padding)

    def _resampled(self, up: Tensor, fine: Tensor, coarse: Tensor) -> Tensor:
        """`up` (B, C, h, w) read at offsets, in pixels of the map."""
        (height, width), size = coarse.shape[2:], (up.shape[2], up.shape[3])
        if self.norm:
            groups = self.compressed // _PER_GROUP
            fine = self._group_norm(fine, groups, "dysampler.norm_hr")
            coarse = self._group_norm(coarse, groups, "dysampler.norm_lr")
        fine, coarse = (torch.cat((each, _similarities(each)), dim=1) for each in (fine, coarse))

        def predicted(name: str) -> Tensor:
            field = sampling.shuffle(self._convolved(coarse, f"dysampler.{name}").to(up.dtype), _CELLS)
            return resized(field, size) + self._convolved(fine, f"dysampler.hr_{name}").to(up.dtype)

        offsets = predicted("offset") * predicted("direct_scale").sigmoid()
        # DySample's order: by axis, horizontal first, then by group.
        columns, rows = offsets.reshape(offsets.shape[0], 2, self.groups, *size).unbind(dim=1)
        base = [
            sampling.positions(Mapping("bilinear"), source, target, dtype=up.dtype, device=up.device)
            for source, target in ((height, size[0]), (width, size[1]))
        ]
        rows = sampling.normalised(rows + base[0].unsqueeze(1), height)
        columns = sampling.normalised(columns + base[1], width)
        grid = torch.stack((columns, rows), dim=-1).flatten(0, 1)
        by_group = up.reshape(up.shape[0] * self.groups, -1, *size)
        return F.grid_sample(by_group, grid, padding_mode="border", align_corners=False).reshape(up.shape)

    def _own_options(self) -> list[str]:
        own = (
            "guide_channels",
            "compressed",
            "hamming",
            "resample",
            "norm",
            "groups",
            "padding",
            "additive",
            "sharpen",
        )
        return [f"{name}={getattr(self, name)}" for name in own]


def _similarities(x: Tensor) -> Tensor:
    """Cosine similarities of each pixel of (B, C, H, W) to the 8 around it that lie 2 away, zero outside: (B, 8, H, W)."""
    height, width = x.shape[2:]
    wide = x.to(sampling.compute_dtype(x.dtype))
    padded = F.pad(wide, (_DILATION,) * 4)
    shifts = [(i * _DILATION, j * _DILATION) for i in range(3) for j in range(3) if (i, j) != (1, 1)]
    around = [padded[:, :, i : i + height, j : j + width] for i, j in shifts]
    return torch.stack([F.cosine_similarity(wide, each, dim=1) for each in around], dim=1).to(x.dtype)


@register_upsampler("freqfusion", options=FreqFusionConfig, exact=keeps_step_0, guided=True)
def _for_site(site: Site, config: FreqFusionConfig, guide_channels: int) -> nn.Module:
    guide = site.guide
    # Where the host concatenates them far from the resize, the guide stays as it is.
    sharpen = guide is None or bool(config.additive) or (guide.fusion == "cat" and guide.way == "fusion")
    return FreqFusion(
        site.channels,
        guide_channels,
        nominal_scale(site),
        sharpen=sharpen,
        compressed=config.compressed,
        hamming=config.hamming,
        resample=config.resample,
        norm=config.norm,
        groups=config.groups,
        padding=config.padding,
        additive=config.additive,
        init=config.init,
        mode=cast(Mode, site.mode),
        align_corners=site.align_corners,
    )
