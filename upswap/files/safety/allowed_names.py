"""Which classes a model file may name, and what it may do with them.

`torch.load(weights_only=True)` calls whatever it was told is safe, with arguments from the file. That is too much for
the classes of a model library: some constructors download, some evaluate strings of their configuration. A whole-model
file needs less. A module is pickled as "a blank instance of this class, with this state", so its class is admitted
behind a seal: the file can have blank instances, and nothing more is ever called for it, no constructor and no
`__new__`. What else a model holds is data: enumeration members, named tuples, plain objects; they get the same seal.
"""

from __future__ import annotations

import abc
import argparse
import dataclasses
import enum
import importlib
import sys
import types
from collections.abc import Collection, Iterable, Mapping
from typing import Any, Generic

import torch

from ...architectures.packages import check_trust, import_own, inside, missing_package
from ...errors import SourceError, UntrustedFileError
from ...shown import brief, one_line
from .stand_ins import (
    Apart,
    Blank,
    BlankNamespace,
    Foreign,
    Opaque,
    SafeGlobal,
    Sealed,
    SealedFunction,
    blank,
    blank_for,
    has_slots,
    seal,
)
from .value_forms import form_of

#: upswap's own classes that files have; nothing else of it is admitted.
UPSAMPLERS: tuple[str, ...] = (
    "upswap.integrations.ultralytics.DySample",
    "upswap.integrations.ultralytics.Mark",
    "upswap.nn.Affine",
    "upswap.nn.ByChannels",
    "upswap.nn.CARAFE",
    "upswap.nn.Cascade",
    "upswap.nn.DySample",
    "upswap.nn.FADE",
    "upswap.nn.FreqFusion",
    "upswap.nn.LDAAQU",
    "upswap.nn.Projection",
    "upswap.nn.SAPA",
)

#: Packages whose classes are admitted, each cut down to the parts that models are made of.
PACKAGES: tuple[str, ...] = (
    "einops.layers.torch",
    "torch.ao.nn.quantized.modules.functional_modules",
    "torch.nn.modules",
    "torch.nn.parallel.data_parallel",
    "torch.nn.parameter",
    "torch.nn.utils",
    "torchvision.models",
    "torchvision.ops",
    "timm.layers",
    "timm.models",
    "segmentation_models_pytorch.base",
    "segmentation_models_pytorch.decoders",
    "segmentation_models_pytorch.encoders",
    "transformers.activations",
    "transformers.configuration_utils",
    "transformers.core_model_loading",
    "transformers.generation.configuration_utils",
    "transformers.models",
    "transformers.pytorch_utils",
    "ultralytics.nn.modules",
    "ultralytics.nn.tasks",
    "monai.networks.blocks",
    "monai.networks.layers",
    "monai.networks.nets",
    *UPSAMPLERS,
)

#: Namespaces of Python itself, which hold what they are given.
NAMESPACES: dict[str, type] = {
    "argparse.Namespace": argparse.Namespace,
    "types.SimpleNamespace": types.SimpleNamespace,
}

#: Modules, these themselves and not what is below them, from which only plain values are admitted: enumerations, named
#: tuples and namespaces.
VALUES: tuple[str, ...] = ("monai.utils.enums", "transformers.backbone_utils", "ultralytics.utils")

#: The one function a file may name: it announces a module whose forward upswap rewrote (see `surgery/rewritten_class.py`).
RESTORE = "upswap.surgery.restore"

#: The addresses in files of upswap 0.1, and those they have now; torch.load takes the real object under the name in the file.
FORMER_NAMES = {
    "upswap.carafe.CARAFE": "upswap.nn.CARAFE",
    "upswap.dysample.DySample": "upswap.nn.DySample",
    "upswap.upsamplers.ByChannels": "upswap.nn.ByChannels",
    "upswap.upsamplers.Cascade": "upswap.nn.Cascade",
    "upswap.rewrite._pending": RESTORE,
}

#: Functions that models keep as attributes. Each computes a tensor from tensors and does nothing else; yet sealed too.
FUNCTIONS = frozenset(
    {
        "timm.layers.activations.gelu",
        "torch._C._nn.gelu",
        "torch.nn.functional.interpolate",
        "torch.nn.functional.relu",
        "torchvision.models.optical_flow.raft._pass_through_h",
        "torchvision.ops.boxes.box_iou",
    }
)

# Modules that carry code in their state and compile it when they are restored.
_CODE_CARRIERS: tuple[type, ...] = (torch.fx.GraphModule, torch.jit.ScriptModule)

# A class that defines one of these runs code of its own while it is restored; fine for a module, not for plain data. Its
# `__setattr__` is not asked: attributes are put in their places.
_RESTORE_HOOKS = ("__new__", "__setstate__", "__del__", "__getattribute__")

# Bases from Python itself that add no state.
_STATELESS = (object, types.SimpleNamespace, abc.ABC, Generic)

# Each name is looked for and may be imported. A large model has 40.
_MOST_NAMES = 500


def safe_globals(
    names: Collection[str], path: str, trust: Iterable[str] = (), foreign: Foreign | None = None
) -> list[SafeGlobal]:
    """The pairs for `torch.serialization.safe_globals` that let a file use `names`, the globals it asks for.

    A module is imported only where its name lies in `PACKAGES` or in a package named in `trust`: importing runs code.
    The functions of a trusted package are admitted as they are, and so are its classes other than modules. Where `foreign`
    is given, a name that is not admitted gets a stand-in of its, and is no error.

    Raises:
        UntrustedFileError: some names are not admitted; the message lists them and says what would admit them.
        SourceError: a package is not installed, or has no such class (any more).
        OptionError: `trust` holds something that is not a package name, or a part of Python itself.
    """
    trusted = tuple(check_trust(package) for package in trust)
    if len(names) > _MOST_NAMES:
        raise SourceError(f"{path} asks for {len(names)} classes and functions, more than any model has")
    # Setting a state needs the class on the list too. A newline ends a name inside a pickle: no file can spell these.
    pairs: list[SafeGlobal] = [
        (Blank, "\nblank"),
        (BlankNamespace, "\nnamespace"),
        (Apart, "\napart"),
        (Opaque, "\nopaque"),
    ]
    refused: dict[str, str] = {}
    for name in sorted(names):
        if FORMER_NAMES.get(name, name) == RESTORE:
            pairs.append((_restore_rewritten, name))
            continue
        form = form_of(name)
        if form is not None:
            pairs.append(form)
            continue
        try:
            found = _resolve(FORMER_NAMES.get(name, name), path, trusted)
        except (_Refused, SourceError) as reason:
            if foreign is not None:
                pairs.append(foreign.stand_in(name))
            elif isinstance(reason, SourceError):
                raise
            else:
                refused[name] = str(reason)
            continue
        if inside(name, trusted):
            pairs.append((seal(found, trusted=True) if _is_made_later(found) else found, name))
        else:
            pairs.append((seal(found) if isinstance(found, type) else SealedFunction(found), name))
    if refused:
        raise UntrustedFileError(*_refusal(refused, path), names=refused)
    return pairs


def restoring(pairs: Iterable[SafeGlobal]) -> set[str]:
    """The names in `safe_globals` whose classes run code of their own on the state that a file gives their instances."""
    found = dict(pair[::-1] for pair in pairs if isinstance(pair, tuple))
    return {
        name
        for name, made in found.items()
        if made is _restore_rewritten
        or (isinstance(made, Sealed) and _setstate(made.original) not in (None, torch.nn.Module.__setstate__))
    }


def _setstate(cls: type) -> Any:
    return getattr(cls, "__setstate__", None)


class _Refused(Exception):
    """A name is not admitted; the text is the reason."""


def _restore_rewritten(original: Any, record: Any) -> Any:
    """`surgery.restore` for a stranger's file: a blank of the class before, to be rewritten once all is judged."""
    if type(record) is not dict:
        raise UntrustedFileError("it describes a rewritten module in a form upswap does not write")
    return blank(original.original if isinstance(original, Sealed) else original, record)


def _is_made_later(found: Any) -> bool:
    """Whether instances of a trusted class are made as those of other classes are: those of modules and dicts without code
    for it of their own, and the members of enumerations, which the whole process shares.
    """
    if not isinstance(found, type):
        return False
    if issubclass(found, enum.Enum):
        return True
    own = ("__new__", "__reduce__", "__reduce_ex__")
    if issubclass(found, dict) and found.__new__ is dict.__new__ and not hasattr(found, "__setstate__"):
        return all(getattr(found, name) is getattr(object, name) for name in own[1:])
    plain = all(getattr(found, name) is getattr(object, name) for name in own)
    return plain and issubclass(found, torch.nn.Module) and blank_for(found) is Blank


def check_names(sites: Iterable[Mapping[str, Any]]) -> None:
    """`UntrustedFileError` unless the upsampler names in a file's sites are names.

    The graph route makes source code with these names in it, so one that is no identifier could be code.
    """
    for site in sites:
        module = site.get("module")
        if module is None:
            continue
        child = module.rpartition(".")[2] if isinstance(module, str) else ""
        # On the module route the upsampler takes the owner's own place, which may be called anything.
        if not child.isidentifier() and not (child and site.get("op") == "module" and module == site.get("owner")):
            raise UntrustedFileError(f"it names an upsampler {brief(module)}, which upswap would not")


def check_values(description: Any, modules: Iterable[str]) -> None:
    """`UntrustedFileError` where a description of a forward's arguments (`inputs.describe`) names more than data.

    Those are built when a forward is traced, and the forward calls methods on them. So instances have to be plain data of
    the packages upswap knows, or of those that the model's own `modules` are in.
    """
    packages = {name.partition(".")[0] for name in (*PACKAGES, *modules)}
    queue, seen = [description], set()
    while queue:
        value = queue.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, Mapping):
            dtype, instance = value.get("dtype"), value.get("instance")
            if isinstance(dtype, str) and not isinstance(vars(torch).get(dtype), torch.dtype):
                raise UntrustedFileError(
                    f"it describes a tensor of the dtype {dtype[:80]!r}, which torch does not have"
                )
            if isinstance(instance, list | tuple) and not _is_known_data(instance, packages):
                raise UntrustedFileError(f"it describes an argument of the class {brief(instance[:2])}")
            queue += value.values()
        elif isinstance(value, list | tuple):
            queue += value


def _is_known_data(instance: Any, packages: Iterable[str]) -> bool:
    """Whether `[module, name, fields]` names a class that is loaded, without asking its module, which could import more."""
    module, name = (*instance, None, None)[:2]
    if not (isinstance(module, str) and isinstance(name, str) and inside(module, packages)):
        return False
    found: Any = sys.modules.get(module)
    for part in name.split("."):
        found = vars(found).get(part) if isinstance(found, type | types.ModuleType) else None
    fields = isinstance(found, type) and (dataclasses.is_dataclass(found) or _is_value(found))
    return fields and not any("__del__" in vars(base) for base in found.__mro__)


def _resolve(name: str, path: str, trusted: tuple[str, ...]) -> Any:
    """The class (or, from `FUNCTIONS`, the function) of that name, or `_Refused` with the reason."""
    if name in NAMESPACES:
        return NAMESPACES[name]
    module_name = name.rpartition(".")[0]
    if not inside(name, (*PACKAGES, *trusted)) and module_name not in VALUES and name not in FUNCTIONS:
        raise _Refused("not in a package upswap knows")
    if not (name.isascii() and all(part.isidentifier() for part in name.split("."))):
        raise _Refused("not a name")
    found = _imported(name, path, trusted)
    if name in FUNCTIONS and callable(found):
        return found
    defined_in = getattr(found, "__module__", None) or ""
    if name not in UPSAMPLERS and not inside(defined_in, (*PACKAGES, *VALUES, *trusted)):
        raise _Refused("defined elsewhere, only passing through this module")
    if not inside(name, trusted):
        _check_class(found, is_value=module_name in VALUES)
    return found


def _imported(name: str, path: str, trusted: tuple[str, ...]) -> Any:
    """What has that name in its module, which is imported; one of `trusted` may be in the current folder. `SourceError` where
    one of them is not there."""
    module_name, _, attribute = name.rpartition(".")
    top = name.partition(".")[0]
    try:
        module = import_own(module_name, path) if inside(name, trusted) else importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name == top:
            raise missing_package(top, path) from error
        raise SourceError(_moved(name, path)) from error
    except ImportError as error:
        raise SourceError(f"{path} needs {name}, and importing {module_name} fails: {error}") from error
    # The module's own names only: a module-level __getattr__ could import more. upswap's own imports these four so.
    found = getattr(module, attribute) if name in UPSAMPLERS else vars(module).get(attribute)
    if found is None:
        raise SourceError(_moved(name, path))
    return found


def _check_class(found: Any, *, is_value: bool) -> None:
    """`_Refused` for what no model has in a file, unless its package is trusted.

    `is_value` says that it comes from a package whose enumerations and named tuples alone are admitted.
    """
    if not isinstance(found, type):
        raise _Refused("a function, and only classes are admitted")
    if issubclass(found, _CODE_CARRIERS):
        raise _Refused("carries code of its own")
    if any("__del__" in vars(base) for base in found.__mro__):
        raise _Refused("runs code of its own when it is thrown away")
    if is_value and not (_is_value(found) or issubclass(found, types.SimpleNamespace)):
        raise _Refused("more than a plain value")
    if not _is_data(found) and not issubclass(found, torch.nn.Module):
        raise _Refused("neither a module nor plain data")
    if not _is_value(found) and blank_for(found) is None and not has_slots(found):
        raise _Refused("has a memory layout of its own")


def _is_value(cls: type) -> bool:
    """Whether `cls` is an enumeration or a named tuple."""
    return issubclass(cls, enum.Enum) or (issubclass(cls, tuple) and hasattr(cls, "_fields"))


def _is_data(cls: type) -> bool:
    """Whether instances of `cls` can be restored without running code of the class."""
    if _is_value(cls):
        return True
    own = [base for base in cls.__mro__ if base not in _STATELESS]
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


def _refusal(refused: Mapping[str, str], path: str) -> list[str]:
    lines = [f"{path} needs code that upswap does not load from a file:"]
    lines += [f"  {one_line(name, 300)}: {reason}" for name, reason in list(refused.items())[:20]]
    if len(refused) > 20:
        lines.append(f"  and {len(refused) - 20} more")
    advice = trust_advice(refused)
    lines += advice
    if not advice or not all(map(_is_own, refused)):
        lines.append(
            "Nothing was run. With the rest a file could do anything. If you know who made it and why it holds that, "
            "build the model in Python or from a spec instead, and load its weights"
        )
    return lines


def own_packages(names: Iterable[str]) -> list[str]:
    """The packages of `names` that could be somebody's own."""
    return sorted({name.partition(".")[0] for name in names if _is_own(name)})


def trust_advice(names: Iterable[str]) -> list[str]:
    """The line that says how to trust the packages of `names`, of those that could be somebody's own."""
    own = own_packages(list(names)[:20])
    if not own:
        return []
    flags = " ".join(f"--trust {package}" for package in own)
    quoted = ", ".join(f'"{package}"' for package in own)
    return [f"Where these are packages of your own, or ones you trust: {flags} (in Python: trust=[{quoted}])"]


def _is_own(name: str) -> bool:
    package = name.partition(".")[0]
    known = package in sys.stdlib_module_names or _inside_known(package)
    return bool(name.count(".")) and package.isidentifier() and not known


def _inside_known(package: str) -> bool:
    return package in {known.partition(".")[0] for known in PACKAGES}
