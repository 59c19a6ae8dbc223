"""What the result of a resize is fused with, and how that is reached, on models of a few lines."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from upswap.plan.site import Site
from upswap.probe.survey import survey


def up(x: torch.Tensor) -> torch.Tensor:
    return F.interpolate(x, scale_factor=2.0)


class Host(nn.Module):
    """Two levels of features, and what makes them and can be done with them."""

    def __init__(self) -> None:
        super().__init__()
        self.fine = nn.Conv2d(3, 4, 3, padding=1)
        self.coarse = nn.Conv2d(4, 4, 3, 2, padding=1)
        self.lateral = nn.Conv2d(4, 4, 1)
        self.transposed = nn.ConvTranspose2d(4, 4, 2, 2)
        self.layer = nn.Upsample(scale_factor=2.0)
        self.nested = nn.Sequential(nn.Sequential(nn.Conv2d(4, 4, 1), nn.Upsample(scale_factor=2.0)))
        self.last = nn.LazyConv2d(2, 1)
        self.bias = nn.Parameter(torch.ones(1, 4, 1, 1))


IMAGE = torch.randn(1, 3, 16, 16)


def host(body: Any) -> nn.Module:
    """A model whose forward is `body(self, image)`."""
    made = type("Net", (Host,), {"forward": body})().eval()
    made(IMAGE)  # for the lazy layer
    return made


def only(body: Any) -> Site:
    """The first feature site of a model whose forward is `body(self, image)`."""
    return next(site for site in survey(host(body), IMAGE, guides=True).sites if site.kind == "feature")


def added_later(self: Any, image: torch.Tensor) -> torch.Tensor:
    fine = self.fine(image)
    x = F.interpolate(self.coarse(fine), scale_factor=2.0)
    skip = self.lateral(fine)
    return self.last(x + skip)


def in_place_on_the_result(self: Any, image: torch.Tensor) -> torch.Tensor:
    fine = self.fine(image)
    x = F.interpolate(self.coarse(fine), scale_factor=2.0)
    x += self.lateral(fine)
    return self.last(x)


def concatenated(self: Any, image: torch.Tensor) -> torch.Tensor:
    fine = self.fine(image)
    maps = [self.lateral(fine)]
    maps.append(F.interpolate(self.coarse(fine), scale_factor=2.0))
    return self.last(torch.cat(maps, dim=1))


def within_the_sum(self: Any, image: torch.Tensor) -> torch.Tensor:
    maps = [self.fine(image)]
    maps.append(self.coarse(maps[0]))
    maps[0] = maps[0] + F.interpolate(maps[1], scale_factor=2.0)
    return self.last(maps[0])


@pytest.mark.parametrize(
    ("body", "fusion", "place", "operand"),
    [
        (added_later, "add", "x + skip", 1),
        (in_place_on_the_result, "add", "x += self.lateral(fine)", 1),
        (concatenated, "cat", "torch.cat(maps, dim=1)", 0),
        (within_the_sum, "add", "maps[0] + F.interpolate(maps[1], scale_factor=2.0)", 0),
    ],
)
def test_where_the_two_are_fused(body: Any, fusion: str, place: str, operand: int) -> None:
    guide = only(body).guide
    assert guide is not None
    assert (guide.way, guide.fusion, guide.channels, guide.place, guide.operand) == (
        "fusion",
        fusion,
        4,
        place,
        operand,
    )


def convolved_between(self: Any, image: torch.Tensor) -> torch.Tensor:
    fine = self.fine(image)
    x = self.lateral(F.interpolate(self.coarse(fine), scale_factor=2.0))
    return self.last(x + fine)


def in_a_branch(self: Any, image: torch.Tensor) -> torch.Tensor:
    fine: Any = self.fine(image)
    x = F.interpolate(self.coarse(fine), scale_factor=2.0)
    if fine is not None:
        x = torch.cat([x, fine], dim=1)
    return self.last(x)


def in_a_list(self: Any, image: torch.Tensor) -> torch.Tensor:
    maps = {"fine": (0, self.fine(image))}
    x = self.lateral(F.interpolate(self.coarse(maps["fine"][1]), scale_factor=2.0))
    return self.last(x + maps["fine"][1])


def transposed_convolution(self: Any, image: torch.Tensor) -> torch.Tensor:
    coarse = self.coarse(self.fine(image))
    skip = self.transposed(coarse)
    return self.last(self.lateral(F.interpolate(coarse, scale_factor=2.0)) + skip)


def in_a_loop(self: Any, image: torch.Tensor) -> torch.Tensor:
    fine = self.fine(image)
    x = self.coarse(fine)
    for skip in (fine,):
        x = self.lateral(F.interpolate(x, scale_factor=2.0)) + skip
    return self.last(x)


@pytest.mark.parametrize(
    ("body", "place"),
    [
        (convolved_between, "fine"),
        (transposed_convolution, "skip"),
        (in_a_branch, "fine"),
        (in_a_list, "maps['fine'][1]"),
        (in_a_loop, "fine"),
    ],
)
def test_a_local_name(body: Any, place: str) -> None:
    guide = only(body).guide
    assert guide is not None
    assert (guide.way, guide.place) == ("local", place)


def by_a_layer(self: Any, image: torch.Tensor) -> torch.Tensor:
    fine = self.fine(image)
    return self.last(self.layer(self.coarse(fine)) + fine)


def by_a_layer_in_others(self: Any, image: torch.Tensor) -> torch.Tensor:
    fine = self.fine(image)
    return self.last(torch.cat((self.nested(self.coarse(fine)), fine), dim=1))


@pytest.mark.parametrize(("body", "through"), [(by_a_layer, ()), (by_a_layer_in_others, ("nested", "nested.0"))])
def test_from_above(body: Any, through: tuple[str, ...]) -> None:
    guide = only(body).guide
    assert guide is not None
    assert (guide.way, guide.place, guide.holder) == ("handed", "fine", "")
    assert [(relay.path, relay.location) for relay in guide.through] == [(path, None) for path in through]


def a_layer_fused_later(self: Any, image: torch.Tensor) -> torch.Tensor:
    fine = self.fine(image)
    x = self.layer(self.coarse(fine))
    return self.last(torch.cat((x, self.lateral(fine)), dim=1))


def test_a_layer_whose_guide_is_computed_later_is_a_site_of_its_caller() -> None:
    site = only(a_layer_fused_later)
    assert site.guide is not None
    assert (site.owner, site.guide.way, site.guide.operand) == ("", "fusion", 1)


def enlarged(x: torch.Tensor) -> torch.Tensor:
    return F.interpolate(x, scale_factor=2.0)


def by_a_helper(self: Any, image: torch.Tensor) -> torch.Tensor:
    fine = self.fine(image)
    x = enlarged(self.coarse(fine))
    return self.last(x + self.lateral(fine))


def test_fused_in_the_code_that_calls_the_function_with_the_resize() -> None:
    site = only(by_a_helper)
    assert site.guide is not None
    assert site.location is not None
    assert (site.guide.way, site.guide.level, len(site.location.steps)) == ("fusion", 0, 2)


class Upper(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.interpolate(x, scale_factor=2.0).relu()


class Middle(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.upper = Upper()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.upper(x)


@pytest.mark.parametrize("source", [False, True])
def test_handed_on_by_the_forward_of_any_module(source: bool) -> None:
    class Net(Host):
        def __init__(self) -> None:
            super().__init__()
            self.middle = Middle()

        def forward(self, image: torch.Tensor) -> torch.Tensor:
            fine = self.fine(image)
            x = self.middle(self.coarse(fine))
            return self.last(x + (self.lateral(fine) + fine if source else fine))

    net = Net().eval()
    net(IMAGE)
    (site,) = survey(net, IMAGE, guides=True).sites
    assert site.guide is not None
    assert (site.guide.place, site.guide.source, site.guide.holder) == ("fine", source, "")
    (relay,) = site.guide.through
    assert relay.path == "middle"
    assert relay.location is not None
    assert relay.location.steps[0].expression == "self.upper(x)"


def nothing(self: Any, image: torch.Tensor) -> torch.Tensor:
    return self.last(F.interpolate(self.coarse(self.fine(image)), scale_factor=2.0))


def itself(self: Any, image: torch.Tensor) -> torch.Tensor:
    x = F.interpolate(self.coarse(self.fine(image)), scale_factor=2.0)
    return self.last(x + self.lateral(x))


def another_resize(self: Any, image: torch.Tensor) -> torch.Tensor:
    coarse = self.coarse(self.fine(image))
    x = F.interpolate(coarse, scale_factor=2.0)
    y = self.lateral(F.interpolate(self.lateral(coarse), scale_factor=2.0))
    return self.last(x + (y + self.lateral(y)))


def parameter(self: Any, image: torch.Tensor) -> torch.Tensor:
    return self.last(F.interpolate(self.coarse(self.fine(image)), scale_factor=2.0) + self.bias)


def the_image(self: Any, image: torch.Tensor) -> torch.Tensor:
    x = F.interpolate(self.coarse(self.fine(image)), scale_factor=2.0)
    return self.last(torch.cat((x, image), dim=1))


def two_guides(self: Any, image: torch.Tensor) -> torch.Tensor:
    fine = self.fine(image)
    x = F.interpolate(self.coarse(fine), scale_factor=2.0)
    return self.last(torch.cat((x, fine, self.lateral(fine)), dim=1))


def two_fusions(self: Any, image: torch.Tensor) -> torch.Tensor:
    fine = self.fine(image)
    x = F.interpolate(self.coarse(fine), scale_factor=2.0)
    return self.last(torch.cat((x + fine, self.lateral(x) + self.lateral(fine)), dim=1))


def written_by_the_sum(self: Any, image: torch.Tensor) -> torch.Tensor:
    skip = self.fine(image)
    skip += F.interpolate(self.coarse(skip), scale_factor=2.0)
    return self.last(skip)


def written_before_the_sum(self: Any, image: torch.Tensor) -> torch.Tensor:
    skip = self.fine(image)
    x = self.lateral(F.interpolate(self.coarse(skip), scale_factor=2.0))
    F.relu(skip, inplace=True)
    return self.last(x + skip)


def written_through_a_view(self: Any, image: torch.Tensor) -> torch.Tensor:
    skip = self.fine(image)
    x = self.lateral(F.interpolate(self.coarse(skip), scale_factor=2.0))
    skip[:, :1].mul_(2)
    return self.last(x + skip)


def input_written(self: Any, image: torch.Tensor) -> torch.Tensor:
    fine = self.fine(image)
    coarse = self.coarse(fine)
    x = F.interpolate(coarse, scale_factor=2.0)
    coarse.zero_()
    return self.last(x + fine)


def unbound_on_another_way(self: Any, image: torch.Tensor) -> torch.Tensor:
    x = self.coarse(self.fine(image))
    if image.shape[1] == 3:
        skip = self.fine(image)
    y = self.lateral(F.interpolate(x, scale_factor=2.0))
    return self.last(y + skip)


def another_name_at_another_size(self: Any, image: torch.Tensor) -> torch.Tensor:
    fine = self.fine(image)
    maps = [fine, None] if image.shape[3] == 16 else [None, fine]
    x = self.coarse(fine)
    del fine
    y = self.lateral(F.interpolate(x, scale_factor=2.0))
    return self.last(y + maps[0 if image.shape[3] == 16 else 1])


def computed_later(self: Any, image: torch.Tensor) -> torch.Tensor:
    y = self.lateral(F.interpolate(self.coarse(self.fine(image)), scale_factor=2.0))
    return self.last(y + self.lateral(self.fine(image)))


def fused_in_a_branch(self: Any, image: torch.Tensor) -> torch.Tensor:
    fine = self.fine(image)
    y = F.interpolate(self.coarse(fine), scale_factor=2.0)
    if image.shape[1] == 3:
        y = y + self.lateral(fine)
    return self.last(y)


def checkpointed_call(self: Any, image: torch.Tensor) -> torch.Tensor:
    fine = self.fine(image)
    y = checkpoint(up, self.coarse(fine), use_reentrant=True)
    return self.last(y + fine)


def checkpointed_layer(self: Any, image: torch.Tensor) -> torch.Tensor:
    fine = self.fine(image)
    y = checkpoint(self.nested, self.coarse(fine), use_reentrant=True)
    return self.last(y + fine)


@pytest.mark.parametrize(
    ("body", "why"),
    [
        (nothing, "no feature of its size"),
        (itself, "no feature of its size"),
        (another_resize, "made larger itself"),
        (parameter, "no feature of its size"),
        (the_image, "no learned feature"),
        (two_guides, "several features"),
        (two_fusions, "several features"),
        (written_by_the_sum, "written to after"),
        (written_before_the_sum, "written to after"),
        (written_through_a_view, "written to after"),
        (input_written, "its input is written to"),
        (unbound_on_another_way, "not bound in every case where it is resized: skip"),
        (another_name_at_another_size, "not at hand by one expression"),
        (computed_later, "not at hand where"),
        (fused_in_a_branch, "branch that may not run after it: y + self.lateral(fine)"),
        (checkpointed_call, "not at hand where it is resized, which torch.utils.checkpoint runs"),
        (checkpointed_layer, "not at hand where it is resized, which torch.utils.checkpoint runs"),
    ],
)
def test_why_there_is_none(body: Any, why: str) -> None:
    site = only(body)
    assert site.guide is None
    assert why in site.no_guide


def test_one_that_differs_in_train_mode() -> None:
    def differs(self: Any, image: torch.Tensor) -> torch.Tensor:
        fine = self.fine(image)
        y = F.interpolate(self.coarse(fine), scale_factor=2.0)
        return self.last(y + fine if self.training else y)

    site = only(differs)
    assert site.guide is None
    assert "in some of its runs only: its result is fused with no feature" in site.no_guide


def test_it_is_not_looked_for_unless_it_is_asked_for() -> None:
    (site,) = survey(host(added_later), IMAGE).sites
    assert site.guide is None
    assert site.no_guide == ""
