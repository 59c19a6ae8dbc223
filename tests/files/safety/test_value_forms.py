"""Values that a pickle makes by calls: each comes back equal, and no file makes anything else of them."""

from __future__ import annotations

import argparse
import collections
import functools
import pathlib
import re
import time
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import upswap
from models import IMAGES, patched, unet
from raw_pickle import Call, Global, New, module, pickled, write_pt
from upswap import UntrustedFileError, UpswapWarning

X = torch.zeros(1, 3, 8, 8)

VALUES: dict[str, Any] = {
    "Namespace": argparse.Namespace(lr=0.1, sizes=[range(3), (slice(1, None), 2)]),
    "SimpleNamespace": types.SimpleNamespace(a=1, b={"c": collections.deque([1])}),
    "no bytes": b"",
    "bytes": b"\x00\xff",
    "range": range(2, 9, 3),
    "slice": slice(None, -1, 2),
    "frozenset": frozenset({1, "a", (2, 3)}),
    "deque": collections.deque([1, [2], (3,)], maxlen=7),
    "empty deque": collections.deque(),
    "full deque": collections.deque([1, 2], maxlen=2),
    "defaultdict": collections.defaultdict(list, {"a": [1], 2: [range(2)]}),
    "defaultdict of sets": collections.defaultdict(set),
    "defaultdict of nothing": collections.defaultdict(None, a=1),
    "Counter": collections.Counter("hello"),
    "Path": Path("/a/b c/model.pt"),
    "relative path": Path("a"),
    "path of another system": pathlib.PureWindowsPath("c:/a/b"),
    "pattern": re.compile(r"(\w+)\.(?P<rest>.*)", re.IGNORECASE | re.DOTALL),
    "pattern of bytes": re.compile(rb"a+"),
    "number of NumPy": np.float32(0.1),
    "dtype of NumPy": np.dtype(">i4"),
    "partial": functools.partial(nn.LayerNorm, eps=1e-6),
    "partial of a function": functools.partial(torch.nn.functional.relu, inplace=True),
    "partial with layers": functools.partial(nn.TransformerEncoderLayer, 8, activation=nn.GELU, dropout=(0.1,)[0]),
}  # fmt: skip

ARRAYS = {
    "float32": np.arange(6, dtype=np.float32).reshape(2, 3),
    "in Fortran's order": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    "no dimension": np.array(3),
    "no element": np.zeros((0, 4)),
    "booleans": np.array([True, False]),
    "another byte order": np.arange(3, dtype=">u2"),
    "a view": np.arange(12).reshape(3, 4)[:, ::2],
}


def loaded(value: Any, tmp_path: Path) -> Any:
    """What `value`, as an attribute of a patched model, is after `save` and `load`; `save` may not warn."""
    model: Any = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Upsample(scale_factor=2), nn.Conv2d(4, 4, 1))
    model[0].kept = value
    got: Any = upswap.load(upswap.save(upswap.patch(model, X), tmp_path / "model.pt"))
    return got[0].kept


def shown(value: Any) -> Any:
    """A value as it can be compared: partials by what they are made of."""
    return (value.func, value.args, value.keywords) if isinstance(value, functools.partial) else value


@pytest.mark.parametrize("name", VALUES)
def test_a_value_comes_back(name: str, tmp_path: Path) -> None:
    got = loaded([VALUES[name]], tmp_path)[0]
    assert type(got) is type(VALUES[name])
    assert shown(got) == shown(VALUES[name])
    assert getattr(got, "maxlen", None) == getattr(VALUES[name], "maxlen", None)
    assert getattr(got, "default_factory", None) == getattr(VALUES[name], "default_factory", None)


@pytest.mark.parametrize("name", ARRAYS)
def test_an_array_comes_back(name: str, tmp_path: Path) -> None:
    array = ARRAYS[name]
    got = loaded(array, tmp_path)
    assert type(got) is np.ndarray
    assert (got.dtype, got.shape) == (array.dtype, array.shape)
    assert np.array_equal(got, array)
    assert got.flags.writeable


def test_values_in_values_and_shared_ones(tmp_path: Path) -> None:
    shared = collections.deque([nn.ReLU()])
    values = loaded({"a": shared, "b": [shared, collections.defaultdict(list, x=[shared])]}, tmp_path)
    assert values["a"] is values["b"][0] is values["b"][1]["x"][0]
    assert isinstance(values["a"][0], nn.ReLU)
    values["b"][1]["new"].append(1)
    assert values["b"][1]["new"] == [1]


def test_float_functionals_and_quantisation_stubs_are_layers(tmp_path: Path) -> None:
    model = patched(unet())
    model.add_module("add", torch.ao.nn.quantized.FloatFunctional())
    got = upswap.load(upswap.save(model, tmp_path / "model.pt"))
    assert torch.equal(got.add.add(IMAGES, IMAGES), IMAGES + IMAGES)


def test_a_method_of_the_model_is_bound_to_the_loaded_one(tmp_path: Path) -> None:
    model = patched(unet())
    model.kept = {"head": model.segmentation_head.forward, "decode": [model.decoder.forward]}
    got: Any = upswap.load(upswap.save(model, tmp_path / "model.pt"))
    assert got.kept["head"].__self__ is got.segmentation_head
    with torch.no_grad():
        features = got.encoder(IMAGES)
        assert torch.equal(got.kept["decode"][0](features), got.decoder(features))


def test_a_model_of_from_pretrained(tmp_path: Path) -> None:
    """transformers leaves regular expressions and objects with slots in it."""
    from transformers import SegformerConfig, SegformerForSemanticSegmentation

    small = {"hidden_sizes": [8] * 4, "depths": [1] * 4, "num_attention_heads": [1] * 4, "mlp_ratios": [1] * 4}
    SegformerForSemanticSegmentation(SegformerConfig(**small, decoder_hidden_size=8)).save_pretrained(tmp_path / "host")
    model: Any = SegformerForSemanticSegmentation.from_pretrained(tmp_path / "host").eval()
    upswap.patch(model, IMAGES)
    for name in ("model.pt", "model.safetensors", "folder"):
        upswap.save(model, tmp_path / name)
    assert model._weight_conversions, "this transformers leaves nothing"
    with torch.no_grad():
        expected = model(IMAGES).logits
        for got in (
            upswap.load(tmp_path / "model.pt"),
            upswap.load(tmp_path / "folder"),
            upswap.load(
                tmp_path / "model.safetensors", SegformerForSemanticSegmentation.from_pretrained(tmp_path / "host")
            ),
        ):
            assert torch.equal(got.eval()(IMAGES).logits, expected)
    got = upswap.load(tmp_path / "model.pt")
    assert [
        (conversion.source_patterns, conversion.compiled_sources, dict(conversion.layer_targets))
        for conversion in got._weight_conversions
    ] == [(c.source_patterns, c.compiled_sources, dict(c.layer_targets)) for c in model._weight_conversions]
    got.save_pretrained(tmp_path / "again")  # runs the conversions backwards


# -- what a file cannot make of them --------------------------------------------------------------------------------------

GETATTR, PARTIAL = Global("__builtin__", "getattr"), Global("functools", "partial")
RANGE, DEQUE, DEFAULT = (
    Global("__builtin__", "xrange"),
    Global("collections", "deque"),
    Global("collections", "defaultdict"),
)
IDENTITY, ARRAY = Global("torch.nn.modules.linear", "Identity"), Global("numpy._core.multiarray", "_reconstruct")
F4 = Call(Global("numpy", "dtype"), "f4", False, True, state=(3, "<", None, None, None, -1, -1, 0))
RENAMING = Global("transformers.core_model_loading", "WeightRenaming")


def partial(function: Any, *args: Any, **keywords: Any) -> Call:
    return Call(PARTIAL, function, state=(function, args, keywords, None))


def array(shape: Any, kind: Any, data: Any) -> Call:
    return Call(ARRAY, Global("numpy", "ndarray"), (0,), b"b", state=(1, shape, kind, False, data))


HOSTILE: dict[str, tuple[Any, str]] = {
    "an attribute of a function": (Call(GETATTR, Global("torch.nn.functional", "relu"), "__globals__"), "own class"),
    "an attribute of a class": (Call(GETATTR, IDENTITY, "__init__"), "own class"),
    "an attribute of a text": (Call(GETATTR, "a", "format"), "own class"),
    "a method of every module": (Call(GETATTR, module("linear.Identity"), "load_state_dict"), "own class"),
    "a method of Python's": (Call(GETATTR, module("linear.Identity"), "__init__"), "own class"),
    "a value of a module": (Call(GETATTR, module("linear.Identity"), "training"), "own class"),
    "a method that there is not": (Call(GETATTR, module("linear.Identity"), "no_such"), "own class"),
    "a default in the place of an attribute": (Call(GETATTR, module("linear.Identity"), "x", 1), "own class"),
    "a partial of a model": (partial(Global("torchvision.models.resnet", "ResNet")), "class ResNet of models"),
    "a partial of a function": (partial(Global("os", "system"), "true"), "os.system"),
    "a partial of a safe function": (partial(Global("_codecs", "encode"), "a"), "partial"),
    "a partial of a partial": (partial(partial(IDENTITY)), "partial"),
    "a partial of a value": (partial(3), "partial"),
    "a partial with a module": (partial(IDENTITY, module("linear.Identity")), "partial"),
    "a partial with a method": (partial(IDENTITY, Call(GETATTR, module("linear.Identity"), "forward")), "partial"),
    "a partial without a state": (Call(PARTIAL, IDENTITY), "partial"),
    "a partial of another function": (
        Call(PARTIAL, IDENTITY, state=(Global("torch.nn.functional", "relu"), (), {}, None)),
        "partial",
    ),
    "a partial with attributes": (Call(PARTIAL, IDENTITY, state=(IDENTITY, (), {}, {"__call__": 1})), "partial"),
    "bytes of a number": (Call(Global("__builtin__", "bytes"), 10**12), "bytes"),
    "a range of text": (Call(RANGE, "a"), "range"),
    "a slice of a module": (Call(Global("__builtin__", "slice"), module("linear.Identity")), "slice"),
    "a deque of what it is called with": (Call(DEQUE, [1, 2]), "deque"),
    "a deque of negative length": (Call(DEQUE, (), -1), "deque"),
    "a defaultdict of a function": (Call(DEFAULT, Global("torch.nn.functional", "relu")), "not plain"),
    "a defaultdict of a class": (Call(DEFAULT, IDENTITY), "not plain"),
    "a type as a value": (Global("__builtin__", "list"), "the type list"),
    "a type that is called": (Call(Global("__builtin__", "list"), (1,)), "the type list"),
    "a path of numbers": (Call(Global("pathlib", "PosixPath"), 1), "path"),
    "a path with an end": (Call(Global("pathlib", "PosixPath"), "a\0b"), "path"),
    "a pattern of numbers": (Call(Global("re", "_compile"), 1, 2), "regular expression"),
    "a pattern without end": (Call(Global("re", "_compile"), "a" * 20_000, 0), "regular expression"),
    "a pattern of many ranges": (Call(Global("re", "_compile"), "[\x01-\U0010ffff]" * 200, 2), "regular expression"),
    "an array of objects": (array((1,), Call(Global("numpy", "dtype"), "O8", False, True), [1]), "NumPy"),
    "an array longer than its bytes": (array((10**9,), F4, b"abcd"), "NumPy"),
    "an array of negative size": (array((-1,), F4, b"abcd"), "NumPy"),
    "an array of too many dimensions": (array((1,) * 100, F4, b"abcd"), "NumPy"),
    "an array without a state": (Call(ARRAY, Global("numpy", "ndarray"), (0,), b"b"), "NumPy"),
    "a frozenset of what it is called with": (Call(Global("__builtin__", "frozenset"), "abc"), "frozenset"),
    "slots that there are not": (New(RENAMING, state=(None, {"__class__": 1})), "state is not what one has"),
    "attributes where there are slots": (New(RENAMING, state=({"a": 1}, {})), "state is not what one has"),
    "two states": (Call(PARTIAL, Call(PARTIAL, IDENTITY, state=(IDENTITY, (), {}, None)), state=None), "partial"),
    "a namespace's method": (Call(Global("types", "SimpleNamespace"), state={"__eq__": IDENTITY}), "__eq__"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_what_a_file_cannot_make(name: str, tmp_path: Path) -> None:
    value, says = HOSTILE[name]
    path = write_pt(tmp_path / "model.pt", pickled(module("linear.Identity", kept=value)))
    with pytest.raises(UntrustedFileError) as caught:
        upswap.load(path)
    assert says in str(caught.value)


@pytest.mark.parametrize("hidden", ["forward", "eval", "__call__"])
def test_a_method_or_partial_takes_no_place_of_code(hidden: str, tmp_path: Path) -> None:
    for value in (Call(GETATTR, module("linear.Identity"), "forward"), partial(IDENTITY)):
        path = write_pt(tmp_path / "model.pt", pickled(module("linear.Identity", **{hidden: value})))
        with pytest.raises(UntrustedFileError, match=hidden):
            upswap.load(path)


def test_a_method_is_no_hook(tmp_path: Path) -> None:
    method = Call(GETATTR, module("linear.Identity"), "forward")
    path = write_pt(tmp_path / "model.pt", pickled(module("linear.Identity", _forward_hooks={0: method})))
    with pytest.raises(UntrustedFileError, match="_forward_hooks"):
        upswap.load(path)


@pytest.mark.parametrize("count", [20, 100])
def test_compiling_patterns_takes_no_longer_than_their_length_explains(count: int, tmp_path: Path) -> None:
    """All the ranges that are let through, at two lengths."""
    patterns = [Call(Global("re", "_compile"), "[\x01-\U0010ffff]|" * count, int(re.IGNORECASE))]
    path = write_pt(tmp_path / "model.pt", pickled(module("linear.Identity", kept=patterns)))
    began = time.process_time()
    upswap.load(path)
    assert time.process_time() - began < 10


class Options(dict):  # type: ignore[type-arg]
    """A dict of one's own: an attribute beside its items, and a way of its own to set one."""

    def __setitem__(self, key: Any, value: Any) -> None:
        raise AssertionError("restoring sets items without the class")


def test_a_dict_of_a_trusted_class(tmp_path: Path) -> None:
    options = Options(a=[nn.ReLU], b=collections.deque([1]))
    dict.__setitem__(options, "c", range(2))
    options.note = ("x", frozenset({1}))  # type: ignore[attr-defined]
    model: Any = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Upsample(scale_factor=2), nn.Conv2d(4, 4, 1))
    model[0].kept = [options, options]
    with pytest.warns(UpswapWarning, match="Options at 0.kept"):
        path = upswap.save(upswap.patch(model, X), tmp_path / "model.pt")
    with pytest.raises(UntrustedFileError):
        upswap.load(path)
    one, other = upswap.load(path, trust=[__name__.partition(".")[0]])[0].kept  # type: ignore[index]
    assert one is other
    assert type(one) is Options
    assert one == {"a": [nn.ReLU], "b": collections.deque([1]), "c": range(2)}
    assert vars(one) == {"note": ("x", frozenset({1}))}


# -- what save says -------------------------------------------------------------------------------------------------------


def test_save_names_the_attribute_and_the_form_that_works(tmp_path: Path) -> None:
    model = patched(unet())
    model.decoder.options = {"make": [functools.partial(torch.nn.functional.normalize, dim=1)]}
    with pytest.warns(UpswapWarning, match="normalize at decoder.options") as caught:
        path = upswap.save(model, tmp_path / "model.pt")
    assert "['make'][0].func" in str(caught[0].message)
    with pytest.raises(UntrustedFileError):
        upswap.load(path)
    line = 'upswap.save(model, "model.safetensors"), and upswap.load("model.safetensors", model)'
    assert line in str(caught[0].message)
    upswap.save(model, tmp_path / "model.safetensors")
    assert upswap.upsamplers(upswap.load(tmp_path / "model.safetensors", unet()))


def test_save_names_what_cannot_be_pickled(tmp_path: Path) -> None:
    model = patched(unet())
    model.decoder.options = {"make": [lambda: 1]}
    with pytest.raises(upswap.SaveError, match=r"because of decoder\.options\['make'\]\[0\]"):
        upswap.save(model, tmp_path / "model.pt")


def test_a_refusal_says_where(tmp_path: Path) -> None:
    inner = module("linear.Identity", kept={"a": (1, [Global("torchvision.models.resnet", "ResNet")])})
    path = write_pt(tmp_path / "model.pt", pickled(module("container.Sequential", _modules={"0": inner})))
    with pytest.raises(UntrustedFileError, match=r"at 0\.kept\['a'\]\[1\]: it keeps the class ResNet"):
        upswap.load(path)
