"""A patched model whose class has changed since: it comes back the same, or each site that does not fit is named.

And the ways around `upswap.save` that Python and torch have: pickles, copies, state dicts, other processes.
"""

from __future__ import annotations

import copy
import dataclasses
import importlib
import inspect
import json
import linecache
import multiprocessing
import pickle
import re
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import segmentation_models_pytorch as smp
import torch
from segmentation_models_pytorch.decoders.fpn.decoder import FPNBlock
from segmentation_models_pytorch.decoders.segformer.decoder import SegformerDecoder
from segmentation_models_pytorch.decoders.unet.decoder import UnetDecoderBlock
from segmentation_models_pytorch.decoders.upernet.decoder import FPNLateralBlock, UPerNetDecoder
from torch import nn
from torch.utils.data import DataLoader

import upswap
from models import IMAGES, assert_same, patched, unet
from tiny_host import image, tiny
from upswap import PlanError
from upswap.plan.plan import Plan
from upswap.surgery.replay import check_plan
from work import calls_made

VERSION_A = """
    import functools

    import torch
    from torch import nn
    from torch.nn import functional as F

    from .helpers import enlarge, twice

    MODE = "nearest"


    def logged(function):
        @functools.wraps(function)
        def wrapper(*args, **kwargs):
            return function(*args, **kwargs)
        return wrapper


    class Straight(nn.Module):
        '''The graph route.'''

        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(8, 8, 3, padding=1)

        def forward(self, x):
            x = F.interpolate(self.conv(x), scale_factor=2.0, mode="bilinear")
            return F.interpolate(self.conv(x), size=(x.shape[2] * 2, x.shape[3] * 2), mode="nearest")


    class Branch(nn.Module):
        '''The source route.'''

        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(8, 8, 3, padding=1)
            self.mode = "bilinear"
            self.factor = 2.0

        def forward(self, x, skip=None):
            x = F.interpolate(self.conv(x), scale_factor=self.factor, mode=self.mode)
            x = F.interpolate(self.conv(x), scale_factor=2.0)
            return x if skip is None else x + skip


    class Loop(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(8, 8, 3, padding=1)
            self.times = 2

        def forward(self, x):
            for _ in range(self.times):
                x = F.interpolate(self.conv(x), scale_factor=2.0, mode="nearest")
            return x


    class Detours(nn.Module):
        '''The source route through helpers, a lambda and a decorator.'''

        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(8, 8, 3, padding=1)

        @logged
        def up(self, x):
            return F.interpolate(self.conv(x), scale_factor=2.0, mode="bilinear")

        def forward(self, x):
            double = lambda y: F.interpolate(y, scale_factor=2.0)
            return double(self.conv(self.up(enlarge(self.conv(x)))))


    class Layer(nn.Module):
        '''The module route.'''

        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(8, 8, 3, padding=1)
            self.up = nn.Upsample(scale_factor=2, mode="bilinear")

        def forward(self, x):
            return self.conv(self.up(self.conv(x)))


    class Net(nn.Module):
        def __init__(self, block):
            super().__init__()
            self.stem = nn.Conv2d(3, 8, 3, padding=1)
            self.block = block()
            self.last = nn.Conv2d(8, 2, 1)

        def forward(self, image):
            return self.last(self.block(self.stem(image)))
"""

HELPERS = """
    from torch.nn import functional as F


    def enlarge(x):
        return twice(x)


    def twice(x):
        return F.interpolate(x, scale_factor=2.0, mode="nearest")
"""

IMAGE = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


class Package:
    """A package on disk whose text changes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "host_package"
        self.folder.mkdir()
        self.files = {"__init__": "", "models": textwrap.dedent(VERSION_A), "helpers": textwrap.dedent(HELPERS)}
        self.load()

    def load(self) -> ModuleType:
        for name in [name for name in sys.modules if name.partition(".")[0] == "host_package"]:
            del sys.modules[name]
        for name, text in self.files.items():
            (self.folder / f"{name}.py").write_text(text)
        importlib.invalidate_caches()
        linecache.clearcache()
        return importlib.import_module("host_package.models")

    def change(self, old: str, new: str) -> None:
        found = [name for name, text in self.files.items() if old in text]
        assert found, old
        for name in found:
            self.files[name] = self.files[name].replace(old, new)
        self.load()

    def build(self, block: str) -> nn.Module:
        models = sys.modules["host_package.models"]
        torch.manual_seed(0)
        return models.Net(getattr(models, block)).eval()


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Package]:
    # Files of one size written within one second have one stamp.
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield Package(tmp_path)
    for name in [name for name in sys.modules if name.partition(".")[0] == "host_package"]:
        del sys.modules[name]


@torch.no_grad()
def output(model: nn.Module) -> torch.Tensor:
    return model(IMAGE)


class Saved:
    """A patched model in every form, and what it computed."""

    def __init__(self, package: Package, block: str, folder: Path) -> None:
        self.package, self.block = package, block
        model = patched(package.build(block))
        assert {site.name for site in upswap.plan_of(model).swapped} == {
            site.name for site in upswap.plan_of(model).sites
        }
        self.sites = [site.name for site in upswap.plan_of(model).swapped]
        self.expected = output(model)
        assert (output(package.build(block)) - self.expected).abs().max() > 1e-3
        self.plan = upswap.plan_of(model).to_json()
        self.weights = model.state_dict()
        self.pt = upswap.save(model, folder / "model.pt")
        self.safetensors = upswap.save(model, folder / "model.safetensors")

    def from_pt(self) -> nn.Module:
        return upswap.load(self.pt, trust=["host_package"])

    def from_safetensors(self) -> nn.Module:
        return upswap.load(self.safetensors, self.package.build(self.block))

    def from_plan(self) -> nn.Module:
        model = upswap.patch(self.package.build(self.block), plan=upswap.Plan.from_json(self.plan))
        model.load_state_dict(self.weights, strict=True)
        return model

    def forms(self) -> dict[str, Callable[[], nn.Module]]:
        return {"pt": self.from_pt, "safetensors": self.from_safetensors, "plan": self.from_plan}


#: What is changed in which block, the sites that are no longer what they were, and what is said of one.
CHANGES: dict[str, tuple[str, str, str, list[str], str]] = {
    "graph: resize removed": (
        "Straight",
        'F.interpolate(self.conv(x), scale_factor=2.0, mode="bilinear")',
        "self.conv(x)",
        ["block:0"],
        "no longer has the call",
    ),
    "graph: all removed": (
        "Straight",
        "F.interpolate(",
        "F.pad(",
        ["block:0", "block:1"],
        "no longer has the call",
    ),
    "graph: mode in the text": (
        "Straight",
        'scale_factor=2.0, mode="bilinear"',
        'scale_factor=2.0, mode="bicubic"',
        ["block:0"],
        "it resizes with mode='bicubic'",
    ),
    "graph: both modes": (
        "Straight",
        '        x = F.interpolate(self.conv(x), scale_factor=2.0, mode="bilinear")\n'
        '        return F.interpolate(self.conv(x), size=(x.shape[2] * 2, x.shape[3] * 2), mode="nearest")',
        '        x = F.interpolate(self.conv(x), scale_factor=3.0, mode="bilinear")\n'
        '        return F.interpolate(self.conv(x), size=(x.shape[2] * 2, x.shape[3] * 2), mode="bicubic")',
        ["block:0", "block:1"],
        "the scale factor 3.0",
    ),
    "graph: a resize more": (
        "Straight",
        "        return F.interpolate(self.conv(x), size",
        "        x = F.interpolate(self.conv(x), scale_factor=1.5)\n        return F.interpolate(self.conv(x), size",
        ["block:0", "block:1"],
        "a resize call that the plan does not know",
    ),
    "graph: a twin before it": (
        "Straight",
        '        x = F.interpolate(self.conv(x), scale_factor=2.0, mode="bilinear")\n',
        '        x = F.interpolate(self.conv(x), scale_factor=2.0, mode="bilinear")\n' * 2,
        ["block:0"],
        "2 times, where it had it once",
    ),
    "source: resize removed": (
        "Branch",
        "F.interpolate(self.conv(x), scale_factor=2.0)\n        return x if",
        "self.conv(x)\n        return x if",
        ["block:1"],
        "no longer has the call",
    ),
    "source: mode in an attribute": (
        "Branch",
        'self.mode = "bilinear"',
        'self.mode = "bicubic"',
        ["block:0"],
        "it resizes with mode='bicubic'",
    ),
    "source: factor in an attribute": (
        "Branch",
        "self.factor = 2.0",
        "self.factor = 4.0",
        ["block:0"],
        r"it resizes by \(4\.0, 4\.0\), where it did by \(2\.0, 2\.0\)",
    ),
    "source: both": (
        "Branch",
        'self.mode = "bilinear"\n        self.factor = 2.0\n\n    def forward(self, x, skip=None):\n',
        'self.mode = "bicubic"\n        self.factor = 2.0\n\n    def forward(self, x, skip=None, other=None):\n',
        ["block:0"],
        "mode='bicubic'",
    ),
    "source: in a branch": (
        "Branch",
        "        x = F.interpolate(self.conv(x), scale_factor=2.0)\n        return x if",
        "        if skip is None:\n            x = F.interpolate(self.conv(x), scale_factor=2.0)\n        return x if",
        ["block:1"],
        "now stands in `if skip is None`, where it stood in no loop or branch",
    ),
    "source: a twin before it": (
        "Branch",
        "        x = F.interpolate(self.conv(x), scale_factor=2.0)\n        return x if",
        "        x = F.interpolate(self.conv(x), scale_factor=2.0)\n" * 2 + "        return x if",
        ["block:1"],
        "2 times, where it had it once",
    ),
    "source: not reached": (
        "Branch",
        "        x = F.interpolate(self.conv(x), scale_factor=2.0)\n        return x if",
        "        if skip is None:\n            return x\n        x = F.interpolate(self.conv(x), scale_factor=2.0)\n"
        "        return x if",
        ["block:1"],
        "not made any more",
    ),
    "source: method renamed": (
        "Branch",
        "    def forward(self, x, skip=None):\n",
        "    def forward(self, x, skip=None):\n        return self.run(x, skip)\n\n    def run(self, x, skip=None):\n",
        ["block:0", "block:1"],
        "no longer has the call",
    ),
    "loop: other text": (
        "Loop",
        "range(self.times)",
        "range(3)",
        ["block:0", "block:1"],
        r"now stands in `for _ in range\(3\)`, where it stood in `for _ in range\(self\.times\)`",
    ),
    "loop: more runs": (
        "Loop",
        "self.times = 2",
        "self.times = 3",
        ["block:0", "block:1"],
        "more often than it was",
    ),
    "loop: fewer runs": ("Loop", "self.times = 2", "self.times = 1", ["block:1"], "run 2 of the call is not made"),
    "detour: helper changed": (
        "Detours",
        'return F.interpolate(x, scale_factor=2.0, mode="nearest")\n',
        'return F.interpolate(x, scale_factor=2.0, mode="nearest-exact")\n',
        ["block:0"],
        "no longer has the call",
    ),
    "detour: helper renamed": (
        "Detours",
        "twice",
        "doubled",
        ["block:0"],
        "enlarge no longer has the call",
    ),
    "detour: lambda changed": (
        "Detours",
        "lambda y: F.interpolate(y, scale_factor=2.0)",
        "lambda z: F.interpolate(z, scale_factor=2.0)",
        ["block:2"],
        "no longer has the call",
    ),
    "detour: method renamed": ("Detours", "up(", "upwards(", ["block:1"], "no longer has the call"),
    "layer: mode": (
        "Layer",
        'mode="bilinear")\n\n    def forward(self, x):\n        return self.conv(self.up',
        'mode="nearest")\n\n    def forward(self, x):\n        return self.conv(self.up',
        ["block.up"],
        "the layer is now Upsample.*'nearest'",
    ),
    "layer: factor": (
        "Layer",
        "nn.Upsample(scale_factor=2,",
        "nn.Upsample(scale_factor=4,",
        ["block.up"],
        "the layer is now",
    ),
    "layer: align_corners": (
        "Layer",
        "nn.Upsample(scale_factor=2,",
        "nn.Upsample(scale_factor=2, align_corners=True,",
        ["block.up"],
        "align_corners=False",
    ),
    "layer: gone": ("Layer", "self.up", "self.larger", ["block.up"], "the model has no module 'block.up'"),
    "layer: not called": (
        "Layer",
        "self.conv(self.up(self.conv(x)))",
        "self.conv(x)",
        ["block.up"],
        "not made any more",
    ),
    "owner renamed": ("Branch", "class Branch(", "class Branched(", ["block:0", "block:1"], "is a host_package"),
}


@pytest.mark.filterwarnings("ignore:the file is written, and upswap.load will refuse it")
class TestChangedClasses:
    @pytest.mark.parametrize("block", ["Straight", "Branch", "Loop", "Detours", "Layer"])
    def test_other_lines_and_other_code_are_no_change(self, block: str, package: Package, tmp_path: Path) -> None:
        saved = Saved(package, block, tmp_path)
        for old, new in [
            ("import functools\n", "import functools\n\n# moved\n\n\nUNUSED = 3\n"),
            ("class Loop", "class Other(nn.Module):\n    pass\n\n\nclass Loop"),
            ("    def forward(self, x", "    def more(self):\n        pass\n\n    def forward(self, x"),
            ("def twice(x):\n", "def twice(x):\n    '''Now with a docstring.'''\n\n"),
            ("def forward(self, x, skip=None)", "def forward(self, x, skip=None, *, more=None)"),
            (
                'scale_factor=2.0, mode="bilinear")',
                'scale_factor=2.0,\n                mode="bilinear",\n            )',
            ),
        ]:
            package.change(old, new)
            for name, load in saved.forms().items():
                model = load()
                assert torch.equal(output(model), saved.expected), name
                assert [site.name for site in upswap.plan_of(model).swapped] == saved.sites

    @pytest.mark.parametrize("change", CHANGES)
    def test_each_site_that_does_not_fit_is_named(self, change: str, package: Package, tmp_path: Path) -> None:
        block, old, new, sites, says = CHANGES[change]
        saved = Saved(package, block, tmp_path)
        package.change(old, new)
        if change == "owner renamed":
            saved.block = "Branched"
        for form, load in saved.forms().items():
            if form == "pt" and _brought_along(change):
                assert torch.equal(output(load()), saved.expected)
                continue
            if form == "pt" and change == "owner renamed":
                with pytest.raises(upswap.SourceError, match=r"host_package\.models\.Branch\b.*has moved"):
                    load()
                continue
            if form == "pt" and change in RUN_SHOWS:
                continue
            with pytest.raises(PlanError, match=says) as caught:
                load()
            message = str(caught.value)
            lines = message.splitlines()[1:]
            assert [line.split(": ")[0].strip() for line in lines] == sites, f"{form}: {message}"
            assert "Install the version of their library" in message

    @pytest.mark.parametrize("block", ["Straight", "Branch", "Loop", "Detours", "Layer"])
    def test_other_channels(self, block: str, package: Package, tmp_path: Path) -> None:
        saved = Saved(package, block, tmp_path)
        for old, new in [("(3, 8,", "(3, 12,"), ("(8, 8,", "(12, 12,"), ("(8, 2,", "(12, 2,")]:
            package.change(old, new)
        for load in (saved.from_plan, saved.from_safetensors):
            with pytest.raises(PlanError, match="it resizes 12 channels, where it had 8") as caught:
                load()
            assert all(f"{site}: " in str(caught.value) for site in saved.sites)


def _brought_along(change: str) -> bool:
    """Whether a change is to what a whole-model file has itself: attributes, layers."""
    return (
        "attribute" in change
        or "runs" in change
        or change in ("source: both", "layer: mode", "layer: factor", "layer: align_corners")
    )


#: What the source of a class does not show, and a whole-model file does not ask.
RUN_SHOWS = {"graph: a resize more", "source: not reached", "layer: gone", "layer: not called"}


# ---- real libraries

#: A class of SMP, what a later version changes in its forward, the sites it makes unfit, and what is said of them.
LATER: list[tuple[type[nn.Module], type[nn.Module], str, str, list[str], str]] = [
    (
        smp.Unet,
        UnetDecoderBlock,
        "mode=self.interpolation_mode",
        'mode="bilinear"',
        [f"decoder.blocks.{index}" for index in range(5)],
        "no longer has the call",
    ),
    (
        smp.Unet,
        UnetDecoderBlock,
        "if skip_connection is not None:",
        "feature_map = F.interpolate(feature_map, scale_factor=1.0)\n    if skip_connection is not None:",
        [f"decoder.blocks.{index}" for index in range(5)],
        "a resize call that the plan does not know",
    ),
    (
        smp.FPN,
        FPNBlock,
        "scale_factor=2.0",
        "size=skip.shape[2:]",
        ["decoder.p4", "decoder.p3", "decoder.p2"],
        "no longer has the call",
    ),
    (
        smp.Segformer,
        SegformerDecoder,
        "dim // 4",
        "dim // 2",
        ["decoder:0", "decoder:1", "decoder:2"],
        r"it resizes by \(16\.0, 16\.0\), where it did by \(8\.0, 8\.0\)",
    ),
    (
        smp.UPerNet,
        FPNLateralBlock,
        'mode="bilinear", align_corners=False',
        'mode="bilinear", align_corners=True',
        [f"decoder.fpn_lateral_blocks.{index}" for index in range(3)],
        "it resizes with mode='bilinear', align_corners=True, where it had",
    ),
    (
        smp.UPerNet,
        UPerNetDecoder,
        "for feature in fpn_features:",
        "for feature in reversed(fpn_features):",
        ["decoder:0", "decoder:1", "decoder:2"],
        "now stands in",
    ),
]


def doctor(monkeypatch: pytest.MonkeyPatch, cls: type, old: str, new: str, folder: Path) -> None:
    """Give a class of an installed library the forward that its next version might have."""
    function: Any = cls.forward  # type: ignore[attr-defined]
    text = textwrap.dedent(inspect.getsource(function))
    assert old in text
    file = folder / f"{cls.__name__}.py"
    file.write_text(f"class {cls.__name__}:\n" + textwrap.indent(text.replace(old, new), "    "))
    namespace = dict(function.__globals__)
    exec(compile(file.read_text(), str(file), "exec"), namespace)
    monkeypatch.setattr(cls, "forward", namespace[cls.__name__].forward)


def smp_model(cls: type[nn.Module], **options: Any) -> nn.Module:
    torch.manual_seed(0)
    return cls("resnet18", encoder_weights=None, classes=2, **options).eval()


@pytest.mark.parametrize(("cls", "changed", "old", "new", "sites", "says"), LATER)
def test_a_later_version_of_a_real_library(
    cls: type[nn.Module],
    changed: type[nn.Module],
    old: str,
    new: str,
    sites: list[str],
    says: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = patched(smp_model(cls))
    path = upswap.save(model, tmp_path / "model.safetensors")
    with torch.no_grad():
        expected = model(IMAGES)
    doctor(monkeypatch, changed, old, f"{old}\\\n", tmp_path)  # the same, on other lines
    with torch.no_grad():
        assert torch.equal(upswap.load(path)(IMAGES), expected)
    monkeypatch.undo()
    (tmp_path / "later").mkdir()
    doctor(monkeypatch, changed, old, new, tmp_path / "later")
    with pytest.raises(PlanError, match=says) as caught:
        upswap.load(path)
    assert [line.split(": ")[0].strip() for line in str(caught.value).splitlines()[1:]] == sites


def test_another_option_of_a_real_library(tmp_path: Path) -> None:
    path = upswap.save(patched(smp_model(smp.FPN)), tmp_path / "model.safetensors")
    with pytest.raises(PlanError, match="it resizes with mode='bilinear'") as caught:
        upswap.load(path, smp_model(smp.FPN, decoder_interpolation="bilinear"))
    lines = str(caught.value).splitlines()[1:]
    assert [line.split(": ")[0].strip() for line in lines] == ["decoder.p4", "decoder.p3", "decoder.p2"]


def test_a_description_of_inputs_may_be_of_any_size_and_kind() -> None:
    """It may come from a stranger: it is run with where that is harmless, and passed over elsewhere."""
    plan = upswap.inspect(smp_model(smp.Unet))
    tensor = {"tensor": [1, 3, 64, 64], "dtype": "float32"}
    for inputs in (
        {},
        {"args": {"tuple": [{"tensor": [1, 3, 10**6, 10**6], "dtype": "float32"}]}, "kwargs": {"dict": {}}},
        {"args": {"tuple": [{"tensor": [1, 3, -1, 64], "dtype": "float32"}]}, "kwargs": {"dict": {}}},
        {"args": {"tuple": [{"tensor": [1, 3, 64, 64], "dtype": "Tensor"}]}, "kwargs": {"dict": {}}},
        {"args": {"tuple": [tensor, {"value": 10**9}]}, "kwargs": {"dict": {}}},
        {"args": {"tuple": [tensor, tensor]}, "kwargs": {"dict": {}}},
        {"args": 3, "kwargs": []},
        {"value": 1},
        {"surprise": 1},
    ):
        upswap.patch(smp_model(smp.Unet), plan=dataclasses.replace(plan, inputs=inputs))


# ---- by hand


def test_a_model_saved_and_loaded_by_torch_alone(tmp_path: Path) -> None:
    for cls in (smp.Unet, smp.UPerNet, smp.Segformer):
        model = patched(smp_model(cls))
        torch.save(model, tmp_path / "model.pt")
        again = torch.load(tmp_path / "model.pt", weights_only=False)
        assert type(again).__mro__[0] is cls
        assert_same(again, model)
        assert upswap.plan_of(again) == upswap.plan_of(model)
        assert_same(upswap.unpatch(again), _unpatched(model))


def _unpatched(model: nn.Module) -> nn.Module:
    return upswap.unpatch(copy.deepcopy(model))


def test_a_copy_is_a_model_of_its_own() -> None:
    model = patched(unet())
    again = copy.deepcopy(model)
    assert_same(again, model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        for parameter in upswap.parameters(again):
            parameter.add_(1)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    upswap.unpatch(again)
    assert upswap.plan_of(model).swapped


def test_state_dicts_go_both_ways() -> None:
    model, original = patched(unet()), unet()
    other = upswap.patch(unet())
    assert other.load_state_dict(model.state_dict(), strict=True) == ([], [])
    assert_same(other, model)
    host = {name: tensor for name, tensor in model.state_dict().items() if name in original.state_dict()}
    assert original.load_state_dict(host, strict=True) == ([], [])
    missing, unexpected = model.load_state_dict(original.state_dict(), strict=False)
    assert not unexpected
    assert {name.rpartition(".upsample.")[0] for name in missing} == {
        site.name for site in upswap.plan_of(model).swapped
    }
    with pytest.raises(RuntimeError, match=r"Unexpected key.*decoder\.blocks\.0\.upsample"):
        unet().load_state_dict(model.state_dict(), strict=True)


WORKER = """
    import torch
    from torch.utils.data import Dataset

    class Computed(Dataset):
        def __init__(self, model, images):
            self.model, self.images = model, images

        def __len__(self):
            return len(self.images)

        def __getitem__(self, index):
            with torch.no_grad():
                return self.model(self.images[index:index + 1])[0]

    def compute(model, images):
        import upswap
        torch.set_num_threads(1)
        with torch.no_grad():
            return model(images).numpy(), [site.name for site in upswap.plan_of(model).swapped]
"""


def test_other_processes_have_the_same_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sent to a spawned process, which has imported nothing before, and to a worker of a DataLoader."""
    (tmp_path / "worker_side.py").write_text(textwrap.dedent(WORKER))
    monkeypatch.syspath_prepend(str(tmp_path))
    worker_side = importlib.import_module("worker_side")
    model = patched(unet())
    with torch.no_grad():
        expected = model(IMAGES)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        got, sites = pool.apply(worker_side.compute, (model, IMAGES))
    torch.testing.assert_close(torch.from_numpy(got), expected, rtol=0, atol=0)
    assert sites == [site.name for site in upswap.plan_of(model).swapped]
    dataset = worker_side.Computed(model, IMAGES)
    loader = DataLoader(dataset, batch_size=len(IMAGES), num_workers=1, multiprocessing_context="spawn")
    (batch,) = list(loader)
    # One image at a time, by kernels that sum in another order.
    torch.testing.assert_close(batch, expected, rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(batch, torch.stack([dataset[index] for index in range(len(IMAGES))]), rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:the file is written, and upswap.load will refuse it")
def test_pickles_of_changed_classes_name_all_sites(package: Package, tmp_path: Path) -> None:
    """Of all modules, where the reader asks for that; of the first, in a plain `pickle.loads`."""
    models = sys.modules["host_package.models"]
    whole = nn.Sequential(package.build("Branch"), nn.Conv2d(2, 3, 1), package.build("Straight"))
    path = upswap.save(upswap.patch(whole.eval()), tmp_path / "whole.pt")
    content = pickle.dumps(whole)
    assert models
    package.change("F.interpolate(self.conv(x), scale_factor=2.0", "F.interpolate(self.conv(x), scale_factor=3.0")
    with pytest.raises(
        PlanError, match=r"does not fit its class.*\n  0\.block:1: Branch\.forward no longer has the call"
    ):
        pickle.loads(content)
    with pytest.raises(PlanError) as caught:
        upswap.load(path, trust=["host_package"])
    assert re.findall(r"^  (\S+): ", str(caught.value), re.MULTILINE) == ["0.block:1", "2.block:0"]


def _many(sites: list[dict[str, Any]], what: str, count: int) -> list[dict[str, Any]]:
    """More sites beside those of a plan: copies of the second, which takes the source route."""
    made = []
    for index in range(count):
        one = copy.deepcopy(sites[1])
        one["name"] = f"{one['name']}{index}"
        if what == "kept":
            one |= {"swap": False, "module": None, "route": None}
        elif what == "of other calls":
            one["location"]["steps"][-1]["expression"] = f"F.interpolate({index})"
        elif what == "of other runs":
            one["location"]["occurrence"] = 2 + index
        elif what == "of other modules":
            one["owner"] = f"branch{index}"
        made.append(one)
    return sites + made


@pytest.mark.parametrize("what", ["kept", "of other calls", "of other runs", "of other modules"])
def test_a_plan_of_many_sites_takes_work_by_their_number(what: str) -> None:
    model = tiny()
    plan = upswap.plan_of(upswap.patch(tiny(), image())).to_dict()

    def work(count: int) -> int:
        sites = _many(plan["sites"], what, count)
        return calls_made(lambda: check_plan(model, Plan.from_dict({**plan, "sites": sites})))

    work(1)  # what is done once
    none, some, twice = work(0), work(200), work(400)
    assert some > none + 200
    assert twice - none < 2.2 * (some - none)


def test_sites_that_do_not_fit_make_no_message_without_end() -> None:
    plan = upswap.plan_of(upswap.patch(tiny(), image())).to_dict()
    plan["sites"] = _many(plan["sites"], "of other calls", 300)
    with pytest.raises(PlanError, match=r"no longer has the call[^$]*and \d+ more$") as caught:
        check_plan(tiny(), Plan.from_dict(plan))
    assert len(str(caught.value)) < 20_000


def test_inputs_without_elements_are_not_gone_along() -> None:
    class Loops(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)
            self.up = nn.Upsample(scale_factor=2)

        def forward(self, x):
            return torch.cat([self.conv(self.up(self.conv(one[None])[:, :3])) for one in x])

    plan = upswap.plan_of(upswap.patch(Loops().eval(), torch.zeros(2, 3, 8, 8))).to_dict()
    assert '"tensor": [2, 3, 8, 8]' in json.dumps(plan["inputs"])
    plan["inputs"] = json.loads(json.dumps(plan["inputs"]).replace("[2, 3, 8, 8]", "[1000000000, 3, 0, 0]"))
    assert calls_made(lambda: check_plan(Loops().eval(), Plan.from_dict(plan))) < 100_000
