"""The five checks of a patched model, each a message, empty where it holds."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from ...nn.registry import is_exact
from ...plan.plan import Plan
from ...probe.dataflow import tensors_in
from ...probe.inputs.inputs import Inputs
from ...probe.preserve import leaving_no_trace
from ...surgery.apply import added_keys, plan_of, undo
from ...surgery.checking.verification import TOLERANCE, Capture, compare
from ...surgery.replay import check_plan


def run_checks(patched: nn.Module, plan: Plan, captured: Capture, shapes: Mapping[str, Any]) -> dict[str, str]:
    """Check a model that was just patched as `plan` says, which is left as found.

    `captured` is what it gave before the patch, `shapes` the shapes in its state dict then.
    """
    original = copy.deepcopy(patched)
    undo(original)
    inputs = captured.runs[0][0]
    checks: dict[str, Callable[[], str]] = {
        "sites": lambda: _sites(original, plan),
        "step 0": lambda: _step_0(original, patched, captured, plan),
        "keys": lambda: _keys(shapes, patched),
        "gradients": lambda: _gradients(patched, inputs),
        "unpatch": lambda: _unpatch(original, captured),
    }
    return {name: _message(check) for name, check in checks.items()}


def _message(check: Callable[[], str]) -> str:
    try:
        return check()
    except Exception as error:  # noqa: BLE001 - a model's own code; that it raises is the outcome
        return f"{type(error).__name__}: {error}"


def _sites(original: nn.Module, plan: Plan) -> str:
    """Every site has a decision with its reason, and the plan, as JSON, fits the model it was made for."""
    bare = [site.name for site in plan.sites if not site.reason or (site.swap and not site.route)]
    check_plan(original, Plan.from_json(plan.to_json()))
    return f"no reason or route: {', '.join(bare)}" if bare else ""


def _step_0(original: nn.Module, patched: nn.Module, captured: Capture, plan: Plan) -> str:
    """Equal outputs at two sizes in eval mode, and in train mode where the model runs in it without targets."""
    if not is_exact(plan):
        return ""
    report = compare(captured, patched)
    if not report.ok:
        return f"relative difference {report.max_rel_diff:.1e} in eval mode"
    first = captured.runs[0][0]
    try:
        expected = _trained(original, first)
    except Exception:  # noqa: BLE001 - a batch of one under batch norm, or a loss that wants targets: not the patch's doing
        return ""
    for old, new in zip(expected, _trained(patched, first), strict=True):
        scale = old.abs().max().item() if old.numel() else 0.0
        if old.numel() and (new - old).abs().max().item() > 10 * TOLERANCE.get(old.dtype, 0.0) * max(scale, 1e-30):
            return "another output in train mode"
    return ""


def _trained(model: nn.Module, inputs: Inputs) -> list[torch.Tensor]:
    """The floating-point outputs in train mode, in a batch of two."""
    twice = inputs.map(lambda tensor: torch.cat((tensor, tensor.flip(-1))) if tensor.dim() == 4 else tensor)
    with leaving_no_trace(model, training=True), torch.no_grad():
        torch.manual_seed(0)
        own = twice.copied()
        outputs = model(*own.args, **own.kwargs)
        return [tensor.detach().clone() for tensor in tensors_in(outputs) if tensor.is_floating_point()]


def _keys(before: Mapping[str, Any], patched: nn.Module) -> str:
    """Every key and shape there was is there, and the new ones are the upsamplers'."""
    after = patched.state_dict()
    added = added_keys(patched)
    lost = [key for key, shape in before.items() if key not in after or after[key].shape != shape]
    foreign = [key for key in after if key not in before and key not in added]
    return f"lost: {lost[:3]}, foreign: {foreign[:3]}" if lost or foreign else ""


def _gradients(patched: nn.Module, inputs: Inputs) -> str:
    """A gradient that is not zero reaches every upsampler that a run reaches."""
    model = copy.deepcopy(patched)
    model.zero_grad(set_to_none=True)
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    own = inputs.copied()
    outputs = [t for t in tensors_in(model(*own.args, **own.kwargs)) if t.is_floating_point() and t.requires_grad]
    if not outputs:
        return "no output has a gradient"
    generator = torch.Generator().manual_seed(0)
    # Random weights: the gradient of a plain sum vanishes behind a softmax or a norm.
    losses = [(t * torch.randn(t.shape, generator=generator).to(t)).sum().float() for t in outputs]
    torch.stack(losses).sum().backward()
    still = [
        path
        for site in plan_of(model).swapped
        if site.seen_in != "nowhere"
        for path in filter(None, (site.module,))
        if not any(p.grad is not None and p.grad.abs().sum() > 0 for p in model.get_submodule(path).parameters())
    ]
    return f"no gradient reaches {', '.join(still)}" if still else ""


def _unpatch(original: nn.Module, captured: Capture) -> str:
    """The patch undone computes bit for bit what was there before."""
    report = compare(captured, original)
    return "" if report.max_abs_diff == 0 else f"a difference of {report.max_abs_diff:.1e}"
