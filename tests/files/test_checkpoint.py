"""Files: what goes in comes out, nothing from a file is run, and a broken one says what it is."""

from __future__ import annotations

import functools
import json
import math
import os
import pickle
import struct
import zipfile
from pathlib import Path
from typing import Any

import pytest
import segmentation_models_pytorch as smp
import torch
from torch import nn
from torch.nn import functional as F

import upswap
from models import IMAGES, assert_same, patched, unet
from upswap import OptionError, PlanError, SourceError
from upswap.files.checkpoint import read_header
from upswap.files.formats import pt
from upswap.files.formats import safetensors as portable

# ---- there and back


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("arch", ["Unet", "Segformer", "UPerNet", "DeepLabV3Plus"])
def test_a_patched_model_comes_back(arch: str, suffix: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = patched(getattr(smp, arch)("resnet18", encoder_weights=None, classes=2).eval())
    path = upswap.save(model, tmp_path / f"model{suffix}")
    again = upswap.load(path)
    assert isinstance(again, getattr(smp, arch))
    assert not again.training
    assert upswap.plan_of(again) == upswap.plan_of(model)
    assert list(upswap.upsamplers(again)) == list(upswap.upsamplers(model))
    assert_same(again, model)
    # What came back is as good as the first: it can be undone, and saved again.
    upswap.save(again, tmp_path / f"second{suffix}")
    assert upswap.upsamplers(again) != {}
    original = getattr(smp, arch)("resnet18", encoder_weights=None, classes=2)
    original.load_state_dict(upswap.unpatch(model).state_dict())
    assert_same(upswap.unpatch(again), original)


@pytest.mark.parametrize(
    "encoder",
    [
        "resnet18",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("mit_b0", "efficientnet-b0", "tu-convnext_atto")),
    ],
)
@pytest.mark.filterwarnings("ignore:Encoder does not have prefix tokens")  # SMP's DPT, on convolutional encoders
def test_whole_models_of_every_architecture_are_admitted(encoder: str, tmp_path: Path) -> None:
    loaded = 0
    for arch in smp.MODEL_ARCHITECTURES_MAPPING:
        try:
            model = smp.create_model(arch, encoder, encoder_weights=None)
        except (ValueError, TypeError):
            continue  # not every architecture takes every encoder
        torch.save(model, tmp_path / "model.pt")
        again = upswap.load(tmp_path / "model.pt")
        assert repr(again) == repr(model)
        assert type(again) is type(model)
        loaded += 1
    assert loaded >= 6


def test_transformers_are_admitted_too(tmp_path: Path) -> None:
    for arch, encoder in [("DPT", "tu-vit_tiny_patch16_224"), ("FPN", "tu-swin_tiny_patch4_window7_224")]:
        model = smp.create_model(arch, encoder, encoder_weights=None)
        torch.save(model, tmp_path / "model.pt")
        assert repr(upswap.load(tmp_path / "model.pt")) == repr(model)


def test_torchvision_detection_is_admitted_with_the_function_it_holds(tmp_path: Path) -> None:
    from torchvision.models import detection
    from torchvision.ops import box_iou

    model = detection.fasterrcnn_mobilenet_v3_large_320_fpn(weights=None, weights_backbone=None).eval()
    torch.save(model, tmp_path / "model.pt")
    again = upswap.load(tmp_path / "model.pt")
    assert again.rpn.box_similarity is box_iou
    with torch.no_grad():
        old, new = model([IMAGES[0]]), again([IMAGES[0]])
    assert torch.equal(old[0]["boxes"], new[0]["boxes"])


class Keeps(nn.Module):
    """A model that resizes by what an attribute holds."""

    def __init__(self, **kept: Any) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 2, 1)
        self.resize = functools.partial(F.interpolate, scale_factor=2)
        self.kept = kept

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.resize(self.first(x)))

    @functools.cached_property
    def layer(self) -> nn.Module:
        return nn.ReLU()


def test_a_resize_kept_in_an_attribute_comes_back(tmp_path: Path) -> None:
    model = patched(Keeps().eval())
    with pytest.warns(upswap.UpswapWarning, match="will refuse it without trust.*\n.*Keeps at Keeps.*\n.*--trust"):
        upswap.save(model, tmp_path / "model.pt")
    assert_same(upswap.load(tmp_path / "model.pt", trust=[__name__]), model)


@pytest.mark.parametrize(
    ("kept", "told"),
    [
        ({"way": math.sqrt}, r"math\.sqrt at kept\['way'\]"),
        (
            {"ways": [functools.partial(nn.ReLU, inplace=slice)]},
            r"a partial of more .*\n  at kept\['ways'\]\[0\].keywords\['inplace'\]",
        ),
        ({}, r"in the place of Keeps\.layer"),
    ],
)
def test_what_no_trust_opens_is_told_when_it_is_saved(kept: dict[str, Any], told: str, tmp_path: Path) -> None:
    model = patched(Keeps(**kept).eval())
    assert model.layer
    if kept:
        del model.__dict__["layer"]
    with pytest.warns(
        upswap.UpswapWarning, match=rf"(?s)will refuse it: .*{told}.*\nNo trust opens it\. A \.safetensors"
    ):
        upswap.save(model, tmp_path / "model.pt")
    with pytest.raises(upswap.UntrustedFileError):
        upswap.load(tmp_path / "model.pt", trust=[__name__])


def test_a_class_held_as_a_value_is_the_class_again(tmp_path: Path) -> None:
    model = unet()
    model.norm = nn.BatchNorm2d
    model.norms = {"a": [nn.BatchNorm2d, nn.LayerNorm], "b": (nn.GroupNorm,)}
    torch.save(model, tmp_path / "model.pt")
    again = upswap.load(tmp_path / "model.pt")
    assert again.norm is nn.BatchNorm2d
    assert again.norms == {"a": [nn.BatchNorm2d, nn.LayerNorm], "b": (nn.GroupNorm,)}


def test_a_half_precision_model_stays_one(tmp_path: Path) -> None:
    model = patched(unet()).bfloat16()
    again = upswap.load(upswap.save(model, tmp_path / "model.safetensors"))
    assert {p.dtype for p in again.parameters()} == {torch.bfloat16}


def test_shared_and_overlapping_tensors(tmp_path: Path) -> None:
    model = unet()
    model.encoder.layer1[0].conv1.weight = model.encoder.layer1[0].conv2.weight
    whole = torch.randn(4)
    model.register_buffer("part", whole[:2])
    model.register_buffer("other", whole[1:])
    path = upswap.save(patched(model), tmp_path / "model.safetensors")
    assert read_header(path)["shared"] == {"encoder.layer1.0.conv2.weight": "encoder.layer1.0.conv1.weight"}
    # The spec builds a model without the two buffers, so it is not kept, and the file says that it needs the model.
    with pytest.raises(SourceError, match="pass it"):
        upswap.load(path)
    base = unet()
    base.register_buffer("part", torch.zeros(2))
    base.register_buffer("other", torch.zeros(3))
    assert_same(upswap.load(path, base), model)


def test_a_file_for_a_model_without_a_spec_takes_the_model(tmp_path: Path) -> None:
    model = patched(unet(activation=nn.Sigmoid))
    path = upswap.save(model, tmp_path / "model.safetensors")
    with pytest.raises(SourceError, match=r"pass it: upswap\.load"):
        upswap.load(path)
    assert_same(upswap.load(path, unet(activation=nn.Sigmoid)), model)
    with pytest.raises(PlanError, match="plan"):
        upswap.load(path, smp.FPN("resnet18", encoder_weights=None))


def test_an_unpatched_model_is_saved_as_it_is(tmp_path: Path) -> None:
    for suffix in (".pt", ".safetensors"):
        again = upswap.load(upswap.save(unet(), tmp_path / f"model{suffix}"))
        with pytest.raises(PlanError):
            upswap.plan_of(again)
        assert_same(again, unet())


def test_the_same_model_gives_the_same_bytes(tmp_path: Path) -> None:
    model = patched(unet())
    for suffix in (".pt", ".safetensors"):
        one, two = (upswap.save(model, tmp_path / f"{name}{suffix}") for name in ("one", "two"))
        assert one.read_bytes() == two.read_bytes()


def test_a_safetensors_holds_no_code(tmp_path: Path) -> None:
    path = upswap.save(
        patched(unet()), tmp_path / "model.safetensors", source="smp:unet?encoder_name=resnet18&classes=2"
    )
    header = read_header(path)
    assert header["source"] == "smp:unet?encoder_name=resnet18&classes=2"
    assert header["upswap_version"] == upswap.__version__
    assert upswap.Plan.from_dict(header["plan"]).swapped
    assert b"\x80\x02" not in path.read_bytes()[:16]


def test_model_is_for_safetensors(tmp_path: Path) -> None:
    path = upswap.save(unet(), tmp_path / "model.pt")
    with pytest.raises(OptionError, match="whole model"):
        upswap.load(path, unet())


# ---- what is not a model


def test_every_other_file_says_what_it_is(tmp_path: Path) -> None:
    model = unet()
    torch.save(model, tmp_path / "model.pt")
    whole = (tmp_path / "model.pt").read_bytes()
    upswap.save(patched(unet()), tmp_path / "model.safetensors")
    tensors = (tmp_path / "model.safetensors").read_bytes()

    def file(name: str, content: bytes) -> Path:
        (tmp_path / name).write_bytes(content)
        return tmp_path / name

    def saved(name: str, value: Any) -> Path:
        torch.save(value, tmp_path / name)
        return tmp_path / name

    scripted = tmp_path / "scripted.pt"
    with zipfile.ZipFile(scripted, "w") as archive:
        for name in ("data.pkl", "constants.pkl", "code/x.py", "version"):
            archive.writestr(f"scripted/{name}", b"3")
    foreign = tmp_path / "foreign.zip"
    with zipfile.ZipFile(foreign, "w") as archive:
        archive.writestr("hello.txt", "hello")
    (tmp_path / "folder").mkdir()
    exported = tmp_path / "exported.pt2"
    torch.export.save(torch.export.export(nn.Conv2d(1, 1, 1), (torch.zeros(1, 1, 4, 4),)), exported)

    cases = {
        tmp_path / "nothing.pt": "there is no file",
        tmp_path / "folder": "is a folder",
        file("empty.pt", b""): "is empty",
        file("text.pt", b"hello"): "is no file of torch.save",
        file("graph.onnx", b"\x08\x0a"): "is an ONNX graph, in which there is no module to patch",
        file("photo.PNG", b"\x89PNG"): "is an image, no model",
        file("book.ipynb", b"{}"): "is a notebook",
        file("net.py", b"import torch"): "is Python code",
        Path(
            "unet"
        ): "there is no file unet. A model of a library has the library before its name: smp:unet, timm:unet",
        file("lfs.pt", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"): "git lfs pull",
        file("bare.pt", pickle.dumps({"a": 1})): "bare pickle",
        file("short.pt", whole[: len(whole) // 2]): "truncated",
        file("header.pt", whole[:10]): "truncated",
        file("flipped.pt", _flip_pickle(whole)): "",
        file("short.safetensors", tensors[:-100]): "not a whole .safetensors",
        file("none.safetensors", b""): "is empty",
        file("bad.safetensors", b"\xff" * 64): "not a whole .safetensors",
        saved("state.pt", model.state_dict()): "state dict",
        saved("wrapped.pt", {"state_dict": model.state_dict(), "epoch": 3}): "state dict",
        saved("training.pt", {"model": model, "ema": unet(), "epoch": 3}): "--key ema",
        saved("tensor.pt", torch.zeros(3)): "holds a Tensor",
        saved("dict.pt", {"a": 1}): "'a'",
        scripted: "TorchScript",
        exported: "ExportedProgram",
        foreign: "zip archive",
    }
    for path, says in cases.items():
        with pytest.raises(SourceError) as caught:
            upswap.load(path)
        assert says in str(caught.value), path.name
        assert path.name in str(caught.value)


def _flip_pickle(whole: bytes) -> bytes:
    """A byte of the pickle inside turned over."""
    at = whole.index(b"\x80\x02") + 40
    return whole[:at] + bytes([whole[at] ^ 0xFF]) + whole[at + 1 :]


def test_a_state_dict_says_how_to_name_its_architecture(tmp_path: Path) -> None:
    torch.save(unet().state_dict(), tmp_path / "weights.pt")
    with pytest.raises(SourceError, match=r"encoder\.conv1\.weight.*--weights"):
        upswap.load(tmp_path / "weights.pt")


def test_a_file_of_a_newer_upswap_says_so(tmp_path: Path) -> None:
    path = upswap.save(patched(unet()), tmp_path / "model.safetensors")
    tensors, header = portable.read(path)
    portable.write(tensors, {portable.HEADER_KEY: json.dumps({**header, "schema": 99, "upswap_version": "9.0"})}, path)
    with pytest.raises(SourceError, match=r"written by upswap 9\.0"):
        upswap.load(path)
    header["plan"]["schema"] = 99
    portable.write(tensors, {portable.HEADER_KEY: json.dumps(header)}, path)
    with pytest.raises(PlanError, match="schema"):
        upswap.load(path)


def test_weights_of_another_model_are_named(tmp_path: Path) -> None:
    path = upswap.save(patched(unet()), tmp_path / "model.safetensors")
    with pytest.raises(SourceError, match=r"segmentation_head\.0\.weight is \(2, "):
        upswap.load(path, unet(classes=3))


def test_json_of_the_header_is_readable_by_others(tmp_path: Path) -> None:
    path = upswap.save(patched(unet()), tmp_path / "model.safetensors")
    with open(path, "rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        metadata = json.loads(file.read(length))["__metadata__"]
    assert json.loads(metadata["upswap"])["plan"]["options"]["config"]["style"] == "lp"


def test_a_pt_that_is_written_to_while_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = upswap.save(
        patched(nn.Sequential(nn.Conv2d(3, 4, 1), nn.Upsample(scale_factor=2), nn.Conv2d(4, 4, 1))),
        tmp_path / "model.pt",
    )
    unpickled = pt._unpickled

    def read_meanwhile(*args: Any) -> Any:
        found = unpickled(*args)
        with open(path, "r+b") as file:
            file.write(b"PK")  # as it was, but at another time
        os.utime(path, ns=(0, 0))
        return found

    monkeypatch.setattr(pt, "_unpickled", read_meanwhile)
    with pytest.raises(SourceError, match="was written to while it was read; load it again"):
        upswap.load(path)
