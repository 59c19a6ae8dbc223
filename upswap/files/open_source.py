"""Any source a user may name, opened: a file, a folder or a spec."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path

from torch import nn

from ..architectures.libraries import build
from ..architectures.spec import parse
from ..errors import OptionError, SourceError
from ..shown import errors_shown
from . import checkpoint
from .formats import folder as own_folder
from .formats import host_folder as hub
from .safety.instance_rules import check_parts
from .weights import Weights, load_weights


@dataclasses.dataclass(frozen=True)
class Source:
    """A model and where it came from: the spec that built it, or the file or folder it was read from.

    `taken` says what of that file, where it is not all of it. `weights` are those of the file with weights.
    """

    model: nn.Module
    spec: str | None
    path: Path | None
    taken: str | None = None
    weights: Weights | None = None

    @property
    def said(self) -> str | None:
        """What was taken of which file, None where it was all of one."""
        parts = [f"source: {self.taken}"] if self.taken is not None else []
        parts += [f"weights: {self.weights.taken}"] if self.weights is not None else []
        return "; ".join(parts) or None


@errors_shown()
def open_source(
    text: str,
    *,
    trust: Iterable[str] = (),
    weights: str | Path | None = None,
    key: str | None = None,
    patched: bool = False,
) -> Source:
    """The model that a path or a spec leads to, with the weights of a file where one is given.

    Args:
        text: the path or spec.
        trust: packages whose code the files may use.
        weights: a file with the weights to load into it.
        key: what to take of a checkpoint where several things could be meant: in `weights`, or else in the file `text`.
        patched: whether the caller deals with the weights of upsamplers; they are left out otherwise.

    Raises:
        SourceError: there is no such file, package, architecture or option; near names are listed.
        UntrustedFileError: the file needs code outside the allow-list.
    """
    spec = parse(text)
    trust = (trust,) if isinstance(trust, str) else tuple(trust)
    if spec is None:
        model, taken = checkpoint.load_source(text, trust=trust, key=key if weights is None else None)
        source = Source(model, None, Path(text), taken)
    elif key is not None and weights is None:
        raise OptionError(f"--key (key=) chooses in a file of a training loop, and {spec} is none; leave it out")
    elif spec.scheme == "hf":
        if spec.options:
            raise SourceError(f"{spec}: a folder takes no options; they are in its config.json")
        folder = Path(spec.name).expanduser()
        own_folder.finish_save(folder)  # the host would open files of two saves, and not see it
        if weights is not None:
            model = hub.open_host(folder)[0]  # the upsamplers' are among `weights`
        elif own_folder.has_upsamplers(folder):
            model = own_folder.load(folder, None, trust)
        else:
            model = hub.open_folder(folder)
        source = Source(check_parts(model, str(folder)), str(spec), folder)
    else:
        source = Source(build(spec), str(spec), None)
    if weights is None:
        return source
    loaded = load_weights(source.model, weights, trust=trust, key=key, patched=patched)
    return dataclasses.replace(source, weights=loaded)
