"""The checks every patched model has to pass, whatever library it comes from.

What a model is run on is a tensor, or `(args, kwargs)`; what it gives may be anything with tensors in it. `Run` has the checks
for a `zoos.case.Case`.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import importlib
import inspect
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

import upswap
from upswap.probe.dataflow import Flow, Node, Operand, tensors_in
from upswap.probe.guides import comes_from, fused_operands
from upswap.probe.inputs.inputs import Inputs, copied, map_tensors
from upswap.probe.inputs.variations import images_of
from zoos.case import Arguments, Case

Given = torch.Tensor | Arguments


def decisions(plan: upswap.Plan) -> dict[str, str]:
    """Site name -> kind, with `=> route` where the site is swapped."""
    return {site.name: f"{site.kind} => {site.route}" if site.swap else site.kind for site in plan.sites}


def arguments(given: Given) -> Arguments:
    """A copy of what a model is run on, which it may write to."""
    pair = ((given,), {}) if isinstance(given, torch.Tensor) else given
    return copied(pair)


def outputs(model: nn.Module, given: Given, seed: int = 0) -> list[torch.Tensor]:
    """Every tensor a model returns, from the same random state each time."""
    args, kwargs = arguments(given)
    torch.manual_seed(seed)
    return list(tensors_in(model(*args, **kwargs)))


def assert_close(got: Sequence[torch.Tensor], expected: Sequence[torch.Tensor], tolerance: float) -> None:
    """Equality: of floats relative to the largest value of each expected tensor, of anything else exactly."""
    assert len(got) == len(expected) > 0
    assert any(old.numel() for old in expected), "only empty tensors to compare"
    for index, (new, old) in enumerate(zip(got, expected, strict=True)):
        assert new.shape == old.shape, f"output {index}: {tuple(new.shape)} instead of {tuple(old.shape)}"
        assert new.dtype == old.dtype
        if not old.numel() or torch.equal(new, old):
            continue
        assert old.is_floating_point(), f"output {index}, of {old.dtype}, has other values"
        finite = old.isfinite()
        assert torch.equal(finite, new.isfinite()), f"output {index}: infinities or NaNs in other places"
        assert torch.equal(new[~finite].nan_to_num(), old[~finite].nan_to_num())
        if finite.any():
            difference, scale = (new - old)[finite].abs().max().item(), old[finite].abs().max().item()
            assert difference <= tolerance * scale, f"output {index}: {difference / scale:.2e} relative"


def assert_equal(got: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> None:
    """Equality bit for bit, NaNs included."""
    assert len(got) == len(expected) > 0
    for index, (new, old) in enumerate(zip(got, expected, strict=True)):
        assert new.shape == old.shape, f"output {index}: {tuple(new.shape)} instead of {tuple(old.shape)}"
        assert new.dtype == old.dtype
        same = torch.equal(new, old) or torch.equal(new.nan_to_num(), old.nan_to_num())
        assert same, f"output {index} differs by up to {(new.double() - old.double()).abs().max().item():.2e}"


def evaluated(model: nn.Module, batches: Sequence[Given], must_run: int = 1) -> list[list[torch.Tensor] | Exception]:
    """What a model gives in eval mode for each batch, or its refusal; so many of the first batches have to be taken."""
    results: list[list[torch.Tensor] | Exception] = []
    model.eval()
    with torch.no_grad():
        for number, given in enumerate(batches):
            try:
                results.append(outputs(model, given))
            except Exception as error:
                if number < must_run:
                    raise
                results.append(error)
    return results


def assert_as_evaluated(
    patched: nn.Module,
    batches: Sequence[Given],
    expected: Sequence[list[torch.Tensor] | Exception],
    compare: Callable[[Sequence[torch.Tensor], Sequence[torch.Tensor]], None],
) -> None:
    """What the original gave on each batch; what it refused is refused in the same words."""
    patched.eval()
    with torch.no_grad():
        for given, result in zip(batches, expected, strict=True):
            if isinstance(result, Exception):
                with pytest.raises(type(result), match=re.escape(str(result))):
                    outputs(patched, given)
            else:
                compare(outputs(patched, given), result)


def check_step_0(original: nn.Module, patched: nn.Module, batches: Sequence[Given], tolerance: float = 1e-5) -> None:
    """Equal outputs in eval mode on each batch; one the original refuses is refused by both in the same words."""
    compare = functools.partial(assert_close, tolerance=tolerance)
    assert_as_evaluated(patched, batches, evaluated(original, batches), compare)


def check_training(original: nn.Module, patched: nn.Module, given: Given, tolerance: float = 1e-5) -> None:
    """In train mode, from the same seed: equal outputs, and in float64 equal gradients of the input and of every host weight.

    Gradients are compared in float32, and less sharply, for a model that does not run in float64.
    """
    assert_close(*(_trained(model, given, torch.float32).outputs for model in (patched, original)), tolerance)
    try:
        old = _trained(original, given, torch.float64, backward=True)
        tolerance, sharp = 1e-9, 1e-7
    except Exception:  # noqa: BLE001 - it did run in float32
        old = _trained(original, given, torch.float32, backward=True)
        sharp = 1e-3
    new = _trained(patched, given, old.dtype, backward=True)
    assert_close(new.outputs, old.outputs, tolerance)
    assert [g is None for g in new.inputs] == [g is None for g in old.inputs]
    present = [pair for pair in zip(new.inputs, old.inputs, strict=True) if pair[1] is not None]
    if present:
        assert_close(*zip(*present, strict=True), sharp)
    largest = max(gradient.abs().max().item() for gradient in old.weights.values() if gradient is not None)
    for name, gradient in old.weights.items():
        assert (gradient is None) == (new.weights[name] is None), name
        if gradient is not None:
            difference = (new.weights[name] - gradient).abs().max().item()
            assert difference <= sharp * largest, f"gradient of {name}: {difference / largest:.2e} of the largest"
    relative = 1e-9 if old.dtype == torch.float64 else 1e-4
    for name, buffer in old.buffers.items():
        close = torch.allclose(new.buffers[name].double(), buffer.double(), rtol=relative, atol=relative * 1e-3)
        assert close, f"buffer {name}"


@dataclasses.dataclass
class _Trained:
    """What one run in train mode gave: outputs, gradients of the inputs and of the parameters, buffers after it."""

    dtype: torch.dtype
    outputs: list[torch.Tensor]
    inputs: list[torch.Tensor | None]
    weights: dict[str, torch.Tensor | None]
    buffers: dict[str, torch.Tensor]


def _trained(model: nn.Module, given: Given, dtype: torch.dtype, backward: bool = False) -> _Trained:
    model = copy.deepcopy(model).to(dtype).train()
    args, kwargs = map_tensors(arguments(given), lambda t: t.to(dtype) if t.is_floating_point() else t)
    leaves = images_of(Inputs(args, kwargs))
    for leaf in leaves:
        leaf.requires_grad_()
    with default_dtype(dtype):
        found = outputs(model, (args, kwargs))
        if backward:
            loss_of(found).backward()
    return _Trained(
        dtype,
        [tensor.detach() for tensor in found],
        [tensor.grad for tensor in leaves],
        {name: parameter.grad for name, parameter in model.named_parameters()},
        dict(model.named_buffers()),
    )


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Inside, tensors that a model makes without naming a dtype have this one."""
    outside = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(outside)


def loss_of(found: Sequence[torch.Tensor]) -> torch.Tensor:
    """The sum of a model's losses where single numbers are all it gives, else its outputs weighted at random."""
    trained = [tensor for tensor in found if tensor.requires_grad]
    assert trained, "no output depends on a parameter"
    if all(tensor.numel() == 1 for tensor in trained):
        return sum(tensor.sum() for tensor in trained)
    generator = torch.Generator().manual_seed(1)
    return sum((t * torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t)).sum() for t in trained)


def check_keys(original: nn.Module, patched: nn.Module) -> None:
    """Every original key with its shape; a checkpoint of the original misses the upsamplers' keys and nothing else."""
    old, new = original.state_dict(), patched.state_dict()
    assert list(old) == [key for key in new if key in old]
    assert all(getattr(old[key], "shape", None) == getattr(new[key], "shape", None) for key in old)
    made = {id(module) for module in upswap.upsamplers(patched).values()}
    everywhere = [(path, m) for path, m in patched.named_modules(remove_duplicate=False) if id(m) in made]
    added = {f"{path}.{key}" for path, module in everywhere for key in module.state_dict()}
    assert set(new) - set(old) == added
    result = patched.load_state_dict(dict(old), strict=False)  # they have the same values
    assert set(result.missing_keys) == added
    assert result.unexpected_keys == []


def check_learning(
    patched: nn.Module,
    given: Given,
    loss: Callable[[Sequence[torch.Tensor]], torch.Tensor] | None = None,
    train: bool = True,
) -> None:
    """A step of training moves every parameter of every upsampler, but on branches that the example's values do not take.

    Where a gain is 0 at first, it is what moves, and what is behind it has a gradient once the gain is not 0. A guided upsampler
    does not run where a host cuts or pads an odd map before it fuses it.
    """
    model = copy.deepcopy(patched).train(train)
    before = [parameter.detach().clone() for parameter in upswap.parameters(model)]
    assert before
    optimiser = torch.optim.SGD(upswap.param_groups(model, lr=1.0))
    ran = _running(model)
    (loss or loss_of)(outputs(model, given)).backward()
    optimiser.step()
    plan = upswap.plan_of(model)
    idle = (
        site for site in plan.swapped if site.seen_in == "nowhere" or (site.guide is not None and site.name not in ran)
    )
    unreached = tuple(f"{site.module}." for site in idle)
    still = {
        name
        for (name, parameter), old in zip(_named_added(model), before, strict=True)
        if torch.equal(parameter.detach(), old) and not name.startswith(unreached)
    }
    if still and any(name.endswith(".gain") for name, _ in _named_added(model)):
        model = copy.deepcopy(patched).train(train)
        with torch.no_grad():
            for name, parameter in _named_added(model):
                if name.endswith(".gain"):
                    parameter.fill_(0.5)
        (loss or loss_of)(outputs(model, given)).backward()
        still -= {
            name for name, parameter in _named_added(model) if not name.endswith(".gain") and _has_gradient(parameter)
        }
    assert not still, f"not moved by a step: {sorted(still)}"


def _running(model: nn.Module) -> set[str]:
    """The names of the sites whose upsamplers run from now on."""
    ran: set[str] = set()
    for site in upswap.plan_of(model).swapped:
        module = model.get_submodule(site.module)
        module.register_forward_pre_hook(lambda _, args, name=site.name: ran.add(name))
    return ran


def _has_gradient(parameter: nn.Parameter) -> bool:
    return parameter.grad is not None and bool(parameter.grad.any())


def _named_added(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [
        (f"{path}.{name}", parameter)
        for path, module in upswap.upsamplers(model).items()
        for name, parameter in module.named_parameters()
    ]


def check_unpatch(original: nn.Module, patched: nn.Module, given: Given) -> None:
    """Undone, which ends the use of `patched`: the original's classes, keys and attributes, its output bit for bit."""
    model = upswap.unpatch(patched).eval()
    assert [type(m) for m in model.modules()] == [type(m) for m in original.modules()]
    assert [path for path, _ in model.named_modules()] == [path for path, _ in original.named_modules()]
    assert list(model.state_dict()) == list(original.state_dict())
    assert set(model.__dict__) == set(original.__dict__)
    original.eval()
    with torch.no_grad():
        assert_equal(outputs(model, given), outputs(original, given))


def check_repatch(patched: nn.Module) -> None:
    """A second patch changes nothing and says so."""
    keys, plan = list(patched.state_dict()), upswap.plan_of(patched)
    classes = [type(module) for module in patched.modules()]
    with pytest.warns(upswap.UpswapWarning, match="patched already"):
        assert upswap.patch(patched) is patched
    assert list(patched.state_dict()) == keys
    assert upswap.plan_of(patched) == plan
    assert [type(module) for module in patched.modules()] == classes


# Stand-ins: the original resize where an upsampler would be ------------------------------------------------------------------


class StandIn(nn.Module):
    """`F.interpolate` as a site calls it, in an upsampler's place."""

    def __init__(self, site: upswap.Site) -> None:
        super().__init__()
        self.mode, self.scale = site.mode, site.scale
        self.align_corners = site.align_corners if site.mode in ("bilinear", "bicubic") else None

    def forward(self, x: torch.Tensor, size: Any = None, scale_factor: Any = None, guide: Any = None) -> torch.Tensor:
        if size is None and scale_factor is None:
            scale_factor = self.scale
        return F.interpolate(x, size, scale_factor, self.mode, self.align_corners)


@upswap.register_upsampler("stand-in")
def _stand_in(site: upswap.Site, options: object) -> nn.Module:
    return StandIn(site)


def with_stand_ins(model: nn.Module, plan: upswap.Plan) -> nn.Module:
    """The model, patched by `plan` but with stand-ins for upsamplers."""
    options = dataclasses.replace(plan.options, upsampler="stand-in", config={}, overrides=())
    sites = tuple(dataclasses.replace(site, config={}, upsampler=None) for site in plan.sites)
    return upswap.patch(model, plan=dataclasses.replace(plan, options=options, sites=sites))


# Guides: each has to be what the upsampler's output is fused with ---------------------------------------------------------------


class _Watch(TorchFunctionMode):
    """What flows into what in a run."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.flow = Flow()
        self.flow.add_source(model.parameters(), "parameter")
        self.flow.add_source(model.buffers(), "buffer")

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = next((value for value in args if isinstance(value, torch.Tensor)), None)
        before = None if given is None or given.is_inference() else (self.flow.node_of(given), given._version)
        result = func(*args, **(kwargs or {}))
        self.flow.add_call(getattr(func, "__name__", ""), args, kwargs or {}, result)
        if before is not None and result is given and given._version == before[1]:
            self.flow._bind(given, before[0])  # `to` and its like, where there was nothing to do
        return result


def check_guides(patched: nn.Module, batches: Sequence[Given]) -> int:
    """In a run on each batch that is taken, the guide of an upsampler is the very tensor that its output is fused with next, or,
    where the plan says so, what that is computed from alone.

    Gives the number of guides that were looked at.
    """
    model = copy.deepcopy(patched).eval()
    guided = [site for site in upswap.plan_of(model).swapped if site.guide is not None]
    # One that is changed where the two are concatenated is another tensor there.
    guided = [
        site
        for site in guided
        if (site.guide.way, site.guide.fusion) != ("fusion", "cat")
        or not getattr(model.get_submodule(site.module), "changes_guide", False)
    ]
    compared = 0
    for number, given in enumerate(batches):
        seen: list[tuple[upswap.Site, Node, Any, Node]] = []
        with _Watch(model) as watch, torch.no_grad():

            def keep(site: upswap.Site, kwargs: Any, out: Any, flow: Flow = watch.flow, seen: Any = seen) -> None:
                guide = kwargs["guide"]
                seen.append((site, flow.node_of(out), Operand.of(guide).tensor, flow.node_of(guide)))

            enlarged: set[int] = set()
            nodes: list[Node] = []  # kept, so that no other has the identity of one

            def note(out: Any, flow: Flow = watch.flow, enlarged: Any = enlarged, nodes: Any = nodes) -> None:
                nodes.append(flow.node_of(out))
                enlarged.add(id(nodes[-1]))

            handles = [
                model.get_submodule(site.module).register_forward_hook(
                    lambda _, args, kwargs, out, site=site, keep=keep: keep(site, kwargs, out), with_kwargs=True
                )
                for site in guided
            ]
            # What an upsampler without a guide gives is made larger too, as the resize was that the planner saw.
            handles += [
                model.get_submodule(site.module).register_forward_hook(lambda _, args, out, note=note: note(out))
                for site in upswap.plan_of(model).swapped
                if site.guide is None
            ]
            try:
                outputs(model, given)
            except Exception:  # noqa: BLE001 - the original refuses it too
                assert number > 0
                continue
            finally:
                for handle in handles:
                    handle.remove()
        reached = {site.name for site, *_ in seen}
        missing = [site.name for site in guided if site.name not in reached and site.seen_in == "eval"]
        assert number or not missing, f"without a guide: {missing}"  # at odd sizes the two may be of other sizes
        upsampled = {id(node) for _, node, *_ in seen} | enlarged
        for site, node, guide, made_by in seen:
            found, why = fused_operands(node)
            others = [(fusing.inputs[index], operand) for fusing, index, operand in found]
            others = [(source, operand) for source, operand in others if id(source) not in upsampled]
            assert others, f"{site.name}: {why}"
            for source, operand in others:
                right = comes_from(source, made_by) if site.guide.source else operand.tensor is guide
                assert right, f"{site.name}: another guide"
        compared += len(seen)
    return compared


# Graphs: what was traced once has to hold for whatever the owner is called with ------------------------------------------------


def check_graph_owners(original: nn.Module, stand_in: nn.Module, given: Given) -> int:
    """Owners that take the graph route, alone, on arguments they were not traced with: equal bit for bit, or both raise.

    The arguments are those of a run of the model, in other sizes and batches, in train mode, with each flag the other way.
    Gives the number of variants compared.
    """
    plan = upswap.plan_of(stand_in)
    owners = dict.fromkeys(site.owner for site in plan.swapped if site.route == "graph")
    seen = _calls_of(original.eval(), owners, given)
    compared = 0
    for path, call in seen.items():
        pair = [copy.deepcopy(model.get_submodule(path)) for model in (original, stand_in)]
        for what, (args, kwargs), training in _variants(pair[0], call):
            results: list[Any] = []
            for owner in pair:
                owner.train(training)
                try:
                    with torch.no_grad():
                        results.append(outputs(owner, (args, kwargs)))
                except Exception as error:  # noqa: BLE001 - either owner may refuse what neither was made for
                    results.append(error)
            old, new = results
            if isinstance(old, Exception):
                assert isinstance(new, Exception), (
                    f"{path or 'root'}, {what}: the original raises {old!r}, the graph runs"
                )
            else:
                assert not isinstance(new, Exception), f"{path or 'root'}, {what}: the graph raises {new!r}"
                try:
                    assert_equal(new, old)
                except AssertionError as error:
                    raise AssertionError(f"{path or 'root'}, {what}: {error}") from error
                compared += 1
    return compared


def _calls_of(model: nn.Module, owners: Sequence[str], given: Given) -> dict[str, Arguments]:
    """The arguments of the first call of each owner in a run of the model."""
    seen: dict[str, Arguments] = {}

    def record(path: str, args: Any, kwargs: Any) -> None:
        seen.setdefault(path, copied((args, kwargs)))

    handles = [
        model.get_submodule(path).register_forward_pre_hook(
            lambda _, args, kwargs, path=path: record(path, args, kwargs), with_kwargs=True
        )
        for path in owners
    ]
    try:
        with torch.no_grad():
            outputs(model, given)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _variants(owner: nn.Module, call: Arguments) -> Iterator[tuple[str, Arguments, bool]]:
    """A call as it was and changed one thing at a time, each with whether the owner is in train mode."""
    yield "as it was", call, False
    yield "in train mode", call, True
    for height, width in ((2, 2), (2, 3), (3, 1)):
        yield f"{height} times as high and {width} times as wide", _resized(call, height, width), False
    batch = next((len(t) for t in tensors_in(call) if t.dim() > 1), 0)
    for other in (1, 3):
        yield f"a batch of {other}", map_tensors(call, lambda t, other=other: _rebatched(t, batch, other)), other == 3
    bound = inspect.signature(owner.forward).bind(*call[0], **call[1])
    bound.apply_defaults()
    for name, value in bound.arguments.items():
        if isinstance(value, bool):
            flipped = inspect.BoundArguments(bound.signature, {**bound.arguments, name: not value})
            yield f"{name}={not value}", (flipped.args, flipped.kwargs), False


def _rebatched(tensor: torch.Tensor, batch: int, other: int) -> torch.Tensor:
    if tensor.dim() == 0 or len(tensor) != batch:
        return tensor
    return tensor[[index % batch for index in range(other)]]


def _resized(value: Any, height: int, width: int) -> Any:
    """Every map of (.., H, W), and every size of two whole numbers, so many times as high and wide."""
    if isinstance(value, torch.Tensor):
        if value.dim() < 4:
            return value
        return value.repeat(*[1] * (value.dim() - 2), height, width)
    if isinstance(value, tuple | list) and len(value) == 2 and all(type(side) is int for side in value):
        return type(value)((value[0] * height, value[1] * width))
    if type(value) in (tuple, list):
        return type(value)(_resized(item, height, width) for item in value)
    if isinstance(value, dict):
        return {key: _resized(item, height, width) for key, item in value.items()}
    return value


# All of it for a case of a zoo ------------------------------------------------------------------------------------------------

#: The zoos, with the library of each, in the order they are reported.
ZOOS = {
    "torchvision": "torchvision",
    "timm": "timm",
    "smp": "segmentation_models_pytorch",
    "transformers": "transformers",
    "ultralytics": "ultralytics",
    "monai": "monai",
    "diffusers": "diffusers",
    "kornia": "kornia",
    "idioms": "torch",
}


def cases_of(zoo: str) -> list[Case]:
    """Every case of a zoo, those of the DySample paper's hosts last. No model is built."""
    module = importlib.import_module(f"zoos.{zoo}_zoo")
    return [*module.CASES, *getattr(module, "PAPER_CASES", ())]


class Run:
    """A case, built once, with its checks by name; the last ends the use of the patched model.

    With `upsampler`, it is patched with that one; sites are then compared by what is swapped alone.

    run = Run(case)
    for name, check in run.checks().items():
        check()
    """

    def __init__(self, case: Case, upsampler: str | None = None) -> None:
        self.case, self.upsampler = case, upsampler
        options = {**case.options, **({} if upsampler is None else {"upsampler": upsampler})}
        with quiet():
            self.original = case.build()
            self.patched: nn.Module | None = copy.deepcopy(self.original)
            given = None if case.inferred else self._given(case.inputs(self.original, 0))
            try:
                upswap.patch(self.patched, given, **options)
                self.plan = upswap.plan_of(self.patched)
            except upswap.NothingToSwapError:
                self.patched = None
                self.plan = upswap.inspect(self.original, given, **options)
            self.batches = [case.inputs(self.original, number) for number in range(case.count)]

    @staticmethod
    def _given(pair: Arguments) -> Any:
        return (pair[0], pair[1])

    @functools.cached_property
    def stand_in(self) -> nn.Module:
        """The original with stand-ins for upsamplers."""
        return with_stand_ins(copy.deepcopy(self.original), self.plan)

    def checks(self) -> dict[str, Callable[[], Any]]:
        """Name -> check, of those there is something to check in: only the sites where nothing is swapped."""
        named: dict[str, Callable[[], Any]] = {"sites": self.sites}
        if self.patched is not None:
            named |= {
                "step 0": self.step_0,
                "stand-ins": self.stand_ins,
                "keys": lambda: check_keys(self.original, self.patched),
                "learning": self.learning,
            }
            if any(site.guide is not None for site in self.plan.swapped):
                named["guides"] = lambda: check_guides(self.patched, self.batches)
            if any(site.route == "graph" for site in self.plan.swapped):
                named["graphs"] = lambda: check_graph_owners(self.original, self.stand_in, self.batches[0])
            if self.case.training is not None:
                named["training"] = self.training
            named["unpatch"] = lambda: check_unpatch(self.original, self.patched, self.batches[0])
        return {name: quietly(check) for name, check in named.items()}

    def sites(self) -> None:
        """Every site as written down for the case, and a plan that JSON gives back."""
        if self.case.expected is not None:
            found, expected = decisions(self.plan), dict(self.case.expected)
            if (
                self.upsampler is not None
            ):  # with a guide, a layer may be a site of the code that calls it, by another route
                parts = ([what.partition(" => ") for what in each.values()] for each in (found, expected))
                counts = (Counter(f"{kind}, swapped" if route else kind for kind, _, route in each) for each in parts)
                found, expected = ({what: f"{count} times" for what, count in each.items()} for each in counts)
            wrong = [
                f"{name}: {found.get(name, 'not found')}, expected {expected.get(name, 'nothing')}"
                for name in {**expected, **found}
                if found.get(name) != expected.get(name)
            ]
            assert not wrong, "; ".join(wrong)
        assert upswap.Plan.from_json(self.plan.to_json()) == self.plan

    @functools.cached_property
    def expected(self) -> list[list[torch.Tensor] | Exception]:
        """What the original gives for each batch; the first two have to run."""
        return evaluated(self.original, self.batches, must_run=min(2, len(self.batches)))

    def step_0(self) -> None:
        """Equal outputs in eval mode."""
        compare = functools.partial(assert_close, tolerance=self.case.tolerance)
        assert_as_evaluated(self.patched, self.batches, self.expected, compare)

    def stand_ins(self) -> None:
        """With the original resize in every upsampler's place: the same keys, and the same outputs bit for bit."""
        leaves = [m for top in upswap.upsamplers(self.stand_in).values() for m in top.modules() if not [*m.children()]]
        assert all(isinstance(leaf, StandIn) for leaf in leaves)
        assert list(self.stand_in.state_dict()) == list(self.original.state_dict())
        assert_as_evaluated(self.stand_in, self.batches, self.expected, assert_equal)

    def training(self) -> None:
        """As `check_training`, for a case that can be trained."""
        assert self.case.training is not None
        check_training(self.original, self.patched, self.case.training(self.original), self.case.tolerance)

    def learning(self) -> None:
        """As `check_learning`; in eval mode for a case that cannot be trained, unless it turns gradients off by itself."""
        if self.case.training is not None:
            check_learning(self.patched, self.case.training(self.original))
        elif any(tensor.requires_grad for tensor in outputs(self.original, self.batches[0])):
            check_learning(self.patched, self.batches[0], train=False)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Inside, what libraries warn of does not matter; what upswap warns of is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", upswap.UpswapWarning)
        # A host that cuts or pads an odd map before it fuses it: the original ran, and said so.
        warnings.filterwarnings("ignore", "site .*: its guide has the size", upswap.UpswapWarning)
        # One that resizes in float32 whatever the model's type.
        warnings.filterwarnings("ignore", "site .*: its guide is torch.float64", upswap.UpswapWarning)
        yield


def quietly(check: Callable[[], Any]) -> Callable[[], Any]:
    """The check, run inside `quiet`."""

    def run() -> Any:
        with quiet():
            return check()

    return run
