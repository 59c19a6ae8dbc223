"""Architectures by name: specs of segmentation_models_pytorch, timm and torchvision, and factories of one's own.

Models are built without pretrained weights unless the spec asks for them, so no spec downloads anything by itself.
"""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from ..errors import SourceError
from .packages import first_line, import_for, import_own, in_current_folder
from .spec import Spec

#: Options that make a library fetch weights.
DOWNLOADS = ("encoder_weights", "weights", "weights_backbone", "pretrained", "pretrained_cfg", "checkpoint_path")


def _smp(spec: Spec) -> nn.Module:
    smp = import_for("segmentation_models_pytorch", spec)
    name = spec.name.lower()
    if name not in smp.MODEL_ARCHITECTURES_MAPPING:
        raise unknown(spec, "architecture", spec.name, smp.MODEL_ARCHITECTURES_MAPPING)
    _check_smp_options(spec, smp.create_model, smp.MODEL_ARCHITECTURES_MAPPING[name])
    try:
        return call(spec, smp.create_model, name, **{"encoder_weights": None, **spec.options})
    except SourceError:
        # Only asked afterwards: SMP takes more names than it lists (aliases of encoders that moved to timm).
        encoder = spec.options.get("encoder_name")
        if isinstance(encoder, str) and not encoder.startswith("tu-") and encoder not in smp.encoders.encoders:
            raise unknown(spec, "encoder", encoder, smp.encoders.encoders, " (or tu-NAME, of timm)") from None
        raise


def _check_smp_options(spec: Spec, *functions: Callable[..., Any]) -> None:
    """SMP hands options it does not know to the encoder, most of which ignore them: a misspelt one would be lost."""
    if str(spec.options.get("encoder_name", "")).startswith("tu-"):
        return  # timm takes more options, and raises on those it does not know
    parameters = {p.name: p.kind for function in functions for p in inspect.signature(function).parameters.values()}
    known = [
        name
        for name, kind in parameters.items()
        if kind not in (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    ]
    known = [name for name in known if name not in ("self", "arch")]
    for option in spec.options:
        if option not in known:
            raise unknown(spec, "option", option, known)


def _timm(spec: Spec) -> nn.Module:
    timm = import_for("timm", spec)
    # "hf-hub:..." and the like are timm's own way to name what is not in its list.
    if ":" not in spec.name and not timm.is_model(spec.name.partition(".")[0]):
        raise unknown(spec, "model", spec.name, timm.list_models())
    return call(spec, timm.create_model, spec.name, **spec.options)


def _torchvision(spec: Spec) -> nn.Module:
    models = import_for("torchvision.models", spec)
    name = spec.name.lower()
    if name not in models.list_models():
        raise unknown(spec, "model", spec.name, models.list_models())
    # Detection and segmentation builders fetch a backbone unless told not to.
    parameters = inspect.signature(models.get_model_builder(name)).parameters
    no_backbone = {"weights_backbone": None} if "weights_backbone" in parameters else {}
    options = {"weights": None, **no_backbone, **spec.options}
    odd = [option for option in spec.options if option not in parameters]
    if odd and _drops_options(functools.partial(models.get_model, name, **options)):
        raise unknown(spec, "option", odd[0], [p for p in parameters if p != "kwargs"])
    return call(spec, models.get_model, name, **options)


def _drops_options(make: Callable[..., Any]) -> bool:
    """Whether a builder ignores options it does not know, as some of torchvision's do: it takes an impossible one."""
    try:
        make(no_model_has_this_option=None)
    except Exception:  # noqa: BLE001 - raising anything is what shows that it does not
        return False
    return True


def _python(spec: Spec) -> nn.Module:
    """`python:package.module:factory`: code of the user's own, found as `python -m` finds it, from the current folder on."""
    module_name, _, path = spec.name.partition(":")
    if not path or not all(part.isidentifier() for part in (*module_name.split("."), *path.split("."))):
        raise SourceError(f"{spec} is not of the form python:package.module:factory")
    found: Any = import_own(module_name, str(spec))
    for part in path.split("."):
        if not hasattr(found, part):
            raise unknown(spec, "name", part, [name for name in dir(found) if not name.startswith("_")])
        found = getattr(found, part)
    if isinstance(found, nn.Module) and not spec.options:
        return found
    if not callable(found):
        raise SourceError(f"{spec} leads to a {type(found).__name__}, which is neither a factory nor a torch.nn.Module")
    with in_current_folder(module_name):  # a factory may import what it needs when it is called
        return call(spec, found, **spec.options)


_BUILDERS: dict[str, Callable[[Spec], nn.Module]] = {
    "smp": _smp,
    "timm": _timm,
    "torchvision": _torchvision,
    "python": _python,
}


def build(spec: Spec) -> nn.Module:
    """A new model of that architecture; `SourceError` names what is wrong with a spec no library can build."""
    return _BUILDERS[spec.scheme](spec)


def call(spec: Spec, function: Callable[..., Any], *args: Any, **kwargs: Any) -> nn.Module:
    """The model that a factory makes, or `SourceError` with what it raised."""
    try:
        model = function(*args, **kwargs)
    except Exception as error:  # a library's constructor; whatever it raises is about the spec
        raise SourceError(f"{spec} cannot be built: {first_line(error)}") from error
    if not isinstance(model, nn.Module):
        raise SourceError(f"{spec} leads to a {type(model).__name__}, which is not a torch.nn.Module")
    return model


def unknown(spec: Spec, what: str, name: str, known: Iterable[str], more: str = "") -> SourceError:
    """The error for a name that is not there, with those near it."""
    names = sorted(known)
    lower = {n.lower(): n for n in names}
    near = [lower[n] for n in difflib.get_close_matches(name.lower(), lower, n=5, cutoff=0.5)]
    listed = (
        f"near it: {', '.join(near)}"
        if near
        else f"there are: {', '.join(names[:20])}{', ...' if len(names) > 20 else ''}"
    )
    return SourceError(f"{spec}: there is no {what} {name!r}; {listed}{more}")
