"""Which classes a model file may name, and what it may do with them.

`torch.load(weights_only=True)` calls whatever it was told is safe, with arguments from the file. That is too much for
the classes of a model library: some constructors download, some evaluate strings of their configuration. A whole-model
file needs less. A module is pickled as "a blank instance of this class, with this state", so its class is admitted
behind a seal: the file can have blank instances, and nothing more is ever called for it, no constructor and no
`__new__`. What else a model holds is data: enumeration members, named tuples, plain objects; they get the same seal.
"""

from __future__ import annotations

import dataclasses
import enum
import importlib
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from .errors import OptionError, SourceError, UntrustedFileError

#: Packages whose classes are admitted, each cut down to the parts that models are made of.
PACKAGES: tuple[str, ...] = (
    "torch.nn",
    "torchvision.models",
    "torchvision.ops",
    "timm.layers",
    "timm.models",
    "segmentation_models_pytorch",
    "transformers.activations",
    "transformers.configuration_utils",
    "transformers.generation.configuration_utils",
    "transformers.models",
    "transformers.pytorch_utils",
    "ultralytics.nn",
    "monai.networks",
    "upswap",
)

#: The one function a file may name: it announces a module whose forward upswap rewrote (see `rewrite.py`).
PENDING = "upswap.rewrite._pending"

#: Functions that models keep as attributes. Each computes a tensor from tensors and does nothing else; yet sealed too.
FUNCTIONS = frozenset(
    {
        "timm.layers.activations.gelu",
        "torch.nn.functional.relu",
        "torchvision.models.optical_flow.raft._pass_through_h",
        "torchvision.ops.boxes.box_iou",
    }
)

# Paths of modules. PyTorch allows more, and names for upsamplers are upswap's own.
_PATH = r"[\w-]+(\.[\w-]+)*"

#: What to install for a package a file or spec needs.
INSTALL = {
    "segmentation_models_pytorch": "pip install 'upswap[smp]'",
    "timm": "pip install 'upswap[timm]'",
    "torchvision": "pip install 'upswap[torchvision]'",
    "transformers": "pip install 'upswap[transformers]'",
    "ultralytics": "pip install ultralytics",
    "monai": "pip install monai",
}

#: What `torch.serialization.safe_globals` takes: an object, with the name a file knows it by.
SafeGlobal = Callable[..., Any] | tuple[Callable[..., Any], str]

# Modules that carry code in their state and compile it when they are restored.
_CODE_CARRIERS: tuple[type, ...] = (torch.fx.GraphModule, torch.jit.ScriptModule)

# A class that defines one of these runs code of its own while it is restored; fine for a module, not for plain data.
_RESTORE_HOOKS = ("__new__", "__setstate__", "__setattr__", "__del__", "__getattribute__")


def missing_package(package: str, needed_for: str) -> SourceError:
    """The one message for a package that is not installed."""
    how = INSTALL.get(package, f"pip install {package}")
    return SourceError(f"{needed_for} needs the package {package}, which is not installed here: {how}")


def safe_globals(names: Iterable[str], path: str, trust: Iterable[str] = ()) -> list[SafeGlobal]:
    """The pairs for `torch.serialization.safe_globals` that let a file use `names`, the globals it asks for.

    A module is imported only where its name lies in `PACKAGES` or in a package named in `trust`: importing runs code.
    The classes and functions of a trusted package are admitted as they are, without a seal.

    Raises:
        UntrustedFileError: some names are not admitted; the message lists them and says what would admit them.
        SourceError: a package is not installed, or has no such class (any more).
        OptionError: `trust` holds something that is not a package name, or a part of Python itself.
    """
    trusted = tuple(_check_trust(package) for package in trust)
    pairs: list[SafeGlobal] = []
    refused: dict[str, str] = {}
    for index, name in enumerate(sorted(names)):
        if name == PENDING:
            from . import rewrite

            pairs += [(_restore_rewritten, name), (rewrite.Pending, "\n" + name)]
            continue
        try:
            found = _resolve(name, path, trusted)
        except _Refused as reason:
            refused[name] = str(reason)
            continue
        if _inside(name, trusted):
            pairs.append((found, name))
        elif not isinstance(found, type):
            pairs.append((_SealedFunction(found), name))
        else:
            pairs.append((_seal(found), name))
            # Setting state needs the real class on the list too. A newline ends a name inside a pickle, so this name
            # is one that no file can spell.
            pairs.append((found, f"\n{index}"))
    if refused:
        raise UntrustedFileError(_refusal(refused, path))
    return pairs


def unseal(model: torch.nn.Module) -> torch.nn.Module:
    """Put real classes and functions back, in place, where a module holds one as a value (`self.norm = nn.ReLU`)."""
    for module in model.modules():
        for key, value in list(vars(module).items()):
            opened = _opened(value)
            if opened is not value:
                module.__dict__[key] = opened
    return model


class _Refused(Exception):
    """A name is not admitted; the text is the reason."""


class _Sealed(type):
    """The type of the stand-ins that a file gets for classes."""

    original: type

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        """What a pickle's REDUCE reaches. Enumerations look a member up this way; nothing else needs it."""
        if issubclass(cls.original, enum.Enum) and len(args) == 1 and not kwargs:
            return cls.original(args[0])
        raise UntrustedFileError(f"it tries to call {cls.original.__module__}.{cls.original.__qualname__}")


class _SealedFunction:
    """The stand-in for a function that a model keeps as an attribute: a value until `unseal`, and never called."""

    def __init__(self, original: Callable[..., Any]) -> None:
        self.original = original

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise UntrustedFileError(f"it tries to call {self.original.__module__}.{self.original.__qualname__}")


def _seal(original: type) -> type:
    def new(cls: type, *args: Any) -> Any:
        if issubclass(original, tuple):
            return tuple.__new__(original, args)
        if args:
            raise UntrustedFileError(f"it passes arguments to {original.__module__}.{original.__qualname__}")
        return object.__new__(original)

    body = {"__new__": new, "original": original, "__module__": original.__module__}
    return _Sealed(original.__name__, (), body)


def _opened(value: Any) -> Any:
    """`value` with real classes for sealed ones, the same object where it holds none."""
    if isinstance(value, _Sealed | _SealedFunction):
        return value.original
    if type(value) in (list, tuple, set):
        items = [_opened(item) for item in value]
        return value if all(new is old for new, old in zip(items, value, strict=True)) else type(value)(items)
    if isinstance(value, dict):
        for key, item in list(value.items()):
            opened = _opened(item)
            if opened is not item:
                value[key] = opened
    return value


def _restore_rewritten(original: Any, record: Any) -> Any:
    """`rewrite._pending` for a stranger's file: with the real class, and the record looked at first."""
    from .rewrite import _pending

    sites = record.get("sites") if isinstance(record, Mapping) else None
    if not isinstance(sites, list):
        raise UntrustedFileError("it describes a rewritten module in a form upswap does not write")
    check_names(sites)
    return _pending(_opened(original), record)


def check_names(sites: Iterable[Mapping[str, Any]]) -> None:
    """`UntrustedFileError` unless the upsampler names in a file's sites are names.

    The graph route makes source code with these names in it, so one that is no identifier could be code.
    """
    for site in sites:
        module, owner = site.get("module"), site.get("owner")
        if module is None:
            continue
        child = module.removeprefix(f"{owner}.") if isinstance(module, str) and re.fullmatch(_PATH, module) else ""
        # On the module route the upsampler takes the owner's own place.
        if (not child.isidentifier() and module != owner) or not child:
            raise UntrustedFileError(f"it names an upsampler {str(module)[:80]!r}, which upswap would not")


def _check_trust(package: str) -> str:
    top = package.partition(".")[0]
    if not top or not all(part.isidentifier() for part in package.split(".")):
        raise OptionError(f"trust takes the name of a Python package, such as my_models; got {package!r}")
    if top in sys.stdlib_module_names:
        raise OptionError(
            f"{package} is part of Python itself: a file that may call it could do anything. Build the model in Python "
            "and pass it to upswap.patch"
        )
    return package


def _inside(name: str, packages: Iterable[str]) -> bool:
    return any(name == package or name.startswith(package + ".") for package in packages)


def _resolve(name: str, path: str, trusted: tuple[str, ...]) -> Any:
    """The class (or, from `FUNCTIONS`, the function) of that name, or `_Refused` with the reason."""
    if not _inside(name, (*PACKAGES, *trusted)):
        raise _Refused("not in a package upswap knows")
    module_name, _, attribute = name.rpartition(".")
    if not all(part.isidentifier() for part in name.split(".")):
        raise _Refused("not a name")
    top = name.partition(".")[0]
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name == top:
            raise missing_package(top, path) from error
        raise SourceError(_moved(name, path)) from error
    except ImportError as error:
        raise SourceError(f"{path} needs {name}, and importing {module_name} fails: {error}") from error
    # The module's own names only: a module-level __getattr__ could import more.
    found = vars(module).get(attribute)
    if found is None:
        raise SourceError(_moved(name, path))
    if not _inside(getattr(found, "__module__", None) or "", (*PACKAGES, *trusted)):
        raise _Refused("defined elsewhere, only passing through this module")
    if _inside(name, trusted):
        return found
    if not isinstance(found, type):
        if name in FUNCTIONS and callable(found):
            return found
        raise _Refused("a function, and only classes are admitted")
    if issubclass(found, _CODE_CARRIERS):
        raise _Refused("carries code of its own")
    if not _is_data(found) and not issubclass(found, torch.nn.Module):
        raise _Refused("neither a module nor plain data")
    return found


def _is_data(cls: type) -> bool:
    """Whether instances of `cls` can be restored without running code of the class."""
    if issubclass(cls, enum.Enum) or (issubclass(cls, tuple) and hasattr(cls, "_fields")):
        return True
    own = [base for base in cls.__mro__ if base is not object]
    if any(base.__module__ in sys.stdlib_module_names for base in own):
        return False
    return dataclasses.is_dataclass(cls) or not any(hook in vars(base) for base in own for hook in _RESTORE_HOOKS)


def _moved(name: str, path: str) -> str:
    top = name.partition(".")[0]
    version = getattr(sys.modules.get(top), "__version__", None)
    installed = f"{top} {version}" if version else top
    return (
        f"{path} needs {name}, which {installed}, installed here, does not have: the class has moved, or the file was "
        f"written with another {top}. Install that version, or build the model from a spec and load its weights"
    )


def _refusal(refused: Mapping[str, str], path: str) -> str:
    lines = [f"{path} needs code that upswap does not load from a file:"]
    lines += [f"  {name}: {reason}" for name, reason in refused.items()]
    packages = sorted({name.partition(".")[0] for name in refused if name.count(".")})
    own = [p for p in packages if p.isidentifier() and p not in sys.stdlib_module_names and not _inside_known(p)]
    if own:
        flags = " ".join(f"--trust {package}" for package in own)
        names = ", ".join(f'"{package}"' for package in own)
        lines.append(f"Where these are packages of your own, or ones you trust: {flags} (in Python: trust=[{names}])")
    if len(own) < len(packages):
        lines.append(
            "Nothing was run. With the rest a file could do anything. If you know who made it and why it holds that, "
            "build the model in Python or from a spec instead, and load its weights"
        )
    return "\n".join(lines)


def _inside_known(package: str) -> bool:
    return package in {known.partition(".")[0] for known in PACKAGES}
