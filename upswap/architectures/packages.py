"""Which packages are installed, which are trusted, and how to install one that is missing."""

from __future__ import annotations

import contextlib
import importlib
import importlib.abc
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
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


#: What to install for a library that upswap knows. No other name is ever given to pip: that of somebody's private package can
#: be another's on the public index.
INSTALL = {
    "segmentation_models_pytorch": "pip install 'upswap[smp]'",
    "timm": "pip install 'upswap[timm]'",
    "torchvision": "pip install 'upswap[torchvision]'",
    "transformers": "pip install 'upswap[transformers]'",
    "ultralytics": "pip install ultralytics",
    "monai": "pip install monai",
    "einops": "pip install einops",
    "huggingface_hub": "pip install huggingface_hub",
}


def missing_package(package: str, needed_for: str) -> SourceError:
    """The one message for a package that is not found."""
    if package in INSTALL:
        return SourceError(f"{needed_for} needs the package {package}, which is not installed here: {INSTALL[package]}")
    return SourceError(
        f"{needed_for} needs the package {package}, which is neither in the current folder, {os.getcwd()}, nor installed. "
        f"upswap does not know it, so it is your own or that of whoever made this: start in the folder that has {package}, "
        "or name that folder in PYTHONPATH, or install its project with pip install -e FOLDER"
    )


class _CurrentFolder(importlib.abc.MetaPathFinder):
    """Finds one package in a folder, before the places where packages are installed."""

    def __init__(self, package: str, folder: str) -> None:
        self.package, self.folder = package, folder

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """As the import system asks."""
        return PathFinder.find_spec(name, [self.folder, *sys.path]) if name == self.package else None

    def has_it(self) -> bool:
        """Whether the package is in the folder."""
        found = self.find_spec(self.package)
        places = [] if found is None else [*(found.submodule_search_locations or ()), found.origin]
        return any(
            Path(place).parent in (Path(self.folder), Path(self.folder, self.package)) for place in places if place
        )


@contextlib.contextmanager
def in_current_folder(module: str) -> Iterator[None]:
    """Inside, the package of `module`, which the user has named, is looked for in the current folder too, as by `python -m`.

    No other name is: a file there that is called like a library is not imported in its place. Where the package is in that
    folder, what its own code imports may be there as well, and is looked for there last. Libraries that upswap knows are
    installed, and never looked for there.
    """
    finder = _CurrentFolder(module.partition(".")[0], os.getcwd())
    if finder.package in INSTALL:
        yield
        return
    # Of its own text, so that what is taken away at the end is this entry and no other.
    beside = [os.path.join(finder.folder, "")] if finder.has_it() else []
    sys.meta_path.insert(0, finder)
    sys.path += beside
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        for entry in beside:
            if entry in sys.path:
                sys.path.remove(entry)


def import_own(module: str, needed_for: str) -> ModuleType:
    """A module of a package that the user has named, or `SourceError` with what keeps it from being imported."""
    try:
        with in_current_folder(module):
            return importlib.import_module(module)
    except ModuleNotFoundError as error:
        missing = error.name or ""
        if missing == module.partition(".")[0]:
            raise missing_package(missing, needed_for) from error
        if missing and f"{module}.".startswith(f"{missing}."):
            raise SourceError(
                f"{needed_for}: there is no module {missing} in the package {module.partition('.')[0]}"
            ) from error
        raise SourceError(f"{needed_for}: importing {module} fails: {error}") from error
    except Exception as error:  # the user's own code; whatever it raises is about the source
        raise SourceError(f"{needed_for}: importing {module} fails: {first_line(error)}") from error


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
