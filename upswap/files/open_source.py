"""Any source a user may name, opened: a file, a folder or a spec."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path

from torch import nn

from ..architectures.libraries import build
from ..architectures.spec import parse
from ..errors import SourceError
from ..shown import errors_shown
from . import checkpoint
from .formats import folder as own_folder
from .formats import host_folder as hub
from .safety.judgement import check_parts


@dataclasses.dataclass(frozen=True)
class Source:
    """A model and where it came from: the spec that built it, or the file or folder it was read from."""

    model: nn.Module
    spec: str | None
    path: Path | None


@errors_shown()
def open_source(text: str, *, trust: Iterable[str] = (), weights: str | Path | None = None) -> Source:
    """The model that a path or a spec leads to, with the weights of a state-dict file where one is given.

    Raises:
        SourceError: there is no such file, package, architecture or option; near names are listed.
        UntrustedFileError: the file needs code outside the allow-list.
    """
    spec = parse(text)
    if spec is None:
        source = Source(checkpoint.load(text, trust=trust), None, Path(text))
    elif spec.scheme == "hf":
        if spec.options:
            raise SourceError(f"{spec}: a folder takes no options; they are in its config.json")
        folder = Path(spec.name).expanduser()
        own_folder.finish_save(folder)  # the host would open files of two saves, and not see it
        source = Source(check_parts(hub.open_folder(folder), str(folder)), str(spec), folder)
    else:
        source = Source(build(spec), str(spec), None)
    if weights is not None:
        checkpoint.load_weights(source.model, weights)
    return source
