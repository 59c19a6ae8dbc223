"""The options of upsamplers with predicted kernels: those of their classes, and what state dicts show of them."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

import pytest

from one_site import one_site
from upswap.nn import CARAFE, FADE, LDAAQU, SAPA, FreqFusion
from upswap.nn.kernels.configs import (
    CARAFEConfig,
    FADEConfig,
    FADELiteConfig,
    FreqFusionConfig,
    LDAAQUConfig,
    SAPAConfig,
    init_of,
)

PAIRS = [
    (CARAFEConfig, CARAFE),
    (LDAAQUConfig, LDAAQU),
    (FADEConfig, FADE),
    (FADELiteConfig, FADE),
    (SAPAConfig, SAPA),
    (FreqFusionConfig, FreqFusion),
]


@pytest.mark.parametrize(("config", "cls"), PAIRS)
def test_the_defaults_are_those_of_the_class(config: Any, cls: Any) -> None:
    own = inspect.signature(cls).parameters
    for field in dataclasses.fields(config):
        if field.name != "cascade":
            assert own[field.name].default == field.default, field.name
    others = {"channels", "guide_channels", "scale", "mode", "align_corners", "device", "dtype"}
    by_site = {FADE: {"embedding_dim", "lite"}, FreqFusion: {"sharpen"}}.get(cls, set())
    assert own.keys() - others - by_site <= {field.name for field in dataclasses.fields(config)}


def test_only_what_starts_at_the_resize_has_a_gain() -> None:
    assert init_of({"0.gain": (8,), "0.content_encoder.bias": (1,)}) == "match"
    assert init_of({"again": (8,), "content_encoder.bias": (1,)}) == "paper"


@pytest.mark.parametrize(
    ("channels", "options", "fitted"),
    [
        (8, {}, {"reduction_factor": 4, "n_groups": 2, "nh": 1}),
        (3, {}, {"reduction_factor": 3, "n_groups": 1, "nh": 1}),
        (24, {"n_groups": 4, "nh": 5}, {"reduction_factor": 4, "n_groups": 3, "nh": 3}),
    ],
)
def test_lda_aqu_is_fitted_to_channels(channels: int, options: dict[str, Any], fitted: dict[str, int]) -> None:
    config, notes = LDAAQUConfig(**options).fit(one_site(channels=channels))
    assert {name: getattr(config, name) for name in fitted} == fitted
    changed = [name for name, value in fitted.items() if getattr(LDAAQUConfig(**options), name) != value]
    assert [note.partition(" ")[0] for note in notes] == changed
    assert LDAAQU(channels, **fitted).n_groups == fitted["n_groups"]


@pytest.mark.parametrize("shapes", [{}, {"proj_q.weight": (4, 16)}, {"x.proj_q.weight": (4, 16, 1, 1)}])
def test_shapes_of_something_else_have_no_candidates(shapes: Any) -> None:
    assert [*LDAAQUConfig.candidates(shapes)] == []
    assert not LDAAQUConfig.is_of(shapes)
