"""Models of whatever code is installed, as cases: from a spec, or from a Python file like those of `tests/libraries/zoos`."""

from __future__ import annotations

import copy
import functools
import importlib
import sys
from pathlib import Path

import torch
from torch import nn

from upswap.architectures.spec import Spec, package_of, parse
from upswap.errors import SourceError
from upswap.files.open_source import open_source
from upswap.probe.inputs.inputs import Inputs
from upswap.probe.inputs.variations import training_inputs
from upswap.probe.survey import survey
from zoos.case import Arguments, Case


def names_of(source: str) -> list[tuple[str, str]]:
    """The heading and the name of each model that a Python file or a spec leads to; a spec's is not built."""
    if _is_file(source):
        return [(Path(source).stem, case.name) for case in cases_of(source)]
    spec = _spec_of(source)
    return [(package_of(spec).partition(".")[0] if spec.scheme == "python" else spec.scheme, str(spec))]


def cases_of(source: str) -> list[Case]:
    """The `CASES` of a Python file, or the one model that a spec leads to, which is built and run for it."""
    return _cases_in(Path(source)) if _is_file(source) else [_case_of(_spec_of(source))]


def _is_file(source: str) -> bool:
    return source.endswith(".py")


def _spec_of(source: str) -> Spec:
    spec = parse(source)
    if spec is None:
        raise SourceError(f"{source!r} is neither a Python file nor a spec such as python:package.module:Net?width=8")
    return spec


@functools.cache
def _cases_in(path: Path) -> list[Case]:
    if not path.is_file():
        raise SourceError(f"no file {path}; name a Python file with CASES in it")
    folder = str(path.resolve().parent)
    if folder not in sys.path:
        sys.path.append(folder)  # what it imports may lie beside it
    module = importlib.import_module(path.stem)
    if module.__file__ is None or not path.samefile(module.__file__):
        raise SourceError(f"{path} cannot be imported as {path.stem}, the name of another module; rename the file")
    cases = getattr(module, "CASES", None)
    if not isinstance(cases, list) or not all(isinstance(case, Case) for case in cases):
        raise SourceError(f"{path} has no CASES, a list of zoos.case.Case")
    return cases


def _case_of(spec: Spec) -> Case:
    """A model on inputs that upswap makes for it: those it is planned on, and those that are larger or have other values.

    It is trained on the second where it runs on them in train mode.
    """

    def build() -> nn.Module:
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(0)
            return open_source(str(spec)).model.eval()

    def inputs(model: nn.Module, number: int) -> Arguments:
        given = batches[number].copied()
        return given.args, given.kwargs

    def training(model: nn.Module) -> Arguments:
        given = training_inputs(model, batches[1].copied())
        return given.args, given.kwargs

    model = build()
    batches: list[Inputs] = [run.inputs for run in survey(model).runs]
    if len(batches) == 1:  # a model that takes one size only
        batches.append(batches[0].map(lambda tensor: tensor.flip(-1) if tensor.dim() else tensor))
    return Case(
        names_of(str(spec))[0][0],
        str(spec),
        build,
        inputs,
        training if _trains(model, training(model)) else None,
    )


def _trains(model: nn.Module, given: Arguments) -> bool:
    args, kwargs = given
    try:
        copy.deepcopy(model).train()(*args, **kwargs)
    except Exception:  # noqa: BLE001 - of the model's own, which may need targets that nobody can make up
        return False
    return True
