"""From what a user can write in a shell, a path or a spec, to a model.

    unet.pt                                             a file, loaded by `checkpoint.load`
    smp:unet?encoder_name=resnet34&classes=3            segmentation_models_pytorch.create_model
    timm:hrnet_w18?features_only=True                   timm.create_model
    torchvision:fasterrcnn_resnet50_fpn                 torchvision.models.get_model

What follows the `?` are keyword arguments: Python literals, or strings where they are none. Models are built without
pretrained weights unless the spec asks for them, so no spec downloads anything by itself.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import functools
import importlib
import inspect
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import quote, unquote

from torch import nn

from .errors import PlanError, SourceError, UntrustedFileError
from .trust import missing_package

_LATER = {"hf": "a transformers model folder", "python": "a factory of your own"}


@dataclasses.dataclass(frozen=True)
class Source:
    """A model and where it came from: the spec that built it, or the file it was read from."""

    model: nn.Module
    spec: str | None
    path: Path | None
    example_inputs: Any = None


@dataclasses.dataclass(frozen=True)
class Spec:
    """`scheme:name?key=value&key=value`, taken apart."""

    scheme: str
    name: str
    options: Mapping[str, Any]

    def __str__(self) -> str:
        query = "&".join(f"{key}={_write(value)}" for key, value in self.options.items())
        return f"{self.scheme}:{self.name}" + (f"?{query}" if query else "")


def open_source(text: str, *, trust: Iterable[str] = (), weights: str | Path | None = None) -> Source:
    """The model that a path or a spec leads to, with the weights of a state-dict file where one is given.

    Raises:
        SourceError: there is no such file, package, architecture or option; near names are listed.
        UntrustedFileError: the file needs code outside the allow-list.
    """
    from . import checkpoint

    spec = parse(text)
    if spec is not None:
        source = Source(build(spec), str(spec), None)
    else:
        path = Path(text)
        model = checkpoint.load(path, trust=trust)
        source = Source(model, None, path)
    if weights is not None:
        checkpoint.load_weights(source.model, weights)
    return source


def parse(text: str) -> Spec | None:
    """The spec written in `text`, None where it is a path.

    >>> parse("smp:unet?encoder_name=resnet18&classes=3")
    Spec(scheme='smp', name='unet', options={'encoder_name': 'resnet18', 'classes': 3})
    >>> parse("models/unet.pt") is None
    True
    """
    scheme, colon, rest = text.partition(":")
    if not colon or Path(text).exists():
        return None
    if scheme in _LATER:
        raise SourceError(
            f"{scheme}: ({_LATER[scheme]}) cannot be named here yet. Build the model in Python and call "
            "upswap.patch(model), or torch.save(model, 'model.pt') and name that file"
        )
    if scheme not in _BUILDERS:
        if not scheme.isalpha() or len(scheme) == 1:
            return None
        raise SourceError(f"{text!r} is no file, and {scheme}: is none of {', '.join(f'{s}:' for s in _BUILDERS)}")
    name, _, query = rest.partition("?")
    if not name:
        raise SourceError(f"{text!r} names no architecture; write for example smp:unet?encoder_name=resnet34&classes=3")
    options: dict[str, Any] = {}
    for part in filter(None, query.split("&")):
        key, equals, value = part.partition("=")
        if not equals or not key.isidentifier():
            raise SourceError(f"{part!r} in {text!r} is not of the form key=value")
        if key in options:
            raise SourceError(f"{key} is given twice in {text!r}")
        options[key] = _read(unquote(value))
    return Spec(scheme, name, options)


def build(spec: Spec) -> nn.Module:
    """A new model of that architecture; `SourceError` names what is wrong with a spec no library can build."""
    return _BUILDERS[spec.scheme](spec)


def rebuild(text: str, path: str) -> nn.Module:
    """The architecture that a file's header names, without weights.

    A header is a stranger's text: it may name an architecture and its sizes, nothing to be fetched from elsewhere.

    Raises:
        UntrustedFileError: the spec would read other files or the network.
        SourceError: as `build`.
    """
    spec = parse(text)
    if spec is None:
        raise SourceError(f"{path} says that its model is {text!r}, which is not a spec; pass model=")
    values = [spec.name, *(value for value in spec.options.values() if isinstance(value, str))]
    outside = next((value for value in values if ":" in value or "/" in value or "\\" in value), None)
    if outside is not None or any(spec.options.get(key) for key in _DOWNLOADS):
        raise UntrustedFileError(
            f"{path} names the architecture {text!r}, which would be fetched from elsewhere. If you trust it, build it "
            "yourself and pass it: upswap.load(path, model)"
        )
    return build(spec)


def spec_of(model: nn.Module) -> str | None:
    """A spec that rebuilds the architecture of a model, patched or not; None where there is none that surely does.

    The models of SMP know the options they were made with, except those that are no plain data, and may have been
    changed since. So the spec is tried: what it builds has to have the same modules.
    """
    config = getattr(model, "_hub_mixin_config", None)
    if not isinstance(config, dict) or not any(
        _package(cls) == "segmentation_models_pytorch" for cls in type(model).__mro__
    ):
        return None
    import segmentation_models_pytorch as smp

    names = {cls: name for name, cls in smp.MODEL_ARCHITECTURES_MAPPING.items()}
    name = next((names[cls] for cls in type(model).__mro__ if cls in names), None)
    options = {key: value for key, value in config.items() if key != "encoder_weights" and value is not None}
    if name is None or not all(_read(_text(value)) == value for value in options.values()):
        return None
    spec = Spec("smp", name, options)
    try:
        return str(spec) if _same_modules(model, build(spec)) else None
    except SourceError:
        return None


def _same_modules(model: nn.Module, rebuilt: nn.Module) -> bool:
    """Whether `model`, leaving upsamplers aside, has the modules of `rebuilt`: names, classes, settings."""
    from .api import plan_of

    try:
        added = {site.module: site.op for site in plan_of(model).swapped}
    except PlanError:
        added = {}
    # The module route put an upsampler in the place of an nn.Upsample; the others added one.
    inside = tuple(f"{path}." for path in added)
    own = {name: module for name, module in model.named_modules() if not name.startswith(inside)}
    for name, module in rebuilt.named_modules():
        mine = own.pop(name, None)
        if mine is None:
            return False
        if name not in added and not (isinstance(mine, type(module)) and mine.extra_repr() == module.extra_repr()):
            return False
    shapes = {key: tensor.shape for key, tensor in model.state_dict().items() if not key.startswith(inside)}
    return all(name in added for name in own) and shapes == {k: t.shape for k, t in rebuilt.state_dict().items()}


def _package(cls: type) -> str:
    return cls.__module__.partition(".")[0]


#: Options that make a library fetch weights.
_DOWNLOADS = ("encoder_weights", "weights", "weights_backbone", "pretrained", "pretrained_cfg", "checkpoint_path")


def _smp(spec: Spec) -> nn.Module:
    smp = _import("segmentation_models_pytorch", spec)
    name = spec.name.lower()
    if name not in smp.MODEL_ARCHITECTURES_MAPPING:
        raise _unknown(spec, "architecture", spec.name, smp.MODEL_ARCHITECTURES_MAPPING)
    _check_smp_options(spec, smp.create_model, smp.MODEL_ARCHITECTURES_MAPPING[name])
    try:
        return _call(spec, smp.create_model, name, **{"encoder_weights": None, **spec.options})
    except SourceError:
        # Only asked afterwards: SMP takes more names than it lists (aliases of encoders that moved to timm).
        encoder = spec.options.get("encoder_name")
        if isinstance(encoder, str) and not encoder.startswith("tu-") and encoder not in smp.encoders.encoders:
            raise _unknown(spec, "encoder", encoder, smp.encoders.encoders, " (or tu-NAME, of timm)") from None
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
            raise _unknown(spec, "option", option, known)


def _timm(spec: Spec) -> nn.Module:
    timm = _import("timm", spec)
    # "hf-hub:..." and the like are timm's own way to name what is not in its list.
    if ":" not in spec.name and not timm.is_model(spec.name.partition(".")[0]):
        raise _unknown(spec, "model", spec.name, timm.list_models())
    return _call(spec, timm.create_model, spec.name, **spec.options)


def _torchvision(spec: Spec) -> nn.Module:
    models = _import("torchvision.models", spec)
    name = spec.name.lower()
    if name not in models.list_models():
        raise _unknown(spec, "model", spec.name, models.list_models())
    # Detection and segmentation builders fetch a backbone unless told not to.
    parameters = inspect.signature(models.get_model_builder(name)).parameters
    no_backbone = {"weights_backbone": None} if "weights_backbone" in parameters else {}
    options = {"weights": None, **no_backbone, **spec.options}
    odd = [option for option in spec.options if option not in parameters]
    if odd and _drops_options(functools.partial(models.get_model, name, **options)):
        raise _unknown(spec, "option", odd[0], [p for p in parameters if p != "kwargs"])
    return _call(spec, models.get_model, name, **options)


def _drops_options(make: Callable[..., Any]) -> bool:
    """Whether a builder ignores options it does not know, as some of torchvision's do: it takes an impossible one."""
    try:
        make(no_model_has_this_option=None)
    except Exception:  # noqa: BLE001 - raising anything is what shows that it does not
        return False
    return True


_BUILDERS: dict[str, Callable[[Spec], nn.Module]] = {"smp": _smp, "timm": _timm, "torchvision": _torchvision}


def _import(module: str, spec: Spec) -> ModuleType:
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


def _call(spec: Spec, function: Callable[..., Any], *args: Any, **kwargs: Any) -> nn.Module:
    try:
        model = function(*args, **kwargs)
    except Exception as error:  # a library's constructor; whatever it raises is about the spec
        raise SourceError(f"{spec} cannot be built: {_first_line(error)}") from error
    if not isinstance(model, nn.Module):
        raise SourceError(f"{spec} leads to a {type(model).__name__}, which is not a torch.nn.Module")
    return model


def _unknown(spec: Spec, what: str, name: str, known: Iterable[str], more: str = "") -> SourceError:
    names = sorted(known)
    lower = {n.lower(): n for n in names}
    near = [lower[n] for n in difflib.get_close_matches(name.lower(), lower, n=5, cutoff=0.5)]
    listed = (
        f"near it: {', '.join(near)}"
        if near
        else f"there are: {', '.join(names[:20])}{', ...' if len(names) > 20 else ''}"
    )
    return SourceError(f"{spec}: there is no {what} {name!r}; {listed}{more}")


def _read(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return text


def _text(value: Any) -> str:
    return value if isinstance(value, str) else repr(value)


def _write(value: Any) -> str:
    text = _text(value)
    if isinstance(value, str) and _read(value) != value:
        text = repr(value)  # a string that would read as something else, '3'
    return quote(text.replace(", ", ","), safe="()[]{}'\",:./-_")


def _first_line(error: Exception) -> str:
    text = str(error).strip() or "no message"
    return f"{type(error).__name__}: {text.splitlines()[0]}"
