"""Which packages are installed, which are trusted, and how to install one that is missing."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterable
from types import ModuleType

from ..errors import OptionError, SourceError
from .spec import Spec


def import_for(module: str, spec: Spec) -> ModuleType:
    """A module of a library that a spec needs, or `SourceError` with how to install it."""
    package = module.partition(".")[0]
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name == package:
            raise missing_package(package, str(spec)) from error
        raise SourceError(f"{spec} needs {package}, whose import fails: {error}") from error
    except (ImportError, RuntimeError) as error:
        # RuntimeError: torchvision built for another torch.
        raise SourceError(f"{spec} needs {package}, whose import fails: {error}") from error


def first_line(error: Exception) -> str:
    """An error in a line: its type and the first line of its message."""
    text = str(error).strip() or "no message"
    return f"{type(error).__name__}: {text.splitlines()[0]}"


def inside(name: str, packages: Iterable[str]) -> bool:
    """Whether a dotted name is one of `packages` or lies in one."""
    return any(name == package or name.startswith(package + ".") for package in packages)


#: What to install for a package a file or spec needs.
INSTALL = {
    "segmentation_models_pytorch": "pip install 'upswap[smp]'",
    "timm": "pip install 'upswap[timm]'",
    "torchvision": "pip install 'upswap[torchvision]'",
    "transformers": "pip install 'upswap[transformers]'",
    "ultralytics": "pip install ultralytics",
    "monai": "pip install monai",
}


def missing_package(package: str, needed_for: str) -> SourceError:
    """The one message for a package that is not installed."""
    how = INSTALL.get(package, f"pip install {package}")
    return SourceError(f"{needed_for} needs the package {package}, which is not installed here: {how}")


def check_trust(package: str) -> str:
    """`package`, or `OptionError` where it is no package name, or a part of Python itself."""
    top = package.partition(".")[0]
    if not top or not all(part.isidentifier() for part in package.split(".")):
        raise OptionError(f"trust takes the name of a Python package, such as my_models; got {package!r}")
    if top in sys.stdlib_module_names:
        raise OptionError(
            f"{package} is part of Python itself: a file that may call it could do anything. Build the model in Python "
            "and pass it to upswap.patch"
        )
    return package
