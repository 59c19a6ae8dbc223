"""What `save` writes without a warning, `load` reads back equal: for generated models, options and forms."""

from __future__ import annotations

import copy
import json
import tempfile
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn
from torch.utils import _pytree as pytree

import generated
import upswap
from models import patched, unet
from upswap.architectures.spec import Spec
from upswap.files.checkpoint import says_how_it_is_built, spec_in
from upswap.files.formats import safetensors as portable
from upswap.files.open_source import open_source
from upswap.files.safety import allowed_names

MODES = ("nearest", "nearest-exact", "bilinear", "bilinear-ac", "bicubic")
NAMES = ("up", "0", "upsample", "class", "größe", "_x", "neck", "train_", "x1", "Up", "a-b", "two words", "ümläut")
#: The methods that make a model so.
DTYPES = ("float", "half", "bfloat16", "double")


@st.composite
def recipes(draw: st.DrawFn) -> dict[str, Any]:
    """What `generated.build` takes."""
    names = draw(st.lists(st.sampled_from(NAMES), min_size=1, max_size=2, unique=True))
    block = st.tuples(st.sampled_from([*generated.BLOCKS]), st.sampled_from(MODES), st.sampled_from((2, 2.0, 1.5, 3)))
    return {
        "blocks": tuple((name, *draw(block)) for name in names),
        "output": draw(st.sampled_from(("tensor", "tuple", "dict", "named", "dataclass"))),
        "buffers": tuple(draw(st.sets(st.sampled_from(("float", "unsaved", "int", "complex", "none", "views"))))),
        "tied": draw(st.booleans()),
    }


@st.composite
def options(draw: st.DrawFn) -> dict[str, Any]:
    """What `patch` takes, but for the names of sites."""
    found: dict[str, Any] = {"kinds": draw(st.sampled_from((("feature",), ("feature", "logits", "gate", "context"))))}
    if draw(st.integers(0, 4)) == 0:
        return {**found, "upsampler": "carafe"}
    return {
        **found,
        "style": draw(st.sampled_from(("lp", "pl"))),
        "groups": draw(st.sampled_from((None, 1, 3, 4, 8))),
        "dyscope": draw(st.booleans()),
        "cascade": draw(st.booleans()),
        "init": draw(st.sampled_from(("match", "paper"))),
    }


@st.composite
def states(draw: st.DrawFn) -> dict[str, Any]:
    """What becomes of a model after it is made: its numbers, layout, modes, what is trained."""
    return {
        "dtype": draw(st.sampled_from(DTYPES)),
        "late": draw(st.booleans()),  # the type is changed after the patch
        "channels_last": draw(st.booleans()),
        "training": draw(st.booleans()),
        "others": draw(st.integers(0, 2**16)),  # bits: which modules are in the other mode
        "frozen": draw(st.integers(0, 2**16)),
        "sites": draw(st.sampled_from((None, "include", "exclude", "overrides"))),
    }


def made(recipe: dict[str, Any], chosen: dict[str, Any], state: dict[str, Any]) -> nn.Module:
    """The model, patched where there is something to swap, its upsamplers moved off step 0."""
    model = generated.build(**recipe)
    if not state["late"]:
        getattr(model, state["dtype"])()
    if state["channels_last"]:
        model.to(memory_format=torch.channels_last)
    model.train(state["training"])
    names = [site.name for site in upswap.inspect(model, **chosen).swapped]
    if len(names) > 1 and state["sites"] == "include":
        chosen = {**chosen, "include": names[:1]}
    elif len(names) > 1 and state["sites"] == "exclude":
        chosen = {**chosen, "exclude": names[:1]}
    elif names and state["sites"] == "overrides" and "style" in chosen:
        chosen = {**chosen, "overrides": {names[-1]: {"style": "pl", "groups": 2}}}
    if names:
        upswap.patch(model, **chosen)
        with torch.no_grad():
            for number, parameter in enumerate(upswap.parameters(model)):
                parameter.add_(torch.rand(parameter.shape, generator=torch.Generator().manual_seed(number)), alpha=0.2)
    getattr(model, state["dtype"])()
    for number, module in enumerate(model.modules()):
        module.training ^= bool(state["others"] >> number % 16 & 1)
    for number, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(not state["frozen"] >> number % 16 & 1)
    return model


def outputs(model: nn.Module, image: torch.Tensor) -> list[torch.Tensor]:
    """The tensors that runs in three modes give, as it is, in eval and in train mode, which ends the use of `model`."""
    found: list[torch.Tensor] = []
    torch.manual_seed(5)
    with torch.no_grad():
        for mode in (None, False, True):
            given = (model if mode is None else model.train(mode))(image)
            found += pytree.tree_leaves((given.out, given.maps) if hasattr(given, "maps") else given)
    return found


def assert_equal(got: nn.Module, expected: nn.Module) -> None:
    """The two are the same in all that a file keeps."""
    assert [(p, m.training) for p, m in got.named_modules()] == [(p, m.training) for p, m in expected.named_modules()]
    assert [type(m).__qualname__ for m in got.modules()] == [type(m).__qualname__ for m in expected.modules()]
    assert [(n, p.requires_grad) for n, p in got.named_parameters()] == [
        (n, p.requires_grad) for n, p in expected.named_parameters()
    ]
    old, new = expected.state_dict(), got.state_dict()
    assert list(old) == list(new)
    for name in old:
        assert old[name].dtype == new[name].dtype, name
        assert torch.equal(old[name], new[name]), name
    unsaved = dict(got.named_buffers())
    for name, buffer in expected.named_buffers():
        assert buffer.dtype == unsaved[name].dtype, name
        assert torch.equal(buffer, unsaved[name]), name
    try:
        plan = upswap.plan_of(expected)
    except upswap.PlanError:
        with pytest.raises(upswap.PlanError):
            upswap.plan_of(got)
    else:
        assert upswap.plan_of(got) == plan
        assert list(upswap.upsamplers(got)) == list(upswap.upsamplers(expected))


@pytest.fixture(autouse=True)
def known(monkeypatch: pytest.MonkeyPatch) -> None:
    """The classes here are of a library that upswap knows."""
    monkeypatch.setattr(allowed_names, "PACKAGES", (*allowed_names.PACKAGES, "generated"))


FEW = settings(
    max_examples=30,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@FEW
@given(recipe=recipes(), chosen=options(), state=states())
def test_what_is_saved_without_a_warning_is_loaded_equal(
    recipe: dict[str, Any], chosen: dict[str, Any], state: dict[str, Any]
) -> None:
    check(recipe, chosen, state)


@pytest.mark.slow
@settings(FEW, max_examples=300, derandomize=False)
@given(recipe=recipes(), chosen=options(), state=states())
def test_so_are_many_more(recipe: dict[str, Any], chosen: dict[str, Any], state: dict[str, Any]) -> None:
    check(recipe, chosen, state)


def check(recipe: dict[str, Any], chosen: dict[str, Any], state: dict[str, Any]) -> None:
    """All forms, each with a spec in it and with the model given."""
    model = made(recipe, chosen, state)
    spec = str(Spec("python", "generated:build", recipe))
    image = generated.image(next(model.parameters()).dtype)
    if state["channels_last"]:
        image = image.contiguous(memory_format=torch.channels_last)
    expected = outputs(copy.deepcopy(model), image)
    with tempfile.TemporaryDirectory() as home:
        for name in ("model.pt", "model.safetensors", "folder"):
            for source in (spec, None):
                path = Path(home) / f"{source is None}-{name}"
                with warnings.catch_warnings(record=True) as told:
                    warnings.simplefilter("always")
                    upswap.save(model, path, source=source)
                if any(issubclass(warning.category, upswap.UpswapWarning) for warning in told):
                    continue
                if source is None and path.suffix != ".pt":
                    # In neither the mode nor the type of the one that was saved.
                    host = generated.build(**recipe, seed=1).train(not state["training"])
                    again = upswap.load(path, host)
                    assert again is host
                else:
                    again = upswap.load(path, trust=["generated"])
                assert_equal(again, model)
                for one, other in zip(outputs(again, image), expected, strict=True):
                    # Not bit for bit: weights out of a file may begin at any address, and torch's kernels round by that.
                    torch.testing.assert_close(one, other, equal_nan=True)


# ---- what was found, by name

TRAIN_ONLY: dict[str, Any] = {"blocks": (("neck", "train", "nearest", 2),)}


@pytest.mark.parametrize("name", ["model.pt", "model.safetensors", "folder"])
@pytest.mark.parametrize(
    "chosen", [{"groups": 3}, {"style": "pl", "groups": 3}, {"overrides": {"neck:1": {"groups": 2}}}]
)
def test_a_site_of_train_mode_with_a_note(chosen: dict[str, Any], name: str, tmp_path: Path) -> None:
    model = upswap.patch(generated.build(**TRAIN_ONLY), **chosen)
    noted = [site for site in upswap.plan_of(model).swapped if site.seen_in == "train" and len(site.notes) > 1]
    assert noted
    again = upswap.load(
        upswap.save(model, tmp_path / name, source=str(Spec("python", "generated:build", TRAIN_ONLY))),
        trust=["generated"],
    )
    assert_equal(again, model)


def test_such_a_site_in_a_file_of_schema_1(tmp_path: Path) -> None:
    """There the reason has both, one after the other."""
    model = upswap.patch(generated.build(**TRAIN_ONLY), groups=3)
    path = upswap.save(model, tmp_path / "model.safetensors")
    tensors, header = portable.read(path)
    header["plan"] = as_schema_1(header["plan"])
    assert sum("(in train mode only); " in site["reason"] for site in header["plan"]["sites"]) == 2
    portable.write(tensors, {portable.HEADER_KEY: json.dumps(header)}, path)
    again = upswap.load(path, generated.build(**TRAIN_ONLY))
    assert [site.seen_in for site in upswap.plan_of(again).swapped] == ["eval", "train", "train"]
    image = generated.image()
    for one, other in zip(outputs(again, image), outputs(model, image), strict=True):
        assert torch.equal(one, other)


def as_schema_1(plan: dict[str, Any]) -> dict[str, Any]:
    """A plan as upswap wrote it before `seen_in` and notes."""
    sites = []
    for site in plan["sites"]:
        notes = [note for note in site["notes"] if note != "in train mode only"]
        reason = site["reason"] + (" (in train mode only)" if site["seen_in"] == "train" else "")
        kept = {key: value for key, value in site.items() if key not in ("config", "notes", "seen_in")}
        sites.append({**kept, "reason": "; ".join([reason, *notes])})
    options = {key: value for key, value in plan["options"].items() if key not in ("config", "overrides")}
    return {**plan, "schema": 1, "sites": sites, "options": {**options, **plan["options"]["config"]}}


LONG = {
    "decoder_attention_type": "scse",
    "activation": "sigmoid",
    "aux_params": {"classes": 4, "pooling": "avg", "dropout": 0.25, "activation": "sigmoid"},
}


@pytest.mark.parametrize("name", ["model.safetensors", "folder"])
def test_a_spec_longer_than_the_name_of_a_file(name: str, tmp_path: Path) -> None:
    model = patched(unet(**LONG))
    path = upswap.save(model, tmp_path / name)
    spec = spec_in(path)
    assert spec is not None
    assert len(spec) > 255
    again = upswap.load(path)
    assert list(again.state_dict()) == list(model.state_dict())
    assert all(
        torch.equal(old, new) for old, new in zip(model.state_dict().values(), again.state_dict().values(), strict=True)
    )
    assert says_how_it_is_built(path)
    # A user may write it too.
    assert set(open_source(spec).model.state_dict()) <= set(model.state_dict())
    upswap.save(model, tmp_path / f"again-{name}", source=spec)


def test_a_file_that_is_called_as_the_spec_is_not_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = upswap.save(unet(), tmp_path / "model.safetensors", source="smp:unet?encoder_name=resnet18&classes=2")
    (tmp_path / "smp:unet?encoder_name=resnet18&classes=2").write_bytes(b"")
    assert type(upswap.load(path)).__name__ == "Unet"


def test_a_shared_block_keeps_its_upsampler_in_a_folder(tmp_path: Path) -> None:
    recipe = {"blocks": (("one", "call", "nearest", 2), ("two", "call", "nearest", 2))}
    model = upswap.patch(generated.build(**recipe))
    assert model.one is model.two
    path = upswap.save(model, tmp_path / "folder")
    assert not any("upsample" in name for name in load_file(path / "model.safetensors"))
    assert_equal(upswap.load(path, generated.build(**recipe)), model)
