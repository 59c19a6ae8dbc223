"""The files that are changed: small models by every route and in every form, made of admitted classes alone."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import re
import tempfile
import types
import warnings
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import upswap
from upswap.files import open_source

#: Whole models of 170 kB: the smallest encoder that timm has for tests, cut short. They take the source and graph routes.
SPEC = "smp:{}?encoder_name=tu-test_byobnet&encoder_depth=3&decoder_channels={}"


@dataclasses.dataclass(frozen=True)
class Seed:
    """What is written for one load: files by name, and the name given to `upswap.load`, "" for the folder itself."""

    name: str
    files: Mapping[str, bytes]
    load: str


@functools.cache
def seeds() -> tuple[Seed, ...]:
    """Every seed, in the same order and with the same bytes in every process."""
    from torchvision.ops import FeaturePyramidNetwork

    torch.manual_seed(0)
    layers = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Upsample(scale_factor=2), nn.Conv2d(4, 4, 1)
    ).eval()
    # Not run, only restored: by code that counts its layers, where the names of its weights are of a torch before 1.0.
    layers.__dict__["recurrent"] = nn.LSTM(2, 2)
    layers.__dict__["recurrent"].__dict__["_all_weights"] = [[None]]
    pyramid = FeaturePyramidNetwork([4, 8], 4).eval()
    features = OrderedDict(a=torch.zeros(1, 4, 16, 16), b=torch.zeros(1, 8, 8, 8))
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = [
            _saved(upswap.patch(layers, torch.zeros(1, 3, 16, 16)), None, folder, "module.pt"),
            _saved(_decoder(), None, folder, "graph.pt"),
            _saved(upswap.patch(pyramid, (features,)), None, folder, "source.pt"),
            _torch_saved(layers.state_dict(), folder, "weights.pt"),
            _saved(_of_values(), None, folder, "values.pt"),
            _saved(*_whole("unet", "(8,8,8)"), folder, "unet.safetensors"),
            _saved(*_whole("upernet", "8"), folder, "upernet.safetensors"),
            _folder(*_whole("upernet", "8"), folder, "folder"),
            _folder(upswap.patch(_segformer(), torch.zeros(1, 3, 64, 64)), None, folder, "transformers"),
        ]
    return tuple(made)


def _whole(architecture: str, channels: str) -> tuple[nn.Module, str]:
    spec = SPEC.format(architecture, channels)
    return upswap.patch(open_source.open_source(spec).model.eval(), torch.zeros(1, 3, 64, 64)), spec


def _segformer() -> nn.Module:
    from transformers import SegformerConfig, SegformerForSemanticSegmentation

    small = {"hidden_sizes": [8] * 4, "depths": [1] * 4, "num_attention_heads": [1] * 4, "mlp_ratios": [1] * 4}
    return SegformerForSemanticSegmentation(SegformerConfig(**small, decoder_hidden_size=8, num_labels=3)).eval()


def _decoder() -> nn.Module:
    """UPerNet's decoder alone: the graph route and the source route."""
    model = open_source.open_source(SPEC.format("upernet", "8")).model.eval()
    return upswap.patch(model.decoder, (model.encoder(torch.zeros(1, 3, 64, 64)),))


def _of_values() -> nn.Module:
    """A model that keeps a value of each kind that is pickled as a call."""
    model: Any = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Upsample(scale_factor=2), nn.Conv2d(4, 4, 1)).eval()
    model[0].kept = {
        "data": [range(3), slice(1, 2), frozenset({1}), Path("a/b"), b"", re.compile("a.b", re.IGNORECASE)],
        "filled": (deque([1, 2], 3), defaultdict(list, a=[1]), Counter("aab")),
        "numbers": [np.float32(1), np.arange(6.0).reshape(2, 3), np.dtype("u1")],
        "named": [argparse.Namespace(a=1), types.SimpleNamespace(b=[2])],
        "called": [functools.partial(nn.LayerNorm, eps=1e-6), model[2].forward],
    }
    return upswap.patch(model, torch.zeros(1, 3, 16, 16))


def _saved(model: nn.Module, spec: str | None, folder: str, name: str) -> Seed:
    path = upswap.save(model, Path(folder) / name, source=spec)
    return Seed(name, {name: path.read_bytes()}, name)


def _torch_saved(value: object, folder: str, name: str) -> Seed:
    path = Path(folder) / name
    torch.save(value, path)
    return Seed(name, {name: path.read_bytes()}, name)


def _folder(model: nn.Module, spec: str | None, folder: str, name: str) -> Seed:
    path = upswap.save(model, Path(folder) / name, source=spec)
    return Seed(name, {file.name: file.read_bytes() for file in sorted(path.iterdir())}, "")


def write(seed: Seed, files: Mapping[str, bytes], folder: Path) -> Path:
    """Write the files of a seed, changed, and give the path to load."""
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder / seed.load
