"""Models of code that is installed beside upswap, as `benchmarks/coverage.py --model` takes them."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import invariants
import own_models
from upswap import InputError, SourceError

NETS = """
from torch import nn
from torch.nn import functional as F

class Net(nn.Module):
    def __init__(self, width=4):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, 2, 1), nn.BatchNorm2d(width))
        self.head = nn.Conv2d(width, 1, 3, padding=1)

    def forward(self, x):
        return self.head(F.interpolate(self.stem(x), size=x.shape[2:]))

class Square(Net):
    def forward(self, x):
        assert x.shape[2:] == (64, 64)
        return super().forward(x)

class Supervised(Net):
    def forward(self, x, target=None):
        x = super().forward(x)
        return (x - target).square().mean() if self.training else x

class Asks(Net):
    def forward(self, x, prompt):
        return super().forward(x) + prompt.weight
"""

CASES = """
import torch
from nets_beside import Asks
from torch import nn
from zoos.case import Case

def build():
    torch.manual_seed(0)
    return Asks().eval()

def inputs(model, number):
    return (torch.randn(2, 3, 32, 32 + 32 * number, generator=torch.Generator().manual_seed(0)), nn.PReLU()), {}

CASES = [Case("asks", "Asks", build, inputs, lambda model: inputs(model, 1), inferred=False)]
"""


@pytest.fixture(autouse=True)
def beside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with a package and a file of cases, which is the current one and not on Python's path."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "nets_beside.py").write_text(NETS)
    (tmp_path / "cases_beside.py").write_text(CASES)
    yield tmp_path
    for name in ("nets_beside", "cases_beside"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize(
    ("source", "zoo", "name", "trains"),
    [
        ("python:nets_beside:Net?width=8", "nets_beside", "python:nets_beside:Net?width=8", True),
        ("python:nets_beside:Square", "nets_beside", "python:nets_beside:Square", True),
        ("python:nets_beside:Supervised", "nets_beside", "python:nets_beside:Supervised", False),
        ("cases_beside.py", "cases_beside", "Asks", True),
    ],
)
def test_all_checks(source: str, zoo: str, name: str, trains: bool) -> None:
    assert own_models.names_of(source) == [(zoo, name)]
    (case,) = own_models.cases_of(source)
    assert case.name == name
    run = invariants.Run(case)
    assert [site.swap for site in run.plan.sites] == [True]
    checks = run.checks()
    assert ("training" in checks) == trains
    for check in checks.values():
        check()


def test_a_model_that_upswap_has_no_inputs_for_needs_a_file() -> None:
    with pytest.raises(InputError, match="needs x, prompt"):
        own_models.cases_of("python:nets_beside:Asks")


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("nowhere.py", "no file nowhere.py"),
        ("nets_beside.py", "nets_beside.py has no CASES"),
        ("torch.py", "rename the file"),
        ("nets_beside", "neither a Python file nor a spec"),
    ],
)
def test_what_leads_to_no_model_says_why(source: str, says: str, beside: Path) -> None:
    (beside / "torch.py").write_text(CASES)
    with pytest.raises(SourceError, match=says):
        own_models.names_of(source)
