"""From sites to a plan, rule by rule: which layers are replaced, where upsamplers go, what cannot be rewritten, what is said."""

from __future__ import annotations

import copy
import dataclasses
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import upswap
from one_site import one_site
from upswap.errors import NothingToSwapError, OptionError, RewriteError
from upswap.plan.plan import Plan, Rewritten
from upswap.probe.survey import Survey
from upswap.surgery import planning
from upswap.surgery.options import make_options


class Host(nn.Module):
    """A layer to replace, and a forward of its own."""

    def __init__(self, layer=None):
        super().__init__()
        self.up = nn.Upsample(scale_factor=2) if layer is None else layer

    def forward(self, x):
        return self.up(x)


class Resizes(nn.Module):
    """One resize of a learned map."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, padding=1)
        self.last = nn.Conv2d(4, 2, 1)

    def forward(self, x):
        return self.last(F.interpolate(self.first(x), scale_factor=2.0, mode="bilinear"))


class Asks(Host):
    def walk(self):
        return [isinstance(child, nn.Upsample) for child in (self.up,)]


class GoesThroughChildren(nn.Module):
    def forward(self, x):
        for child in self.children():
            x = child(x)
        return F.interpolate(x, scale_factor=2)


def layer_site(**changes):
    return one_site(**{"op": "module", "owner": "up", "swap": True, "mode": "nearest", **changes})


def survey_of(sites=(), unlocated=None, forwards=None):
    return Survey(list(sites), unlocated or {}, (SimpleNamespace(forwards=forwards or {}),), None, [])


# Which layers are replaced


def replaceable(model, **changes):
    return planning._replaceable(model, model.get_submodule("up"), layer_site(**changes))


@pytest.mark.parametrize("factor", [2, 2.0, (2.0, 3.0), 1.5, (1.5, 2.0)])
def test_a_layer_with_a_factor_is_replaced(factor) -> None:
    assert replaceable(Host(nn.Upsample(scale_factor=factor)))


@pytest.mark.parametrize(
    ("factor", "whole"),
    [(2, True), (2.0, True), ((2.0, 3.0), True), (1.5, False), ((1.5, 2.0), False), ((2.0, 1.5), False)],
)
def test_a_layer_that_rounds_its_size_first_is_replaced_only_where_the_factor_is_whole(factor, whole) -> None:
    layer = nn.Upsample(scale_factor=factor, recompute_scale_factor=True)
    assert replaceable(Host(layer), sized_by="size") is whole


def test_the_model_itself_is_not_replaced() -> None:
    layer = nn.Upsample(scale_factor=2)
    assert not planning._replaceable(layer, layer, layer_site(owner=""))


def test_a_layer_with_a_size_is_not_replaced() -> None:
    assert not replaceable(Host(nn.Upsample(size=8)))


def test_a_layer_with_a_forward_of_its_own_is_not_replaced() -> None:
    layer = nn.Upsample(scale_factor=2)
    layer.forward = lambda x: x
    assert not replaceable(Host(layer))


def test_no_layer_is_replaced_where_code_asks_for_the_class() -> None:
    assert not replaceable(Asks())


@pytest.mark.parametrize("kind", [list, tuple, lambda layers: {"a": layers[0]}])
def test_a_layer_that_a_plain_attribute_holds_is_not_replaced(kind) -> None:
    model = Host()
    model.held = kind([model.up])
    assert not replaceable(model)


def test_a_layer_that_a_plain_attribute_of_a_child_holds_is_not_replaced() -> None:
    model = Host()
    model.child = nn.Identity()
    model.child.held = [nn.Upsample(scale_factor=2), model.up]
    assert not replaceable(model)


@pytest.mark.parametrize("name", ["_held", "held"])
def test_what_other_attributes_hold_does_not_matter(name) -> None:
    model = Host()
    setattr(model, name, [model.up] if name == "_held" else [nn.Upsample(scale_factor=2)])
    assert replaceable(model)


def test_a_site_of_a_layer_that_is_not_replaced_becomes_the_call_in_its_forward() -> None:
    model, site = Host(nn.Upsample(size=8)), layer_site()
    assert planning._as_call(model, model.up, site) == dataclasses.replace(site, op="interpolate")
    kept = layer_site(swap=False)
    assert planning._as_call(model, model.up, kept) is kept
    other = Host()
    assert planning._as_call(other, other.up, site) is site


# What cannot be rewritten whatever the route


def problem(model, path="", site=None, unlocated=None):
    return planning._problem(model, model.get_submodule(path), path, site or one_site(), survey_of(unlocated=unlocated))


def test_a_forward_set_on_the_instance() -> None:
    model = Host()
    model.forward = lambda x: x
    assert problem(model) == "its forward was set on the instance, and would hide a rewritten one"
    assert problem(model, site=layer_site()) is None


class OneLayer(nn.Module):
    """A layer at two places, and a function at a third."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 2, 1)
        self.up = nn.Upsample(scale_factor=2)

    def forward(self, x):
        x = self.first(x)
        return self.last(self.up(x) + self.up(x * 2) + F.interpolate(x, scale_factor=2))


def test_a_graph_of_fx_keeps_its_own_resizes_through_copies_too() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(torch.fx.symbolic_trace(OneLayer()).eval())
    original, image = copy.deepcopy(model), torch.randn(1, 3, 8, 8)
    patched = upswap.patch(model, image)
    kept, swapped = sorted(upswap.plan_of(patched).sites, key=lambda site: site.swap)
    assert (swapped.name, swapped.route) == ("0.up", "module")
    assert kept.name == "0"
    assert kept.reason.endswith(
        "torch.fx makes its forward of a graph: patch the model before it is traced, and trace the patched one"
    )
    with torch.no_grad():
        assert torch.allclose(patched(image), original(image), atol=1e-6)
        for parameter in upswap.parameters(patched):
            parameter.normal_()
        assert torch.equal(copy.deepcopy(patched)(image), patched(image))


@pytest.mark.parametrize(
    ("model", "name"),
    [
        (nn.Sequential(nn.Identity()), "Sequential"),
        (nn.ModuleList([nn.Identity()]), "ModuleList"),
        (nn.ModuleDict({"a": nn.Identity()}), "ModuleDict"),
    ],
)
def test_a_model_that_is_a_container(model, name) -> None:
    assert problem(model) == f"the model is itself a {name}, which runs whatever is put into it"
    assert problem(Host(model), "up") is None


def test_a_site_that_could_not_be_located() -> None:
    assert problem(Host(), unlocated={"decoder": "no source"}) == "no source"
    assert problem(Host(), unlocated={"head": "no source"}) is None
    assert problem(Host(), "up", layer_site(), {"decoder": "no source"}) is None


# Where upsamplers go


def module_path(model, owner="", ordinal=0, count=1, **changes):
    site = one_site(owner=owner, ordinal=ordinal, **changes)
    return planning._module_path(model, model.get_submodule(owner), site, count)


def test_a_replaced_layer_keeps_its_path() -> None:
    assert module_path(Host(), "up", op="module") == "up"


def test_an_upsampler_is_a_child_of_its_owner() -> None:
    model = Host(Resizes())
    assert module_path(model) == "upsample"
    assert module_path(model, "up") == "up.upsample"
    assert module_path(model, "up", 2) == "up.upsample"
    assert module_path(model, "up", 2, 3) == "up.upsample_2"


def test_a_name_that_is_taken_gets_more_to_it() -> None:
    model = Host(Resizes())
    model.upsample = None
    assert module_path(model, ordinal=1) == "upsample_1"
    model.upsample_1 = 3
    assert module_path(model, ordinal=1) == "upsample_1_1"
    model.upsample_2 = 3
    assert module_path(model, ordinal=2, count=2) == "upsample_2_"
    model.upsample_2_ = 3
    assert module_path(model, ordinal=2, count=2) == "upsample_2__"


def test_an_owner_that_runs_its_children_leaves_its_upsampler_to_the_module_above() -> None:
    model = Host(Host(GoesThroughChildren()))
    assert module_path(model, "up.up") == "up.up_upsample"
    assert module_path(Host(GoesThroughChildren()), "up") == "up_upsample"
    assert module_path(Host(GoesThroughChildren()), "up", 1, 2) == "up_upsample_1"
    # the model itself has nothing above it
    assert module_path(GoesThroughChildren()) == "upsample"


def test_containers_above_are_passed_too_and_numbers_made_names() -> None:
    model = Host(nn.Sequential(GoesThroughChildren()))
    assert module_path(model, "up.0") == "up__0_upsample"
    assert module_path(nn.Sequential(GoesThroughChildren()), "0") == "_0_upsample"


def test_a_name_above_is_to_be_free_in_owner_and_holder() -> None:
    model = Host(GoesThroughChildren())
    model.up_upsample = None
    assert module_path(model, "up", 3) == "up_upsample_3"
    model = Host(GoesThroughChildren())
    model.up.up_upsample = None
    assert module_path(model, "up", 3) == "up_upsample_3"


# Sites and their routes


def test_a_problem_keeps_the_site_with_the_reason_or_is_raised() -> None:
    site = one_site(swap=True, module="decoder.upsample", route="graph")
    assert planning._kept(site, "no source", False) == dataclasses.replace(
        site, swap=False, module=None, route=None, reason="cannot be rewritten: no source"
    )
    with pytest.raises(RewriteError) as caught:
        planning._kept(site, "no source", True)
    assert str(caught.value) == "site decoder: no source; exclude the site, or drop strict to keep it as it is"


def test_an_owner_s_sites_get_routes_and_paths() -> None:
    model, site = Host(), layer_site()
    routed, rewriting = planning._routed(model, "up", Rewritten([site], []), survey_of(), False)
    assert routed == [dataclasses.replace(site, module="up", route="module")]
    assert rewriting == ("module", {})


def test_an_owner_with_nothing_to_swap_has_no_rewriting() -> None:
    site = one_site(owner="")
    assert planning._routed(Host(), "", Rewritten([site], []), survey_of(), False) == ([site], None)
    swapped = one_site(owner="", swap=True)
    routed, rewriting = planning._routed(
        Host(), "", Rewritten([swapped], []), survey_of(unlocated={"decoder": "why"}), False
    )
    assert rewriting is None
    assert [(s.swap, s.reason) for s in routed] == [(False, "cannot be rewritten: why")]
    with pytest.raises(RewriteError, match="site decoder: why; exclude"):
        planning._routed(Host(), "", Rewritten([swapped], []), survey_of(unlocated={"decoder": "why"}), True)


def test_what_no_route_can_rewrite_is_kept_with_the_reason(monkeypatch) -> None:
    def refuse(owner, sites, forward, handing, path):
        raise RewriteError("no route")

    monkeypatch.setattr(planning, "rewrite_owner", refuse)
    sites = [one_site(name="a", owner="", swap=True), one_site(name="b", owner="", reason="an image")]
    routed, rewriting = planning._routed(Host(), "", Rewritten(sites, []), survey_of(), False)
    assert rewriting is None
    assert [(s.swap, s.reason, s.module) for s in routed] == [
        (False, "cannot be rewritten: no route", None),
        (False, "an image", None),
    ]
    with pytest.raises(RewriteError, match="site a: no route; exclude"):
        planning._routed(Host(), "", Rewritten(sites, []), survey_of(), True)


def test_decide_leaves_the_model_alone_and_says_everything() -> None:
    model = Resizes().eval()
    before = dict(model.named_modules())
    decision = planning.decide(model, torch.zeros(1, 3, 8, 8), make_options())
    assert dict(model.named_modules()) == before
    plan = decision.plan
    (site,) = plan.sites
    assert (site.swap, site.route, site.module) == (True, "graph", "upsample")
    assert plan.model_class == f"{__name__}.Resizes"
    assert plan.upswap_version == upswap.__version__
    assert plan.options == make_options()
    assert plan.hints == ()
    assert list(plan.calls) == [""]
    assert plan.inputs["args"]
    assert [rewriting.route for rewriting in decision.rewritings.values()] == ["graph"]
    assert len(decision.runs) == 2


# What is said


def plan_of(*sites, upsampler="dysample", **options):
    return Plan("hosts.small.Host", make_options(upsampler, **options), sites)


def test_the_hint_for_upsamplers_that_are_not_exact() -> None:
    assert planning._inexact(plan_of()) == []
    expected = "dysample with these options is not exact at step 0: the model has to be trained"
    assert planning._inexact(plan_of(init="paper")) == [expected]
    (hint,) = planning._inexact(plan_of(upsampler="carafe", init="paper"))
    assert hint.startswith("carafe with these options")


def test_one_site_that_is_not_exact_is_enough() -> None:
    exact, paper = (one_site(swap=True, config=make_options(init=init).config) for init in ("match", "paper"))
    assert planning._inexact(plan_of(exact)) == []
    assert len(planning._inexact(plan_of(exact, paper))) == 1


SWAPPED = one_site(swap=True)
PAPER = one_site(swap=True, config={"init": "paper"})


def learned(count):
    return nn.Sequential(*[nn.ConvTranspose2d(1, 1, 2, stride=2) for _ in range(count)])


def test_hints_where_sites_are_swapped() -> None:
    assert planning._hints(Host(), plan_of(SWAPPED, one_site())) == []
    assert planning._hints(learned(1), plan_of(PAPER)) == planning._inexact(plan_of(init="paper"))


def test_hints_where_none_is() -> None:
    assert planning._hints(Host(), plan_of(one_site(), init="paper")) == []
    start = "it makes maps larger with layers of its own, which upswap leaves alone: "
    one, four = "0 (ConvTranspose2d)", ", ".join(f"{n} (ConvTranspose2d)" for n in range(4))
    assert planning._hints(learned(1), plan_of(init="paper")) == [start + one]
    assert planning._hints(learned(4), plan_of()) == [start + four]
    assert planning._hints(learned(6), plan_of(one_site())) == [start + four + " and 2 more"]


class Scripted(torch.jit.ScriptModule):
    """A module compiled by TorchScript, without its compiler."""


def test_hints_name_compiled_parts_first() -> None:
    model = nn.Sequential(*[Scripted() for _ in range(5)])
    hint = "compiled by TorchScript, whose resizes cannot be seen: 0, 1, 2, 3"
    assert planning._hints(model, plan_of()) == [hint]
    assert planning._hints(model, plan_of(PAPER)) == [hint, *planning._inexact(plan_of(PAPER))]


def said(*sites, hints=(), **options):
    plan = Plan("hosts.small.Host", make_options(**options), tuple(sites), hints=hints)
    error = planning.nothing_to_swap(plan)
    assert isinstance(error, NothingToSwapError)
    return str(error)


def test_nothing_to_swap_without_sites() -> None:
    start = "nothing to swap: Host makes no resize call (F.interpolate, nn.Upsample) on the example inputs"
    assert said() == start
    assert said(hints=("one", "two")) == f"{start}\none\ntwo"


def test_nothing_to_swap_lists_the_sites_and_the_kinds_that_could_be_opened() -> None:
    sites = [one_site(name=kind, kind=kind, reason=f"a {kind}") for kind in ("logits", "image", "gate", "context")]
    start = "nothing to swap: Host has 4 resize call(s), none of them to be swapped:\n" + "\n".join(
        f"  {kind}: {kind}: a {kind}" for kind in ("logits", "image", "gate", "context")
    )
    assert said(*sites) == start + "\nkinds= (--kind) can open: context, gate, logits"
    assert said(*sites, kinds=("gate", "feature")) == start + "\nkinds= (--kind) can open: context, logits"
    assert said(*sites, kinds=("gate", "context", "logits"), hints=("one",)) == start + "\none"
    assert "can open" not in said(one_site(kind="image"), one_site(kind="feature"))


def test_the_importable_name_of_a_class() -> None:
    assert planning.class_name(nn.Upsample()) == "torch.nn.modules.upsampling.Upsample"


# What can be patched at all


def refused(model):
    with pytest.raises(OptionError) as caught:
        planning.check_model(model)
    return str(caught.value)


def test_a_plain_model_is_taken() -> None:
    assert planning.check_model(Host()) is None
    assert planning.check_model(upswap.patch(Resizes().eval(), torch.zeros(1, 3, 8, 8))) is None


def test_what_is_no_module_is_refused() -> None:
    assert refused(3) == "expected a torch.nn.Module, got a int"
    assert refused(Scripted()) == (
        "this is a TorchScript module, whose code is compiled; patch the Python model it was made from"
    )
    exported = torch.export.ExportedProgram.__new__(torch.export.ExportedProgram)
    assert refused(exported) == (
        "this is an ExportedProgram, a graph without classes; patch the Python model it was made from"
    )


def test_a_model_with_a_patched_part_is_refused() -> None:
    part = upswap.patch(Resizes().eval(), torch.zeros(1, 3, 8, 8))
    assert refused(Host(part)) == (
        "the submodule up is patched already; upswap.unpatch it first, then patch the whole model"
    )


@pytest.mark.parametrize(
    ("wrap", "name", "attribute"),
    [(torch.compile, "OptimizedModule", "_orig_mod"), (nn.DataParallel, "DataParallel", "module")],
)
def test_a_wrapped_model_is_refused_with_the_way_to_the_one_inside(wrap, name, attribute) -> None:
    assert refused(wrap(Host())) == (
        f"this model is wrapped in {name}; patch the model inside, model.{attribute}, before it is wrapped"
    )
    own = type(name, (nn.Module,), {})()
    setattr(own, attribute, Host())
    assert planning.check_model(own) is None  # a class of one's own of that name
