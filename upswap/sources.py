"""From what a user can write in a shell, a path or a spec, to a model.

unet.pt                                             a file, loaded by `checkpoint.load`
smp:unet?encoder_name=resnet34&classes=3            segmentation_models_pytorch.create_model
timm:hrnet_w18?features_only=True                   timm.create_model
torchvision:fasterrcnn_resnet50_fpn                 torchvision.models.get_model
hf:FOLDER                                           a model folder of transformers or SMP, with its weights
python:package.module:factory?width=32              code of one's own
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import nn
from torch.utils import _pytree as pytree

from . import hub
from .builders import DOWNLOADS, build
from .errors import PlanError, SourceError, UntrustedFileError
from .rewrite import plan_of
from .sealed import inside
from .spec import Spec, parse, read_value, text_of
from .trust import check_trust


@dataclasses.dataclass(frozen=True)
class Source:
    """A model and where it came from: the spec that built it, or the file or folder it was read from."""

    model: nn.Module
    spec: str | None
    path: Path | None


def open_source(text: str, *, trust: Iterable[str] = (), weights: str | Path | None = None) -> Source:
    """The model that a path or a spec leads to, with the weights of a state-dict file where one is given.

    Raises:
        SourceError: there is no such file, package, architecture or option; near names are listed.
        UntrustedFileError: the file needs code outside the allow-list.
    """
    from . import checkpoint

    spec = parse(text)
    if spec is None:
        source = Source(checkpoint.load(text, trust=trust), None, Path(text))
    elif spec.scheme == "hf":
        if spec.options:
            raise SourceError(f"{spec}: a folder takes no options; they are in its config.json")
        folder = Path(spec.name).expanduser()
        source = Source(hub.open_folder(folder), str(spec), folder)
    else:
        source = Source(build(spec), str(spec), None)
    if weights is not None:
        checkpoint.load_weights(source.model, weights)
    return source


def path_of(source: str | Path) -> Path | None:
    """The file or folder that a path or spec reads, None where it reads none."""
    spec = parse(source) if isinstance(source, str) else None
    if spec is None:
        return Path(source)
    return Path(spec.name).expanduser() if spec.scheme == "hf" else None


def rebuilds(text: Any, trust: Iterable[str] = ()) -> bool:
    """Whether what a header says of its source is a spec that `rebuild` builds with this `trust`."""
    spec = parse(text) if isinstance(text, str) else None
    if spec is None or spec.scheme == "hf":
        return False
    return spec.scheme != "python" or inside(package_of(spec), tuple(trust))


def package_of(spec: Spec) -> str:
    """The package whose code a `python:` spec runs."""
    return spec.name.partition(":")[0]


def rebuild(text: str, path: str, trust: Iterable[str] = ()) -> nn.Module:
    """The architecture that a file's header names, without weights.

    A header is a stranger's text: it may name an architecture and its sizes, nothing to be fetched from elsewhere, and
    code only of packages named in `trust`.

    Raises:
        UntrustedFileError: the spec would read other files or the network, or run code that is not trusted.
        SourceError: as `build`.
    """
    spec = parse(text)
    if spec is None or spec.scheme == "hf":
        raise SourceError(f"{path} says that its model is {text!r}, which cannot be built from here; pass model=")
    if spec.scheme == "python":
        package = package_of(spec)
        if not inside(package, [check_trust(name) for name in trust]):
            top = package.partition(".")[0]
            raise UntrustedFileError(
                f"{path} names a factory in the package {top}, {text!r}. If you trust that package: --trust {top} "
                f'(in Python: trust=["{top}"]), or pass the model: upswap.load(path, model)'
            )
        return build(spec)
    values = [spec.name, *pytree.tree_leaves(dict(spec.options))]
    outside = next((v for v in values if isinstance(v, str) and (":" in v or "/" in v or "\\" in v)), None)
    if outside is not None or any(spec.options.get(key) for key in DOWNLOADS):
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
    if name is None or not all(read_value(text_of(value)) == value for value in options.values()):
        return None
    spec = Spec("smp", name, options)
    try:
        return str(spec) if same_modules(model, build(spec)) else None
    except SourceError:
        return None


def same_modules(model: nn.Module, rebuilt: nn.Module) -> bool:
    """Whether `model`, leaving upsamplers aside, has the modules of `rebuilt`: names, classes, settings."""
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
