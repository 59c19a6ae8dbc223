"""What upsamplers with predicted kernels share: how they are called, and the gain by which they start at the original resize."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...errors import OptionError, ShapeError
from ..arguments import Target, check_choice, plain, positive_int, scale_pair, target
from ..configs import Init
from ..host_init import InitialisesItself
from ..projection import Affine, KnownValues, Projection, weights_of
from ..sampling import memory_format as layout
from ..sampling import positions as sampling
from ..sampling.positions import Mode, Pair, Ratio
from ..tracing import leaf
from ..watch import values, watch


class KernelUpsampler(KnownValues, InitialisesItself):
    """Upsample (B, C, H, W) by a published operator U, from the original resize R on.

        init="match": out = R(x) + gain * (U(x) - R(x)), `gain` a number for each channel, 0 at first
        init="paper": out = U(x), the published operator; it has no `gain`

    With "match", the output at step 0 is that of the original resize, exactly: also where U is infinite or not a number, which
    a gain of 0 leaves out (the sign of a zero may differ). The gradient reaches the gain at step 0, and what predicts the
    kernels from step 1 on.

    A state dict without `gain` is that of the published operator: loaded into a module with "match" it makes the gain 1. A gain
    of 1 throughout goes into a module with "paper".

    A target smaller than the input along an axis is computed by the original resize. Kernels and sums are float32 (float64 for
    float64 input); the convolutions run in the dtype of their weights, or of autocast. The output has the input's dtype and
    memory format. There are no second derivatives.
    """

    is_upsampler = True

    #: The names of its gains, which "paper" has none of.
    gains: ClassVar[tuple[str, ...]] = ("gain",)

    def __init__(
        self,
        channels: int,
        scale: float | Sequence[float],
        init: Init,
        mode: Mode,
        align_corners: bool,
        device: torch.device | str | int | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        check_choice("init", init, get_args(Init))
        check_choice("mode", mode, sampling.MODES)
        self.channels = positive_int("channels", channels)
        self.scale: Ratio = scale_pair(scale)
        self.init = init
        self.mode = mode
        self.align_corners = bool(align_corners)
        self._add_gain("gain", self.channels, device, dtype)

    def _add_gain(
        self, name: str, channels: int, device: torch.device | str | int | None, dtype: torch.dtype | None
    ) -> None:
        values = torch.empty(channels, device=device, dtype=dtype) if self.init == "match" else None
        self.register_parameter(name, None if values is None else nn.Parameter(values))

    def reset_parameters(self) -> None:
        """Initialise as `init` says. Call it where a host's own initialisation has been over the module."""
        for name in self.gains:
            gain = self._parameters[name]
            if gain is not None:
                nn.init.zeros_(gain)
        self._reset_published()
        for module in self.modules():
            if isinstance(module, KnownValues):
                module.note_values()

    def _reset_published(self) -> None:
        """Initialise the published operator as its authors do."""
        raise NotImplementedError

    def is_as_initialised(self) -> bool:
        """Whether gains, biases and norms are what `reset_parameters` puts there; False too where they have no values.

        Weights that are drawn at random tell nothing. The first step of training moves the gain; of the published operator, the
        biases.
        """
        starts: list[tuple[Tensor | None, float]] = [(self._parameters[name], 0.0) for name in self.gains]
        for module in self.modules():
            if isinstance(module, Affine | nn.Conv2d):  # files of upswap 0.1 have the latter
                starts.append((module.bias, 0.0))
                if module.weight.dim() == 1:  # of a norm
                    starts.append((module.weight, 1.0))
        found = [(values(tensor), start) for tensor, start in starts if tensor is not None]
        return all(value is not None and bool((value == start).all()) for value, start in found)

    def misfit(self) -> str | None:
        """What makes the values unfit for use: some are no numbers. None if nothing."""
        for name, tensor in (*self.named_parameters(), *self.named_buffers()):
            found = values(tensor)
            if found is not None and not bool(torch.isfinite(found).all()):
                return f"has values in {name} that are no numbers"
        return None

    def reinitialised(self) -> str | None:
        """None: what predicts kernels is random from the start, and an initialisation of layers knows no gain."""
        return None

    def _watched(self) -> nn.Parameter:
        """The parameter that the first step of training changes: the gain, or a weight of the published operator."""
        gain = self._parameters["gain"]
        return next(each for each in self.parameters() if each.dim() > 1) if gain is None else gain

    @leaf
    def forward(
        self,
        x: Tensor,
        size: int | Sequence[int] | None = None,
        scale_factor: float | Sequence[float] | None = None,
    ) -> Tensor:
        """Upsample `x`, to `size`, by `scale_factor`, or by the module's own `scale` where neither is given.

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
        self._check(x)
        shape, factors, smaller = target(x, size, scale_factor, self.scale)
        if smaller:
            return self._original(x, size, factors)
        return self._finished(x, size, factors, self._upsample(x, shape))

    def _upsample(self, x: Tensor, size: Pair) -> Tensor:
        """The published operator, of `x` at `size`, in the dtype that sums are computed in."""
        raise NotImplementedError

    def _check(self, x: Tensor) -> None:
        if x.dim() != 4 or x.shape[1] != self.channels or not x.is_floating_point():
            raise ShapeError(
                f"{type(self).__name__} expects a floating-point input of shape (B, {self.channels}, H, W), got "
                f"{tuple(x.shape)} of {x.dtype}"
            )
        if self.training and not torch.compiler.is_compiling():
            watch(self, self._watched(), x)

    def _original(self, x: Tensor, size: Any, factors: Ratio | None) -> Tensor:
        """The resize that the module stands in for."""
        return sampling.Mapping(self.mode, self.align_corners).resize(x, size, factors)

    def _finished(self, x: Tensor, size: Any, factors: Ratio | None, published: Tensor) -> Tensor:
        """What the module gives, from what the published operator does."""
        memory_format = layout.format_of(x)
        published = published.contiguous(memory_format=memory_format)
        gain = self._parameters["gain"]
        out = published if gain is None else changed_by(gain, self._original(x, size, factors), published)
        return out.to(x.dtype).contiguous(memory_format=memory_format)

    def _convolved(self, x: Tensor, path: str) -> Tensor:
        """`x` (B, C, H, W) by the convolution at `path`, zero outside, in the dtype of its weights or that of autocast."""
        weight, bias = weights_of(self, path)
        return F.conv2d(x, weight, bias, padding=weight.shape[-1] // 2, groups=x.shape[1] // weight.shape[1])

    def _layer_norm(self, x: Tensor, path: str) -> Tensor:
        """`x` (B, C, H, W) normalised over its channels, with the weights at `path`; computed wide, of x's dtype."""
        wide = x.to(sampling.compute_dtype(x.dtype)).permute(0, 2, 3, 1)
        weight, bias = (each.to(wide.dtype) for each in weights_of(self, path))
        return F.layer_norm(wide, (x.shape[1],), weight, bias).permute(0, 3, 1, 2).to(x.dtype)

    def _group_norm(self, x: Tensor, groups: int, path: str) -> Tensor:
        """The same over groups of channels and all pixels."""
        wide = x.to(sampling.compute_dtype(x.dtype))
        weight, bias = (each.to(wide.dtype) for each in weights_of(self, path))
        return F.group_norm(wide, groups, weight, bias).to(x.dtype)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Take the authors' state dicts, which have no gain."""
        error_msgs = args[-1]
        loaded = [value for key, value in state_dict.items() if key.startswith(prefix)]
        for name in self.gains:
            key, own = f"{prefix}{name}", self._parameters[name]
            if own is not None and key not in state_dict and loaded:
                state_dict[key] = loaded[0].new_ones(own.shape)
            elif own is None and key in state_dict and not bool((state_dict.pop(key) == 1).all()):
                error_msgs.append(
                    f"{key}: this checkpoint was trained from the original resize on; make the {type(self).__name__} with "
                    "init='match' for it"
                )
        super()._load_from_state_dict(state_dict, prefix, *args)

    def __setstate__(self, state: Any) -> None:
        """Files of before the gain have the published operator."""
        super().__setstate__(state)
        if "init" not in self.__dict__:
            self.init = "paper"
            self._add_gain("gain", self.channels, None, None)

    def extra_repr(self) -> str:
        """The options, for `print(model)`."""
        parts = [f"{self.channels}", f"scale={plain(self.scale)}", *self._own_options()]
        parts += [f"init={self.init}", f"mode={self.mode}"]
        if self.align_corners:
            parts.append("align_corners=True")
        return ", ".join(parts)

    def _own_options(self) -> list[str]:
        """The options of the published operator, as `name=value`."""
        raise NotImplementedError


class GuidedUpsampler(KernelUpsampler):
    """One whose operator U also sees a guide (B, guide_channels, h, w): the feature that the upsampled map is fused with.

    U is computed at the guide's size, whatever that is: output pixel o of m reads around pixel floor(o * n / m) of n. Where
    another size is asked for, U is resized to it (bilinear).
    """

    def __init__(
        self,
        channels: int,
        guide_channels: int | None,
        scale: float | Sequence[float],
        init: Init,
        mode: Mode,
        align_corners: bool,
        device: torch.device | str | int | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__(channels, scale, init, mode, align_corners, device, dtype)
        self.guide_channels = (
            self.channels if guide_channels is None else positive_int("guide_channels", guide_channels)
        )

    @leaf
    def forward(
        self,
        x: Tensor,
        size: int | Sequence[int] | None = None,
        scale_factor: float | Sequence[float] | None = None,
        guide: Tensor | None = None,
    ) -> Tensor:
        """Upsample `x`, to `size`, by `scale_factor`, or to the guide's size where neither is given.

        Args:
            x: (B, C, H, W), floating point, of any memory format.
            size: the output's (h, w), or one int for both.
            scale_factor: one factor, or (vertical, horizontal).
            guide: (B, guide_channels, h, w), at least as large as `x` along each axis.

        Returns:
            (B, C, h, w), of x's dtype and memory format.

        Raises:
            ShapeError: `x` or `guide` is not what the module was built for.
            OptionError: there is no guide; both size and scale_factor are given, or one of them is not one value or a pair.
        """
        self._check(x)
        guide = self._checked(guide, x)
        size, (shape, factors, smaller) = self._target(x, size, scale_factor, guide)
        if smaller:
            return self._original(x, size, factors)
        return self._finished(x, size, factors, resized(self._operate(x, guide), shape))

    def _operate(self, x: Tensor, guide: Tensor) -> Tensor:
        """The published operator, at the size of the guide, in the dtype that sums are computed in."""
        raise NotImplementedError

    def _target(self, x: Tensor, size: Any, scale_factor: Any, guide: Tensor) -> tuple[Any, Target]:
        """The size that is asked for, which the guide has where nothing is, and what that means for `x`."""
        if size is None and scale_factor is None:
            own = target(x, None, None, self.scale)
            if sampling.known_equal(own.size, (guide.shape[2], guide.shape[3])):
                return None, own
            size = (guide.shape[2], guide.shape[3])
        return size, target(x, size, scale_factor, self.scale)

    def _checked(self, guide: Tensor | None, x: Tensor) -> Tensor:
        kind = type(self).__name__
        if guide is None:
            raise OptionError(
                f"{kind} needs a guide, the high-resolution feature that its output is fused with: module(x, guide=feature), of "
                f"shape ({x.shape[0]}, {self.guide_channels}, h, w)"
            )
        fits = guide.dim() == 4 and guide.shape[:2] == (x.shape[0], self.guide_channels) and guide.is_floating_point()
        if not fits or guide.shape[2] < x.shape[2] or guide.shape[3] < x.shape[3]:
            raise ShapeError(
                f"{kind} expects a floating-point guide of shape ({x.shape[0]}, {self.guide_channels}, h, w), at least as large "
                f"as the map of {tuple(x.shape[2:])}, got {tuple(guide.shape)} of {guide.dtype}"
            )
        return guide


def resized(x: Tensor, size: Pair) -> Tensor:
    """`x` (B, C, H, W) at `size`, by the bilinear resize where it has another."""
    if sampling.known_equal((x.shape[2], x.shape[3]), size):
        return x
    return F.interpolate(x, size, mode="bilinear", align_corners=False)


def changed_by(gain: Tensor, original: Tensor, published: Tensor) -> Tensor:
    """`original` (B, C, h, w) moved towards `published` by `gain` (C,), in the dtype of `published`."""
    weight = gain.to(published.dtype).view(-1, 1, 1)
    change = published - original
    # Of no gain nothing is added, whatever the operator gave; times 0, an infinity would be no number.
    change = change.masked_fill((weight == 0) & ~change.detach().isfinite(), 0)
    return original + weight * change


def odd(name: str, value: int) -> int:
    """A kernel's side; OptionError unless it is odd, so that it has a centre."""
    if positive_int(name, value) % 2 == 0:
        raise OptionError(f"{name} must be odd, so that a kernel has a centre; got {value}")
    return int(value)


def xavier(projection: Projection) -> None:
    """Glorot and Bengio's uniform weights, and biases of 0: what most of the authors begin with."""
    nn.init.xavier_uniform_(projection.weight)
    if projection.bias is not None:
        nn.init.zeros_(projection.bias)


def ones(norm: Affine) -> None:
    """Weights of 1 and biases of 0, with which a norm changes nothing more."""
    nn.init.ones_(norm.weight)
    if norm.bias is not None:
        nn.init.zeros_(norm.bias)
