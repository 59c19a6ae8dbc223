"""One model of a run, from its source to its row: built, looked at, swapped, verified, saved."""

from __future__ import annotations

import contextlib
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..._version import __version__
from ...errors import SourceError, UpswapError
from ...files import atomic, checkpoint
from ...files.open_source import open_source
from ...plan.plan import Plan
from ...probe.inputs.infer import example_inputs_for
from ...probe.inputs.inputs import Inputs
from ...probe.preserve import leaving_no_trace
from ...surgery.operation import Operation
from ...surgery.options import make_options
from ..bench.flops import count
from .checks import run_checks
from .rows import Row, Task


def run(task: Task) -> Row:
    """Do the task. Whatever goes wrong is in the row: its status, and the cause in a line."""
    row = Row(task.source)
    torch.set_num_threads(task.settings.threads)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            _run(task, row)
    except UpswapError as error:
        if not isinstance(error, SourceError):
            row.status = "failed"  # a source that cannot be opened has said so itself, in `_run`
        row.error = str(error).removeprefix(task.source).lstrip(": ")  # the row says of which model it is
    except MemoryError:
        raise
    except Exception as error:  # noqa: BLE001 - a model's own code; one model must not stop the others
        row.status = "failed"
        row.error = f"{type(error).__name__}: {error}"
    return row


def _run(task: Task, row: Row) -> None:
    settings = task.settings
    with _timed(row, "build"):
        row.status = "cannot be built"
        source = open_source(task.source, trust=settings.trust)
    row.status = "failed"
    if settings.build_only:
        row.status = "nothing to swap"
        return
    model = source.model.eval()
    row.versions = _versions(model)
    row.parameters = row.parameters_after = _count(model)
    options = make_options(**settings.options)
    with _timed(row, "look"):
        size = settings.input_size
        given = None if size is None else example_inputs_for(model, size)
        operation = Operation(model, given, options)
        plan = operation.plan
    _describe(row, plan)
    if not plan.swapped:
        row.status = "nothing to swap"
        return
    with _timed(row, "verify"):
        before = operation.capture()
        first = before.runs[0][0]
        row.flops = _flops(model, first)
    shapes = {key: value.shape for key, value in model.state_dict().items() if isinstance(value, torch.Tensor)}
    with _timed(row, "look"):
        operation.apply()
    row.parameters_after = _count(model)
    with _timed(row, "verify"):
        report = operation.compare()
        row.max_rel_diff = report.max_rel_diff
        report.check(plan)
        row.flops_after = _flops(model, first)
        row.flops_at = ", ".join("x".join(map(str, tensor.shape)) for tensor in first.tensors())
    if settings.check:
        with _timed(row, "check"):
            row.checks = run_checks(model, plan, before, shapes)
    if settings.output is not None:
        with _timed(row, "save"):
            _save(model, plan, task)
        row.output = Path(task.target).name
    row.status = "converted"


@contextlib.contextmanager
def _timed(row: Row, phase: str) -> Iterator[None]:
    before = time.perf_counter()
    row.seconds.setdefault(phase, 0.0)
    try:
        yield
    finally:
        row.seconds[phase] = round(row.seconds[phase] + time.perf_counter() - before, 4)


def _describe(row: Row, plan: Plan) -> None:
    row.model = plan.model_class
    row.sites, row.swapped = len(plan.sites), len(plan.swapped)
    row.kept = dict(Counter(site.kind for site in plan.kept))
    row.routes = dict(Counter(site.route for site in plan.swapped if site.route))
    row.details = [
        {
            "site": site.name,
            "kind": site.kind,
            "mode": site.mode,
            "ratio": site.ratio,
            "channels": site.channels,
            "shape": f"{'x'.join(map(str, site.in_shape[2:]))} -> {'x'.join(map(str, site.out_shape[2:]))}",
            "swap": site.swap,
            "route": site.route or "",
            "reason": site.why,
        }
        for site in plan.sites
    ]


def _save(model: nn.Module, plan: Plan, task: Task) -> None:
    # The journal has the name for the run's own. What is there is of one that was stopped between the file and its row.
    target = Path(task.target)
    if task.settings.output == "plan":
        atomic.write_text(target, plan.to_json(indent=2) + "\n", force=True)
    else:
        checkpoint.save(model, target, source=task.source, force=True)


def _flops(model: nn.Module, inputs: Inputs) -> int:
    with leaving_no_trace(model), torch.no_grad():
        return count(model, inputs.copied())


def _count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _versions(model: nn.Module) -> dict[str, str]:
    """The versions of upswap, torch and the packages that the model's classes come from."""
    import sys

    packages = {type(module).__module__.partition(".")[0] for module in model.modules()} | {"torch"}
    found: dict[str, Any] = {name: getattr(sys.modules.get(name), "__version__", None) for name in sorted(packages)}
    return {"upswap": __version__, **{name: str(version) for name, version in found.items() if version is not None}}
