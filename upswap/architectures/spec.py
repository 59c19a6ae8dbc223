"""Models written in a line of text: `smp:unet?encoder_name=resnet34&classes=3`, taken apart and put together again.

What follows the `?` are keyword arguments: Python literals, or strings where they are none.
"""

from __future__ import annotations

import ast
import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

from ..errors import SourceError

SCHEMES = ("smp", "timm", "torchvision", "hf", "python")


@dataclasses.dataclass(frozen=True)
class Spec:
    """`scheme:name?key=value&key=value`, taken apart."""

    scheme: str
    name: str
    options: Mapping[str, Any]

    def __str__(self) -> str:
        query = "&".join(f"{key}={_write(value)}" for key, value in self.options.items())
        return f"{self.scheme}:{self.name}" + (f"?{query}" if query else "")


def parse(text: str) -> Spec | None:
    """The spec written in `text`, which a user gave, None where it is a path: that of a file goes before a spec.

    >>> parse("smp:unet?encoder_name=resnet18&classes=3")
    Spec(scheme='smp', name='unet', options={'encoder_name': 'resnet18', 'classes': 3})
    >>> parse("models/unet.pt") is None
    True
    """
    if os.path.exists(text):  # `Path.exists` raises for a spec that is longer than the name of a file may be
        return None
    spec = parse_stored(text)
    scheme, colon, _ = text.partition(":")
    if spec is None and colon and scheme.isalpha() and len(scheme) > 1:
        raise SourceError(f"{text!r} is no file, and {scheme}: is none of {', '.join(f'{s}:' for s in SCHEMES)}")
    return spec


def parse_stored(text: str) -> Spec | None:
    """The spec in `text`, which a file has of its model, None where it is none. No file is looked for.

    >>> parse_stored("unet.pt") is None
    True
    """
    scheme, colon, rest = text.partition(":")
    if not colon or scheme not in SCHEMES:
        return None
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
        options[key] = read_value(unquote(value))
    return Spec(scheme, name, options)


def read_value(text: str) -> Any:
    """The Python literal that `text` is, or `text` itself."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return text


def text_of(value: Any) -> str:
    """A value as `read_value` reads it."""
    return value if isinstance(value, str) else repr(value)


def _write(value: Any) -> str:
    text = text_of(value)
    if isinstance(value, str) and read_value(value) != value:
        text = repr(value)  # a string that would read as something else, '3'
    return quote(text.replace(", ", ","), safe="()[]{}'\",:./-_")


def path_of(source: str | Path) -> Path | None:
    """The file or folder that a path or spec reads, None where it reads none."""
    spec = parse(source) if isinstance(source, str) else None
    if spec is None:
        return Path(source)
    return Path(spec.name).expanduser() if spec.scheme == "hf" else None


def package_of(spec: Spec) -> str:
    """The package whose code a `python:` spec runs."""
    return spec.name.partition(":")[0]
