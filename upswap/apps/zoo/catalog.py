"""Which models a run is about: the sources that names and patterns select in a library's own list."""

from __future__ import annotations

import contextlib
import fnmatch
import importlib
import inspect
import os
import re
import unicodedata
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ...architectures.packages import import_for
from ...architectures.spec import Spec, path_of
from ...errors import FilterError, SaveError, SourceError

# torchvision's model packages that make maps larger; its classifiers do not.
_TORCHVISION = ("torchvision.models.detection", "torchvision.models.segmentation", "torchvision.models.optical_flow")

_RESIZES = re.compile(r"interpolate|[Uu]psample|UpSample|resize")


def smp(archs: str, encoders: str, options: Mapping[str, Any]) -> list[str]:
    """SMP's architectures on encoders, by comma-separated patterns; `tu-` patterns look in timm's list."""
    library = import_for("segmentation_models_pytorch", Spec("smp", "unet", {}))
    chosen = _matching(archs, list(library.MODEL_ARCHITECTURES_MAPPING), "architecture of SMP")
    names = list(library.encoders.encoders)
    if any(pattern.strip().startswith("tu-") for pattern in encoders.split(",")):
        timm = import_for("timm", Spec("timm", "resnet18", {}))
        names += [f"tu-{name}" for name in timm.list_models()]
    backbones = _matching(encoders, names, "encoder of SMP")
    return [str(Spec("smp", arch, {"encoder_name": encoder, **options})) for arch in chosen for encoder in backbones]


def timm(match: str, options: Mapping[str, Any]) -> list[str]:
    """timm's models whose code resizes anything, by comma-separated patterns."""
    library = import_for("timm", Spec("timm", "resnet18", {}))
    resizing = [name for name in library.list_models() if _resizes(library.model_entrypoint(name).__module__)]
    return [str(Spec("timm", name, options)) for name in _matching(match, resizing, "model of timm that resizes")]


def torchvision(match: str, options: Mapping[str, Any]) -> list[str]:
    """torchvision's detection, segmentation and optical flow models, by comma-separated patterns."""
    library = import_for("torchvision.models", Spec("torchvision", "fcn_resnet50", {}))
    names = [
        name for name in library.list_models() if library.get_model_builder(name).__module__.startswith(_TORCHVISION)
    ]
    chosen = _matching(match, names, "detection, segmentation or flow model of torchvision")
    return [str(Spec("torchvision", name, options)) for name in chosen]


def listed(path: Path) -> list[str]:
    """The sources in a text file, one a line; empty lines and those that begin with # are comments."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise SourceError(f"{path} cannot be read as a list of sources: {error}") from error
    sources = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
    if not sources:
        raise SourceError(f"{path} lists no sources; write a file or a spec a line")
    return list(dict.fromkeys(sources))


def targets(
    sources: Iterable[str], folder: Path, suffix: str, claimed: Mapping[str, str] | None = None
) -> dict[str, Path]:
    """A file for every source, readable and one for each: the one it has in `claimed`, by name, or one that nothing has.

    >>> targets(["smp:unet?encoder_name=resnet18", "a/unet.pt", "b/unet.pt"], Path("out"), ".pt").values()
    dict_values([PosixPath('out/smp-unet-resnet18.pt'), PosixPath('out/unet.pt'), PosixPath('out/unet-2.pt')])

    Raises:
        SaveError: a file would be written over one of the sources.
    """
    sources, made = list(sources), dict(claimed or {})
    taken = {_one_name(name) for name in made.values()}
    counts: dict[str, int] = {}
    for source in sources:
        name = stem = _file_name(source)
        while source not in made:
            counts[stem] = counts.get(stem, 0) + 1
            name = f"{stem}{'' if counts[stem] == 1 else f'-{counts[stem]}'}{suffix}"
            if _one_name(name) not in taken:
                taken.add(_one_name(name))
                made[source] = name
    found = {source: folder / made[source] for source in sources}
    _check_sources(found)
    return found


def _one_name(name: str) -> str:
    """What names have in common that are one file on some system."""
    return unicodedata.normalize("NFC", name).casefold()


def _check_sources(targets: Mapping[str, Path]) -> None:
    read: dict[object, str] = {}
    for source in targets:
        with contextlib.suppress(SourceError, OSError):  # one that cannot be read is told of in its row
            path = path_of(source)
            read |= {} if path is None else dict.fromkeys(_identities(path), source)
    for source, target in targets.items():
        for identity in _identities(target) & read.keys():
            raise SaveError(
                f"{target}, the file for {source}, is a source of this run as well: {read[identity]}. "
                "Name another folder with -o"
            )


def _identities(path: Path) -> set[object]:
    """What tells a file by any of its names, there or not."""
    found: set[object] = {os.path.realpath(path)}
    with contextlib.suppress(OSError):
        status = os.stat(path)
        found.add((status.st_dev, status.st_ino))
    return found


def _file_name(source: str) -> str:
    if re.match(r"[a-z]{2,}:", source):
        scheme, _, rest = source.partition(":")
        name, _, query = rest.partition("?")
        values = [part.partition("=")[2] if part.startswith("encoder_name=") else part for part in query.split("&")]
        text = "-".join(filter(None, [scheme, name, *values]))
    else:
        path = Path(source)
        text = path.stem if path.suffix in (".pt", ".pth", ".safetensors") else path.name
    return re.sub(r"[^\w.=-]+", "_", text).encode()[:150].decode(errors="ignore") or "model"


def _matching(patterns: str, names: list[str], what: str) -> list[str]:
    """The names that match one of the comma-separated patterns, in the order of the list; each has to match something."""
    found: set[str] = set()
    for pattern in filter(None, (part.strip() for part in patterns.split(","))):
        matches = fnmatch.filter(names, pattern)
        if not matches:
            near = ", ".join(names[:8])
            raise FilterError(f"{pattern!r} matches no {what}; there are {len(names)}: {near}, ...")
        found.update(matches)
    return [name for name in names if name in found]


def _resizes(module: str) -> bool:
    """Whether the source of a module names a resize at all; a model of one that does not has nothing to look at."""
    if module not in _known:
        _known[module] = bool(_RESIZES.search(inspect.getsource(importlib.import_module(module))))
    return _known[module]


_known: dict[str, bool] = {}
