"""Which route rewrites which idiom, and what is refused."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from one_site import one_site
from upswap.errors import OptionError, RewriteError
from upswap.surgery.options import make_options
from upswap.surgery.planning import decide
from upswap.surgery.routes import choose
from upswap.surgery.routes.choose import Rewriting, replay_owner, rewrite_owner
from upswap.surgery.routes.refusals import Misfit, NotFaithful


class Base(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, padding=1)
        self.last = nn.Conv2d(4, 2, 1)


class Straight(Base):
    def forward(self, x):
        return self.last(F.interpolate(self.first(x), scale_factor=2.0, mode="bilinear"))


class ToASize(Base):
    def forward(self, x):
        low = F.max_pool2d(self.first(x), 2)
        return self.last(F.interpolate(low, size=x.shape[-2:]))


class ArgumentThatIsNone(Base):
    def forward(self, x, skip=None):
        x = F.interpolate(self.first(x), scale_factor=2.0)
        return self.last(x if skip is None else x + skip)


class Branch(Base):
    def forward(self, x):
        x = self.first(x)
        if x.shape[2] < 1000:
            x = F.interpolate(x, scale_factor=2.0)
        return self.last(x)


class Helper(Base):
    def up(self, x):
        return F.interpolate(x, scale_factor=2.0)

    def forward(self, x):
        return self.last(self.up(self.first(x)))


class Training(Base):
    def forward(self, x):
        x = F.interpolate(self.first(x), scale_factor=2.0)
        return self.last(F.dropout(x, 0.5, self.training))


class TwoWidths(Base):
    """One call for maps of 4 channels and of 8."""

    def forward(self, x):
        x = self.first(x)
        wide, narrow = [F.interpolate(y, scale_factor=2.0) for y in (torch.cat((x, x), 1), x)]
        return self.last(narrow + wide[:, :4])


class Layer(Base):
    def __init__(self):
        super().__init__()
        self.up = nn.Upsample(scale_factor=2, mode="bilinear")

    def forward(self, x):
        return self.last(self.up(self.first(x)))


class SizedLayer(Layer):
    def __init__(self):
        super().__init__()
        self.up = nn.Upsample(size=(16, 16))


def decided(model):
    return decide(model.eval(), torch.zeros(1, 3, 8, 8), make_options())


@pytest.mark.parametrize(
    ("cls", "owner", "route"),
    [
        (Straight, "", "graph"),
        (ToASize, "", "graph"),
        (ArgumentThatIsNone, "", "source"),
        (Branch, "", "source"),
        (Helper, "", "source"),
        (Training, "", "source"),
        (TwoWidths, "", "source"),
        (Layer, "up", "module"),
    ],
)
def test_the_route_of_an_idiom(cls, owner, route) -> None:
    decision = decided(cls())
    assert {path: rewriting.route for path, rewriting in decision.rewritings.items()} == {owner: route}
    assert {site.route for site in decision.plan.swapped} == {route}
    methods = [name for name in decision.rewritings[owner].methods if not name.startswith("_upswap_script")]
    assert methods == ([] if route == "module" else ["forward"])


def found(model):
    """A model, its sites as decided, and what its forward was called with."""
    plan = decided(model).plan
    return model, plan.sites, plan.calls.get("")


def test_layers_alone_take_the_module_route_and_are_not_looked_at() -> None:
    site = one_site(op="module", swap=True, other_channels=(3,))
    assert rewrite_owner(nn.Identity(), [site, site], None) == Rewriting("module", {})


def test_other_channels_take_the_source_route_without_a_trace(monkeypatch) -> None:
    model, (site,), forward = found(Straight())
    monkeypatch.setattr(choose, "graph_forward", lambda *_: pytest.fail("was traced"))
    several = dataclasses.replace(site, other_channels=(8,))
    assert rewrite_owner(model, [several], forward).route == "source"
    # one of them is enough, and one call among layers
    layer = one_site(op="module")
    assert rewrite_owner(model, [layer, several], forward).route == "source"


def test_a_forward_that_could_not_be_described_takes_the_source_route() -> None:
    model, sites, forward = found(Straight())
    assert rewrite_owner(model, sites, forward).route == "graph"
    rewriting = rewrite_owner(model, sites, None)
    assert (rewriting.route, list(rewriting.methods)) == ("source", ["forward"])


def test_rewriting_does_not_change_the_owner() -> None:
    model, sites, forward = found(Straight())
    before = Straight.forward
    rewrite_owner(model, sites, forward)
    rewrite_owner(model, sites, None)
    assert Straight.forward is before
    assert "forward" not in model.__dict__


@pytest.mark.parametrize("error", [RewriteError("no"), Misfit({"a": "no"})])
def test_only_an_unfaithful_graph_is_followed_by_the_source_route(error, monkeypatch) -> None:
    def refuse(*_):
        raise error

    monkeypatch.setattr(choose, "graph_forward", refuse)
    monkeypatch.setattr(choose, "source_methods", lambda *_: {"forward": 1})
    with pytest.raises(type(error)) as caught:
        rewrite_owner(nn.Identity(), [one_site()], None)
    assert caught.value is error
    error = NotFaithful("no")
    assert rewrite_owner(nn.Identity(), [one_site()], None) == Rewriting("source", {"forward": 1})


def test_where_no_route_is_faithful_the_reason_is_that_of_the_source() -> None:
    model, (site,), _ = found(Straight())
    (step,) = site.location.steps
    gone = dataclasses.replace(site.location, steps=(dataclasses.replace(step, expression="F.interpolate(x)"),))
    with pytest.raises(RewriteError, match=r"Straight\.forward no longer has the call `F\.interpolate\(x\)`"):
        rewrite_owner(model, [dataclasses.replace(site, location=gone)], None)
    with pytest.raises(RewriteError, match="Identity has no method forward of its own to rewrite"):
        rewrite_owner(nn.Identity(), [site], None)


# A plan made before


def misfit(owner, sites, forward=None):
    with pytest.raises(Misfit) as caught:
        replay_owner(owner, sites, forward)
    return caught.value.causes


def test_replay_gives_what_rewriting_gave() -> None:
    model, sites, forward = found(Straight())
    assert replay_owner(model, sites, forward).route == "graph"
    assert replay_owner(model, sites, None).route == "source"
    layer = Layer()
    (site,) = decided(layer).plan.sites
    assert replay_owner(layer.up, [site], None) == Rewriting("module", {})


KNOWN = one_site(name="up", op="module", swap=True, scale=(2.0, 2.0))


@pytest.mark.parametrize(
    ("layer", "scale"),
    [
        (nn.Upsample(scale_factor=2, mode="bilinear"), (2.0, 2.0)),
        (nn.Upsample(scale_factor=(2.0, 3.0), mode="bilinear"), (2.0, 3.0)),
        (nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False), (2.0, 2.0)),
    ],
)
def test_replay_takes_a_layer_like_the_one_it_knew(layer, scale) -> None:
    assert replay_owner(layer, [dataclasses.replace(KNOWN, scale=scale)], None).route == "module"


@pytest.mark.parametrize(
    "layer",
    [
        nn.Upsample(scale_factor=2, mode="bicubic"),
        nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True),
        nn.Upsample(scale_factor=3, mode="bilinear"),
        nn.Upsample(scale_factor=(2.0, 3.0), mode="bilinear"),
        nn.Upsample(size=8, mode="bilinear"),
        nn.Identity(),
    ],
)
def test_replay_refuses_another_layer_and_says_both(layer) -> None:
    expected = f"the layer is now {layer}, where it had mode='bilinear', align_corners=False, scale_factor=(2.0, 2.0)"
    assert misfit(layer, [KNOWN]) == {"up": expected}


def test_replay_refuses_a_layer_that_has_a_size_beside_its_factor() -> None:
    layer = nn.Upsample(scale_factor=2, mode="bilinear")
    layer.size = 8
    assert list(misfit(layer, [KNOWN])) == ["up"]


def test_replay_takes_a_layer_without_a_size_attribute() -> None:
    layer = nn.Identity()
    layer.mode, layer.scale_factor = "bilinear", 2.0
    assert replay_owner(layer, [KNOWN], None).route == "module"


def test_replay_looks_at_swapped_layers_only() -> None:
    model, (site,), _ = found(Straight())
    kept = one_site(name="kept", op="module")  # of a layer that the owner is not
    assert replay_owner(model, [kept, site], None).route == "source"


def test_replay_passes_on_the_causes_of_a_misfit() -> None:
    model, (site,), forward = found(Straight())
    changed = dataclasses.replace(site, mode="bicubic")
    assert misfit(model, [changed], forward) == {
        site.name: "it resizes with mode='bilinear', align_corners=False, "
        "where it had mode='bicubic', align_corners=False"
    }


def relocated(site, **changes):
    (step,) = site.location.steps
    return dataclasses.replace(
        site,
        name="gone",
        location=dataclasses.replace(site.location, steps=(dataclasses.replace(step, **changes),)),
    )


def test_replay_names_the_sites_that_do_not_fit_and_those_alone() -> None:
    model, (site,), _ = found(Straight())
    gone = relocated(site, expression="up(x)")
    kept = dataclasses.replace(relocated(site, expression="up(y)"), name="kept", swap=False)
    assert misfit(model, [site, gone, kept]) == {"gone": "Straight.forward no longer has the call `up(x)`"}


def raising(error):
    def refuse(*_):
        raise error

    return refuse


def test_replay_gives_every_swapped_site_the_cause_that_no_one_of_them_has(monkeypatch) -> None:
    monkeypatch.setattr(choose, "rewrite_owner", raising(RewriteError("together")))
    monkeypatch.setattr(choose, "source_methods", lambda *_: {})
    sites = [one_site(name=name, swap=name != "kept") for name in ("a", "kept", "b")]
    assert misfit(nn.Identity(), sites) == {"a": "together", "b": "together"}


@pytest.mark.parametrize("kind", [KeyError, TypeError, ValueError, AttributeError, IndexError, RuntimeError])
def test_replay_calls_a_description_damaged_that_values_cannot_be_made_from(kind, monkeypatch) -> None:
    error = kind("x")
    monkeypatch.setattr(choose, "rewrite_owner", raising(error))
    sites = [one_site(name=name, swap=name != "kept") for name in ("a", "kept", "b")]
    cause = f"its description in the plan is damaged ({kind.__name__}: {error})"
    assert misfit(nn.Identity(), sites) == {"a": cause, "b": cause}


@pytest.mark.parametrize("error", [OptionError("an option"), MemoryError()])
def test_replay_lets_other_errors_through(error, monkeypatch) -> None:
    monkeypatch.setattr(choose, "rewrite_owner", raising(error))
    with pytest.raises(type(error)) as caught:
        replay_owner(nn.Identity(), [one_site(swap=True)], None)
    assert caught.value is error


def test_the_errors_of_a_misfit_keep_what_led_to_them(monkeypatch) -> None:
    error = KeyError("x")
    monkeypatch.setattr(choose, "rewrite_owner", raising(error))
    with pytest.raises(Misfit) as caught:
        replay_owner(nn.Identity(), [one_site(swap=True)], None)
    assert caught.value.__cause__ is error
