"""Pyramids as frameworks write them: text detection, segmentation from config dicts, detection from a table of nodes.

The models are this repository's own. What they have of docTR, mmsegmentation and effdet is where and how those resize.
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

# Text detection: a pyramid with one weightless layer, level heads of several ratios -----------------------------------


class Stem(nn.Module):
    """Four maps, each half as large as the one before."""

    def __init__(self, widths: tuple[int, ...]) -> None:
        super().__init__()
        self.stages = nn.ModuleList(
            nn.Sequential(nn.Conv2d(a, b, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(b), nn.ReLU())
            for a, b in itertools.pairwise((3, *widths))
        )

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        maps = []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return maps


class TextPyramid(nn.Module):
    """One `upsample` for the way down; a head a level, whose own layer has a ratio for its level, called in a comprehension."""

    def __init__(self, widths: tuple[int, ...], width: int) -> None:
        super().__init__()
        out = width // len(widths)
        self.in_branches = nn.ModuleList(
            nn.Sequential(nn.Conv2d(chans, width, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True))
            for chans in widths
        )
        self.upsample = nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True)
        self.out_branches = nn.ModuleList(self.level(width, out, 2**index) for index in range(len(widths)))

    @staticmethod
    def level(width: int, out: int, ratio: int) -> nn.Sequential:
        layers = [nn.Conv2d(width, out, 3, padding=1, bias=False), nn.BatchNorm2d(out), nn.ReLU(inplace=True)]
        if ratio > 1:
            layers.append(nn.Upsample(scale_factor=ratio, mode="bilinear", align_corners=True))
        return nn.Sequential(*layers)

    def forward(self, x: list[torch.Tensor]) -> torch.Tensor:
        x = [branch(fmap) for branch, fmap in zip(self.in_branches, x, strict=True)]
        out = [x[-1]]
        for fmap in x[:-1][::-1]:
            out.append(self.upsample(out[-1]) + fmap)
        return torch.cat([branch(fmap) for branch, fmap in zip(self.out_branches, out[::-1], strict=True)], dim=1)


class TextDetector(nn.Module):
    """A probability and a threshold for each pixel; in train mode, with targets, the loss."""

    def __init__(self, widths: tuple[int, ...] = (8, 8, 12, 16), width: int = 16) -> None:
        super().__init__()
        self.feat_extractor = Stem(widths)
        self.fpn = TextPyramid(widths, width)
        self.prob_head, self.thresh_head = (
            nn.Sequential(nn.Conv2d(width, 4, 3, padding=1), nn.ReLU(), nn.ConvTranspose2d(4, 1, 2, stride=2))
            for _ in range(2)
        )

    def forward(
        self, x: torch.Tensor, target: torch.Tensor | None = None, return_model_output: bool = False
    ) -> dict[str, Any]:
        feat_concat = self.fpn(self.feat_extractor(x))
        logits = self.prob_head(feat_concat)
        out: dict[str, Any] = {}
        if target is None or return_model_output:
            out["out_map"] = torch.sigmoid(logits)
        if target is not None:
            thresh = torch.sigmoid(self.thresh_head(feat_concat))
            prob = torch.reciprocal(1.0 + torch.exp(-5.0 * (torch.sigmoid(logits) - thresh)))
            target = F.interpolate(target, size=prob.shape[-2:])
            out["loss"] = F.binary_cross_entropy_with_logits(logits, target) + (prob - target).abs().mean()
        return out


class LevelHeads(nn.Module):
    """One method of one line for every level, its ratio an argument, called from a comprehension."""

    def __init__(self, widths: tuple[int, ...] = (8, 8, 8), classes: int = 2) -> None:
        super().__init__()
        self.stem = Stem(widths)
        self.heads = nn.ModuleList(nn.Conv2d(chans, 8, 3, padding=1) for chans in widths)
        self.final = nn.Conv2d(8 * len(widths), classes, 1)

    def enlarge(self, x: torch.Tensor, ratio: int) -> torch.Tensor:
        return F.interpolate(x, scale_factor=ratio, mode="bilinear", align_corners=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        maps = self.stem(x)
        return self.final(
            torch.cat(
                [self.enlarge(h(m), 2 ** (i + 1)) for i, (h, m) in enumerate(zip(self.heads, maps, strict=True))], 1
            )
        )


# Segmentation: heads built from config dicts, a `resize` that warns ----------------------------------------------------


class Config(dict):  # type: ignore[type-arg]
    """A dict whose keys are attributes too, as the registries of such frameworks hand to every layer."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


def resize(input, size=None, scale_factor=None, mode="nearest", align_corners=None, warning=True):
    """The resize of the whole framework: it warns where corners would not be aligned, and passes everything on."""
    if warning and size is not None and align_corners:
        in_h, in_w = tuple(int(side) for side in input.shape[2:])
        out_h, out_w = tuple(int(side) for side in size)
        larger = (out_h > in_h or out_w > in_w) and min(in_h, in_w) > 1
        if larger and (out_h - 1) % (in_h - 1) and (out_w - 1) % (in_w - 1):
            warnings.warn(f"sizes {out_h, out_w} and {in_h, in_w} do not align", stacklevel=2)
    return F.interpolate(input, size, scale_factor, mode, align_corners)


class ConvModule(nn.Module):
    """A convolution with what its configs ask for, in the order they ask for; the norm is found by its name."""

    def __init__(self, inside, outside, kernel, padding=0, norm_cfg=None, act_cfg=None, order=("conv", "norm", "act")):
        super().__init__()
        self.norm_cfg, self.act_cfg, self.order = norm_cfg, act_cfg, order
        self.with_norm, self.with_activation = norm_cfg is not None, act_cfg is not None
        self.conv = nn.Conv2d(inside, outside, kernel, padding=padding, bias=not self.with_norm)
        if self.with_norm:
            self.norm_name = "bn"
            self.add_module(self.norm_name, nn.BatchNorm2d(outside))
        if self.with_activation:
            self.activate = nn.ReLU(inplace=True)

    @property
    def norm(self):
        return getattr(self, self.norm_name)

    def forward(self, x, activate=True, norm=True):
        for layer in self.order:
            if layer == "conv":
                x = self.conv(x)
            elif layer == "norm" and norm and self.with_norm:
                x = self.norm(x)
            elif layer == "act" and activate and self.with_activation:
                x = self.activate(x)
        return x


class PoolPyramid(nn.ModuleList):
    """Pools of several grids: a list of branches that runs them, and brings each back to the size of its input."""

    def __init__(self, scales, inside, outside, align_corners, **cfg):
        super().__init__()
        self.align_corners = align_corners
        for scale in scales:
            self.append(nn.Sequential(nn.AdaptiveAvgPool2d(scale), ConvModule(inside, outside, 1, **cfg)))

    def forward(self, x):
        outs = []
        for branch in self:
            pooled = branch(x)
            outs.append(resize(pooled, size=x.size()[2:], mode="bilinear", align_corners=self.align_corners))
        return outs


class DecodeHead(nn.Module):
    """What the heads share: how they take their inputs from the backbone's list, and how they classify."""

    def __init__(self, in_channels, channels, num_classes, in_index, input_transform=None, align_corners=False, **cfg):
        super().__init__()
        self.in_channels, self.channels, self.in_index = in_channels, channels, in_index
        self.input_transform, self.align_corners, self.cfg = input_transform, align_corners, cfg
        self.conv_seg = nn.Conv2d(channels, num_classes, 1)
        self.dropout = nn.Dropout2d(0.1)

    def _transform_inputs(self, inputs):
        if self.input_transform == "resize_concat":
            inputs = [inputs[i] for i in self.in_index]
            resized = [
                resize(input=x, size=inputs[0].shape[2:], mode="bilinear", align_corners=self.align_corners)
                for x in inputs
            ]
            return torch.cat(resized, dim=1)
        if self.input_transform == "multiple_select":
            return [inputs[i] for i in self.in_index]
        return inputs[self.in_index]

    def cls_seg(self, feat):
        return self.conv_seg(self.dropout(feat))


class UPerDecoder(DecodeHead):
    """Pools on the last map, a pyramid on all, fused at the first's size."""

    def __init__(self, pool_scales=(1, 2, 3), **kwargs):
        super().__init__(input_transform="multiple_select", **kwargs)
        self.psp_modules = PoolPyramid(pool_scales, self.in_channels[-1], self.channels, self.align_corners, **self.cfg)
        bottleneck = self.in_channels[-1] + len(pool_scales) * self.channels
        self.bottleneck = ConvModule(bottleneck, self.channels, 3, padding=1, **self.cfg)
        self.lateral_convs, self.fpn_convs = nn.ModuleList(), nn.ModuleList()
        for in_channels in self.in_channels[:-1]:
            self.lateral_convs.append(ConvModule(in_channels, self.channels, 1, **self.cfg))
            self.fpn_convs.append(ConvModule(self.channels, self.channels, 3, padding=1, **self.cfg))
        self.fpn_bottleneck = ConvModule(len(self.in_channels) * self.channels, self.channels, 3, padding=1, **self.cfg)

    def psp_forward(self, inputs):
        x = inputs[-1]
        psp_outs = [x]
        psp_outs.extend(self.psp_modules(x))
        return self.bottleneck(torch.cat(psp_outs, dim=1))

    def _forward_feature(self, inputs):
        inputs = self._transform_inputs(inputs)
        laterals = [conv(inputs[i]) for i, conv in enumerate(self.lateral_convs)]
        laterals.append(self.psp_forward(inputs))
        levels = len(laterals)
        for i in range(levels - 1, 0, -1):
            prev_shape = laterals[i - 1].shape[2:]
            laterals[i - 1] = laterals[i - 1] + resize(
                laterals[i], size=prev_shape, mode="bilinear", align_corners=self.align_corners
            )
        fpn_outs = [self.fpn_convs[i](laterals[i]) for i in range(levels - 1)]
        fpn_outs.append(laterals[-1])
        for i in range(levels - 1, 0, -1):
            fpn_outs[i] = resize(
                fpn_outs[i], size=fpn_outs[0].shape[2:], mode="bilinear", align_corners=self.align_corners
            )
        return self.fpn_bottleneck(torch.cat(fpn_outs, dim=1))

    def forward(self, inputs):
        return self.cls_seg(self._forward_feature(inputs))


class ConcatDecoder(DecodeHead):
    """An auxiliary head on all maps, brought to the first's size and put together."""

    def __init__(self, **kwargs):
        super().__init__(input_transform="resize_concat", **kwargs)
        self.convs = nn.Sequential(ConvModule(sum(self.in_channels), self.channels, 3, padding=1, **self.cfg))

    def forward(self, inputs):
        return self.cls_seg(self.convs(self._transform_inputs(inputs)))


class Segmentor(nn.Module):
    """Backbone and heads; `mode` says what of, and the logits come at the image's size."""

    def __init__(self, widths: tuple[int, ...] = (8, 12, 16), classes: int = 3, align_corners: bool = False) -> None:
        super().__init__()
        cfg = {"norm_cfg": Config(type="BN", requires_grad=True), "act_cfg": Config(type="ReLU")}
        head = dict(
            in_channels=list(widths), num_classes=classes, in_index=[0, 1, 2], align_corners=align_corners, **cfg
        )
        self.align_corners = align_corners
        self.train_cfg, self.test_cfg = Config(), Config(mode="whole", stride=None)
        self.backbone = Stem(widths)
        self.decode_head = UPerDecoder(channels=8, **head)
        self.auxiliary_head = ConcatDecoder(channels=8, **head)

    @property
    def with_auxiliary_head(self) -> bool:
        return hasattr(self, "auxiliary_head") and self.auxiliary_head is not None

    def encode_decode(self, inputs):
        logits = self.decode_head(self.backbone(inputs))
        return resize(input=logits, size=inputs.shape[2:], mode="bilinear", align_corners=self.align_corners)

    def loss(self, inputs, target):
        maps = self.backbone(inputs)
        losses = {}
        for name in ("decode", "auxiliary") if self.with_auxiliary_head else ("decode",):
            logits = getattr(self, f"{name}_head")(maps)
            logits = resize(logits, size=target.shape[1:], mode="bilinear", align_corners=self.align_corners)
            losses[f"{name}.loss_ce"] = F.cross_entropy(logits, target)
        return losses

    def forward(self, inputs, data_samples=None, mode="tensor"):
        if mode == "loss":
            return self.loss(inputs, data_samples)
        if mode == "tensor" and self.test_cfg.mode == "whole":
            return self.encode_decode(inputs)
        raise RuntimeError(f"no mode {mode!r}")


# Detection: a pyramid of both directions, from a table of nodes ----------------------------------------------------------


class Interpolate2d(nn.Module):
    """`F.interpolate` as a layer of its own, with whatever that takes."""

    def __init__(self, size=None, scale_factor=None, mode="nearest", align_corners=False):
        super().__init__()
        self.name = type(self).__name__
        self.size = size
        self.scale_factor = tuple(float(f) for f in scale_factor) if isinstance(scale_factor, tuple) else scale_factor
        self.mode = mode
        self.align_corners = None if mode == "nearest" else align_corners

    def forward(self, input):
        return F.interpolate(
            input, self.size, self.scale_factor, self.mode, self.align_corners, recompute_scale_factor=False
        )


class Resample(nn.Sequential):
    """From one level to another: a 1x1 convolution where the widths differ, then a pool or an interpolation."""

    def __init__(self, inside, outside, input_size, output_size, upsample):
        super().__init__()
        if inside != outside:
            self.add_module(
                "conv", nn.Sequential(OrderedDict(conv=nn.Conv2d(inside, outside, 1), bn=nn.BatchNorm2d(outside)))
            )
        if input_size > output_size:
            stride = math.ceil(input_size / output_size)
            self.add_module("downsample", nn.MaxPool2d(stride + 1, stride, padding=stride // 2))
        elif input_size < output_size:
            self.add_module("upsample", Interpolate2d(scale_factor=float(output_size // input_size), mode=upsample))


class Combine(nn.Module):
    """Inputs of other levels, each resampled by what a `ModuleDict` has for it, in a sum with learned positive weights."""

    def __init__(self, info, width, inputs_offsets, output_size, upsample, weight_method):
        super().__init__()
        self.inputs_offsets, self.weight_method = inputs_offsets, weight_method
        self.resample = nn.ModuleDict()
        for offset in inputs_offsets:
            self.resample[str(offset)] = Resample(
                info[offset]["num_chs"], width, info[offset]["size"], output_size, upsample
            )
        self.edge_weights = nn.Parameter(torch.ones(len(inputs_offsets))) if weight_method != "sum" else None

    def forward(self, x: list[torch.Tensor]):
        nodes = [
            resample(x[offset]) for offset, resample in zip(self.inputs_offsets, self.resample.values(), strict=True)
        ]
        if self.weight_method == "fastattn":
            weights = F.relu(self.edge_weights.to(dtype=x[0].dtype))
            total = torch.sum(weights)
            out = torch.stack([(node * weights[i]) / (total + 0.0001) for i, node in enumerate(nodes)], dim=-1)
        elif self.weight_method == "attn":
            out = torch.stack(nodes, dim=-1) * torch.softmax(self.edge_weights.to(dtype=x[0].dtype), dim=0)
        else:
            out = torch.stack(nodes, dim=-1)
        return torch.sum(out, dim=-1)


class Node(nn.Sequential):
    """Combine, then convolve."""

    def forward(self, x: list[torch.Tensor]) -> torch.Tensor:  # type: ignore[override]
        for module in self:
            x = module(x)
        return x


class Layer(nn.Module):
    """One round over all nodes of the table; each adds a map to the list that the later ones read."""

    def __init__(self, info, nodes, width, levels, **options):
        super().__init__()
        self.num_levels = levels
        info = [*info]
        self.fnode = nn.ModuleList()
        for node in nodes:
            combine = Combine(info, width, tuple(node["inputs_offsets"]), node["size"], **options)
            conv = nn.Sequential(
                nn.ReLU(),
                nn.Conv2d(width, width, 3, padding=1, groups=width),
                nn.Conv2d(width, width, 1),
                nn.BatchNorm2d(width),
            )
            self.fnode.append(Node(OrderedDict(combine=combine, after_combine=conv)))
            info.append({"num_chs": width, "size": node["size"]})
        self.info = info[-levels:]

    def forward(self, x: list[torch.Tensor]):
        for fn in self.fnode:
            x.append(fn(x))
        return x[-self.num_levels :]


def table_of(sizes: list[int]) -> list[dict[str, Any]]:
    """The nodes of a pyramid of both directions: down from the smallest map, then up again."""
    levels = len(sizes)
    ids = {level: [level] for level in range(levels)}
    nodes, number = [], levels
    for level in range(levels - 2, -1, -1):
        nodes.append({"size": sizes[level], "inputs_offsets": [ids[level][-1], ids[level + 1][-1]]})
        ids[level].append(number)
        number += 1
    for level in range(1, levels):
        nodes.append({"size": sizes[level], "inputs_offsets": [*ids[level], ids[level - 1][-1]]})
        ids[level].append(number)
        number += 1
    return nodes


class LevelHead(nn.Module):
    """Convolutions that all levels share, with a norm of each level's own."""

    def __init__(self, width: int, outputs: int, levels: int, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.num_levels = levels
        self.conv_rep = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn_rep = nn.ModuleList(norm(width) for _ in range(levels))
        self.act = nn.SiLU(inplace=True)
        self.predict = nn.Conv2d(width, outputs, 3, padding=1)

    def forward(self, x: list[torch.Tensor]) -> list[torch.Tensor]:
        return [self.predict(self.act(self.bn_rep[level](self.conv_rep(x[level])))) for level in range(self.num_levels)]


class BothWays(nn.Module):
    """A detector whose pyramid is a table: rounds over it, then class and box heads on every level."""

    def __init__(
        self, width: int = 8, rounds: int = 2, weight_method: str = "fastattn", upsample: str = "nearest"
    ) -> None:
        super().__init__()
        widths, sizes = (8, 12, 16), [32, 16, 8]
        self.config = Config(name="both_ways", fpn_channels=width, rounds=rounds, nodes=table_of(sizes))
        self.backbone = Stem(widths)
        info = [{"num_chs": chans, "size": size} for chans, size in zip(widths, sizes, strict=True)]
        cells = OrderedDict()
        for index in range(rounds):
            cells[str(index)] = Layer(info, self.config.nodes, width, 3, upsample=upsample, weight_method=weight_method)
            info = cells[str(index)].info
        self.cell = nn.Sequential(cells)
        norm = partial(nn.BatchNorm2d, eps=0.001, momentum=0.01)
        self.class_net, self.box_net = LevelHead(width, 3, 3, norm), LevelHead(width, 4, 3, norm)

    def forward(self, x: torch.Tensor) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        x = self.cell(self.backbone(x))
        return self.class_net(x), self.box_net(x)
