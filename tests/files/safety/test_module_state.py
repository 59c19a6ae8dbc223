"""What the modules of a stranger's file hold: names that could be code, things in the place of methods and hooks."""

from __future__ import annotations

import builtins
import contextlib
import copy
import dataclasses
import sys
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from torch import nn
from torch.nn import functional as F
from torchvision.ops.feature_pyramid_network import FeaturePyramidNetwork

import upswap
from raw_pickle import Call, Global, New, pickled, write_pt
from upswap import UntrustedFileError, UpswapWarning
from upswap.files.safety.module_state import check_modules
from upswap.surgery.rewritten_class import Record, restore

#: In two parts, so that this file itself, which is parsed too, does not have it.
MARK = "_upswap_" + "was_run"
#: Each would run code as a name that is put into source text unescaped, in one of the ways a generator may write it.
CODE = f'__import__("builtins").__dict__.__setitem__("{MARK}", 1)'
HOSTILE = [
    f'x"), {CODE}, getattr(self, "x',
    f"x'), {CODE}, getattr(self, 'x",
    f"x\n    {CODE}\n    x",
    f"x\r    {CODE}\r    x",
    f"x\u2028{CODE}",
    f"x; {CODE} #",
]


#: The source texts with a hostile string in them that Python was given to compile, whoever gave them.
COMPILED: list[str] = []


def _hear(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "compile" and MARK in str(arguments[0]):
        COMPILED.append(str(arguments[0]))


@pytest.fixture(scope="module", autouse=True)
def audited() -> None:
    sys.addaudithook(_hear)


@pytest.fixture(autouse=True)
def unmarked() -> Any:
    vars(builtins).pop(MARK, None)
    COMPILED.clear()
    yield
    assert MARK not in vars(builtins), "code from a string was run"
    assert not COMPILED, "a string got into source text"


def test_the_attack_is_real() -> None:
    exec(CODE)
    assert MARK in vars(builtins)
    assert len(COMPILED) == 1
    vars(builtins).pop(MARK)
    COMPILED.clear()


class Straight(nn.Module):
    """A site for each route: a straight line, a layer, and a branch."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.up, self.last = nn.Conv2d(3, 8, 3, 2, 1), nn.Upsample(scale_factor=2), nn.Conv2d(8, 2, 1)
        self.line, self.branch = Line(), Branch()

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.last(self.branch(self.line(self.up(self.stem(image)))))
        return result


class Line(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.gain = nn.Conv2d(8, 8, 1), nn.Parameter(torch.ones(1, 8, 1, 1))
        self.register_buffer("shift", torch.zeros(1, 8, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.interpolate(self.conv(x) * self.gain + self.shift, scale_factor=2)


class Branch(Line):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv(x) * self.gain
        return F.interpolate(x, scale_factor=2) if x.dim() == 4 else x


def model() -> nn.Module:
    torch.manual_seed(0)
    return Straight().eval()


IMAGE = torch.randn(1, 3, 16, 16)


def leaves(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of every string in plain data, and of every key."""
    if isinstance(value, str):
        return [path]
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list | tuple) else ()
    found = [(*path, "key of", key) for key in value] if isinstance(value, dict) else []
    for key, item in items:
        found += leaves(item, (*path, key))
    return found


def with_string(value: Any, path: tuple[Any, ...], text: str) -> Any:
    """A copy of plain data with another string, or key, at a path."""
    if not path:
        return text
    if path[0] == "key of":
        return {text if key == path[1] else key: item for key, item in value.items()}
    if isinstance(value, dict):
        return {key: with_string(item, path[1:], text) if key == path[0] else item for key, item in value.items()}
    return [with_string(item, path[1:], text) if index == path[0] else item for index, item in enumerate(value)]


def run(make: Any) -> None:
    """A hostile string is an error of upswap's, or makes no difference to what is run."""
    try:
        made = make()
    except (upswap.UpswapError, RuntimeError, KeyError, TypeError, ValueError, AttributeError):
        return
    with contextlib.suppress(RuntimeError, AttributeError, TypeError, KeyError, ValueError, UpswapWarning):
        made(IMAGE)


def test_no_string_of_a_plan_becomes_code() -> None:
    plan = upswap.inspect(model())
    assert {site.route for site in plan.swapped} == {"module", "graph", "source"}
    data = plan.to_dict()
    paths = leaves(data)
    assert len(paths) > 100
    for number, path in enumerate(paths):
        text = HOSTILE[number % len(HOSTILE)]
        run(
            lambda path=path, text=text: upswap.patch(
                model(), plan=upswap.Plan.from_dict(with_string(data, path, text))
            )
        )


def test_no_string_of_a_record_becomes_code() -> None:
    patched = upswap.patch(model())
    for name in ("line", "branch"):
        module = patched.get_submodule(name)
        record: Record = type(module)._upswap_record  # type: ignore[assignment]
        data, state = record.to_dict(), module.__getstate__()
        paths = leaves(data)
        assert len(paths) > 15

        original = type(module).__bases__[0]

        def restored(changed: Any, original: type = original, state: Any = state) -> nn.Module:
            made = restore(original, changed)
            made.__setstate__(copy.deepcopy(state))
            return nn.Sequential(nn.Conv2d(3, 8, 1), made)

        for number, path in enumerate(paths):
            text = HOSTILE[number % len(HOSTILE)]
            run(lambda path=path, text=text, restored=restored, data=data: restored(with_string(data, path, text)))


@pytest.mark.parametrize("text", HOSTILE[::2], ids=range(len(HOSTILE[::2])))
def test_no_name_in_a_tree_of_modules_becomes_code(text: str, tmp_path: Path) -> None:
    count = sum(len(t) for m in model().modules() for t in (m._modules, m._parameters, m._buffers))
    assert count > 15
    for number in range(count):
        odd = model()
        tables = [t for m in odd.modules() for t in (m._modules, m._parameters, m._buffers) for _ in t]
        keys = [key for m in odd.modules() for t in (m._modules, m._parameters, m._buffers) for key in t]
        table, key = tables[number], keys[number]
        # Under a hostile name too, and found there first by whoever looks for the name of a value.
        items = {text: table[key], **table}
        table.clear()
        table.update(items)
        run(lambda odd=odd: upswap.patch(odd))
        with pytest.warns(UpswapWarning, match="which is no plain name"):
            upswap.save(odd, tmp_path / "odd.pt", force=True)
        with pytest.raises(UntrustedFileError, match="which is no plain name"):
            upswap.load(tmp_path / "odd.pt", trust=[__name__.partition(".")[0]])


def test_such_a_module_is_rewritten_without_a_trace() -> None:
    odd = model()
    odd.line._modules = {HOSTILE[0]: odd.line.conv, "layer-1": nn.Identity(), **odd.line._modules}
    patched = upswap.patch(copy.deepcopy(odd))
    assert upswap.plan_of(patched).site("line").route == "source"
    torch.testing.assert_close(patched(IMAGE), odd(IMAGE))


EMPTY = {name: value for name, value in vars(nn.Identity()).items() if name != "training"}


def identity(**state: Any) -> New:
    return New(Global("torch.nn.modules.linear", "Identity"), state={**EMPTY, "training": False, **state})


CALLABLES = {
    "a class that torch holds safe": Global("builtins", "set"),
    "another": Global("builtins", "bytearray"),
    "a function that torch holds safe": Global("_codecs", "encode"),
    "an admitted class": Global("torch.nn.modules.linear", "Identity"),
    "an admitted function": Global("torch.nn.functional", "relu"),
    "a module": identity(),
    "data": 3,
    "text": "forward",
}


@pytest.mark.parametrize("value", CALLABLES.values(), ids=CALLABLES)
@pytest.mark.parametrize("name", ["forward", "__call__", "extra_repr", "_call_impl", "__setstate__", "to"])
def test_nothing_stands_in_the_place_of_a_method(name: str, value: Any, tmp_path: Path) -> None:
    path = write_pt(tmp_path / "m.pt", pickled(identity(**{name: value})))
    if name in ("extra_repr", "to") and isinstance(value, str | int):
        assert vars(upswap.load(path))[name] == value  # it cannot be called
        return
    with pytest.raises(UntrustedFileError, match=f"in the place of Identity.{name}|in the place of a|is refused"):
        upswap.load(path)


@pytest.mark.parametrize("value", [v for k, v in CALLABLES.items() if k not in ("data", "text")])
@pytest.mark.parametrize("table", ["_forward_hooks", "_forward_pre_hooks", "_state_dict_hooks", "_backward_hooks"])
def test_nothing_of_the_files_choosing_is_a_hook(table: str, value: Any, tmp_path: Path) -> None:
    path = write_pt(tmp_path / "m.pt", pickled(identity(**{table: {0: value}})))
    with pytest.raises(UntrustedFileError, match=r"_hooks of Identity|in the place of"):
        upswap.load(path)


@pytest.mark.parametrize("name", ["_compiled_call_impl", "call_super_init"])
def test_nothing_to_be_called_hides_an_attribute_that_is_data(name: str, tmp_path: Path) -> None:
    path = write_pt(tmp_path / "m.pt", pickled(identity(**{name: Global("builtins", "set")})))
    with pytest.raises(UntrustedFileError, match=f"puts set in the place of Identity.{name}"):
        upswap.load(path)


def test_data_may_hide_data_and_torchs_own_hooks_stay() -> None:
    class Own(nn.Module):
        rate = 0.5

    module = Own()
    module.rate = 0.7
    with pytest.warns(FutureWarning):
        module.old = torch.nn.utils.weight_norm(nn.Linear(2, 2))
    module.spectral = torch.nn.utils.spectral_norm(nn.Linear(2, 2))
    check_modules(module)
    module.spectral.register_forward_hook(lambda *_: None)
    with pytest.raises(UntrustedFileError, match="among the _forward_hooks of Linear"):
        check_modules(module)
    check_modules(module, (__name__.partition(".")[0],))


@pytest.mark.parametrize("kept", [True, False])
def test_the_state_of_an_enumerations_member_is_not_set(kept: bool, tmp_path: Path) -> None:
    from monai.utils.enums import UpsampleMode

    before = [(name, member.value, dict(vars(member))) for name, member in UpsampleMode.__members__.items()]
    value = next(iter(UpsampleMode)).value
    member = Call(
        Global("monai.utils.enums", "UpsampleMode"), value, state={"_value_": "evil", "more": 1} if kept else None
    )
    path = write_pt(tmp_path / "m.pt", pickled(identity(mode=member)))
    if kept:
        with pytest.raises(upswap.SourceError):
            upswap.load(path)
    else:
        assert upswap.load(path).mode is next(iter(UpsampleMode))
    assert [(name, member.value, dict(vars(member))) for name, member in UpsampleMode.__members__.items()] == before


def test_an_unknown_value_makes_no_member_and_runs_no_code(tmp_path: Path) -> None:
    from monai.utils.enums import UpsampleMode

    before = dict(UpsampleMode._value2member_map_)
    path = write_pt(
        tmp_path / "m.pt", pickled(identity(mode=Call(Global("monai.utils.enums", "UpsampleMode"), "evil")))
    )
    with pytest.raises(UntrustedFileError):
        upswap.load(path)
    assert UpsampleMode._value2member_map_ == before


@dataclasses.dataclass
class Settings:
    layer: type = nn.ReLU
    rate: float = 0.1

    def scaled(self) -> float:
        return self.rate * 2


def test_objects_that_are_no_modules_are_looked_at_too() -> None:
    holder = nn.Identity()
    holder.kept = {"settings": [Settings()]}
    check_modules(holder)
    vars(holder.kept["settings"][0])["scaled"] = set
    with pytest.raises(UntrustedFileError, match=r"puts set in the place of Settings\.scaled"):
        check_modules(holder)


def test_real_models_pass() -> None:
    check_modules(FeaturePyramidNetwork([8, 16], 8))
    check_modules(upswap.patch(model()))
    hooked = nn.Identity()
    hooked._forward_hooks = OrderedDict()
    check_modules(hooked)


def test_names_that_real_models_have_are_stored_and_not_traced(tmp_path: Path) -> None:
    """RegNet's `block1-0`, DiNTS's `(0, 1)`."""
    regnet = torchvision.models.regnet_y_400mf(weights=None).eval()
    upswap.save(regnet, tmp_path / "regnet.pt")
    assert set(upswap.load(tmp_path / "regnet.pt").state_dict()) == set(regnet.state_dict())
    odd = model()
    odd.line._modules = {"block1-0": nn.Identity(), "(0, 1)": odd.line.conv, **odd.line._modules}
    assert upswap.inspect(odd).site("line").route == "source"
    with pytest.warns(UpswapWarning, match="without trust"):
        upswap.save(odd, tmp_path / "odd.pt")
    upswap.load(tmp_path / "odd.pt", trust=[__name__.partition(".")[0]])
