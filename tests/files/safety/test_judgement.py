"""What a file puts together is judged as a whole, and leaves nothing behind where it is refused."""

from __future__ import annotations

import copy
import pickletools
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import segmentation_models_pytorch as smp
import torch
from monai.utils.enums import UpsampleMode
from torch import nn
from ultralytics.utils import IterableSimpleNamespace

import upswap
from models import IMAGES
from raw_pickle import Call, Global, New, Raw, module, pickled, write_pt
from upswap import SourceError, UntrustedFileError

SET = Global("builtins", "set")
ENCODE = Global("_codecs", "encode")
MEMBER = Call(Global("monai.utils.enums", "UpsampleMode"), "deconv")
NAMESPACE = Global("ultralytics.utils", "IterableSimpleNamespace")


def named(**state: Any) -> OrderedDict[str, Any]:
    return OrderedDict(state)


def relu() -> New:
    return module("activation.ReLU", inplace=False)


def hook(value: Any) -> OrderedDict[int, Any]:
    return OrderedDict({0: value})


def tensor(hooks: Any) -> Call:
    """A parameter of one number, with backward hooks."""
    storage = Raw(b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x01tQ")
    made = Call(
        Global("torch._utils", "_rebuild_tensor_v2"),
        storage,
        0,
        (1,),
        (1,),
        False,
        Call(Global("collections", "OrderedDict")),
    )
    return Call(Global("torch._utils", "_rebuild_parameter"), made, True, hooks)


#: What a file could put in the place of code: the pickled value, and what the refusal names.
SHADOWS: dict[str, tuple[Any, str]] = {
    "a safe function as a method": (module("linear.Identity", forward=SET), "builtins.set"),
    "a safe function of C as a method": (module("linear.Identity", eval=ENCODE), "_codecs.encode"),
    "a safe function as a hook": (module("linear.Identity", _forward_hooks=hook(SET)), "builtins.set"),
    "a safe class anywhere": (module("linear.Identity", kept=[Global("builtins", "bytearray")]), "bytearray"),
    "a stand-in's maker": (module("linear.Identity", kept=Global("numpy", "dtype")), "NumpyTypeForm"),
    "a module as a method": (module("linear.Identity", forward=relu()), "a ReLU in the place of Identity.forward"),
    "a module as the compiled call": (module("linear.Identity", _compiled_call_impl=relu()), "_compiled_call_impl"),
    "a module as a hook": (module("linear.Identity", _forward_pre_hooks=hook(relu())), "a ReLU in Identity._forward_pre"),
    "a module as a hook of a state dict": (module("linear.Identity", _state_dict_hooks=hook(relu())), "_state_dict_hooks"),
    "a namespace in the place of a method": (module("linear.Identity", type=Call(NAMESPACE, state={})), "Identity.type"),
    "hooks that are no dict": (module("linear.Identity", _forward_hooks=relu()), "Identity._forward_hooks"),
    "what copying asks an instance for": (module("linear.Identity", __deepcopy__=relu()), "__deepcopy__"),
    "an attribute that is no name": (module("linear.Identity", **{"a b": 1}), "'a b'"),
    "a method of an ordered dict": (
        module("linear.Identity", _modules=Call(Global("collections", "OrderedDict"), state={"items": relu()})),
        "OrderedDict.items",
    ),
    "a hook of a tensor": (module("linear.Identity", _parameters=named(weight=tensor(hook(relu())))), "tensor with hooks"),
    "a module among the parameters": (module("linear.Identity", _parameters=named(weight=relu())), "parameters"),
    "a namespace among the modules": (module("linear.Identity", _modules=named(a=Call(NAMESPACE, state={}))), "modules"),
    "a part with the name of a method": (module("linear.Identity", _modules=named(forward=relu())), "Identity.forward"),
    "a part with a name of Python's own": (module("linear.Identity", _modules=named(__class__=relu())), "__class__"),
    "a method of a namespace": (Call(NAMESPACE, state={"get": relu()}), "IterableSimpleNamespace.get"),
    "a state that is none": (New(Global("torch.nn.modules.linear", "Identity"), state=[1]), "state"),
    "no state": (New(Global("torch.nn.modules.linear", "Identity")), "state"),
    "a member with a state": (Call(Global("monai.utils.enums", "UpsampleMode"), "deconv", state={"x": 1}), "Member"),
    "a member that there is not": (Call(Global("monai.utils.enums", "UpsampleMode"), "no such"), "there is not"),
}  # fmt: skip


@pytest.mark.parametrize("name", list(SHADOWS))
def test_nothing_takes_the_place_of_code(name: str, tmp_path: Path) -> None:
    value, says = SHADOWS[name]
    before = copy.deepcopy({member: dict(vars(member)) for member in UpsampleMode})
    with pytest.raises((UntrustedFileError, SourceError)) as caught:
        upswap.load(write_pt(tmp_path / "evil.pt", pickled([value, MEMBER])))
    assert says in str(caught.value)
    assert {member: dict(vars(member)) for member in UpsampleMode} == before


def test_the_same_without_what_is_refused_loads(tmp_path: Path) -> None:
    """So that the refusals above are of what they name."""
    parts = named(
        a=relu(), b=module("linear.Identity", _parameters=named(weight=tensor(None)), type="torch.nn.Identity")
    )
    whole = module("container.Sequential", _modules=parts, mode=MEMBER, args=Call(NAMESPACE, state={"box": 1}))
    got = upswap.load(write_pt(tmp_path / "good.pt", pickled(whole)))
    assert [type(part) for part in got] == [nn.ReLU, nn.Identity]
    assert got.mode is UpsampleMode.DECONV
    assert got.args == IterableSimpleNamespace(box=1)
    assert got.b.type == "torch.nn.Identity"


def test_a_dict_that_is_filled_after_the_load_holds_no_hooks_of_a_tensor(tmp_path: Path) -> None:
    """Empty while the file is judged, and also where the model keeps what its code calls at other times."""
    shared: OrderedDict[int, Any] = OrderedDict()
    whole = module("linear.Identity", _parameters=named(weight=tensor(shared)), _forward_hooks=shared)
    got = upswap.load(write_pt(tmp_path / "model.pt", pickled(whole)))
    called: list[str] = []
    got.register_forward_hook(lambda *_: called.append("forward"))
    (got(torch.ones(1)) * got.weight).sum().backward()
    assert called == ["forward"]
    torch.save(got.weight, tmp_path / "weight.pt")
    assert torch.equal(torch.load(tmp_path / "weight.pt", weights_only=True), got.weight)


@pytest.mark.parametrize("hooks", [Global("torchvision.ops.boxes", "box_iou"), SET, 0, "", {0: 1}, (), relu(), MEMBER])
@pytest.mark.parametrize("function", ["_rebuild_parameter", "_rebuild_tensor_v2"])
def test_what_stands_where_a_tensor_has_its_hooks(function: str, hooks: Any, tmp_path: Path) -> None:
    made = tensor(hooks)
    if function == "_rebuild_tensor_v2":
        made = made.args[0]
        made.args = (*made.args[:-1], hooks)
    with pytest.raises(UntrustedFileError, match="other arguments"):
        upswap.load(write_pt(tmp_path / "weights.pt", pickled({"weight": made})))


@pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled")
def test_a_refused_file_leaves_no_tensor_to_the_next_load(tmp_path: Path) -> None:
    """torch keeps sparse tensors in a list of the process, which it checks at the end of a load."""
    torch.save([torch.sparse_coo_tensor(torch.tensor([[0]]), torch.ones(1), (2,)), Evil()], tmp_path / "sparse.pt")
    with pytest.raises(SourceError, match="damaged"):
        upswap.load(tmp_path / "sparse.pt")
    assert torch._utils._sparse_tensors_to_validate == []


class Evil:
    """Fails after what comes before it in a file was made."""

    def __reduce__(self) -> Any:
        return set, ([[]],)


def test_no_code_of_a_class_runs_before_the_whole_is_judged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []
    real = nn.Conv2d.__setstate__

    def restored(self: nn.Conv2d, state: Any) -> None:
        ran.append("conv")
        real(self, state)

    monkeypatch.setattr(nn.Conv2d, "__setstate__", restored)
    torch.save(nn.Sequential(nn.Conv2d(1, 1, 1)), tmp_path / "model.pt")
    model = nn.Sequential(nn.Conv2d(1, 1, 1), nn.Identity())
    model[1].__dict__["forward"] = nn.ReLU()
    torch.save(model, tmp_path / "evil.pt")
    with pytest.raises(UntrustedFileError, match=r"Identity\.forward"):
        upswap.load(tmp_path / "evil.pt")
    assert ran == []
    upswap.load(tmp_path / "model.pt")
    assert ran == ["conv"]


def test_a_record_is_checked_as_it_is_in_the_end(tmp_path: Path) -> None:
    """A pickle can go on filling what it has given away already."""
    record: dict[str, Any] = {"schema": 2, "path": "", "sites": [], "forward": None}
    cls = Global("segmentation_models_pytorch.decoders.fpn.decoder", "FPNBlock")
    argument = {"instance": ["subprocess", "Popen", {}]}
    forward = {"arguments": {"args": {"tuple": [argument]}, "kwargs": {"dict": {}}}, "children": []}
    entry = pickletools.optimize(pickled(("forward", forward)))[2:-2]  # without the start, the tuple, the end
    later = Raw(b"h\x01" + entry + b"s")  # the record, which was given the number 1, gets another entry
    path = write_pt(tmp_path / "late.pt", pickled([record, module_of(cls, record, {"training": False, "late": later})]))
    with pytest.raises(UntrustedFileError, match="Popen"):
        upswap.load(path)


def module_of(cls: Global, record: Any, state: Any) -> Call:
    return Call(Global("upswap.surgery", "restore"), cls, record, state=state)


def test_sharing_stays_as_it_was(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(1, 1, 1), nn.ReLU())
    pair = (UpsampleMode.DECONV, [1])
    model.values = {"pair": pair, "again": pair, UpsampleMode.DECONV: {UpsampleMode.PIXELSHUFFLE}}
    model[1].kept = [model[0]]  # not registered there
    torch.save(model, tmp_path / "model.pt")
    got = upswap.load(tmp_path / "model.pt")
    assert got.values["pair"] is got.values["again"]
    assert got.values["pair"] == pair
    assert got.values[UpsampleMode.DECONV] == {UpsampleMode.PIXELSHUFFLE}
    assert got[1].kept[0] is got[0]


@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated")
def test_weight_norm_keeps_its_hook(tmp_path: Path) -> None:
    model = nn.Sequential(nn.utils.weight_norm(nn.Conv2d(2, 2, 1)))
    torch.save(model.eval(), tmp_path / "model.pt")
    x = torch.ones(1, 2, 4, 4)
    torch.testing.assert_close(upswap.load(tmp_path / "model.pt")(x), model(x), rtol=0, atol=0)


def test_patched_models_load_by_every_route(tmp_path: Path) -> None:
    model = upswap.patch(smp.UPerNet("resnet18", encoder_weights=None).eval())
    got = upswap.load(upswap.save(model, tmp_path / "model.pt"))
    assert {site.route for site in upswap.plan_of(got).swapped} >= {"graph", "source"}
    with torch.no_grad():
        torch.testing.assert_close(got(IMAGES), model(IMAGES), rtol=0, atol=0)
