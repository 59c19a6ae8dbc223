"""Packages: which are imported from where, and what is said of one that is missing."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import upswap
from upswap import SourceError, UntrustedFileError
from upswap.apps.cli import run
from upswap.architectures import packages
from upswap.architectures.libraries import build
from upswap.architectures.spec import parse
from upswap.files.safety import allowed_names

NET = """
import torch
from torch import nn
from beside_them import WIDTH

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, WIDTH, 3, padding=1)
        self.head = nn.Conv2d(WIDTH, 1, 3, padding=1)

    def forward(self, x):
        return self.head(nn.functional.interpolate(self.stem(x), scale_factor=2))

def late():
    import also_beside_them
    return Net()
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A current folder that is not on Python's path, with a package of the user's own and the modules it imports."""
    before = set(sys.modules)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry not in ("", ".")])
    (tmp_path / "own_nets").mkdir()
    (tmp_path / "own_nets" / "unets.py").write_text(NET)
    (tmp_path / "own_nets" / "broken.py").write_text("import nothing_of_that_name\nclass Net: ...")
    (tmp_path / "own_nets" / "raises.py").write_text("raise OSError('no licence')")
    (tmp_path / "beside_them.py").write_text("WIDTH = 4")
    (tmp_path / "also_beside_them.py").write_text("")
    yield tmp_path
    for name in set(sys.modules) - before:
        if name.partition(".")[0] in ("own_nets", "beside_them", "also_beside_them", "einops", "hostile"):
            del sys.modules[name]


def saved(path: Path, name: str = "unets") -> Path:
    """A `.pt` of the package here, which is then as if it had not been imported."""
    model = build(parse("python:own_nets.unets:Net"))
    type(model).__module__ = f"own_nets.{name}"
    sys.modules[f"own_nets.{name}"] = sys.modules["own_nets.unets"]
    torch.save(model, path)
    for module in [module for module in sys.modules if module.partition(".")[0] in ("own_nets", "beside_them")]:
        del sys.modules[module]
    sys.path[:] = [entry for entry in sys.path if entry != str(path.parent)]
    return path


def test_a_trusted_package_is_found_in_the_current_folder(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, finders, entries = saved(here / "net.pt"), [*sys.meta_path], [*sys.path]
    with pytest.raises(UntrustedFileError, match="--trust own_nets"):
        upswap.load(path)
    assert "own_nets" not in sys.modules
    assert type(upswap.load(path, trust=["own_nets"])).__name__ == "Net"
    assert sys.meta_path == finders
    assert sys.path == entries
    assert run(["inspect", str(path), "--trust", "own_nets"]) == 0
    assert "root" in capsys.readouterr().out


def test_a_factory_finds_what_is_beside_its_package_even_late(here: Path) -> None:
    entries = [*sys.path]
    assert type(build(parse("python:own_nets.unets:late"))).__name__ == "Net"
    assert sys.path == entries


def test_elsewhere_it_is_told_how_to_put_it_on_the_path(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(here / "net.pt")
    (here / "empty").mkdir()
    monkeypatch.chdir(here / "empty")
    with pytest.raises(SourceError) as caught:
        upswap.load(path, trust=["own_nets"])
    with pytest.raises(SourceError) as of_spec:
        build(parse("python:own_nets.unets:Net"))
    for told in (str(caught.value), str(of_spec.value)):
        assert "PYTHONPATH" in told
        assert str(here / "empty") in told
        assert "pip install own_nets" not in told
    # What it says works.
    monkeypatch.syspath_prepend(str(here))
    assert type(upswap.load(path, trust=["own_nets"])).__name__ == "Net"


@pytest.mark.parametrize(
    ("module", "says"),
    [
        ("nowhere", "no module own_nets.nowhere in the package own_nets"),
        ("broken", "importing own_nets.broken fails: No module named 'nothing_of_that_name'"),
        ("raises", "OSError: no licence"),
    ],
)
def test_a_trusted_package_that_fails_says_why(module: str, says: str, here: Path) -> None:
    path = saved(here / "net.pt", module)
    with pytest.raises(SourceError, match=says):
        upswap.load(path, trust=["own_nets"])


def test_no_other_name_is_looked_for_in_the_current_folder(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file there that is called like a library runs neither when that is missing nor before one that is installed."""
    for name in ("einops", "hostile", "wave"):
        (here / f"{name}.py").write_text(f"raise SystemExit('{name} of the current folder ran')")
    path = saved(here / "net.pt")
    (here / "beside_them.py").write_text("import wave\nWIDTH = 4")
    assert upswap.load(path, trust=["own_nets"]).stem.out_channels == 4
    for trusted in ("einops", "own_nets"):
        with packages.in_current_folder(trusted):
            found = packages.importlib.import_module("einops")  # installed, and known
        assert str(here) not in str(found.__file__)
    with packages.in_current_folder("not_here"), pytest.raises(ModuleNotFoundError):
        packages.importlib.import_module("hostile")


def test_only_known_libraries_are_given_to_pip() -> None:
    for name in ("their_private_nets", "numpy_of_ours", "torch_models"):
        told = str(packages.missing_package(name, "net.pt"))
        assert f"install {name}" not in told
        assert "PYTHONPATH" in told
    for name, command in packages.INSTALL.items():
        assert str(packages.missing_package(name, "net.pt")).endswith(command)
    known = {name.partition(".")[0] for name in allowed_names.PACKAGES}
    assert known <= {*packages.INSTALL, "torch", "upswap"}
