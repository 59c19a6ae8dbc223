"""Plans and files that this version wrote go on loading; newer ones are refused, and broken ones say where.

Run as a script, with `tests/support` in PYTHONPATH, it writes the files under `data/`, for a new version of the schema.
"""

from __future__ import annotations

import dataclasses
import json
import pickle
import re
import sys
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import upswap
from tiny_host import image, tiny
from upswap import Plan, PlanError, SourceError
from upswap.files.formats import description
from upswap.files.formats import safetensors as portable
from upswap.plan import site as _site
from upswap.plan.plan import Options, Override
from upswap.plan.site import Guide, Location, Relay, Site, Step
from upswap.surgery import rewritten_class

DATA = Path(__file__).parents[1] / "data"
STORED = DATA / "schema2"
SCHEMAS = ("schema1", "schema2")
DOCUMENT = Path(__file__).parents[2] / "docs" / "plan.md"


def smp_unet() -> nn.Module:
    import segmentation_models_pytorch as smp

    return smp.Unet("resnet18", encoder_weights=None, classes=2).eval()


def smp_upernet() -> nn.Module:
    import segmentation_models_pytorch as smp

    return smp.UPerNet("resnet18", encoder_weights=None, classes=2).eval()


def smp_deeplab() -> nn.Module:
    import segmentation_models_pytorch as smp

    return smp.DeepLabV3Plus("resnet18", encoder_weights=None, classes=2).eval()


def retinanet() -> nn.Module:
    from torchvision.models import detection

    return detection.retinanet_resnet50_fpn(weights=None, weights_backbone=None, num_classes=3).eval()


#: Models whose plans are stored: the source route, the graph route, layers, detection.
MODELS: dict[str, Callable[[], nn.Module]] = {
    "smp-unet": smp_unet,
    "smp-upernet": smp_upernet,
    "smp-deeplabv3plus": smp_deeplab,
    "torchvision-retinanet": retinanet,
    "tiny": tiny,
}


def trained() -> nn.Module:
    model = upswap.patch(tiny())
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in upswap.parameters(model):
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.3)
    return model


def write_all(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, build in MODELS.items():
        (folder / f"{name}.json").write_text(upswap.inspect(build()).to_json(indent=1) + "\n")
    model = trained()
    upswap.save(model, folder / "tiny.pt", force=True)
    upswap.save(model, folder / "tiny.safetensors", force=True)
    (folder / "output.json").write_text(json.dumps([round(value, 6) for value in shown(model).tolist()]) + "\n")


@torch.no_grad()
def shown(model: nn.Module) -> torch.Tensor:
    """Every fifth pixel of its output."""
    return model(image())[..., ::5, ::5].flatten()


# ---- what this version wrote


@pytest.mark.parametrize("name", MODELS)
def test_stored_plans_load_and_come_back_exactly(name: str) -> None:
    text = (STORED / f"{name}.json").read_text()
    plan = Plan.from_json(text)
    assert plan.to_json(indent=1) + "\n" == text
    assert json.loads(text)["schema"] == 2
    assert Plan.from_json(plan.to_json()) == plan
    routes = {site.route for site in plan.swapped}
    assert routes == {"tiny": {"graph", "source", "module"}, "smp-upernet": {"graph", "source"}}.get(name, routes)


def test_a_plan_with_guides_comes_back() -> None:
    plan = Plan.from_json((STORED / "smp-unet.json").read_text())
    site = plan.swapped[0]
    assert site.location is not None
    step = site.location.steps[0]
    relays = (Relay("neck.0", None), Relay("neck.0.1", site.location))
    guides = [
        Guide(8, "cat", "local", name="skips", path=(0, "fine")),
        Guide(8, "add", "fusion", fusing=step, operand=1),
        Guide(8, "add", "handed", name="y", holder="", through=relays, location=site.location),
    ]
    sites = [dataclasses.replace(site, name=str(number), guide=guide) for number, guide in enumerate(guides)]
    sites.append(dataclasses.replace(site, no_guide="nothing is fused", upsampler="carafe", config={"init": "paper"}))
    guided = plan.replace_sites(sites)
    assert Plan.from_json(guided.to_json()) == guided
    assert [site.guide.place for site in guided.sites if site.guide] == ["skips[0]['fine']", step.expression, "y"]


@pytest.mark.parametrize(
    "change",
    [{"name": "a.b"}, {"name": "__class__"}, {"name": "lambda"}, {"path": [-1]}, {"path": [[0]]}, {"way": "global"}],
)
def test_a_guide_names_a_local_and_keys_alone(change: dict[str, Any]) -> None:
    plan = Plan.from_json((STORED / "smp-unet.json").read_text())
    site = dataclasses.replace(plan.sites[0], guide=Guide(8, "cat", "local", name="skip"))
    data = plan.replace_sites([site]).to_dict()
    data["sites"][0]["guide"] |= change
    with pytest.raises(PlanError, match=r"sites\[0\].guide"):
        Plan.from_dict(data)


@pytest.mark.parametrize("name", MODELS)
def test_plans_of_schema_1_load_as_what_they_said(name: str) -> None:
    old = Plan.from_json((DATA / "schema1" / f"{name}.json").read_text())
    new = Plan.from_json((STORED / f"{name}.json").read_text())
    assert old.schema == new.schema == 2
    assert old.options == new.options
    for before, after in zip(old.sites, new.sites, strict=True):
        for field in ("name", "owner", "kind", "swap", "route", "module", "config", "seen_in", "why"):
            assert getattr(before, field) == getattr(after, field), field
    assert Plan.from_json(old.to_json()) == old


@pytest.mark.parametrize("upsampler", ["dysample", "carafe", "someones"])
def test_options_of_schema_1_go_to_the_upsampler_that_read_them(upsampler: str) -> None:
    data = json.loads((DATA / "schema1" / "tiny.json").read_text())
    given = {"style": "pl", "groups": 2, "dyscope": True, "init": "paper", "cascade": True}
    plan = Plan.from_dict({**data, "options": {**data["options"], **given, "upsampler": upsampler}})
    read = {"dysample": given, "carafe": {"cascade": True, "init": "paper"}, "someones": {}}[upsampler]
    assert plan.options.config == read
    assert all(site.config == read for site in plan.swapped)


def test_a_carafe_of_before_its_gain_is_the_published_one() -> None:
    model = upswap.patch(tiny(), image(), upsampler="carafe", init="paper")
    data = upswap.plan_of(model).to_dict()
    for options in (
        data["options"]["config"],
        *(site[key] for site in data["sites"] for key in ("config", "settings")),
    ):
        options.pop("init", None)
    old = upswap.patch(tiny(), plan=Plan.from_dict(data))
    assert upswap.plan_of(old) == upswap.plan_of(model)
    old.load_state_dict(model.state_dict())
    assert torch.equal(old.eval()(image()), model.eval()(image()))


def test_a_call_of_train_mode_alone_is_no_more_told_by_its_reason() -> None:
    data = json.loads((DATA / "schema1" / "tiny.json").read_text())
    data["sites"][0]["reason"] += " (in train mode only)"
    site = Plan.from_dict(data).sites[0]
    assert site.seen_in == "train"
    assert "train mode" not in site.reason
    assert site.notes == ("in train mode only",)


@pytest.mark.parametrize("schema", SCHEMAS)
@pytest.mark.parametrize("name", ["tiny", "smp-unet"])
def test_a_stored_plan_is_carried_out(name: str, schema: str) -> None:
    """That of another's library only as long as that is as it was; SMP's Unet has been."""
    plan = Plan.from_json((DATA / schema / f"{name}.json").read_text())
    model = upswap.patch(MODELS[name](), plan=plan)
    assert [site.module for site in plan.swapped] == list(upswap.upsamplers(model))


@pytest.mark.parametrize("schema", SCHEMAS)
@pytest.mark.parametrize("name", ["tiny.pt", "tiny.safetensors"])
def test_stored_files_load_and_compute_what_they_did(name: str, schema: str) -> None:
    path = DATA / schema / name
    model = upswap.load(path, trust=["tiny_host"]) if name.endswith(".pt") else upswap.load(path, tiny())
    expected = json.loads((DATA / schema / "output.json").read_text())
    torch.testing.assert_close(shown(model), torch.tensor(expected), rtol=1e-5, atol=1e-5)
    assert (shown(model) - shown(tiny())).abs().max() > 1e-2
    assert upswap.plan_of(model) == Plan.from_json((DATA / schema / "tiny.json").read_text())


# ---- what a newer one writes


def test_a_newer_plan_is_refused() -> None:
    data = json.loads((STORED / "tiny.json").read_text())
    newer = {**data, "schema": 3, "upswap_version": "9.1", "surprise": [1]}
    with pytest.raises(
        PlanError, match=r"schema 3 and was written by a newer upswap, upswap 9\.1.*pip install -U upswap"
    ):
        Plan.from_dict(newer)
    for schema in (None, "1", True, 0, -3, 1.0, [1], "x" * 1000):
        with pytest.raises(PlanError, match=r"has schema .{1,70}, this upswap reads schema 2: make the plan again"):
            Plan.from_dict({**data, "schema": schema})


def test_a_newer_file_is_refused(tmp_path: Path) -> None:
    path = upswap.save(trained(), tmp_path / "model.safetensors")
    tensors, header = portable.read(path)

    def rewritten(**changes: Any) -> Path:
        portable.write(tensors, {portable.HEADER_KEY: json.dumps({**header, **changes})}, path)
        return path

    with pytest.raises(SourceError, match=r"upswap 9\.1.*update upswap"):
        upswap.load(rewritten(schema=2, upswap_version="9.1"), tiny())
    with pytest.raises(PlanError, match="written by a newer upswap"):
        upswap.load(rewritten(plan={**header["plan"], "schema": 3}), tiny())


def test_a_newer_whole_model_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rewritten_class.Record, "to_dict", lambda self: {**_old_record(self), "schema": 3, "more": 1})
    model = trained()
    torch.save(model, tmp_path / "model.pt")
    content = pickle.dumps(model)
    for load in (lambda: upswap.load(tmp_path / "model.pt", trust=["tiny_host"]), lambda: pickle.loads(content)):
        with pytest.raises(PlanError, match=r"'straight' has schema 3 and was written by a newer upswap"):
            load()


_old_record = rewritten_class.Record.to_dict


# ---- what is broken


def entries(data: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths of everything in nested dicts and lists."""
    found = [path] if path else []
    for key, value in data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ():
        found += entries(value, (*path, key))
    return found


def changed(data: Any, path: tuple[Any, ...], value: Any) -> Any:
    """`data` with another value at a path."""
    copy = json.loads(json.dumps(data))
    place = copy
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return copy


@pytest.mark.parametrize("value", ["text", -1, 2.5, True, None, [], {}, [{}], {"a": 1}, 10**30, float("nan")])
def test_every_entry_of_another_type_is_named_or_fine(value: Any) -> None:
    """Either the plan is refused, naming the entry, or it is a plan: it has JSON, and that gives it back."""
    data = json.loads((STORED / "tiny.json").read_text())
    free = ("config", "settings", "inputs", "calls")
    refused = 0
    for path in entries(data):
        if path == ("schema",) or any(key in free for key in path[:-1]):
            continue
        try:
            plan = Plan.from_dict(changed(data, path, value))
        except PlanError as error:
            refused += 1
            named = re.sub(r"\.(\d+)", r"[\1]", ".".join(map(str, path)))
            message = str(error)
            assert f"plan.{named}" in message or named.partition(".")[0] in message, message
            assert len(message) < 400
        else:
            assert Plan.from_json(plan.to_json()) == plan or value != value
    assert refused > len(entries(data)) / 6


BROKEN: dict[str, tuple[tuple[Any, ...], Any, str]] = {
    "a string for a number": (
        ("sites", 1, "channels"),
        "8",
        r"plan\.sites\[1\]\.channels is '8', where it has to be a whole",
    ),
    "a bool for a number": (("sites", 1, "channels"), True, r"sites\[1\]\.channels is True"),
    "a number for a bool": (("sites", 0, "swap"), 1, r"sites\[0\]\.swap is 1, where it has to be true or false"),
    "negative channels": (("sites", 0, "channels"), -4, r"channels is -4, where it has to be a positive number"),
    "a size no model has": (("sites", 0, "in_shape"), [1, 10**12, 4, 4], r"in_shape\[1\] is 1000000000000"),
    "a run no loop has": (
        ("sites", 0, "location", "occurrence"),
        2**31 - 1,
        r"occurrence is 2147483647, where it has to be",
    ),
    "infinity": (("sites", 0, "scale"), [float("inf"), 2.0], r"scale\[0\] is inf"),
    "a ratio of none": (("sites", 0, "scale"), [0.0, 2.0], r"scale\[0\] is 0\.0, where it has to be a positive"),
    "three ratios": (("sites", 0, "scale"), [2.0, 2.0, 2.0], r"scale is .* where it has to be a list of 2"),
    "a list for an object": (("options",), [], r"plan\.options is \[\], where it has to be an object"),
    "an object for a list": (("sites",), {}, r"plan\.sites is \{\}, where it has to be a list"),
    "a name that is no string": (("sites", 0, "name"), 3, r"sites\[0\]\.name is 3, where it has to be a string"),
    "an empty name": (("sites", 0, "name"), "", r"sites\[0\]\.name is '', where it has to be a name"),
    "a path that is none": (
        ("sites", 0, "owner"),
        "a..b",
        r"owner is 'a\.\.b', where it has to be the path of a module",
    ),
    "a path with a hole": (
        ("sites", 0, "module"),
        "a..b",
        r"module is 'a\.\.b', where it has to be the path of a module",
    ),
    "a kind unknown": (
        ("sites", 0, "kind"),
        "faeture",
        r"kind is 'faeture', where it has to be one of feature, logits",
    ),
    "a route unknown": (("sites", 0, "route"), "magic", r"route is 'magic', where it has to be one of module, graph"),
    "an option unknown": (("options", "stile"), "zz", r"unknown entries in a Options: stile \(in plan\.options\)"),
    "a way of no steps": (
        ("sites", 0, "location", "steps"),
        [],
        r"location\.steps is \[\], where it has to be a list of one",
    ),
    "a step of another form": (
        ("sites", 0, "location", "steps", 0),
        5,
        r"steps\[0\] is 5, where it has to be an object",
    ),
    "an entry more": (("sites", 0, "extra"), 5, r"unknown entries in a Site: extra \(in plan\.sites\[0\]\)"),
    "inputs that are none": (("inputs",), [], r"plan\.inputs is \[\], where it has to be an object"),
    "a long value": (("model_class",), ["x" * 10_000], r"plan\.model_class is \['x{5,20}\.\.\.x{5,20}'\], where"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_plan_says_where(what: str) -> None:
    path, value, says = BROKEN[what]
    data = json.loads((STORED / "tiny.json").read_text())
    with pytest.raises(PlanError, match=says):
        Plan.from_dict(changed(data, path, value))


def test_entries_that_are_missing_are_named() -> None:
    data = json.loads((STORED / "tiny.json").read_text())
    for name in ("model_class", "options", "sites"):
        with pytest.raises(PlanError, match=f"plan has no entry {name}"):
            Plan.from_dict({key: value for key, value in data.items() if key != name})
    site = {key: value for key, value in data["sites"][2].items() if key != "scale"}
    with pytest.raises(PlanError, match=r"plan\.sites\[2\] has no entry scale"):
        Plan.from_dict(changed(data, ("sites", 2), site))


def test_sites_of_one_name_are_refused() -> None:
    data = json.loads((STORED / "tiny.json").read_text())
    with pytest.raises(PlanError, match="several sites are named straight"):
        Plan.from_dict({**data, "sites": [data["sites"][0], data["sites"][0]]})


def test_data_without_a_bottom_is_refused() -> None:
    data = json.loads((STORED / "tiny.json").read_text())
    deep: Any = 1
    for _ in range(500):
        deep = [deep]
    with pytest.raises(PlanError, match=r"goes too deep"):
        Plan.from_dict({**data, "inputs": {"a": deep}})
    with pytest.raises(PlanError, match="not JSON"):
        Plan.from_json("[" * 10**6)


def test_a_broken_description_of_a_forward_is_an_error_of_the_plan() -> None:
    """What the graph route needs is taken apart where it is used."""
    data = json.loads((STORED / "tiny.json").read_text())
    calls = data["calls"]["straight"]
    said: set[bool] = set()
    tensors = ({"tensor": [2, 2], "dtype": "surprise"}, {"tensor": [-1], "dtype": "float32"})
    for path in entries(calls):
        for value in (None, -1, "text", [], {}, [1], *tensors):
            plan = Plan.from_dict({**data, "calls": {"straight": changed(calls, path, value)}})
            try:
                model = upswap.patch(tiny(), plan=plan)
            except PlanError as error:
                said.add("straight" in str(error))
            else:
                assert model(image()).shape == (1, 2, 6 * 16, 5 * 16)
    assert said == {True}


def test_a_broken_record_is_an_error_of_the_plan() -> None:
    record = vars(type(trained().straight))["_upswap_record"].to_dict()
    assert rewritten_class.Record.from_dict(record).to_dict() == record
    for broken in (None, [], {}, {**record, "sites": 3}, {**record, "path": 4}, {**record, "sites": [{}]}):
        with pytest.raises(PlanError):
            rewritten_class.Record.from_dict(broken)


# ---- the document


def test_every_field_is_documented() -> None:
    text = DOCUMENT.read_text()
    for cls in (Plan, Options, Override, Site, Guide, Relay, Location, Step):
        section = re.search(rf"^## {cls.__name__}\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
        assert section is not None, cls.__name__
        rows = re.findall(r"^\| `(\w+)` \|", section[1], re.MULTILINE)
        assert rows == [field.name for field in dataclasses.fields(cls)], cls.__name__
        typing.get_type_hints(cls)
    section = re.search(r"^## The description of a file\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    assert section is not None
    rows = re.findall(r"^\| `(\w+)` \|", section[1], re.MULTILINE)
    # The last are of folders (`folder.save`) and of upsamplers alone (`save(only="upsamplers")`).
    assert set(rows) == {*description.describe(trained(), None, {}), "config_builds", "holds"}
    for kind in _site.KINDS:
        assert f"`{kind}`" in text


if __name__ == "__main__":
    write_all(Path(sys.argv[1]) if len(sys.argv) > 1 else STORED)
