"""What a file that is made from another is called, where the user does not say."""

from __future__ import annotations

import os
from pathlib import Path

from ..architectures.spec import parse


def converted_name(source: str) -> Path:
    """`unet.pt` gives `unet.upswap.pt` beside it, `smp:unet?...` gives `unet.upswap.pt` here, a folder gives a folder.

    >>> converted_name("models/unet.pt").as_posix(), converted_name("smp:Unet?classes=3").as_posix()
    ('models/unet.upswap.pt', 'unet.upswap.pt')
    >>> converted_name("hf:models/segformer").as_posix(), converted_name("python:nets.unet:make").as_posix()
    ('models/segformer-upswap', 'make.upswap.pt')
    """
    spec = parse(source)
    if spec is not None and spec.scheme != "hf":
        name = spec.name.rpartition(":")[2].lower().replace("/", "_")
        return Path(f"{name}.upswap.pt")
    path = _named(Path(source if spec is None else spec.name))
    if spec is not None or os.path.isdir(path):
        return path.with_name(f"{path.name}-upswap")
    return path.with_name(f"{path.stem}.upswap{_suffix(path)}")


def exported_name(source: str, suffix: str) -> Path:
    """The file of a runtime: beside a file or a folder, here for an architecture.

    >>> exported_name("models/unet.upswap.pt", ".onnx").as_posix(), exported_name("smp:Unet?classes=3", ".xml").as_posix()
    ('models/unet.upswap.onnx', 'unet.xml')
    >>> exported_name("hf:models/segformer.v2", ".ncnn.param").as_posix()
    'models/segformer.v2.ncnn.param'
    """
    spec = parse(source)
    if spec is not None and spec.scheme != "hf":
        return Path(f"{converted_name(source).stem.removesuffix('.upswap')}{suffix}")
    path = _named(Path(source if spec is None else spec.name))
    folder = spec is not None or os.path.isdir(path)
    return path.with_name(f"{path.name if folder else path.stem}{suffix}")


def reverted_name(patched: Path) -> Path:
    """Where the original goes.

    >>> reverted_name(Path("a/unet.upswap.pt")).as_posix(), reverted_name(Path("a/folder")).as_posix()
    ('a/unet.reverted.pt', 'a/folder-reverted')
    >>> reverted_name(Path("last.ckpt")).as_posix()
    'last.reverted.pt'
    """
    patched = _named(patched)
    if os.path.isdir(patched) or not patched.suffix:
        return patched.with_name(f"{patched.name}-reverted")
    return patched.with_name(f"{patched.stem.removesuffix('.upswap')}.reverted{_suffix(patched)}")


def _suffix(path: Path) -> str:
    """The suffix of the same form of file; training loops have others (`last.ckpt`)."""
    return path.suffix if path.suffix in (".pt", ".pth", ".safetensors") else ".pt"


def _named(path: Path) -> Path:
    """The path by a name that others can be made from: not `.`, `..` or `~`."""
    path = path.expanduser()
    return path if path.name not in ("", "..") else path.resolve()
