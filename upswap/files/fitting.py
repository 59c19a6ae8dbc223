"""Which of a checkpoint's tensors are a model's weights: under which key of the file, and behind which prefix.

Training loops save their weights among other things, and wrappers put their own name before every key. What is taken here is
taken only where it is all of the model's and the only thing that could be meant.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import shlex
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from torch.nn.parameter import is_lazy

from ..errors import SourceError
from ..nn.state_dicts import upsamplers_in
from ..shown import listed, one_line

Tensors = Mapping[str, torch.Tensor]

#: What wrappers inside a model add to a name, anywhere in it: torch.compile, FSDP, activation checkpointing.
_WRAPPERS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})


@dataclasses.dataclass(frozen=True)
class Fit:
    """A way to take the tensors under `key` of a file for a model's.

    `names` gives the file's name for each of the model's, and for those in `added`, which stand among them and the model
    does not have. `removed` is what was taken off the names. `outside` are the file's names that stand elsewhere.
    """

    key: str
    removed: tuple[str, ...]
    names: Mapping[str, str]
    added: tuple[str, ...]
    outside: tuple[str, ...]

    def label(self, others: Iterable[Fit]) -> str:
        """What `--key` says to mean this one and not the others."""
        alone = all(other is self or other.key != self.key for other in others)
        prefix = () if alone else (part.rstrip(".") for part in self.removed[:1])
        return ".".join(filter(None, (self.key, *prefix)))


def choose(parts: Mapping[str, Tensors], own: Tensors, key: str | None, path: str | Path, model: str) -> Fit:
    """The one way to take a file's tensors for those of a model.

    Args:
        parts: the tensors in the file by the key they stand under, `""` for the file itself.
        own: the state dict of the model.
        key: which of them the user means, None for the one that fits. A prefix of names may follow it: `state_dict.teacher`.
        path: the file.
        model: the model's class, for messages.

    Raises:
        SourceError: none fits, and the message says what is missing; or several do, and it lists them.
    """
    asked, prefix = (None, None) if key is None else _asked(parts, key, path)
    looked_at = parts if asked is None else {asked: parts[asked]}
    ways = [way for part, found in looked_at.items() for way in _whole(part, found, own)]
    if prefix is not None:
        ways = [way for way in ways if way.removed[:1] == (prefix,)]
    if not ways:
        raise SourceError(f"{path}{_no_fit(looked_at, own, model, prefix)}")
    odd = {name: found[way.names[name]] for way in ways for found in [parts[way.key]] for name in way.added}
    problems = [f"{name} {problem}" for name, tensor in odd.items() if (problem := no_memory(tensor))]
    if problems:
        raise SourceError(f"{path} does not hold the weights of this {model}: {listed(problems)}")
    first, *others = ways
    if not all(_same(parts[first.key], first, parts[way.key], way) for way in others):
        raise several(path, {way.label(ways): len(way.names) for way in ways}, "weights")
    return first


def several(path: str | Path, found: Mapping[str, int], what: str) -> SourceError:
    """The error for a file with several things that could be meant, by their keys, with the number of their tensors."""
    most = sorted(found.items(), key=lambda item: -item[1])[:10]
    flags = [
        one_line(f"--key {shlex.quote(key)}") for key, _ in most
    ]  # a key is a stranger's text, to be pasted into a shell
    width = max(map(len, flags))
    rows = [f"  {flag:<{width}}  {count} tensors" for flag, (_, count) in zip(flags, most, strict=True)]
    return SourceError(
        f"{path} holds several {what} that could be meant. Choose one:",
        *rows,
        f"In Python: key={json.dumps(most[0][0])}",
    )


def keys_listed(found: Iterable[str]) -> str:
    """The keys of a file, as a message has them; a file that is one thing itself has none."""
    return ", ".join(repr(name) for name in found if name) or "none"


def _asked(parts: Mapping[str, Tensors], key: str, path: str | Path) -> tuple[str, str | None]:
    """The part that a key names, and the prefix of names after it."""
    if key in parts:
        return key, None
    for part in sorted(parts, key=len, reverse=True):
        start = f"{part}." if part else ""
        prefix = key[len(start) :] + "."
        if key.startswith(start) and any(name.startswith(prefix) for name in parts[part]):
            return part, prefix
    has = ", ".join(f"{name!r} ({len(found)} tensors)" for name, found in list(parts.items())[:10] if name)
    raise SourceError(f"{path} has no weights under {key!r}; it has {has or 'them under no key'}")


def _whole(key: str, found: Tensors, own: Tensors) -> list[Fit]:
    """The ways in which all of the model's tensors are among `found`. No name is changed where they fit as they are."""
    for plain, wrappers in _spellings(found):
        counts = _prefixes(plain, own)
        ways = [
            _way(key, prefix, wrappers, plain, own)
            for prefix, count in counts.items()
            if count == len(own) and not any(_difference(found[plain[prefix + name]], own[name]) for name in own)
        ]
        if ways:
            return [way for way in ways if not way.removed] or ways
    return []


def _spellings(found: Iterable[str]) -> Iterator[tuple[dict[str, str], tuple[str, ...]]]:
    """The names as they are, then without the wrappers inside the model: the file's names by those, and what was removed."""
    yield {name: name for name in found}, ()
    plain = {".".join(part for part in name.split(".") if part not in _WRAPPERS): name for name in found}
    gone = {part for name in found for part in name.split(".") if part in _WRAPPERS}
    if gone:
        yield plain, tuple(f"{part}." for part in sorted(gone))


def _prefixes(names: Iterable[str], own: Tensors) -> Counter[str]:
    """The prefixes behind which names of the model stand, and how many of them."""
    found: Counter[str] = Counter()
    longest = max(map(len, own), default=0)
    for name in names:
        at = name.find(".", len(name) - longest - 1) + 1 if len(name) > longest else 0
        if not at and len(name) > longest:
            continue
        while True:
            if name[at:] in own:
                found[name[:at]] += 1
            at = name.find(".", at) + 1
            if not at:
                break
    return found


def _way(key: str, prefix: str, wrappers: tuple[str, ...], plain: Mapping[str, str], own: Tensors) -> Fit:
    names = {name[len(prefix) :]: old for name, old in plain.items() if name.startswith(prefix)}
    outside = tuple(old for name, old in plain.items() if not name.startswith(prefix))
    return Fit(key, (*filter(None, [prefix]), *wrappers), names, tuple(n for n in names if n not in own), outside)


def _same(found: Tensors, way: Fit, others: Tensors, other: Fit) -> bool:
    """Whether two ways give the same tensors."""
    return way.names.keys() == other.names.keys() and all(
        found[old] is others[other.names[name]] or torch.equal(found[old], others[other.names[name]])
        for name, old in way.names.items()
    )


def _no_fit(parts: Mapping[str, Tensors], own: Tensors, model: str, prefix: str | None) -> str:
    """What is to be said where no part fits: how the nearest differs."""
    nearest = (-1, "", "")
    for part, found in parts.items():
        counts = _prefixes(found, own)
        for behind in [prefix] if prefix is not None else [*dict(counts.most_common(1)), ""]:
            nearest = max(nearest, (counts[behind], part, behind), key=lambda one: one[0])
    _, part, behind = nearest
    upsamplers = tuple(f"{path}." for path in upsamplers_in(parts[part]))
    found = {
        name[len(behind) :]: tensor
        for name, tensor in parts[part].items()
        if name.startswith(behind) and not name.startswith(upsamplers)
    }
    where = " ".join(filter(None, [part and f"under {part!r}", behind and f"behind {behind!r}"]))
    return f"{where and f' {where}'} does not hold the weights of this {model}: {differences(own, found)}"


def differences(own: Tensors, found: Tensors) -> str:
    """How the tensors of a file differ from those of a model; empty where those of the file can be copied to the model's."""
    missing = [name for name in own if name not in found]
    unexpected = [name for name in found if name not in own]
    others = [f"{name} {how}" for name in own if name in found and (how := _difference(found[name], own[name]))]
    near = {name: difflib.get_close_matches(name, unexpected, n=1, cutoff=0.8) for name in missing[:5]}
    told = [f"{name} (near it in the file: {near[name][0]})" if near.get(name) else name for name in missing]
    groups = [(f"missing: {listed(told)}", missing), (f"unexpected: {listed(unexpected)}", unexpected)]
    return "; ".join([text for text, names in groups if names] + ([listed(others)] if others else []))


def _difference(found: torch.Tensor, own: torch.Tensor) -> str | None:
    """Why a tensor of a file cannot be copied to that of a model, None where it can."""
    problem = None if is_lazy(own) else no_memory(found, own.layout)
    if problem is None and not is_lazy(own) and found.shape != own.shape:
        return f"is {tuple(found.shape)} in the file and {tuple(own.shape)} in the model"
    return problem


def no_memory(tensor: torch.Tensor, layout: torch.layout = torch.strided) -> str | None:
    """Why a tensor has no values in memory of this layout, None for one that has."""
    if not isinstance(tensor, torch.Tensor):
        return f"is a {type(tensor).__name__}, not a tensor"
    if is_lazy(tensor):
        return "has no shape yet, which a lazy layer gets from its first input"
    if tensor.is_meta:
        return "is on the meta device, where it has no values"
    if tensor.layout is not layout:
        return f"has the layout {tensor.layout}, in the place of {layout}"
    return None
