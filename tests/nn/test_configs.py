"""Options of upsamplers: what a value may be, what fits a site, and what the options look like as text."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import pytest

import upswap
from one_site import one_site
from upswap.errors import OptionError
from upswap.nn import CARAFEConfig
from upswap.nn.configs import (
    DySampleConfig,
    UpsamplerConfig,
    describe,
    from_plain,
    nominal_scale,
    option_types,
    value_from_text,
)
from upswap.nn.registry import OWN, config_class, make_config, name_of
from upswap.surgery.options import make_options


@dataclasses.dataclass(frozen=True)
class EveryType(UpsamplerConfig):
    kernel: int = 3
    gain: float = 1.0
    name: str = "a"
    flag: bool = False
    mode: Literal["x", "y"] = "x"
    sizes: tuple[int, ...] = ()
    pair: tuple[int, float] = (1, 1.0)
    maybe: float | None = None


@pytest.mark.parametrize(
    "values",
    [
        {"kernel": 5},
        {"gain": 2},
        {"gain": 0.5},
        {"name": ""},
        {"flag": True},
        {"mode": "y"},
        {"sizes": (1, 2, 3)},
        {"pair": (3, 0.5)},
        {"maybe": None},
        {"maybe": 2.0},
    ],
)
def test_values_of_a_fields_type_are_taken(values: dict[str, Any]) -> None:
    assert dataclasses.asdict(EveryType(**values)) == {**dataclasses.asdict(EveryType()), **values}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"kernel": "5"}, "kernel must be a whole number, got '5'"),
        ({"kernel": True}, "kernel must be a whole number, got True"),
        ({"kernel": 2.0}, "kernel must be a whole number"),
        ({"gain": "1"}, "gain must be a number"),
        ({"gain": False}, "gain must be a number"),
        ({"name": 3}, "name must be a string"),
        ({"flag": 1}, "flag must be true or false, got 1"),
        ({"mode": "z"}, "mode='z' is not one of x, y"),
        ({"mode": ["x"]}, "is not one of x, y"),
        ({"sizes": (1, "2")}, "sizes must be"),
        ({"sizes": 3}, "sizes must be"),
        ({"pair": (1,)}, "pair must be"),
        ({"maybe": "none"}, "maybe must be a number or None"),
    ],
)
def test_other_values_are_named(values: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        EveryType(**values)


def test_lists_of_json_stand_for_tuples() -> None:
    assert from_plain(EveryType, {"sizes": [1, 2], "pair": [1, 2.0]}) == EveryType(sizes=(1, 2), pair=(1, 2.0))


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("kernel", "7", 7),
        ("gain", "0.5", 0.5),
        ("name", "7", "7"),
        ("flag", "true", True),
        ("flag", "False", False),
        ("mode", "y", "y"),
        ("maybe", "none", None),
        ("maybe", "2", 2.0),
    ],
)
def test_text_of_a_command_line(name: str, text: str, value: Any) -> None:
    found = value_from_text(name, text, option_types(EveryType)[name])
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(("name", "text"), [("kernel", "x"), ("flag", "1"), ("mode", "z"), ("maybe", "nothing")])
def test_text_that_stands_for_no_value(name: str, text: str) -> None:
    with pytest.raises(OptionError, match=name):
        value_from_text(name, text, option_types(EveryType)[name])


@pytest.mark.parametrize("groups", [0, -1])
def test_groups_are_positive(groups: int) -> None:
    with pytest.raises(OptionError, match=f"groups must be a positive integer, got {groups}"):
        DySampleConfig(groups=groups)


@pytest.mark.parametrize(
    ("config", "channels", "style", "groups", "notes"),
    [
        (DySampleConfig(), 8, "lp", 4, 0),
        (DySampleConfig(style="pl"), 32, "pl", 8, 0),
        (DySampleConfig(style="pl"), 6, "lp", 3, 2),
        (DySampleConfig(groups=8), 12, "lp", 6, 1),
        (DySampleConfig(), 1, "lp", 1, 1),
        (DySampleConfig(groups=5), 10, "lp", 5, 0),
    ],
)
def test_what_fits_a_site(config: DySampleConfig, channels: int, style: str, groups: int, notes: int) -> None:
    fitted, said = config.fit(one_site(channels=channels))
    assert (fitted.style, fitted.groups, len(said)) == (style, groups, notes)
    assert (fitted.dyscope, fitted.init, fitted.cascade) == (config.dyscope, config.init, config.cascade)


def test_pl_needs_the_square_of_the_ratio() -> None:
    assert DySampleConfig(style="pl").fit(one_site(channels=8, scale=(4.0, 4.0)))[0].style == "lp"
    assert DySampleConfig(style="pl").fit(one_site(channels=16, scale=(4.0, 4.0)))[0].style == "pl"
    # A ratio that follows the input's size is built for x2.
    following = one_site(channels=4, scale=(4.0, 4.0), fixed_ratio=False)
    assert nominal_scale(following) == (2, 2)
    assert DySampleConfig(style="pl").fit(following)[0].style == "pl"


def test_the_options_as_text_name_each_with_its_default_and_meaning() -> None:
    lines = describe(DySampleConfig).splitlines()
    assert [line.partition(" ")[0] for line in lines] == [field.name for field in dataclasses.fields(DySampleConfig)]
    assert lines[0].startswith('style ("lp", "pl"; default "lp"): ')
    assert lines[1].startswith("groups (int or None; default None): ")


@pytest.mark.parametrize("cls", [config_class(name) for name in OWN])
def test_every_option_of_upswaps_own_says_what_it_means(cls: type[UpsamplerConfig]) -> None:
    assert all(field.metadata["help"] for field in dataclasses.fields(cls))


def test_help_of_patch_has_the_options() -> None:
    assert all(f"        {field.name} (" in str(upswap.patch.__doc__) for field in dataclasses.fields(DySampleConfig))


# ---- from keyword arguments


def test_a_config_says_the_name_and_keywords_change_it() -> None:
    assert make_options(DySampleConfig(style="pl"), groups=2) == make_options(style="pl", groups=2)
    assert make_options(CARAFEConfig()).upsampler == "carafe"
    assert name_of(DySampleConfig()) == "dysample"


@pytest.mark.parametrize(
    ("upsampler", "option", "message"),
    [
        ("dysample", "stile", "upsampler 'dysample' has no option 'stile'; near it: style"),
        ("dysample", "exclud", "near it: exclude"),
        ("carafe", "groups", "upsampler 'carafe' has no option 'groups'; it has up_kernel, "),
    ],
)
def test_an_unknown_option_is_an_error_with_near_names(upsampler: str, option: str, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        make_options(upsampler, **{option: 3})


def test_a_config_that_nothing_is_registered_with() -> None:
    with pytest.raises(OptionError, match="no upsampler is registered with options of the class EveryType"):
        make_options(EveryType())
    with pytest.raises(OptionError, match="takes a name or a config, got 3"):
        make_options(3)  # type: ignore[arg-type]


@pytest.mark.parametrize("options", [{}, {"stile": "pl"}, {"style": "zz"}])
def test_overrides_are_checked_before_the_model_is_looked_at(options: dict[str, Any]) -> None:
    with pytest.raises(OptionError):
        make_options(overrides={"decoder": options})


def test_a_plan_has_every_option_written_out() -> None:
    assert make_options().config == dataclasses.asdict(make_config("dysample", {}))
