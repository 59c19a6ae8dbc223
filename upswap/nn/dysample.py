"""DySample: upsampling as reading the input at learned positions.

Liu et al., "Learning to Upsample by Learning to Sample", ICCV 2023, https://arxiv.org/abs/2308.15085.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, cast, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import OptionError, ShapeError
from ..plan.site import Site
from .arguments import check_choice, plain, positive_int, scale_pair, target
from .composed import keeps_step_0, make_cascaded
from .configs import DEFAULT_GROUPS, DySampleConfig, Init, Style, nominal_scale
from .host_init import InitialisesItself
from .projection import Projection, weights_of
from .registry import register_upsampler
from .sampling import memory_format as layout
from .sampling import positions as sampling
from .sampling.autograd import is_exporting, plain_functions_wanted
from .sampling.pointwise import pointwise
from .sampling.positions import Mapping, Mode, Pair, Ratio, Reading, Scheme
from .sampling.sampler import points, upsample
from .sampling.samplers import Sampler, SamplerName
from .scripted import dysample_forward
from .tracing import leaf, scripted_as
from .watch import is_noise, values, watch

# The paper's, section 4.
PAPER_OFFSET_STD = 0.001

# Of a million normal numbers none is further out, in standard deviations.
_FAR = 6

# `offset.bias` at the start of a dynamic-scope module that matches a resize. With an offset of exactly 0 the product
# sigmoid(scope) * offset would give `scope` no gradient in the first step. 2**-44 moves a sampling point by 1.4e-14
# pixels: nothing in float32, under the rounding of a float64 coordinate, and yet far from underflow, so that every
# parameter moves from the first step on (in parameters stored as float16 it is 0, and `scope` moves from the second
# step on). A visible bias taken back by `init_pos` would do too, but then zero offsets would no longer mean the base
# grid, and released checkpoints would not fit the module.
_NUDGE = 2.0**-44

# Released checkpoints may be stored in half precision; grids that really differ do so by at least 1/16 of a pixel.
_INIT_POS_TOLERANCE = 0.01


class DySample(InitialisesItself, nn.Module):
    """Upsample (B, C, H, W) by reading it at learned positions; at step 0, exactly the resize it stands in for.

    For every output pixel and each of `groups` groups of channels, an offset d in input pixels is predicted from the
    input and added to the position p the original resize reads (see `upswap.sampling`); the group is read at p + d.

        lp: d = scope * shuffle(offset(x))      offset: 1x1 convolution C -> 2 * groups * sh * sw
        pl: d = scope * offset(shuffle(x))      offset: 1x1 convolution C / (sh * sw) -> 2 * groups
        static scope: 0.25                      dynamic: 0.5 * sigmoid(scope(x)), scope like offset, without bias

    with (sh, sw) = ceil(scale), the resolution offsets are predicted at; for any other target size the field of offsets
    is resized to it. Positions, offsets and samples are computed in float32 (float64 for float64 input) whatever
    the input's dtype, the parameters' or autocast's: half-precision coordinates are off by up to whole pixels on wide
    maps (`torch.set_float32_matmul_precision` holds here too: "medium" makes offsets as coarse). The output has the input's
    dtype and memory format.

    The state dict is that of the authors' module: `offset.weight`, `offset.bias`, `scope.weight` where `dyscope` (and
    `scope.bias` in modules released before 2024-03, which load too), `init_pos`. `init_pos` says which base grid
    the offsets were trained on: loading one that is not this module's is an error. Where the authors' module cannot
    compute the base grid (bicubic, align_corners, a scale that is no integer) there is no `init_pos`.

    A target smaller than the input along an axis is computed by the original resize: an upsampler never samples a
    downsample.

    >>> import torch
    >>> from upswap import DySample
    >>> up = DySample(64, 2, dyscope=True)
    >>> x = torch.randn(1, 64, 12, 16)
    >>> up(x).shape
    torch.Size([1, 64, 24, 32])
    >>> up(x, size=(25, 33)).shape
    torch.Size([1, 64, 25, 33])
    >>> torch.allclose(up(x), torch.nn.functional.interpolate(x, scale_factor=2, mode="bilinear"), atol=1e-5)
    True
    """

    __module__ = "upswap.nn"  # the address in files, which outlive the file it stands in

    if TYPE_CHECKING:  # TorchScript cannot read these annotations
        init_pos: Tensor
        sampler: tuple[SamplerName, bool, int]
    #: Its own resizing is no call of the model it stands in (`probe/resize_calls.py`).
    is_upsampler = True
    #: How the map is read; `upswap.exportable` chooses another one for runtimes that lack GridSample.
    sampler = ("gridsample", False, 1)  # a `Sampler`, as plain data for files
    __jit_unused_properties__ = ("base", "_is_hf_initialized")  # TorchScript compiles properties too

    def __init__(
        self,
        in_channels: int,
        scale: float | Sequence[float] = 2,
        style: Style = "lp",
        groups: int | None = None,
        dyscope: bool = False,
        *,
        init: Init = "match",
        mode: Mode = "bilinear",
        align_corners: bool = False,
        strict: bool = False,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Build the module.

        Args:
            in_channels: C.
            scale: the factor, or (vertical, horizontal) factors, at least 1, integral or not. A call that gives neither
                size nor scale_factor resizes by it.
            style: "lp" (linear, then shuffle) or "pl" (shuffle, then linear: fewer parameters, C must be a multiple of
                sh * sw).
            groups: groups of channels with sampling points of their own; None for 4 (lp) or 8 (pl). Where it does not
                divide C, the largest divisor of C below it is used; `groups` and `requested_groups` tell.
            dyscope: whether the range of the offsets is predicted too.
            init: "match" to compute the original resize at step 0, "paper" for the authors' initialisation: half-pixel
                bilinear positions whatever the original resize, offset weights from N(0, 0.001).
            mode: the mode of the original resize: nearest, nearest-exact, area, bilinear or bicubic.
            align_corners: the original resize's; only bilinear and bicubic have it.
            strict: raise where `groups` does not divide C.
            device: the parameters' device.
            dtype: the parameters' dtype.

        Raises:
            OptionError: an option has a value that cannot be used.
        """
        super().__init__()
        check_choice("style", style, get_args(Style))
        check_choice("init", init, get_args(Init))
        check_choice("mode", mode, sampling.MODES)
        if align_corners and mode not in ("bilinear", "bicubic"):
            raise OptionError(f"align_corners=True has no meaning in mode {mode!r}; only bilinear and bicubic have it")
        self.in_channels = positive_int("in_channels", in_channels)
        self.scale = scale_pair(scale)
        self.style = style
        self.requested_groups = positive_int("groups", DEFAULT_GROUPS[style] if groups is None else groups)
        self.groups = max(n for n in range(1, self.requested_groups + 1) if self.in_channels % n == 0)
        if strict and self.groups != self.requested_groups:
            raise OptionError(
                f"groups={self.requested_groups} does not divide in_channels={in_channels}; the largest that does is "
                f"groups={self.groups}, which strict=False takes by itself"
            )
        self.dyscope = bool(dyscope)
        self.init = init
        self.mode = mode
        self.align_corners = bool(align_corners)
        self.offset_scale: Pair = (math.ceil(self.scale[0]), math.ceil(self.scale[1]))

        sub_pixels = self.offset_scale[0] * self.offset_scale[1]
        conv_in, conv_out = self.in_channels, 2 * self.groups
        if style == "lp":
            conv_out *= sub_pixels
        elif self.in_channels % sub_pixels:
            raise OptionError(
                f"style='pl' shuffles {sub_pixels} channels into one before it predicts offsets, and "
                f"in_channels={in_channels} is not a multiple of {sub_pixels}; use style='lp'"
            )
        else:
            conv_in //= sub_pixels
        self.offset = Projection(conv_in, conv_out, True, device, dtype)
        self.scope = Projection(conv_in, conv_out, False, device, dtype) if dyscope else None
        init_pos = self._initial_positions()
        if init_pos is not None:
            like = self.offset.weight
            self.register_buffer("init_pos", torch.empty_like(init_pos, device=like.device, dtype=like.dtype))
        self.reset_parameters()

    @property
    def base(self) -> Mapping:
        """What a call with zero offsets computes; `mode` and `align_corners` are what downsampling calls compute."""
        return Mapping(self.mode, self.align_corners) if self.init == "match" else Mapping("bilinear")

    def reset_parameters(self) -> None:
        """Initialise as `init` says. Call it again where a host's own initialisation has been over the module."""
        with torch.no_grad():
            if self.init == "paper":
                nn.init.normal_(self.offset.weight, std=PAPER_OFFSET_STD)
            else:
                nn.init.zeros_(self.offset.weight)
            if self.offset.bias is not None:
                nn.init.constant_(self.offset.bias, self._start_bias())
            if self.scope is not None:
                nn.init.zeros_(self.scope.weight)
                if self.scope.bias is not None:
                    nn.init.zeros_(self.scope.bias)
        self.reset_positions()
        for projection in self.children():
            if isinstance(projection, Projection):
                projection.note_values()

    @torch.no_grad()
    def reset_positions(self) -> None:
        """Write to `init_pos`, where there is one, what the base grid has it be."""
        init_pos = self._initial_positions()
        if init_pos is not None:
            self.init_pos.copy_(init_pos)

    def is_as_initialised(self) -> bool:
        """Whether the weights are what `reset_parameters` puts there; False too where they have no values."""
        parameters = {name: values(parameter) for name, parameter in self.named_parameters()}
        if any(value is None for value in parameters.values()):
            return False
        for name, value in cast(dict[str, Tensor], parameters).items():
            if name == "offset.weight" and self.init == "paper":
                if not 0 < float(value.float().abs().max()) < _FAR * PAPER_OFFSET_STD:
                    return False
                continue
            start = self._start_bias() if name == "offset.bias" else 0.0
            if not torch.equal(value, torch.full_like(value, start)):
                return False
        return True

    def misfit(self) -> str | None:
        """What makes the values unfit for use: some are no numbers, or `init_pos` is of another base grid. None if nothing."""
        for name, tensor in (*self.named_parameters(), *self.named_buffers()):
            found = values(tensor)
            if found is not None and not bool(torch.isfinite(found).all()):
                return f"has values in {name} that are no numbers"
        loaded = values(self.init_pos) if "init_pos" in self._buffers else None
        problem = None if loaded is None else self._init_pos_problem(loaded)
        return None if problem is None else f"has another init_pos than it was made with: {problem}"

    def reinitialised(self) -> str | None:
        """What shows, before any training, that a host's initialisation went over the offsets; None if nothing does.

        That is a weight of independent entries that neither `reset_parameters` nor a load put there.
        """
        offset: nn.Module = self.offset  # an nn.Conv2d in files of upswap 0.1
        changed = isinstance(offset, Projection) and offset.was_changed() and not offset.may_be_trained()
        weight = values(cast(Projection, offset).weight) if changed else None
        if weight is None or self.is_as_initialised() or not is_noise(weight):
            return None
        return (
            f"has an offset.weight of independent random numbers (standard deviation {float(weight.double().std()):.2g}): "
            "an initialisation of the host's went over it. reset_parameters() of each of upswap.upsamplers(model) puts step "
            "0 back"
        )

    def _start_bias(self) -> float:
        return _NUDGE if self.dyscope and self.init == "match" else 0.0

    @scripted_as(dysample_forward)
    @leaf
    def forward(
        self,
        x: Tensor,
        size: int | Sequence[int] | None = None,
        scale_factor: float | Sequence[float] | None = None,
    ) -> Tensor:
        """Upsample `x`, to `size`, by `scale_factor`, or by the module's own `scale` where neither is given.

        The arguments mean what they mean in `F.interpolate`: positions follow n / m for a size and 1 / scale_factor for
        a factor.

        Args:
            x: (B, C, H, W), floating point, of any memory format.
            size: the output's (h, w), or one int for both.
            scale_factor: one factor, or (vertical, horizontal).

        Returns:
            (B, C, h, w), of x's dtype and memory format.

        Raises:
            ShapeError: `x` is not what the module was built for.
            OptionError: both size and scale_factor are given, or one of them is not one value or a pair.
        """
        self._check_input(x)
        if self.training and not torch.compiler.is_compiling() and isinstance(self.offset, Projection):
            watch(self, self.offset.weight, x)
        shape, factors, smaller = target(x, size, scale_factor, self.scale)
        if smaller:
            return Mapping(self.mode, self.align_corners).resize(x, size, scale_factor)
        device_type = x.device.type
        # Entered only where needed, so that an exported graph has no autocast region in it.
        if device_type != "meta" and torch.is_autocast_enabled(device_type):
            with torch.autocast(device_type, enabled=False):
                return self._upsample(x, shape, factors)
        return self._upsample(x, shape, factors)

    def _upsample(self, x: Tensor, size: Pair, factors: Ratio | None) -> Tensor:
        """Sample `x` (B, C, H, W) at `size`, computing in full precision throughout."""
        reading = self._reading(x, size, factors)
        dense = x.is_contiguous() or layout.is_channels_last(x)  # of other layouts widening would make one of these
        if x.device.type == "cpu" and dense and not torch.is_grad_enabled() and not plain_functions_wanted():
            # Widened once, for the convolutions and for reading; a backward pass would then keep what is widened. A trace must
            # not depend on whether there will be one: `torch.jit.trace` checks itself with gradients on and off.
            wide = x.to(sampling.compute_dtype(x.dtype))
            return upsample(wide, self._field(wide), reading).to(x.dtype)
        return upsample(x, self._field(x), reading)

    def _reading(self, x: Tensor, size: Pair, factors: Ratio | None) -> Reading:
        scheme = Scheme(
            self.groups, self.offset_scale, self.scope is not None, self.base, torch.compiler.is_compiling()
        )
        init_pos = None
        # The authors' module rounds init_pos to float32, which float64 shows at scales such as 3: what was loaded is
        # used. In float32 torch's own formula is nearer to the original resize on wide maps.
        if x.dtype == torch.float64 and self._reads_init_pos():
            vertical, horizontal = self.offset_scale
            exact = (vertical * x.shape[2], horizontal * x.shape[3])
            if factors == self.scale or (factors is None and sampling.known_equal(size, exact)):
                init_pos = self.init_pos
        return Reading(size, factors, scheme, init_pos, Sampler(*self.sampler))

    def points(
        self,
        x: Tensor,
        size: int | Sequence[int] | None = None,
        scale_factor: float | Sequence[float] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Where a call with the same arguments reads `x`, in source pixels, before the border clamps it.

        Args:
            x: (B, C, H, W), floating point.
            size: the output's (h, w), or one int for both.
            scale_factor: one factor, or (vertical, horizontal).

        Returns:
            Rows and columns, (B, groups, h, w) each: float32, or float64 for a float64 input.

        Raises:
            ShapeError: `x` is not what the module was built for.
            OptionError: the target is smaller than the input, where no point is read.
        """
        field, reading = self._field_and_reading(x, size, scale_factor)
        rows, columns = points(x, field, reading)
        return rows, columns

    def offsets(
        self,
        x: Tensor,
        size: int | Sequence[int] | None = None,
        scale_factor: float | Sequence[float] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """How far a call with the same arguments moves its points from where the original resize reads, in source pixels.

        Arguments, shapes and errors are those of `points`.
        """
        field, reading = self._field_and_reading(x, size, scale_factor)
        moved, unmoved = points(x, field, reading), points(x, torch.zeros_like(field), reading)
        return moved.rows - unmoved.rows, moved.columns - unmoved.columns

    def _field_and_reading(self, x: Tensor, size: Any, scale_factor: Any) -> tuple[Tensor, Reading]:
        self._check_input(x)
        shape, factors, smaller = target(x, size, scale_factor, self.scale)
        if smaller:
            raise OptionError(
                f"{shape} is smaller than the input {tuple(x.shape[2:])}: the original resize computes that"
            )
        return self._field(x), self._reading(x, shape, factors)

    def _reads_init_pos(self) -> bool:
        """Whether `init_pos` says what the base grid is: it exists, and is not the constant 0 of the nearest family."""
        return "init_pos" in self._buffers and self.base.mode == "bilinear" and self.init_pos.dtype == torch.float64

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> DySample:
        """Cast or move the module; a cast to float64 also undoes the rounding `init_pos` had."""
        before = self._buffers.get("init_pos")
        super()._apply(fn, recurse)
        if before is not None and before.dtype != torch.float64 and self.init_pos.dtype == torch.float64:
            expected = self._initial_positions()
            if expected is not None:
                self.init_pos.copy_(expected)
        return self

    def _field(self, x: Tensor) -> Tensor:
        """The convolutions' outputs as one map of H x W pixels, (B, n * groups * sh * sw, H, W): offset, then scope.

        So the submodules only hold the weights: they are not called, and forward hooks on them do not run.
        """
        dtype = sampling.compute_dtype(x.dtype)
        weight, bias = (parameter.to(dtype) for parameter in weights_of(self, "offset"))
        if self.scope is not None:
            # Offset and scope as one convolution, which reads x once.
            scope_weight, scope_bias = (parameter.to(dtype) for parameter in weights_of(self, "scope"))
            weight, bias = torch.cat((weight, scope_weight)), torch.cat((bias, scope_bias))
        if self.style == "lp":
            return pointwise(x, weight, bias)
        sub_pixels = self.offset_scale[0] * self.offset_scale[1]
        batch, channels, height, width = x.shape
        if layout.is_channels_last(x):
            # Shuffle, convolve, unshuffle as one convolution: output k of n sees input channels k, k + n, k + 2 n...
            same = torch.eye(sub_pixels, dtype=dtype, device=x.device).view(1, sub_pixels, 1, sub_pixels)
            weight = (weight.view(-1, 1, channels // sub_pixels, 1) * same).view(-1, channels, 1, 1)
            return pointwise(x, weight, bias.repeat_interleave(sub_pixels))
        # A 1x1 convolution over the sub-pixels stacked along the height: shuffling there and back is no work.
        stacked = x.contiguous().view(batch, channels // sub_pixels, sub_pixels * height, width)
        if torch.is_grad_enabled() and torch.compiler.is_compiling() and not is_exporting():
            # What is kept for the backward pass must not be a reshaped map: Inductor lays it out as channels_last, and where
            # sizes are dynamic it cannot compare its strides (pytorch issue 185510). A sum is no reshape.
            field = F.conv2d(stacked.to(dtype), weight).view(batch, sub_pixels * len(bias), height, width)
            return field + bias.repeat_interleave(sub_pixels).view(-1, 1, 1)
        return pointwise(stacked, weight, bias).view(batch, sub_pixels * len(bias), height, width)

    def _check_input(self, x: Tensor) -> None:
        if x.dim() != 4 or x.shape[1] != self.in_channels:
            raise ShapeError(f"DySample expects an input of shape (B, {self.in_channels}, H, W), got {tuple(x.shape)}")
        if not x.is_floating_point():
            raise ShapeError(f"DySample expects a floating-point input, got {x.dtype}")

    def _initial_positions(self) -> Tensor | None:
        """The values of this module's `init_pos` in float64 on the CPU, None where it has none."""
        if all(float(factor).is_integer() for factor in self.scale):
            return sampling.initial_positions(self.base, self.offset_scale, self.groups)
        return None

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Accept the older `scope.bias`, and refuse offsets that were trained on another base grid."""
        old_bias = state_dict.get(f"{prefix}scope.bias")
        if old_bias is not None and self.scope is not None and self.scope.bias is None:
            # Children load after their parent: this only makes the place for the value, and 0 changes nothing.
            weight = self.scope.weight
            self.scope.bias = nn.Parameter(weight.new_zeros(weight.shape[0]), requires_grad=weight.requires_grad)
        problem = self._init_pos_problem(state_dict.get(f"{prefix}init_pos"))
        if problem is not None:
            error_msgs.append(f"{prefix}init_pos: {problem}")
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def _init_pos_problem(self, loaded: Any) -> str | None:
        """Why a checkpoint's `init_pos` does not fit this module, or None where it does or has no values to compare."""
        expected = self._initial_positions()
        # Subclasses of Tensor (fake, distributed) may have no values at hand.
        if expected is None or type(expected) is not Tensor or type(loaded) is not Tensor or loaded.is_meta:
            return None
        if loaded.shape != expected.shape:
            what = f"its shape is {tuple(loaded.shape)}, this module's {tuple(expected.shape)}"
        else:
            difference = (loaded.detach().to("cpu", torch.float64) - expected).abs().max().item()
            if difference <= _INIT_POS_TOLERANCE:
                return None
            what = f"positions differ by {difference:.3g} pixels"
        return (
            f"this checkpoint was made for another base grid, scale or groups ({what}). This module has "
            f"scale={plain(self.scale)}, groups={self.groups} and the base grid of {self.base.describe()}; "
            "the authors' released checkpoints need init='paper', or mode='bilinear'"
        )

    def extra_repr(self) -> str:
        """The options, for `print(model)`."""
        parts = [f"{self.in_channels}", f"scale={plain(self.scale)}", f"style={self.style}", f"groups={self.groups}"]
        if self.groups != self.requested_groups:
            parts[-1] += f" (asked for {self.requested_groups})"
        parts += [f"dyscope={self.dyscope}", f"init={self.init}", f"mode={self.mode}"]
        if self.align_corners:
            parts.append("align_corners=True")
        return ", ".join(parts)


@register_upsampler("dysample", options=DySampleConfig, exact=keeps_step_0)
def _for_site(site: Site, config: DySampleConfig) -> nn.Module:
    def make(factor: Any) -> DySample:
        return DySample(
            site.channels,
            factor,
            config.style,
            config.groups,
            config.dyscope,
            init=config.init,
            mode=cast(Mode, site.mode),
            align_corners=site.align_corners,
        )

    return make_cascaded(nominal_scale(site), config.cascade, make)
