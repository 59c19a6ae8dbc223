"""The public list of `upswap.nn`: addresses that files keep."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest
from torch import nn

import upswap.nn
from upswap.files.safety.allowed_names import UPSAMPLERS


def test_every_name_is_there() -> None:
    assert dir(upswap.nn) == sorted(upswap.nn.__all__)
    assert set(upswap.nn._HOMES) == set(upswap.nn.__all__)
    for name, home in upswap.nn._HOMES.items():
        assert getattr(upswap.nn, name) is getattr(importlib.import_module(f"upswap.nn.{home}"), name)
    with pytest.raises(AttributeError, match="has no attribute 'Nothing'"):
        upswap.nn.Nothing  # noqa: B018


def test_modules_have_an_address_that_files_may_name() -> None:
    found = [getattr(upswap.nn, name) for name in upswap.nn.__all__]
    modules = [cls for cls in found if isinstance(cls, type) and issubclass(cls, nn.Module)]
    assert {cls.__module__ for cls in modules} == {"upswap.nn"}
    assert {f"upswap.nn.{cls.__name__}" for cls in modules} == {
        name for name in UPSAMPLERS if name.startswith("upswap.nn.")
    }


def test_configs_need_no_torch() -> None:
    configs = [name for name in upswap.nn.__all__ if name.endswith("Config")]
    assert len(configs) > 5
    code = f"import sys\nfrom upswap.nn import {', '.join(configs)}\nprint('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
