"""Files: what goes in comes out, nothing from a file is run, and a broken one says what it is."""

from __future__ import annotations

import copy
import functools
import io
import json
import os
import pickle
import signal
import struct
import subprocess
import sys
import textwrap
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest
import segmentation_models_pytorch as smp
import torch
from torch import nn

import upswap
from upswap import OptionError, PlanError, SaveError, SourceError, UntrustedFileError, UpswapWarning, trust
from upswap.checkpoint import read_header

IMAGES = torch.randn(2, 3, 128, 128, generator=torch.Generator().manual_seed(0))


def unet(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    return smp.Unet("resnet18", encoder_weights=None, **{"classes": 2, **options}).eval()


def patched(model: nn.Module) -> nn.Module:
    """Patched, and with offsets large enough that a lost or misplaced upsampler shows in the output."""
    upswap.patch(model)
    with torch.no_grad():
        for parameter in upswap.parameters(model):
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)), alpha=0.3)
    return model


def assert_same(got: nn.Module, expected: nn.Module) -> None:
    assert list(got.state_dict()) == list(expected.state_dict())
    for key, tensor in expected.state_dict().items():
        torch.testing.assert_close(got.state_dict()[key], tensor, rtol=0, atol=0)
    with torch.no_grad():
        torch.testing.assert_close(got.eval()(IMAGES), expected.eval()(IMAGES), rtol=0, atol=0)


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


@pytest.mark.parametrize("encoder", ["resnet18", "mit_b0", "efficientnet-b0", "tu-convnext_atto"])
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


# ---- nothing is run


class Reduced:
    """Pickles as a call of `function(*args)`."""

    def __init__(self, function: Any, *args: Any) -> None:
        self.call = (function, args)

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call


class Global:
    """A GLOBAL instruction of any name, for names that pickle would not write."""

    def __init__(self, module: str, name: str) -> None:
        self.module, self.name = module, name


class _Pickler(pickle._Pickler):  # type: ignore[name-defined]
    dispatch = copy.copy(pickle._Pickler.dispatch)  # type: ignore[attr-defined]

    def save_global_of(self, obj: Global) -> None:
        self.write(pickle.GLOBAL + f"{obj.module}\n{obj.name}\n".encode())

    dispatch[Global] = save_global_of


def write_pt(path: Path, pickled: bytes) -> Path:
    """A file as torch.save makes them, with any pickle inside."""
    torch.save({"x": torch.zeros(1)}, path)
    with zipfile.ZipFile(path) as archive:
        records = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, data in records.items():
            archive.writestr(name, pickled if name.endswith("data.pkl") else data)
    return path


def pickled(value: Any) -> bytes:
    buffer = io.BytesIO()
    _Pickler(buffer, protocol=2).dump(value)
    return buffer.getvalue()


class _Call:
    """GLOBAL, arguments, REDUCE by hand: `function` is a Global."""

    def __init__(self, function: Global, *args: Any) -> None:
        self.function, self.args = function, args


def _save_call(pickler: Any, call: _Call) -> None:
    pickler.save(call.function)
    pickler.save(call.args)
    pickler.write(pickle.REDUCE)


_Pickler.dispatch[_Call] = _save_call


class _New(_Call):
    """The same with NEWOBJ: `cls.__new__(cls, *args)`, then BUILD with a state."""

    state: Any = None


def _save_new(pickler: Any, new: _New) -> None:
    pickler.save(new.function)
    pickler.save(new.args)
    pickler.write(pickle.NEWOBJ)
    if new.state is not None:
        pickler.save(new.state)
        pickler.write(pickle.BUILD)


_Pickler.dispatch[_New] = _save_new


def new(cls: Global, *args: Any, state: Any = None) -> _New:
    result = _New(cls, *args)
    result.state = state
    return result


def attacks(mark: Path) -> dict[str, tuple[Any, str]]:
    """What a file could hold: the pickled value, and what the refusal names. The first would make the file `mark`."""
    command = f"touch {mark}"
    python = f"open({str(mark)!r}, 'w')"
    module_list = Global("torch.nn.modules.container", "ModuleList")
    return {
        "os.system": (_Call(Global("os", "system"), command), "os.system"),
        "posix.system": (_Call(Global("posix", "system"), command), "posix.system"),
        "eval": (_Call(Global("builtins", "eval"), python), "builtins.eval"),
        "eval, as Python 2 named it": (_Call(Global("__builtin__", "eval"), python), "builtins.eval"),
        "getattr chain": (_Call(_Call(Global("builtins", "getattr"), Global("os", "path"), "os"), command), "getattr"),
        "subprocess": (_Call(Global("subprocess", "Popen"), ["touch", str(mark)]), "subprocess.Popen"),
        "partial": (_Call(_Call(Global("functools", "partial"), Global("os", "system"), command)), "functools.partial"),
        "nested torch.load": (_Call(Global("torch.serialization", "load"), str(mark)), "torch.serialization.load"),
        "torch.hub": (_Call(Global("torch.hub", "load"), "evil/repo", "m"), "torch.hub.load"),
        "a function of an admitted package": (
            _Call(Global("timm.models._factory", "create_model"), "resnet10t"),
            "create_model",
        ),
        "a module passing through an admitted package": (Global("timm.models._hub", "Path"), "passing through"),
        "an import by an admitted package": (
            _Call(Global("torch.nn.modules.module.os", "system"), command),
            "torch.nn.modules.module.os",
        ),
        "a GraphModule": (new(Global("torch.fx.graph_module", "GraphModule"), state={"_code": python}), "GraphModule"),
        "a GraphModule of torchvision": (
            new(Global("torchvision.models.feature_extraction", "DualGraphModule"), state={"_code": python}),
            "DualGraphModule",
        ),
        "a ScriptModule": (new(Global("torch.jit._script", "RecursiveScriptModule")), "RecursiveScriptModule"),
        "a constructor": (
            _Call(Global("segmentation_models_pytorch.decoders.unet.model", "Unet"), "resnet18", 5, "imagenet"),
            "call",
        ),
        "__new__ with arguments": (new(module_list, [1]), "arguments"),
        "a constructor through an enumeration's door": (_Call(module_list, [1]), "call"),
        "an admitted function": (_Call(Global("torchvision.ops.boxes", "box_iou"), 1, 2), "call"),
        "through torch's own rebuilding": (
            _Call(
                Global("torch._tensor", "_rebuild_from_type_v2"),
                Global("os", "system"),
                Global("os", "system"),
                (command,),
                {},
            ),
            "os.system",
        ),
        "a path through a class": (Global("torch.nn.Module.__init__.__globals__", "os"), "torch.nn"),
    }


NAMES = list(attacks(Path("mark")))


@pytest.mark.parametrize("name", NAMES)
def test_a_file_cannot_run_code(name: str, tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    value, says = attacks(mark)[name]
    path = write_pt(tmp_path / "evil.pt", pickled(value))
    with pytest.raises((UntrustedFileError, SourceError)) as caught:
        upswap.load(path)
    assert says in str(caught.value)
    assert not mark.exists()


@pytest.mark.parametrize("name", ["os.system", "eval", "subprocess"])
def test_the_attacks_are_real(name: str, tmp_path: Path) -> None:
    """The same pickles do run when nothing guards them, so the test above can fail."""
    mark = tmp_path / "ran"
    process = pickle.loads(pickled(attacks(mark)[name][0]))
    for end in ("wait", "close"):
        getattr(process, end, int)()
    assert mark.exists()


PACKAGE = """
    from pathlib import Path
    Path({mark!r}).touch()
    import torch
    class Net(torch.nn.Module):
        def forward(self, x):
            return x
    """


def _own_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> Path:
    """A package whose import leaves a mark, on the path, and a file with a model of its class."""
    mark = tmp_path / "imported"
    (tmp_path / f"{name}.py").write_text(textwrap.dedent(PACKAGE.format(mark=str(mark))))
    monkeypatch.syspath_prepend(str(tmp_path))
    module = __import__(name)
    torch.save(module.Net(), tmp_path / "own.pt")
    mark.unlink()
    monkeypatch.delitem(sys.modules, name)
    return mark


def test_a_package_of_ones_own_is_not_even_imported_without_trust(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mark = _own_package(tmp_path, monkeypatch, "nets_of_mine")
    with pytest.raises(UntrustedFileError, match="--trust nets_of_mine"):
        upswap.load(tmp_path / "own.pt")
    with pytest.raises(UntrustedFileError, match="--trust nets_of_mine"):
        upswap.load(tmp_path / "own.pt", trust=["nets", "other"])
    assert not mark.exists()
    assert type(upswap.load(tmp_path / "own.pt", trust=["nets_of_mine"])).__name__ == "Net"
    assert mark.exists()
    monkeypatch.delitem(sys.modules, "nets_of_mine")


def test_a_name_that_only_looks_like_an_admitted_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mark = _own_package(tmp_path, monkeypatch, "timm_models")
    with pytest.raises(UntrustedFileError, match="timm_models"):
        upswap.load(tmp_path / "own.pt")
    assert not mark.exists()


@pytest.mark.parametrize("package", ["os", "builtins", "functools", "subprocess.run"])
def test_python_itself_cannot_be_trusted_away(package: str, tmp_path: Path) -> None:
    path = write_pt(tmp_path / "evil.pt", pickled(_Call(Global("os", "system"), "true")))
    with pytest.raises(OptionError, match="part of Python"):
        upswap.load(path, trust=[package])


@pytest.mark.parametrize("package", ["", "a b", "../x", "a..b"])
def test_trust_takes_package_names(package: str, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="package"):
        upswap.load(upswap.save(unet(), tmp_path / "model.pt"), trust=[package])


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_names_in_a_plan_cannot_become_code(suffix: str, tmp_path: Path) -> None:
    """The graph route writes source code with the upsampler's name in it."""
    mark = tmp_path / "ran"
    model = upswap.patch(smp.UPerNet("resnet18", encoder_weights=None).eval())
    path = upswap.save(model, tmp_path / f"model{suffix}")
    old = b"decoder.fpn_lateral_blocks.0.upsample"
    evil = 'decoder.fpn_lateral_blocks.0.conv_norm_relu") and exec("open(MARK, chr(119))") or getattr(self, "x'
    evil = evil.replace("MARK", "+".join(f"chr({ord(c)})" for c in str(mark)))
    if suffix == ".pt":
        with zipfile.ZipFile(path) as archive:
            data = archive.read("archive/data.pkl")
        length = struct.pack("<I", len(old))
        data = data.replace(b"X" + length + old, b"X" + struct.pack("<I", len(evil)) + evil.encode())
        path = _repacked(path, data)
    else:
        tensors, header = upswap.checkpoint._read_safetensors(path)
        for site in header["plan"]["sites"]:
            if site["module"] == old.decode():
                site["module"] = evil
        upswap.checkpoint._write_safetensors(tensors, header, path)
    with pytest.raises(UntrustedFileError, match="names an upsampler"):
        upswap.load(path)(IMAGES)
    assert not mark.exists()


def _repacked(path: Path, data: bytes) -> Path:
    with zipfile.ZipFile(path) as archive:
        records = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, content in records.items():
            archive.writestr(name, data if name.endswith("data.pkl") else content)
    return path


def test_a_header_may_not_send_for_anything(tmp_path: Path) -> None:
    path = upswap.save(patched(unet()), tmp_path / "model.safetensors")
    tensors, header = upswap.checkpoint._read_safetensors(path)
    header["source"] = "timm:hf-hub:evil/model"
    upswap.checkpoint._write_safetensors(tensors, header, path)
    with pytest.raises(UntrustedFileError, match="fetched from elsewhere"):
        upswap.load(path)


def test_saving_what_loading_would_refuse_says_so(tmp_path: Path) -> None:
    model = unet()
    model.make = functools.partial(nn.LayerNorm, eps=1e-6)
    with pytest.warns(UpswapWarning, match=r"functools\.partial"):
        upswap.save(model, tmp_path / "model.pt")


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
        saved("training.pt", {"model": model, "epoch": 3}): "models under model",
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


def test_a_class_that_has_moved_and_a_package_that_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_pt(tmp_path / "moved.pt", pickled(new(Global("timm.layers.nowhere", "Layer"), state={})))
    with pytest.raises(SourceError, match="has moved"):
        upswap.load(path)
    path = write_pt(tmp_path / "moved2.pt", pickled(new(Global("timm.layers.norm", "Nowhere"), state={})))
    with pytest.raises(SourceError, match="has moved"):
        upswap.load(path)
    monkeypatch.setattr(trust, "PACKAGES", (*trust.PACKAGES, "no_such_package"))
    path = write_pt(tmp_path / "missing.pt", pickled(new(Global("no_such_package.nets", "UNet"), state={})))
    with pytest.raises(SourceError, match="pip install no_such_package"):
        upswap.load(path)


def test_a_file_of_a_newer_upswap_says_so(tmp_path: Path) -> None:
    path = upswap.save(patched(unet()), tmp_path / "model.safetensors")
    tensors, header = upswap.checkpoint._read_safetensors(path)
    upswap.checkpoint._write_safetensors(tensors, {**header, "schema": 99, "upswap_version": "9.0"}, path)
    with pytest.raises(SourceError, match=r"written by upswap 9\.0"):
        upswap.load(path)
    header["plan"]["schema"] = 99
    upswap.checkpoint._write_safetensors(tensors, header, path)
    with pytest.raises(PlanError, match="schema"):
        upswap.load(path)


def test_weights_of_another_model_are_named(tmp_path: Path) -> None:
    path = upswap.save(patched(unet()), tmp_path / "model.safetensors")
    with pytest.raises(SourceError, match=r"segmentation_head\.0\.weight is \(2, "):
        upswap.load(path, unet(classes=3))


# ---- writing


def test_the_target_is_guarded(tmp_path: Path) -> None:
    model = unet()
    source = upswap.save(model, tmp_path / "source.pt")
    before = source.read_bytes()
    with pytest.raises(SaveError, match="source itself"):
        upswap.save(model, source, source=source, force=True)
    link = tmp_path / "link.pt"
    link.symlink_to(source)
    with pytest.raises(SaveError, match="source itself"):
        upswap.save(model, link, source=source, force=True)
    with pytest.raises(SaveError, match="--force"):
        upswap.save(model, source)
    with pytest.raises(SaveError, match="is a folder"):
        upswap.save(
            model, tmp_path.with_suffix(".pt") if tmp_path.with_suffix(".pt").is_dir() else _folder(tmp_path / "d.pt")
        )
    with pytest.raises(SaveError, match="no folder"):
        upswap.save(model, tmp_path / "missing" / "model.pt")
    with pytest.raises(SaveError, match="must end in"):
        upswap.save(model, tmp_path / "model.bin")
    assert source.read_bytes() == before
    model.segmentation_head[0].bias.data += 1
    upswap.save(model, source, force=True)
    assert source.read_bytes() != before


def _folder(path: Path) -> Path:
    path.mkdir()
    return path


def test_a_read_only_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Root may write anywhere, so the answer of the system is stood in for.
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(SaveError, match="read-only"):
        upswap.save(unet(), tmp_path / "model.pt")


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_full_disk_leaves_nothing(suffix: str, tmp_path: Path) -> None:
    """A limit on the size of files stands in for the disk's: the write fails half-way through."""
    code = f"""
        import resource, signal, sys
        import torch, upswap
        model = torch.nn.Linear(1000, 1000)
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))
        try:
            upswap.save(model, {str(tmp_path / f"model{suffix}")!r})
        except upswap.SaveError as error:
            sys.stdout.write(str(error))
            sys.exit(7)
        """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=False)
    assert done.returncode == 7, done.stderr
    assert "cannot be written" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_cannot_be_pickled(tmp_path: Path) -> None:
    model = unet()
    model.hook = lambda x: x
    with pytest.raises(SaveError, match="cannot be pickled"):
        upswap.save(model, tmp_path / "model.pt")
    assert list(tmp_path.iterdir()) == []
    model.register_buffer("extra", None)
    upswap.save(model, tmp_path / "model.safetensors")


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_killed_while_writing(suffix: str, tmp_path: Path) -> None:
    """The target is whole whatever moment the process dies at: the old file or a new one, never a part."""
    target = upswap.save(nn.Linear(1500, 1500), tmp_path / f"model{suffix}")
    code = f"""
        import sys, torch, upswap
        model = torch.nn.Linear(1500, 1500)
        sys.stdout.write("ready\\n"); sys.stdout.flush()
        while True:
            upswap.save(model, {str(target)!r}, force=True)
            sys.stdout.write("."); sys.stdout.flush()
        """
    for delay in (0.003, 0.05, 0.11, 0.2, 0):
        child = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, text=True)
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        if delay:
            time.sleep(delay)
        else:
            child.stdout.read(1)  # once a save is done, however slow the machine
        child.send_signal(signal.SIGKILL)
        child.communicate()
        model = upswap.load(target, nn.Linear(1500, 1500) if suffix == ".safetensors" else None)
        assert torch.isfinite(model.weight).all()


def test_json_of_the_header_is_readable_by_others(tmp_path: Path) -> None:
    path = upswap.save(patched(unet()), tmp_path / "model.safetensors")
    with open(path, "rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        metadata = json.loads(file.read(length))["__metadata__"]
    assert json.loads(metadata["upswap"])["plan"]["options"]["style"] == "lp"
