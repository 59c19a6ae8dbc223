"""Resizes outside a forward, or that one upsampler a line cannot stand for: all the checks, on a model for each idiom."""

from __future__ import annotations

import copy
import pickle
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import idioms as d
import invariants
import upswap
from zoos.case import Arguments, Case

SOURCE = "feature => source"

#: Each model and all of its sites.
MODELS: dict[type[nn.Module], dict[str, str]] = {
    d.Helper: {"root": SOURCE},
    d.HelperTwice: {"root:0": SOURCE, "root:1": SOURCE},
    d.HelperInLoop: {"root": SOURCE},  # which of the runs resizes follows the shapes
    d.HelperThatNamesItself: {"root:0": SOURCE, "root:1": SOURCE},
    d.FromTorchvision: {"root": SOURCE},
    d.CallsItself: {"root:0": SOURCE, "root:1": SOURCE, "root:2": SOURCE},
    d.HelperOfHelper: {"root:0": SOURCE, "root:1": SOURCE},
    d.LoopInHelper: {"root:0": SOURCE, "root:1": SOURCE},
    d.Choice: {"root": SOURCE},
    d.Static: {"root:0": SOURCE, "root:1": SOURCE},
    d.PlainObject: {"root": SOURCE},
    d.Lambda: {"root:0": SOURCE, "root:1": SOURCE},
    d.LocalLambda: {"root:0": SOURCE, "root:1": SOURCE},
    d.Partial: {"root:0": SOURCE, "root:1": SOURCE},
    d.Table: {"root": SOURCE},
    d.Inherited: {"root": SOURCE},
    d.InheritedByName: {"root": SOURCE},
    d.InheritedTwice: {"root": SOURCE},
    d.InheritedMethod: {"root:0": SOURCE, "root:1": SOURCE},
    d.ByName: {"root": SOURCE},
    d.Lines: {"root:0": SOURCE, "root:1": SOURCE},
    d.MethodInLoop: {"root:0": SOURCE, "root:1": SOURCE},
    d.Decorated: {"root": SOURCE},
    d.DecoratedTwice: {"root": SOURCE},
    d.DecoratedMethod: {"root": SOURCE},
    d.DecoratedMethodTwice: {f"root:{number}": SOURCE for number in range(4)},
    d.DecoratedHelper: {"root": SOURCE},
    d.PartialMethod: {"root": SOURCE},
    d.SubclassedLayers: {"up": SOURCE, "twice:0": SOURCE, "twice:1": SOURCE},
    d.CheckpointedHelper: {"root": SOURCE},
    d.CheckpointedLocal: {"root:0": SOURCE, "root:1": "identity", "root:2": SOURCE},
    d.CheckpointedLambda: {"root": SOURCE},
    d.CheckpointedMethod: {"root:0": SOURCE, "root:1": SOURCE},
    d.CheckpointedResize: {"root:0": SOURCE, "root:1": SOURCE, "root:2": SOURCE},
    d.ReentrantResize: {"root:0": SOURCE, "root:1": SOURCE, "root:2": SOURCE},
    d.ReentrantHelper: {"root": SOURCE},
    d.ReentrantLambda: {"root": SOURCE},
    d.ReentrantMethod: {"root:0": SOURCE, "root:1": SOURCE},
    d.InContainer: {"blocks.0": SOURCE, "blocks.1": SOURCE},
    d.ThroughChildren: {"neck": SOURCE},
    d.SharedLayer: {"up": "feature => module"},
    d.OneLayer: {"root:0": SOURCE, "root:1": SOURCE, "root:2": "logits"},
    d.OneLayerInLoop: {"root:0": SOURCE, "root:1": SOURCE},
    d.LayerByForward: {"root:0": SOURCE, "root:1": SOURCE},
    d.MadeLayers: {"root:0": SOURCE, "root:1": SOURCE, "root:2": SOURCE},
    d.ListedLayers: {"root:0": SOURCE, "root:1": SOURCE, "root:2": SOURCE},
    d.MethodInComprehension: {"root:0": SOURCE, "root:1": SOURCE},
    d.SharedBlock: {"block": SOURCE},
    d.EitherWay: {"root:0": SOURCE, "root:1": SOURCE},
    d.DeepSupervision: {"root:0": SOURCE, "root:1": SOURCE},
    d.TrainOnly: {"merge": SOURCE},
    d.UntilLarge: {"root": SOURCE},
    d.Records: {"root:0": "identity", "root:1": SOURCE, "root:2": SOURCE},
    d.KeywordsOnly: {"root": SOURCE},
    d.Anisotropic: {"up": "feature => module", "root:0": "feature => graph", "root:1": "feature => graph"},
    d.FixedLayer: {"rounds": SOURCE, "fixed": SOURCE, "listed": SOURCE},
}
#: Whose instances cannot be pickled as they are: they hold lambdas.
UNPICKLABLE = {d.Lambda}


def build(cls: type[nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return cls().eval()


def given(model: nn.Module, number: int) -> Arguments:
    torch.manual_seed(number)
    side = {0: (1, 3, 24, 32), 1: (3, 3, 32, 48), 2: (2, 3, 48, 24), 3: (2, 3, 32, 48)}[number]
    image = torch.randn(*side)
    return ((), {"image": image}) if isinstance(model, d.KeywordsOnly) else ((image,), {})


@pytest.mark.parametrize("cls", MODELS, ids=lambda cls: cls.__name__)
def test_all_checks(cls: type[nn.Module]) -> None:
    case = Case(
        "idioms", cls.__name__, lambda: build(cls), given, lambda model: given(model, 3), 3, MODELS[cls], inferred=False
    )
    for check in invariants.Run(case).checks().values():
        check()


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # of the reentrant checkpoint
@pytest.mark.parametrize("cls", MODELS, ids=lambda cls: cls.__name__)
def test_copies_pickles_and_plans(cls: type[nn.Module]) -> None:
    args, kwargs = given(build(cls), 1)
    patched = upswap.patch(build(cls), given(build(cls), 0))
    training = cls is d.TrainOnly
    plan = upswap.Plan.from_json(upswap.plan_of(patched).to_json())
    replayed = upswap.patch(build(cls), plan=plan)
    replayed.load_state_dict(patched.state_dict(), strict=True)
    with torch.no_grad():
        for parameter in upswap.parameters(patched):
            parameter.add_(torch.randn_like(parameter) * 0.1)
        replayed.load_state_dict(patched.state_dict(), strict=True)
        expected = invariants.outputs(patched.train(training), (args, kwargs))
        plain = invariants.outputs(build(cls).train(training), (args, kwargs))
        assert any((a - b).abs().max() > 1e-3 for a, b in zip(plain, expected, strict=True)), (
            "the upsamplers are not in use"
        )
        again = [copy.deepcopy(patched), replayed]
        if cls not in UNPICKLABLE:
            again.append(pickle.loads(pickle.dumps(patched)))
        for model in again:
            invariants.assert_equal(invariants.outputs(model.train(training), (args, kwargs)), expected)
            assert upswap.plan_of(model) == upswap.plan_of(patched)
            assert type(upswap.unpatch(model)) is cls
            invariants.assert_equal(invariants.outputs(model, (args, kwargs)), plain)


@pytest.mark.parametrize("side", [16, 17, 18])
@pytest.mark.parametrize("example", [32, 33])
def test_both_ways_of_a_branch_go_through_one_upsampler(example: int, side: int) -> None:
    """Whichever the example takes, and the run at another size."""
    patched = upswap.patch(build(d.EitherWay), torch.randn(1, 3, example, example))
    assert invariants.decisions(upswap.plan_of(patched)) == MODELS[d.EitherWay]
    image = torch.randn(1, 3, side, side)
    invariants.assert_close([patched(image)], [build(d.EitherWay)(image)], 1e-5)
    patched(image).sum().backward()
    assert all(parameter.grad is not None for parameter in upswap.parameters(patched))


def test_a_resize_that_torch_runs_otherwise_is_kept() -> None:
    """How often is torch's business, and so is the order."""

    class Mapped(d.Base):
        def forward(self, image):
            high, low = self.both(image)
            maps = torch.utils._pytree.tree_map(partial(F.interpolate, scale_factor=2), [low, self.low(low)])
            return self.last(high + maps[0].mean() + maps[1].mean())

    for site in upswap.inspect(build(Mapped)).sites:
        assert site.reason.startswith("cannot be rewritten: ")
        assert site.reason.endswith(" of torch runs the resize")


@pytest.mark.parametrize("copied", [False, True])
def test_a_part_that_is_scripted_stands_beside_a_resize(copied: bool) -> None:
    """torch's copies of a scripted module have parameters that are no leaves."""
    original = build(d.ScriptedPart)
    patched = upswap.patch(copy.deepcopy(original) if copied else build(d.ScriptedPart), given(original, 0))
    plan = upswap.plan_of(patched)
    assert invariants.decisions(plan) == {"root": SOURCE}
    assert plan.hints == ("compiled by TorchScript, whose resizes cannot be seen: gain, gain.0, gain.1",)
    (image,), _ = given(original, 1)
    with torch.no_grad():
        invariants.assert_close([patched(image)], [original(image)], 1e-5)
        invariants.assert_equal([upswap.unpatch(patched)(image)], [original(image)])


def test_a_layer_called_at_several_places_can_share_one_upsampler() -> None:
    model = build(d.OneLayerInLoop)
    patched = upswap.patch(copy.deepcopy(model), given(model, 0), share_layers=True)
    assert invariants.decisions(upswap.plan_of(patched)) == {"up": "feature => module"}
    assert upswap.plan_of(patched).options.share_layers
    shared = upswap.inspect(build(d.OneLayer), given(model, 0), share_layers=True)
    assert invariants.decisions(shared) == {"up": "other"}
    assert shared.site("up").reason == "called for several purposes: feature, logits"


def test_hooks_of_a_layer_whose_calls_have_upsamplers_run() -> None:
    model = build(d.OneLayerInLoop)
    patched = upswap.patch(copy.deepcopy(model), given(model, 0))
    seen: list[tuple[type, float, torch.Size, torch.Size]] = []

    def before(layer: nn.Module, args: tuple[()], kwargs: dict[str, torch.Tensor]) -> tuple[Any, Any]:
        return args, {"input": kwargs["input"] * 2}

    def after(layer: nn.Module, args: Any, kwargs: dict[str, torch.Tensor], result: torch.Tensor) -> torch.Tensor:
        assert isinstance(layer, nn.Upsample)
        seen.append((nn.Upsample, float(layer.scale_factor), kwargs["input"].shape, result.shape))
        return result + 1

    expected = []
    for one in (model, patched):
        layer = one.get_submodule("up")
        layer.register_forward_pre_hook(before, with_kwargs=True)
        layer.register_forward_hook(after, with_kwargs=True)
        expected.append(invariants.outputs(one, given(model, 1)))
    invariants.assert_close(expected[1], expected[0], 1e-5)
    assert len(seen) == 4
    assert seen[:2] == seen[2:]


def test_a_layer_put_in_the_place_of_a_called_one_runs_with_a_warning() -> None:
    model = build(d.OneLayerInLoop)
    patched = upswap.patch(copy.deepcopy(model), given(model, 0))
    torch.manual_seed(0)
    model.up = patched.up = nn.ConvTranspose2d(8, 8, 2, 2)
    model.up.forward = lambda input: nn.ConvTranspose2d.forward(model.up, input)
    with pytest.warns(upswap.UpswapWarning, match="which upswap does not know; the original ran"):
        got = invariants.outputs(patched, given(model, 1))
    invariants.assert_equal(got, invariants.outputs(model, given(model, 1)))


#: What torch.compile itself refuses: the original does not compile whole either.
UNCOMPILED = {
    d.ReentrantResize, d.ReentrantHelper, d.ReentrantLambda, d.ReentrantMethod, d.UntilLarge, d.PartialMethod
}  # fmt: skip
if torch.__version__ < (2, 14):  # 2.9 refuses to compile a function that sets an attribute of itself, which 2.14 takes
    UNCOMPILED.add(d.HelperThatNamesItself)


@pytest.mark.parametrize("cls", [cls for cls in MODELS if cls not in UNCOMPILED], ids=lambda cls: cls.__name__)
def test_compiles_whole(cls: type[nn.Module]) -> None:
    original = build(cls)
    patched = upswap.patch(build(cls), given(original, 0))
    torch._dynamo.reset()
    compiled = torch.compile(patched, fullgraph=True, backend="eager")
    for number in (0, 1):
        args, kwargs = given(original, number)
        with torch.no_grad():
            got: Any = compiled(*args, **kwargs)
        invariants.assert_close(
            upswap.probe.dataflow.tensors_in(got), invariants.outputs(original, (args, kwargs)), 1e-5
        )
