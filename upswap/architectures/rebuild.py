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
from typing import Any

from torch import nn
from torch.utils import _pytree as pytree

from ..errors import SourceError, UntrustedFileError
from .libraries import DOWNLOADS, build
from .packages import check_trust, inside
from .spec import Spec, package_of, parse_stored


def rebuilds(text: Any, trust: Iterable[str] = ()) -> bool:
    """Whether what a header says of its source is a spec that `rebuild` builds with this `trust`."""
    spec = parse_stored(text) if isinstance(text, str) else None
    if spec is None or spec.scheme == "hf":
        return False
    return spec.scheme != "python" or inside(package_of(spec), tuple(trust))


def stored_spec(spec: Spec) -> Spec | None:
    """What a file says of a model made from `spec`: the weights are in the file. None where `rebuild` would refuse it."""
    kept = spec
    if spec.scheme != "python":
        options = {key: value for key, value in spec.options.items() if not (key in DOWNLOADS and value)}
        kept = dataclasses.replace(spec, options=options)
    return None if _is_fetched(kept) else kept


def _is_fetched(spec: Spec) -> bool:
    """Whether a library would build the architecture with files from elsewhere, or what it takes for their names."""
    if spec.scheme == "python":
        return False
    values = [spec.name, *pytree.tree_leaves(dict(spec.options))]
    outside = any(isinstance(value, str) and any(mark in value for mark in ":/\\") for value in values)
    return outside or any(spec.options.get(key) for key in DOWNLOADS)


def rebuild(text: str, path: str, trust: Iterable[str] = ()) -> nn.Module:
    """The architecture that a file's header names, without weights.

    A header is a stranger's text: it may name an architecture and its sizes, nothing to be fetched from elsewhere, and
    code only of packages named in `trust`.

    Raises:
        UntrustedFileError: the spec would read other files or the network, or run code that is not trusted.
        SourceError: as `build`.
    """
    spec = parse_stored(text)
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
    if _is_fetched(spec):
        raise UntrustedFileError(
            f"{path} names the architecture {text!r}, which would be fetched from elsewhere. If you trust it, build it "
            "yourself and pass it: upswap.load(path, model)"
        )
    return build(spec)
