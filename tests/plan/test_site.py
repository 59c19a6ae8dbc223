from __future__ import annotations

import json

import pytest

from upswap import OptionError, PlanError
from upswap.plan.plan import Options, Override, Plan
from upswap.plan.site import Location, Site, Step


def site(name: str = "decoder", **changes: object) -> Site:
    values = {
        "name": name,
        "owner": name,
        "owner_class": "package.Decoder",
        "ordinal": 0,
        "kind": "feature",
        "op": "interpolate",
        "mode": "nearest",
        "align_corners": False,
        "antialias": False,
        "sized_by": "size",
        "scale": (2.0, 2.0),
        "fixed_ratio": True,
        "channels": 8,
        "other_channels": (),
        "in_shape": (1, 8, 4, 4),
        "out_shape": (1, 8, 8, 8),
        "dtype": "float32",
        "calls": 1,
        "location": Location((Step("Decoder.forward", "F.interpolate(x, size)", 0),), 0, "decoder.py", 12),
        "swap": True,
        "settings": {"scale": (2, 2), "groups": 4},
    }
    return Site(**{**values, **changes})  # type: ignore[arg-type]


def test_a_plan_survives_json() -> None:
    plan = Plan(
        "package.Model",
        Options(include=("a*", "b"), config={"groups": 3}, overrides=(Override("a", {"groups": 2}),)),
        (site(), site("other", location=None, swap=False)),
        inputs={"args": {"tuple": []}},
        calls={"decoder": {"args": {"tuple": [{"tensor": [1, 2], "dtype": "float32"}]}, "kwargs": {"dict": {}}}},
        hints=("one",),
    )
    assert Plan.from_json(plan.to_json()) == plan
    assert json.loads(plan.to_json())["sites"][0]["name"] == "decoder"
    assert [s.name for s in plan.swapped] == ["decoder"]
    assert [s.name for s in plan.kept] == ["other"]
    assert plan.site("other").location is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": 99}, "schema 99"),
        ({"sites": [{"name": "x"}]}, "not a plan upswap wrote"),
        ({"sites": "no"}, "not a plan upswap wrote"),
        ({"options": {"strict": "zz"}}, "not a plan upswap wrote"),
        ({"surprise": 1}, "unknown entries in a Plan: surprise"),
    ],
)
def test_a_plan_of_another_shape_is_refused(change: dict[str, object], message: str) -> None:
    data = {**Plan("package.Model", Options(), (site(),)).to_dict(), **change}
    with pytest.raises(PlanError, match=message):
        Plan.from_dict(data)


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '"text"', "null"])
def test_text_that_is_no_plan_is_refused(text: str) -> None:
    with pytest.raises(PlanError):
        Plan.from_json(text)


@pytest.mark.parametrize(
    "options",
    [
        {"kinds": ("feature", "nonsense")},
        {"kinds": ()},
    ],
)
def test_options_that_cannot_be_used(options: dict[str, object]) -> None:
    with pytest.raises(OptionError):
        Options(**options)  # type: ignore[arg-type]


def test_a_site_that_is_not_there_is_named_with_those_that_are() -> None:
    with pytest.raises(PlanError, match=r"no site 'nope'.*decoder"):
        Plan("package.Model", Options(), (site(),)).site("nope")


def test_ratio() -> None:
    assert site().ratio == "x2"
    assert site(scale=(3.0, 2.0)).ratio == "x3,x2"
    assert site(scale=(1.5, 1.5)).ratio == "x1.5"
