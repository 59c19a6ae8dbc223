"""A patched model of a library whose integration has a mark carries one; no other does, and no library is imported for it."""

from __future__ import annotations

import copy
import subprocess
import sys
import types

import pytest
from torch import nn

import upswap
from upswap import UpswapWarning, integrations


class Theirs(nn.Sequential):
    """A model of a library that builds models anew."""

    __module__ = "theirs.models"


class Mark:
    """What the module of `upswap.integrations` for that library has."""


def model() -> nn.Module:
    return Theirs(nn.Conv2d(3, 8, 1), nn.Upsample(scale_factor=2), nn.Conv2d(8, 2, 1))


def test_a_patched_model_carries_the_mark_of_its_library(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("theirs_for_upswap")
    module.Mark = Mark  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(integrations, "MARKING", {"theirs": module.__name__, "another": "not.imported"})
    patched = upswap.patch(model())
    assert any(isinstance(value, Mark) for value in vars(copy.deepcopy(patched)).values())
    assert not any(isinstance(value, Mark) for value in vars(upswap.unpatch(patched)).values())
    assert not any(isinstance(value, Mark) for value in vars(upswap.patch(nn.Sequential(*model()))).values())


def test_an_integration_that_cannot_be_imported_is_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(integrations, "MARKING", {"theirs": "upswap.integrations.not_there"})
    with pytest.warns(UpswapWarning, match=r"theirs.*will build this Theirs without its upsamplers.*not_there"):
        patched = upswap.patch(model())
    assert upswap.is_patched(patched)


def test_every_mark_is_where_it_is_said_to_be_and_nothing_else_is_imported() -> None:
    assert integrations.MARKING
    for package, name in integrations.MARKING.items():
        code = f"""
import sys, torch, upswap
upswap.patch(torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Upsample(scale_factor=2), torch.nn.Conv2d(4, 4, 3)))
assert "upswap.integrations" in sys.modules and not {{{name!r}, {package!r}}} & set(sys.modules)
import {name} as module
module.Mark()
"""
        subprocess.run([sys.executable, "-c", code], check=True)
