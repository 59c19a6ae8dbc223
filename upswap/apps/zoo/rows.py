"""What a run over many models asks for and what it writes down: `Task` and `Row`, plain data.

Nothing here imports torch.
"""

from __future__ import annotations

import dataclasses
import functools
import types
import typing
from collections.abc import Mapping
from typing import Any

#: What can become of a model. The first two are well, the others say why in `error`.
STATUSES = ("converted", "nothing to swap", "cannot be built", "failed")

#: What can be written for a model, and how its file ends.
FORMATS = {"pt": ".pt", "safetensors": ".safetensors", "plan": ".plan.json"}


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is done with every model of a run; a journal belongs to one of these.

    `options` are keyword arguments of `upswap.patch`. `output` is one of `FORMATS`, None where no model is written.
    `input_size` is (height, width) in pixels. `timeout` is in seconds, `memory` in bytes, each for one model.
    `build_only` does nothing with a model but build it, to time that.
    """

    options: Mapping[str, Any]
    output: str | None = "pt"
    check: bool = False
    build_only: bool = False
    input_size: tuple[int, int] | None = None
    trust: tuple[str, ...] = ()
    timeout: float = 600.0
    memory: int | None = None
    threads: int = 1

    def identity(self) -> dict[str, Any]:
        """The settings that rows depend on; the limits and the threads are not among them."""
        data = dataclasses.asdict(self)
        return {key: data[key] for key in ("options", "output", "check", "input_size", "trust")}


@dataclasses.dataclass(frozen=True)
class Task:
    """One model of a run: where it comes from, the file that is written for it, and the folder that paths start from."""

    source: str
    target: str
    settings: Settings
    home: str

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts and lists."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Task:
        """The task that `to_dict` described."""
        settings = dict(data["settings"])
        size = settings["input_size"]
        settings["input_size"] = None if size is None else (size[0], size[1])
        settings["trust"] = tuple(settings["trust"])
        return cls(data["source"], data["target"], Settings(**settings), data["home"])


@dataclasses.dataclass
class Row:
    """What became of one model. Sizes are counted in bytes, times in seconds, FLOPs at the inputs `flops_at`.

    `seconds` is by phase, and `max_rel_diff` the largest difference at step 0 relative to its output. `checks` has a
    message for each check that was made, empty where it holds. `details` has the sites as the table of `inspect` does.
    """

    source: str
    status: str = "failed"
    error: str = ""
    model: str = ""
    output: str | None = None
    sites: int = 0
    swapped: int = 0
    kept: dict[str, int] = dataclasses.field(default_factory=dict)
    routes: dict[str, int] = dataclasses.field(default_factory=dict)
    parameters: int = 0
    parameters_after: int = 0
    flops: int | None = None
    flops_after: int | None = None
    flops_at: str = ""
    max_rel_diff: float | None = None
    checks: dict[str, str] = dataclasses.field(default_factory=dict)
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)
    peak_memory: int = 0
    versions: dict[str, str] = dataclasses.field(default_factory=dict)
    worker: str = ""
    details: list[dict[str, Any]] = dataclasses.field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether the model was dealt with and every check holds."""
        return self.status in STATUSES[:2] and not any(self.checks.values())

    @property
    def total_seconds(self) -> float:
        """The seconds of all phases."""
        return sum(self.seconds.values())

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts and lists."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Row:
        """The row that `to_dict` described; entries of other versions are left out, and `ValueError` is raised for no row."""
        kinds = _kinds()
        found = {key: value for key, value in data.items() if key in kinds}
        if "source" not in found:
            raise ValueError("there is no source")
        for key, value in found.items():
            if not _has_kind(value, kinds[key]):
                raise ValueError(f"{key} is {value!r:.60}")
        return cls(**found)


@functools.cache
def _kinds() -> dict[str, Any]:
    return typing.get_type_hints(Row)


def _has_kind(value: Any, kind: Any) -> bool:
    """Whether a value of JSON is of the type of a field: a plain one, a list or dict of some, or one of several."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is types.UnionType:
        return any(_has_kind(value, each) for each in arguments)
    if origin is list:
        return isinstance(value, list) and all(_has_kind(item, arguments[0]) for item in value)
    if origin is dict:
        return isinstance(value, dict) and all(_has_kind(item, arguments[1]) for item in value.values())
    return kind is Any or type(value) is kind or (kind is float and type(value) is int)
