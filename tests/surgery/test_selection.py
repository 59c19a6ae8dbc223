"""Why a site is swapped or kept, rule by rule."""

from __future__ import annotations

import dataclasses

import pytest

from one_site import one_site
from upswap.errors import FilterError, OptionError
from upswap.surgery.options import make_options
from upswap.surgery.selection import SWAPPABLE, check_patterns, select

NAMES = ["decoder.up1", "decoder.up2", "decoder.up3", "decoder.up4", "head"]


def reason_kept(site, **options):
    (decided,) = select([site], make_options(**options))
    assert not decided.swap
    assert decided.settings == {}
    return decided.reason


def test_a_feature_is_swapped_with_its_settings_and_its_own_reason() -> None:
    site = one_site()
    config = {"style": "lp", "groups": None, "dyscope": False, "init": "match", "cascade": False}
    settings = {**config, "groups": 4}
    assert select([site], make_options()) == (dataclasses.replace(site, swap=True, config=config, settings=settings),)


@pytest.mark.parametrize("kind", ["feature", "logits", "gate", "context"])
def test_kinds_that_can_be_swapped_are_where_they_are_asked_for(kind) -> None:
    assert kind in SWAPPABLE
    (decided,) = select([one_site(kind=kind)], make_options(kinds=(kind,)))
    assert decided.swap


@pytest.mark.parametrize("kind", ["logits", "gate", "context"])
def test_kinds_not_asked_for_are_kept_for_what_they_are(kind) -> None:
    assert reason_kept(one_site(kind=kind, reason="what it is")) == "what it is"


@pytest.mark.parametrize(
    "kind", ["image", "parameter", "mask", "identity", "downsample", "sequence", "volume", "other"]
)
def test_kinds_that_cannot_be_swapped_are_kept_though_asked_for(kind) -> None:
    assert reason_kept(one_site(kind=kind, reason="what it is"), kinds=(kind,)) == "what it is"


def test_with_include_only_what_one_of_the_patterns_matches_is_swapped() -> None:
    sites = [one_site(name="decoder.up1"), one_site(name="decoder.up2"), one_site(name="head")]
    decided = select(sites, make_options(include=("*.up1", "head")))
    assert [site.swap for site in decided] == [True, False, True]
    assert decided[1].reason == "not included"


def test_exclude_names_the_first_pattern_that_matches_and_wins_over_include() -> None:
    sites = [one_site(name="decoder.up1"), one_site(name="head")]
    decided = select(sites, make_options(include=("*",), exclude=("head", "he*")))
    assert [site.swap for site in decided] == [True, False]
    assert decided[1].reason == "excluded by 'head'"


def test_patterns_tell_upper_case_from_lower() -> None:
    with pytest.raises(FilterError, match="include pattern 'HEAD'"):
        select([one_site(name="head")], make_options(include=("HEAD",)))
    sites = [one_site(name="head"), one_site(name="HEAD")]
    assert [site.swap for site in select(sites, make_options(exclude=("HEAD",)))] == [True, False]


@pytest.mark.parametrize("option", ["include", "exclude"])
def test_both_options_refuse_a_pattern_that_matches_nothing(option) -> None:
    with pytest.raises(FilterError, match=f"^{option} pattern 'tail' matches none of the 1 sites"):
        select([one_site()], make_options(**{option: ("*", "tail")}))


@pytest.mark.parametrize("mode", ["trilinear", "lanczos"])
def test_modes_without_an_equal_are_kept(mode) -> None:
    assert reason_kept(one_site(mode=mode)) == f"mode {mode!r} has no sampling equivalent"


@pytest.mark.parametrize("mode", ["nearest", "nearest-exact", "bilinear", "bicubic", "area"])
def test_modes_with_an_equal_are_swapped_and_kept_with_antialias(mode) -> None:
    (decided,) = select([one_site(mode=mode)], make_options())
    assert decided.swap
    assert (
        reason_kept(one_site(mode=mode, antialias=True)) == f"mode {mode!r} with antialias has no sampling equivalent"
    )


@pytest.mark.parametrize("scale", [(1.0, 1.0), (0.5, 2.0), (2.0, 0.99), (0.5, 0.5)])
def test_ratios_that_do_not_enlarge_are_kept(scale) -> None:
    assert reason_kept(one_site(scale=scale)) == "does not make its input larger at the example size"


@pytest.mark.parametrize("scale", [(1.0, 2.0), (2.0, 1.0), (1.5, 1.5), (1.25, 1.0)])
def test_ratios_that_enlarge_one_axis_are_swapped(scale) -> None:
    (decided,) = select([one_site(scale=scale)], make_options())
    assert decided.swap


@pytest.mark.parametrize("fixed", [False, None])
def test_a_context_whose_ratio_is_not_known_to_be_fixed_is_kept(fixed) -> None:
    site = one_site(kind="context", fixed_ratio=fixed, reason="a point")
    assert reason_kept(site, kinds=("context",)) == "a point; no fixed ratio to learn an upsampler for"


@pytest.mark.parametrize("fixed", [False, None])
def test_other_kinds_need_no_fixed_ratio(fixed) -> None:
    (decided,) = select([one_site(fixed_ratio=fixed)], make_options())
    assert decided.swap


def test_what_is_not_fitted_as_asked_is_said_after_the_reason() -> None:
    (decided,) = select([one_site(channels=6, other_channels=(3, 9), reason="why")], make_options(style="pl"))
    assert decided.config["style"] == "pl"
    assert (decided.settings["style"], decided.settings["groups"]) == ("lp", 3)
    assert decided.reason == "why"
    assert decided.notes == (
        "style lp, because 6 channels are not divisible by 4",
        "groups 3, the largest divisor of 6 channels up to 4",
        "an upsampler each for 6, 3, 9 channels",
    )
    assert decided.why == "; ".join(("why", *decided.notes))


def test_with_strict_every_channel_count_has_to_fit() -> None:
    site = one_site(channels=8, other_channels=(6,))
    assert select([site], make_options(strict=True))[0].swap
    with pytest.raises(OptionError, match="4 groups do not divide 6 channels"):
        select([site], make_options(groups=4, strict=True))


def test_another_upsampler_gets_its_own_options() -> None:
    (decided,) = select([one_site()], make_options("carafe", up_kernel=3))
    assert decided.config == decided.settings
    assert decided.config["up_kernel"] == 3
    assert decided.notes == ()


# ---- overrides

SITES = [one_site(name="decoder.p2"), one_site(name="decoder.p3"), one_site(name="head")]


def groups(**options):
    return [site.config["groups"] for site in select(SITES, make_options(**options))]


def test_an_override_changes_the_sites_it_names_and_no_other() -> None:
    assert groups(groups=4, overrides={"decoder.p2": {"groups": 8}}) == [8, 4, 4]


def test_a_pattern_matches_whole_names() -> None:
    assert groups(overrides={r"re:decoder\..*": {"groups": 2}}) == [2, 2, None]
    with pytest.raises(FilterError, match=r"override 're:decoder' matches none of the 3 sites"):
        groups(overrides={"re:decoder": {"groups": 2}})


def test_an_exact_name_goes_before_a_pattern_and_the_first_pattern_before_the_next() -> None:
    overrides = {"re:.*": {"groups": 2}, "re:decoder.*": {"groups": 1}, "head": {"groups": 8}}
    assert groups(overrides=overrides) == [2, 2, 8]


def test_what_an_override_does_not_name_stays_as_asked_for_everywhere() -> None:
    decided = select(SITES, make_options(style="pl", overrides={"head": {"groups": 2}}))[2]
    assert (decided.config["style"], decided.config["groups"]) == ("pl", 2)
    assert decided.notes == ("groups=2 by the override 'head'",)


def test_a_name_without_re_is_no_pattern() -> None:
    with pytest.raises(FilterError, match=r"override 'decoder\.\*' matches none of the 3 sites; near it: decoder\.p"):
        groups(overrides={"decoder.*": {"groups": 2}})


def test_a_pattern_that_is_no_expression_is_named() -> None:
    with pytest.raises(FilterError, match=r"'\(' is no regular expression"):
        groups(overrides={"re:(": {"groups": 2}})


def test_an_override_of_kept_sites_is_an_error_with_the_reason() -> None:
    with pytest.raises(FilterError, match=r"override 'head' is for sites that are kept: head: excluded by 'head'"):
        groups(overrides={"head": {"groups": 2}}, exclude="head")


def test_the_error_for_a_pattern_names_the_three_nearest_best_first() -> None:
    with pytest.raises(FilterError) as caught:
        check_patterns("include", ["head", "*decoder.up33*"], NAMES)
    start, near, end = str(caught.value).partition("; near it: decoder.up3, ")
    assert start == "include pattern '*decoder.up33*' matches none of the 5 sites"
    assert near
    names, _, rest = end.partition(". The names are")
    assert len(names.split(", ")) == 2
    assert set(names.split(", ")) < set(NAMES)
    assert rest == " those that `upswap inspect` lists; * matches any part of one."


def test_the_error_for_a_pattern_near_nothing_names_the_first_three() -> None:
    with pytest.raises(FilterError, match=r"sites; near it: decoder\.up1, decoder\.up2, decoder\.up3\. The names"):
        check_patterns("exclude", ["zzzz"], NAMES)


def test_a_pattern_is_near_a_name_of_which_it_has_a_third() -> None:
    with pytest.raises(FilterError, match=r"near it: head\. The names"):  # 2 * 2 letters of 9
        check_patterns("include", ["heqqq"], ["zzz", "head"])
    with pytest.raises(FilterError, match=r"near it: zzz, abcdefghij\. The names"):  # 2 * 2 of 17
        check_patterns("include", ["ab*qqqq"], ["zzz", "abcdefghij"])


def test_the_error_where_there_are_no_sites_names_none() -> None:
    with pytest.raises(FilterError) as caught:
        check_patterns("include", ["a"], [])
    assert str(caught.value) == (
        "include pattern 'a' matches none of the 0 sites. "
        "The names are those that `upswap inspect` lists; * matches any part of one."
    )


def test_patterns_that_match_a_name_each_are_taken() -> None:
    assert check_patterns("include", ["head", "*.up?"], NAMES) is None


def test_stars_at_the_ends_of_a_pattern_and_nothing_else_do_not_count_against_a_name() -> None:
    with pytest.raises(FilterError, match=r"near it: hebcdfgi\. The"):  # 2 * 2 of 12, with the stars of 14
        check_patterns("include", ["*heqq*"], ["zzz", "hebcdfgi"])
    with pytest.raises(FilterError, match=r"near it: aXeXbcdfgi\. The"):
        check_patterns("include", ["XeX"], ["zzz", "aXeXbcdfgi"])


def test_a_site_that_was_swapped_before_is_kept_all_the_same() -> None:
    assert reason_kept(one_site(swap=True), include=("*",), exclude=("decoder",)) == "excluded by 'decoder'"
