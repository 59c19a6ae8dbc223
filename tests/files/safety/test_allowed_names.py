"""Nothing from a file is run."""

from __future__ import annotations

import json
import pickle
import struct
import subprocess
import sys
import textwrap
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import segmentation_models_pytorch as smp
import torch
from torch import nn

import upswap
from models import IMAGES, patched, unet
from raw_pickle import Call, Global, New, Raw, module, pickled, records, repacked, write_pt
from upswap import OptionError, PlanError, SourceError, UntrustedFileError
from upswap.files.formats import safetensors as portable
from upswap.files.safety import allowed_names as trust


def rewritten(argument: Any) -> Call:
    """A module whose rewriting traces its forward with an argument made from a description."""
    forward = {"arguments": {"args": {"tuple": [argument]}, "kwargs": {"dict": {}}}, "children": []}
    cls = Global("segmentation_models_pytorch.decoders.fpn.decoder", "FPNBlock")
    record = {"schema": 1, "path": "", "sites": [], "forward": forward}
    return Call(Global("upswap.surgery", "restore"), cls, record, state={})


def attacks(mark: Path) -> dict[str, tuple[Any, str]]:
    """What a file could hold: the pickled value, and what the refusal names. The first would make the file `mark`."""
    command = f"touch {mark}"
    python = f"open({str(mark)!r}, 'w')"
    module_list = Global("torch.nn.modules.container", "ModuleList")
    return {
        "os.system": (Call(Global("os", "system"), command), "os.system"),
        "posix.system": (Call(Global("posix", "system"), command), "posix.system"),
        "eval": (Call(Global("builtins", "eval"), python), "builtins.eval"),
        "eval, as Python 2 named it": (Call(Global("__builtin__", "eval"), python), "builtins.eval"),
        "getattr chain": (Call(Call(Global("builtins", "getattr"), Global("os", "path"), "os"), command), "os.path"),
        "subprocess": (Call(Global("subprocess", "Popen"), ["touch", str(mark)]), "subprocess.Popen"),
        "partial": (Call(Call(Global("functools", "partial"), Global("os", "system"), command)), "os.system"),
        "nested torch.load": (Call(Global("torch.serialization", "load"), str(mark)), "torch.serialization.load"),
        "torch.hub": (Call(Global("torch.hub", "load"), "evil/repo", "m"), "torch.hub.load"),
        "a function of an admitted package": (
            Call(Global("timm.models._factory", "create_model"), "resnet10t"),
            "create_model",
        ),
        "a module passing through an admitted package": (Global("timm.models._hub", "Path"), "passing through"),
        "an import by an admitted package": (
            Call(Global("torch.nn.modules.module.os", "system"), command),
            "torch.nn.modules.module.os",
        ),
        "a GraphModule": (New(Global("torch.fx.graph_module", "GraphModule"), state={"_code": python}), "GraphModule"),
        "a GraphModule of torchvision": (
            New(Global("torchvision.models.feature_extraction", "DualGraphModule"), state={"_code": python}),
            "DualGraphModule",
        ),
        "a ScriptModule": (New(Global("torch.jit._script", "RecursiveScriptModule")), "RecursiveScriptModule"),
        "a constructor": (
            Call(Global("segmentation_models_pytorch.decoders.unet.model", "Unet"), "resnet18", 5, "imagenet"),
            "call",
        ),
        "__new__ with arguments": (New(module_list, [1]), "arguments"),
        "a constructor through an enumeration's door": (Call(module_list, [1]), "call"),
        "an admitted function": (Call(Global("torchvision.ops.boxes", "box_iou"), 1, 2), "call"),
        "through torch's own rebuilding": (
            Call(
                Global("torch._tensor", "_rebuild_from_type_v2"),
                Global("os", "system"),
                Global("os", "system"),
                (command,),
                {},
            ),
            "os.system",
        ),
        "INST": (Raw(b"(S'" + command.encode() + b"'\nios\nsystem\n."), "damaged"),
        "OBJ": (Raw(b"(cos\nsystem\nS'" + command.encode() + b"'\no."), "damaged"),
        "STACK_GLOBAL": (Raw(b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x01a\x85R."), "damaged"),
        "NEWOBJ_EX": (Raw(b"\x80\x04cos\nsystem\n)}\x92."), "damaged"),
        "the extension registry": (Raw(b"\x80\x02\x82\x01)R."), "damaged"),
        "a persistent id of text": (Raw(b"\x80\x02Pos.system\n."), "damaged"),
        "a persistent id that is no storage": (
            Raw(pickle.dumps(("module", "os", "system"), 2)[:-1] + b"Q."),
            "storage",
        ),
        "a call of a result": (Call(Call(Global("collections", "OrderedDict")), 1), "not a name"),
        "a partial without a call": (
            Call(Global("functools", "partial"), Global("os", "system"), command),
            "os.system",
        ),
        "a letter of another alphabet": (New(Global("torch.nn.modules.line\u0430r", "Linear"), state={}), "not a name"),
        "a class that only looks like one": (
            New(Global("torch.nn.modules.linear.Linear", "Linear"), state={}),
            "moved",
        ),
        "a class of the command line": (Call(Global("upswap.apps.cli", "main"), []), "upswap.apps.cli.main"),
        "upswap's own rewriting, by its class": (
            New(Global("upswap.surgery.rewritten_class", "Pending"), state={}),
            "Pending",
        ),
        "a remote caller beside plain values": (
            New(Global("ultralytics.utils.triton", "TritonRemoteModel"), state={"url": "http://localhost"}),
            "TritonRemoteModel",
        ),
        "a class that runs code beside plain values": (New(Global("ultralytics.utils", "TryExcept")), "TryExcept"),
        "a class as a forward hook": (
            module("linear.Identity", _forward_hooks=OrderedDict({0: Global("torch.nn.modules.linear", "Linear")})),
            "_forward_hooks",
        ),
        "a class as a state dict hook": (
            module(
                "linear.Identity", _state_dict_pre_hooks=OrderedDict({0: Global("torch.nn.modules.linear", "Linear")})
            ),
            "_state_dict_pre_hooks",
        ),
        "a class as the forward": (
            module("linear.Identity", forward=Global("torch.nn.modules.linear", "Linear")),
            "forward",
        ),
        "a class as another method": (
            module("linear.Identity", eval=Global("torch.nn.modules.linear", "Linear")),
            "eval",
        ),
        "a class that evaluates its options, to be called": (
            module("linear.Identity", act=[Global("segmentation_models_pytorch.decoders.unet.model", "Unet")]),
            "Unet",
        ),
        "an object in a NumPy scalar": (
            Call(Global("numpy.core.multiarray", "scalar"), Call(Global("numpy", "dtype"), "O8", False, True), b"x"),
            "NumPy",
        ),
        "a rewritten module of no class": (
            Call(Global("upswap.surgery", "restore"), 1, {"sites": []}),
            "rewritten",
        ),
        "a rewritten module of another class": (
            Call(Global("upswap.surgery", "restore"), Global("torch", "Size"), {"sites": []}, state={}),
            "not a module",
        ),
        "a rewritten module without a description": (
            Call(Global("upswap.surgery", "restore"), module_list, ["sites"], state={}),
            "form upswap does not write",
        ),
        "a module of torch in the place of a number": (rewritten({"dtype": "hub"}), "hub"),
        "an object of another library as an argument": (
            rewritten({"instance": ["subprocess", "Popen", {"args": {"value": command}}]}),
            "Popen",
        ),
        "an argument whose module would import more": (
            rewritten({"instance": ["transformers", "AutoModel", {}]}),
            "AutoModel",
        ),
        "a path through a class": (Global("torch.nn.Module.__init__.__globals__", "os"), "torch.nn"),
    }


NAMES = list(attacks(Path("mark")))


@pytest.mark.parametrize("name", NAMES)
def test_a_file_cannot_run_code(name: str, tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    value, says = attacks(mark)[name]
    path = write_pt(tmp_path / "evil.pt", pickled(value))
    with pytest.raises((SourceError, PlanError)) as caught:
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


WATCHED = """
    import sys
    from pathlib import Path
    sys.path[:0] = {paths!r}
    import pickle
    import monai.networks.nets, timm, torchvision, transformers, segmentation_models_pytorch, upswap
    import zoos.ultralytics_zoo  # importing it asks the network, without the settings there
    from fuzz.guard import Watch, watched

    watch = Watch()
    for path in sorted(Path({folder!r}).glob("*.pt")):
        outcome = watched(upswap.load, path, watch)
        assert outcome.ended in ("UntrustedFileError", "SourceError", "PlanError") and not outcome.wrong, (path, outcome)
    outcome = watched(lambda path: pickle.loads({control!r}), path, watch)
    assert "os.system" in outcome.wrong, outcome
    print("all refused")
    """


def test_nothing_is_run_that_python_itself_would_notice(tmp_path: Path) -> None:
    """Python's audit events, in a process of its own: no call, import, file or code, for any of the attacks."""
    for index, (value, _) in enumerate(attacks(tmp_path / "ran").values()):
        write_pt(tmp_path / f"{index:02}.pt", pickled(value))
    tests = Path(__file__).parents[2]
    paths = [str(tests), str(tests / "libraries"), str(Path(upswap.__file__).parents[1])]
    control = pickled(Call(Global("os", "system"), "true"))
    code = textwrap.dedent(WATCHED.format(paths=paths, folder=str(tmp_path), control=control))
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert ran.stdout == "all refused\n", ran.stdout + ran.stderr[-3000:]
    assert not (tmp_path / "ran").exists()


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
    path = write_pt(tmp_path / "evil.pt", pickled(Call(Global("os", "system"), "true")))
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
        data = records(path)["archive/data.pkl"]
        length = struct.pack("<I", len(old))
        data = data.replace(b"X" + length + old, b"X" + struct.pack("<I", len(evil)) + evil.encode())
        path = repacked(path, data)
    else:
        tensors, header = portable.read(path)
        for site in header["plan"]["sites"]:
            if site["module"] == old.decode():
                site["module"] = evil
        portable.write(tensors, {portable.HEADER_KEY: json.dumps(header)}, path)
    with pytest.raises((UntrustedFileError, PlanError), match=r"names an upsampler|has to be the path of a module"):
        upswap.load(path)(IMAGES)
    assert not mark.exists()


def test_a_header_may_not_send_for_anything(tmp_path: Path) -> None:
    path = upswap.save(patched(unet()), tmp_path / "model.safetensors")
    tensors, header = portable.read(path)
    header["source"] = "timm:hf-hub:evil/model"
    portable.write(tensors, {portable.HEADER_KEY: json.dumps(header)}, path)
    with pytest.raises(UntrustedFileError, match="fetched from elsewhere"):
        upswap.load(path)


def test_a_class_that_has_moved_and_a_package_that_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_pt(tmp_path / "moved.pt", pickled(New(Global("timm.layers.nowhere", "Layer"), state={})))
    with pytest.raises(SourceError, match="has moved"):
        upswap.load(path)
    path = write_pt(tmp_path / "moved2.pt", pickled(New(Global("timm.layers.norm", "Nowhere"), state={})))
    with pytest.raises(SourceError, match="has moved"):
        upswap.load(path)
    monkeypatch.setattr(trust, "PACKAGES", (*trust.PACKAGES, "no_such_package"))
    path = write_pt(tmp_path / "missing.pt", pickled(New(Global("no_such_package.nets", "UNet"), state={})))
    with pytest.raises(SourceError, match=r"needs the package no_such_package.*PYTHONPATH"):
        upswap.load(path)


@pytest.mark.parametrize(
    ("argument", "says"),
    [
        ({"dtype": "hub"}, "hub"),
        ({"tensor": [1], "dtype": "load"}, "load"),
        ({"instance": ["subprocess", "Popen", {}]}, "Popen"),
        ({"instance": ["transformers", "AutoModel", {}]}, "AutoModel"),
    ],
)
def test_arguments_in_a_plan_are_data(argument: Any, says: str, tmp_path: Path) -> None:
    """The graph route builds them to trace a forward, which calls methods on them."""
    path = upswap.save(
        upswap.patch(smp.UPerNet("resnet18", encoder_weights=None).eval()), tmp_path / "model.safetensors"
    )
    tensors, header = portable.read(path)
    (owner,) = (owner for owner in header["plan"]["calls"] if "lateral_blocks.0" in owner)
    header["plan"]["calls"][owner]["arguments"]["args"]["tuple"][0] = argument
    portable.write(tensors, {portable.HEADER_KEY: json.dumps(header)}, path)
    with pytest.raises(UntrustedFileError, match=says):
        upswap.load(path)


def test_what_a_description_holds_is_not_waited_for(tmp_path: Path) -> None:
    """A list that holds itself."""
    description = Raw(b"]q\x01h\x01a")
    path = write_pt(tmp_path / "round.pt", pickled(rewritten(description)))
    with pytest.raises((SourceError, PlanError), match=r"goes too deep|round"):
        upswap.load(path)


def test_a_message_shows_a_files_text_and_is_not_run_by_a_terminal(tmp_path: Path) -> None:
    names = [Global("\x1b[2Jevil", "A" * 10**6), *(Global(f"a{i}.b", "c") for i in range(99))]
    path = write_pt(tmp_path / "a.pt", pickled(names))
    with pytest.raises(UntrustedFileError, match="and 80 more") as refused:
        upswap.load(path)
    torch.save(nn.Identity(), path)
    contents = records(path)
    contents["a/byteorder"] = b"\x1b[2J\0" * 10**5
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in contents.items():
            archive.writestr(name, content)
    with pytest.raises(SourceError, match="damaged") as damaged:
        upswap.load(path)
    for message in (str(refused.value), str(damaged.value)):
        assert "\x1b" not in message
        assert len(message) < 5000


def test_trained_yolos_and_monai_and_numpy_are_admitted(tmp_path: Path) -> None:
    """Their files hold a namespace with the training's settings, enumerations, numbers of NumPy."""
    from monai.networks.nets import UNETR, SegResNet
    from ultralytics.utils import IterableSimpleNamespace

    from zoos.ultralytics_zoo import tasks

    yolo = tasks.DetectionModel("yolov8n.yaml", nc=2, verbose=False).eval()
    yolo.args = IterableSimpleNamespace(box=7.5, data="coco8.yaml", names=["a"])
    got = _through_a_file(yolo, tmp_path)
    assert type(got.args) is IterableSimpleNamespace
    assert vars(got.args) == vars(yolo.args)
    assert got.yaml == yolo.yaml
    monai = SegResNet(spatial_dims=2, upsample_mode="nontrainable").eval()
    assert _through_a_file(monai, tmp_path).upsample_mode is monai.upsample_mode
    unetr = UNETR(1, 2, (32, 32), spatial_dims=2, feature_size=4, hidden_size=24, mlp_dim=24, num_heads=2).eval()
    _through_a_file(unetr, tmp_path, torch.zeros(1, 1, 32, 32))
    counted = nn.Identity()
    counted.values = [np.float64(0.1), np.int32(-5), np.bool_(True), np.float32("nan").dtype, np.dtype(">f8").type(2)]
    got = _through_a_file(counted, tmp_path)
    assert [type(value) for value in got.values] == [type(value) for value in counted.values]
    assert got.values == counted.values


def _through_a_file(model: nn.Module, tmp_path: Path, images: torch.Tensor | None = None) -> Any:
    torch.save(model, tmp_path / "model.pt")
    got = upswap.load(tmp_path / "model.pt")
    assert type(got) is type(model)
    for (name, tensor), (same, other) in zip(model.state_dict().items(), got.state_dict().items(), strict=True):
        assert name == same
        assert torch.equal(tensor, other)
    if images is not None:
        with torch.no_grad():
            torch.testing.assert_close(got(images), model(images), rtol=0, atol=0)
    return got
