"""The plans of the patched models in a trainer's module, kept in its checkpoint and carried out again before a load."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..api import is_patched, patch
from ..errors import PlanError
from ..files.formats.description import checked_plan
from ..nn.state_dicts import upsamplers_in
from ..surgery.apply import plan_of
from ..surgery.wrappers import patched_models

#: Where a checkpoint has them, each under the path of its model in the module: plain data, which `weights_only` lets through.
KEY = "upswap"


def plans_in(module: nn.Module) -> dict[str, dict[str, Any]]:
    """The plans of the patched models in `module` by their paths in it, as plain data."""
    if not is_patched(module):
        return {}
    return {path: plan_of(patched).to_dict() for path, patched in patched_models(module).items()}


def patch_like(module: nn.Module, plans: Any, source: str | Path) -> None:
    """Patch the parts of `module` that are not patched yet as the plans say that a checkpoint has beside its weights.

    Args:
        module: what the weights are to be loaded into.
        plans: what `plans_in` gave; anything else is as good as nothing.
        source: the checkpoint, as a message names it.

    Raises:
        PlanError: a plan does not fit its part.
        UntrustedFileError: a plan has names that no plan has.
    """
    for path, plan in (plans if isinstance(plans, Mapping) else {}).items():
        part = dict(module.named_modules()).get(path)
        if part is None:
            raise PlanError(
                f"{source} has the plan of a model at {path!r}, and this {type(module).__name__} has none there"
            )
        if not is_patched(part):
            patch(part, plan=checked_plan(plan, part, Path(source)))


def check_taken(module: nn.Module, weights: Mapping[str, Tensor], source: str | Path, advice: str = "") -> None:
    """`PlanError` where weights of upsamplers would find no place in `module`: a load that is not strict leaves them out.

    `advice` is what else to do than to patch the module.
    """
    own = module.state_dict()
    lost = [path for path in upsamplers_in(weights) if not any(key.startswith(f"{path}.") for key in own)]
    if lost:
        names = ", ".join(lost[:3]) + (f" and {len(lost) - 3} more" if len(lost) > 3 else "")
        raise PlanError(
            f"{source} has trained upsamplers at {names}, which this {type(module).__name__} has not: it is not patched, or in "
            f"another way. Patch it as it was, upswap.patch(model), before the checkpoint is loaded{advice}"
        )
