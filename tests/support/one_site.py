"""A `Site` that is swapped as it stands, for tests of the rules that look at one."""

from __future__ import annotations

import dataclasses
from typing import Any

from upswap.plan.site import Site

_SITE = Site(
    name="decoder",
    owner="decoder",
    owner_class="host.Decoder",
    ordinal=0,
    kind="feature",
    op="interpolate",
    mode="bilinear",
    align_corners=False,
    antialias=False,
    sized_by="scale_factor",
    scale=(2.0, 2.0),
    fixed_ratio=True,
    channels=8,
    other_channels=(),
    in_shape=(1, 8, 4, 4),
    out_shape=(1, 8, 8, 8),
    dtype="float32",
    calls=1,
    location=None,
    reason="a learned feature map, made larger",
)


def one_site(**changes: Any) -> Site:
    """The site with some of its fields changed."""
    return dataclasses.replace(_SITE, **changes)
