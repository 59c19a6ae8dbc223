"""Networks that run again and again, or by way of others' code: diffusion steps, recurrent updates, scripted helpers.

The models are this repository's own. What they have of diffusers, RAFT-Stereo and PIDNet is where and how those resize.
"""

from __future__ import annotations

import functools
import warnings

import torch
from torch import nn
from torch.nn import functional as F

ALIGN = False

# Diffusion: an upsampling block with an optional convolution and an optional size ---------------------------------------


class Upsample2D(nn.Module):
    """x2, or to the size asked for; then a convolution, where there is one."""

    def __init__(self, channels: int, use_conv: bool = False, interpolate: bool = True) -> None:
        super().__init__()
        self.channels, self.use_conv, self.interpolate = channels, use_conv, interpolate
        self.conv = nn.Conv2d(channels, channels, 3, padding=1) if use_conv else None

    def forward(self, hidden_states, output_size=None, *args, **kwargs):
        if hidden_states.shape[1] != self.channels:
            raise ValueError("other channels")
        dtype = hidden_states.dtype
        if dtype == torch.bfloat16:
            hidden_states = hidden_states.to(torch.float32)
        if hidden_states.shape[0] >= 64:
            hidden_states = hidden_states.contiguous()
        if self.interpolate:
            if output_size is None:
                hidden_states = F.interpolate(hidden_states, scale_factor=2.0, mode="nearest")
            else:
                hidden_states = F.interpolate(hidden_states, size=output_size, mode="nearest")
        if dtype == torch.bfloat16:
            hidden_states = hidden_states.to(dtype)
        if self.use_conv:
            hidden_states = self.conv(hidden_states)
        return hidden_states


class ResBlock(nn.Module):
    """Two convolutions between which the time step comes in."""

    def __init__(self, inside: int, outside: int, time: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(4, inside), nn.Conv2d(inside, outside, 3, padding=1)
        self.time = nn.Linear(time, outside)
        self.norm2, self.conv2 = nn.GroupNorm(4, outside), nn.Conv2d(outside, outside, 3, padding=1)
        self.shortcut = nn.Conv2d(inside, outside, 1) if inside != outside else None

    def forward(self, x, temb):
        hidden = self.conv1(F.silu(self.norm1(x))) + self.time(F.silu(temb))[:, :, None, None]
        hidden = self.conv2(F.silu(self.norm2(hidden)))
        return hidden + (x if self.shortcut is None else self.shortcut(x))


class UpBlock(nn.Module):
    """Blocks that take their skips off a tuple; its upsamplers are a list of one, or None."""

    def __init__(self, inside: int, skips: list[int], outside: int, time: int, upsample: bool, use_conv: bool) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(
            ResBlock((inside if index == 0 else outside) + skip, outside, time) for index, skip in enumerate(skips)
        )
        self.upsamplers = nn.ModuleList([Upsample2D(outside, use_conv)]) if upsample else None

    def forward(self, hidden_states, res_hidden_states_tuple, temb, upsample_size=None):
        for resnet in self.resnets:
            hidden_states = torch.cat([hidden_states, res_hidden_states_tuple[-1]], dim=1)
            res_hidden_states_tuple = res_hidden_states_tuple[:-1]
            hidden_states = resnet(hidden_states, temb)
        if self.upsamplers is not None:
            for upsampler in self.upsamplers:
                hidden_states = upsampler(hidden_states, upsample_size)
        return hidden_states


class DenoisingUNet(nn.Module):
    """A step of a diffusion; where the image is no multiple of its factor, each block is told the size to come to."""

    def __init__(self, use_conv: bool = True) -> None:
        super().__init__()
        time = 16
        self.num_upsamplers = 2
        self.conv_in = nn.Conv2d(3, 8, 3, padding=1)
        self.time_embedding = nn.Sequential(nn.Linear(8, time), nn.SiLU(), nn.Linear(time, time))
        self.down_blocks = nn.ModuleList([ResBlock(8, 8, time), ResBlock(8, 16, time), ResBlock(16, 16, time)])
        self.downsamplers = nn.ModuleList(
            [nn.Conv2d(8, 8, 3, stride=2, padding=1), nn.Conv2d(16, 16, 3, stride=2, padding=1)]
        )
        self.up_blocks = nn.ModuleList(
            [
                UpBlock(16, [16], 16, time, True, use_conv),
                UpBlock(16, [16], 8, time, True, use_conv),
                UpBlock(8, [8, 8], 8, time, False, use_conv),
            ]
        )
        self.conv_out = nn.Conv2d(8, 3, 3, padding=1)

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor | float | int, return_dict: bool = True):
        default_overall_up_factor = 2**self.num_upsamplers
        forward_upsample_size = False
        for dim in sample.shape[-2:]:
            if dim % default_overall_up_factor != 0:
                forward_upsample_size = True
                break
        timesteps = torch.as_tensor(timestep, device=sample.device).reshape(-1).expand(sample.shape[0])
        frequencies = torch.exp(-torch.arange(4, device=sample.device, dtype=sample.dtype))
        angles = timesteps[:, None].to(sample.dtype) * frequencies
        temb = self.time_embedding(torch.cat([angles.sin(), angles.cos()], 1))

        hidden = self.conv_in(sample)
        skips = (hidden,)
        for index, block in enumerate(self.down_blocks):
            hidden = block(hidden, temb)
            skips += (hidden,)
            if index < len(self.downsamplers):
                hidden = self.downsamplers[index](hidden)
        for index, block in enumerate(self.up_blocks):
            own, skips = skips[-len(block.resnets) :], skips[: -len(block.resnets)]
            upsample_size = skips[-1].shape[2:] if forward_upsample_size and index < self.num_upsamplers else None
            hidden = block(hidden, own, temb, upsample_size)
        sample = self.conv_out(hidden)
        return {"sample": sample} if return_dict else (sample,)


# Recurrent updates: hidden states of several levels, each resized to the next ---------------------------------------------


def pool2x(x):
    return F.avg_pool2d(x, 3, stride=2, padding=1)


def interp(x, dest):
    """The arguments collected first, and unpacked into the call."""
    interp_args = {"mode": "bilinear", "align_corners": True}
    return F.interpolate(x, dest.shape[2:], **interp_args)


class ConvGRU(nn.Module):
    """A gated unit on maps, with any number of other maps beside the state."""

    def __init__(self, hidden: int, inputs: int) -> None:
        super().__init__()
        self.convz, self.convr, self.convq = (nn.Conv2d(hidden + inputs, hidden, 3, padding=1) for _ in range(3))

    def forward(self, h, *x_list):
        x = torch.cat(x_list, dim=1)
        hx = torch.cat([h, x], dim=1)
        z, r = torch.sigmoid(self.convz(hx)), torch.sigmoid(self.convr(hx))
        return (1 - z) * h + z * torch.tanh(self.convq(torch.cat([r * h, x], dim=1)))


class UpdateBlock(nn.Module):
    """Three states, from coarse to fine; which of them are updated is asked for at each call."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gru08, self.gru16, self.gru32 = ConvGRU(width, 2 * width), ConvGRU(width, 2 * width), ConvGRU(width, width)
        self.encoder, self.flow_head = nn.Conv2d(2, width, 3, padding=1), nn.Conv2d(width, 2, 3, padding=1)
        self.mask = nn.Conv2d(width, 4 * 9, 1)

    def forward(self, net, flow=None, iter08=True, iter16=True, iter32=True, update=True):
        if iter32:
            net[2] = self.gru32(net[2], pool2x(net[1]))
        if iter16:
            net[1] = self.gru16(net[1], pool2x(net[0]), interp(net[2], net[1]))
        if iter08:
            net[0] = self.gru08(net[0], self.encoder(flow), interp(net[1], net[0]))
        if not update:
            return net
        return net, 0.25 * self.mask(net[0]), self.flow_head(net[0])


class RecurrentFlow(nn.Module):
    """A flow that is refined step by step; coarse states are updated more often than fine ones."""

    def __init__(self, width: int = 8, slow_fast: bool = True) -> None:
        super().__init__()
        self.slow_fast = slow_fast
        self.stem = nn.Sequential(nn.Conv2d(6, width, 3, stride=2, padding=1), nn.InstanceNorm2d(width), nn.ReLU())
        self.layer1, self.layer2 = (nn.Conv2d(width, width, 3, stride=2, padding=1) for _ in range(2))
        self.update_block = UpdateBlock(width)

    def upsample_flow(self, flow, mask):
        """A convex combination of neighbours: learned already, and no resize."""
        batch, channels, height, width = flow.shape
        mask = torch.softmax(mask.view(batch, 1, 9, 2, 2, height, width), dim=2)
        up = F.unfold(2 * flow, [3, 3], padding=1).view(batch, channels, 9, 1, 1, height, width)
        up = torch.sum(mask * up, dim=2).permute(0, 1, 4, 2, 5, 3)
        return up.reshape(batch, channels, 2 * height, 2 * width)

    def forward(self, image1, image2, iters=3, flow_init=None, test_mode=False):
        first = self.stem(torch.cat([image1, image2], 1))
        second = self.layer1(first)
        net = [torch.tanh(x) for x in (first, second, self.layer2(second))]
        flow = torch.zeros_like(first[:, :2]) if flow_init is None else flow_init
        predictions = []
        for step in range(iters):
            flow = flow.detach()
            if self.slow_fast:
                net = self.update_block(net, iter32=True, iter16=False, iter08=False, update=False)
                net = self.update_block(net, iter32=True, iter16=True, iter08=False, update=False)
            net, mask, delta = self.update_block(net, flow)
            flow = flow + delta
            if test_mode and step < iters - 1:
                continue
            predictions.append(self.upsample_flow(flow, mask))
        return predictions[-1] if test_mode else predictions


# Two branches side by side: attention between them, pools of many grids ----------------------------------------------------


class PixelAttention(nn.Module):
    """The context branch lays itself over the detail branch, as far as both agree."""

    def __init__(self, inside: int, middle: int, with_channel: bool = False) -> None:
        super().__init__()
        self.with_channel = with_channel
        self.f_x = nn.Sequential(nn.Conv2d(inside, middle, 1, bias=False), nn.BatchNorm2d(middle))
        self.f_y = nn.Sequential(nn.Conv2d(inside, middle, 1, bias=False), nn.BatchNorm2d(middle))

    def forward(self, x, y):
        input_size = x.size()
        y_q = self.f_y(y)
        y_q = F.interpolate(y_q, size=[input_size[2], input_size[3]], mode="bilinear", align_corners=False)
        x_k = self.f_x(x)
        sim_map = torch.sigmoid(torch.sum(x_k * y_q, dim=1).unsqueeze(1))
        y = F.interpolate(y, size=[input_size[2], input_size[3]], mode="bilinear", align_corners=False)
        return (1 - sim_map) * x + sim_map * y


class PoolContext(nn.Module):
    """Averages over ever larger windows, brought back to size and added up."""

    def __init__(self, inside: int, middle: int, outside: int) -> None:
        super().__init__()
        self.scale0 = nn.Sequential(nn.BatchNorm2d(inside), nn.ReLU(), nn.Conv2d(inside, middle, 1))
        self.scale1 = nn.Sequential(nn.AvgPool2d(3, stride=2, padding=1), nn.Conv2d(inside, middle, 1))
        self.scale2 = nn.Sequential(nn.AdaptiveAvgPool2d((1, 1)), nn.Conv2d(inside, middle, 1))
        self.process1, self.process2 = (nn.Conv2d(middle, middle, 3, padding=1) for _ in range(2))
        self.compression = nn.Conv2d(middle * 3, outside, 1)

    def forward(self, x):
        width, height = x.shape[-1], x.shape[-2]
        x_list = [self.scale0(x)]
        x_list.append(
            self.process1(
                F.interpolate(self.scale1(x), size=[height, width], mode="bilinear", align_corners=ALIGN) + x_list[0]
            )
        )
        x_list.append(
            self.process2(
                F.interpolate(self.scale2(x), size=[height, width], mode="bilinear", align_corners=ALIGN) + x_list[1]
            )
        )
        return self.compression(torch.cat(x_list, 1))


class SegmentHead(nn.Module):
    """Logits, larger by a factor where the head has one."""

    def __init__(self, inside: int, classes: int, scale_factor: int | None = None) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(inside), nn.Conv2d(inside, inside, 3, padding=1, bias=False)
        self.relu, self.conv2, self.scale_factor = nn.ReLU(inplace=True), nn.Conv2d(inside, classes, 1), scale_factor

    def forward(self, x):
        out = self.conv2(self.relu(self.conv1(self.relu(self.bn1(x)))))
        if self.scale_factor is not None:
            height, width = x.shape[-2] * self.scale_factor, x.shape[-1] * self.scale_factor
            out = F.interpolate(out, size=[height, width], mode="bilinear", align_corners=ALIGN)
        return out


class TwoBranches(nn.Module):
    """Detail and context side by side; in train mode a head on the detail too, where the model was made with one."""

    def __init__(self, width: int = 8, classes: int = 3, augment: bool = True) -> None:
        super().__init__()
        self.augment = augment
        self.conv1 = nn.Sequential(nn.Conv2d(3, width, 3, stride=2, padding=1), nn.BatchNorm2d(width), nn.ReLU())
        self.detail = nn.Conv2d(width, width, 3, padding=1)
        self.context = nn.Sequential(nn.Conv2d(width, 2 * width, 3, stride=2, padding=1), nn.BatchNorm2d(2 * width))
        self.compression = nn.Sequential(nn.Conv2d(2 * width, width, 1, bias=False), nn.BatchNorm2d(width))
        self.pag = PixelAttention(width, width // 2)
        self.deep = nn.Conv2d(2 * width, 2 * width, 3, stride=2, padding=1)
        self.spp = PoolContext(2 * width, width, width)
        self.seghead_p = SegmentHead(width, classes) if augment else None
        self.final_layer = SegmentHead(width, classes, 2)

    def forward(self, x):
        width_output, height_output = x.shape[-1] // 2, x.shape[-2] // 2
        x = self.conv1(x)
        context = self.context(F.relu(x))
        x = self.pag(self.detail(x), self.compression(context))
        temp = x
        deep = F.interpolate(
            self.spp(self.deep(F.relu(context))),
            size=[height_output, width_output],
            mode="bilinear",
            align_corners=ALIGN,
        )
        out = self.final_layer(x + deep)
        return [self.seghead_p(temp), out] if self.augment else out


# Helpers that are scripted --------------------------------------------------------------------------------------------------


def _doubled(x: torch.Tensor) -> torch.Tensor:
    return F.interpolate(x, scale_factor=2.0, mode="nearest")


@functools.cache
def doubled():
    """The function as TorchScript, of which there is no source to rewrite; torch warns that scripting is on its way out."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.script(_doubled)


@torch.jit.script_if_tracing
def matched(x: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Python in a run, TorchScript in a trace."""
    return F.interpolate(x, size=other.shape[-2:], mode="bilinear", align_corners=False)


class Scripted(nn.Module):
    """A scripted helper on one level, one that is scripted in a trace on the other."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.high, self.low = nn.Conv2d(3, width, 3, padding=1), nn.Conv2d(width, width, 3, stride=2, padding=1)
        self.last = nn.Conv2d(width, 2, 1)

    def forward(self, image):
        high = self.high(image)
        low = self.low(high)
        low = low + doubled()(self.low(low))
        return self.last(high + matched(low, high))
