"""A YAML of ultralytics with upsamplers as rows, for those who build their models from YAML."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torchvision
import yaml
from torch import nn
from ultralytics import YOLO
from ultralytics.nn import tasks

from .. import api
from ..errors import NothingToSwapError, OptionError, SourceError
from ..files import atomic
from ..nn.configs import DySampleConfig
from ..plan.plan import Plan
from ..plan.site import Site
from ..probe.inputs.infer import example_inputs_for
from ..surgery.checking.verification import Report, verify
from ..surgery.planning import nothing_to_swap
from .ultralytics import register

#: What `yaml_model_load` adds to what is in the file.
_ADDED = ("scale", "yaml_file")


@dataclasses.dataclass(frozen=True)
class Rows:
    """What `write` did: the indices of the new rows, how the model compared, and what is to be known."""

    path: Path
    rows: tuple[int, ...]
    report: Report
    notes: tuple[str, ...]


def write(
    source: str,
    output: Path,
    *,
    input_size: tuple[int, int] | None = None,
    force: bool = False,
    **options: Any,
) -> Rows:
    """Write the YAML of a model with DySample in the rows of its `nn.Upsample`, once it is seen to compute the same.

    Args:
        source: a YAML file, or the name of one that ultralytics has, such as `yolov8n.yaml`.
        output: the file to write.
        input_size: (height, width) in pixels of the example image.
        force: whether a file that exists may be replaced.
        options: what `upswap.patch` takes; the upsampler is dysample.

    Raises:
        SourceError: ultralytics does not build a model of `source`, or would run code to.
        NothingToSwapError: there is no row to replace.
        OptionError: the options are of something that a row cannot have.
        VerificationError: the model with the rows does not compute what the original does; nothing is written.
        SaveError: the file exists, or cannot be written.
    """
    if not source.endswith((".yaml", ".yml")):
        raise SourceError(f"{source} is no YAML. Name one, such as yolov8n.yaml; for a .pt: upswap convert {source}")
    atomic.check(output, force=force)
    register()
    model, config = _built(source)
    plan = api.inspect(model, None if input_size is None else example_inputs_for(model, input_size), **options)
    if not plan.swapped:
        raise nothing_to_swap(plan)
    rows, notes = _with_rows(config, plan)
    built = type(model)({**config, "scale": tasks.guess_model_scale(source)}, verbose=False).eval()
    built.load(model, verbose=False)
    report = verify(model, built, None if input_size is None else example_inputs_for(model, input_size))
    report.check(plan)
    if tasks.guess_model_scale(output) != tasks.guess_model_scale(source):
        notes.append(
            f"ultralytics reads the scale of a model off the file's name, and {output.name} does not have that of {source}"
        )
    atomic.write_text(output, _text(source, config), force=force)
    return Rows(output, rows, report, tuple(notes))


def _built(source: str) -> tuple[Any, dict[str, Any]]:
    """The model that a YAML builds, and what is in the YAML."""
    try:
        config = tasks.yaml_model_load(source)
        code = _code_in(config)
        model = None if code else YOLO(source).model.eval()
    except Exception as error:  # whatever ultralytics raises for a file that it does not find, or cannot build
        raise SourceError(f"ultralytics does not build a model of {source}: {type(error).__name__}: {error}") from error
    if code:
        raise SourceError(f"{source} is refused, because ultralytics would run what it names: {', '.join(code)}")
    return model, {key: value for key, value in config.items() if key not in _ADDED}


def _code_in(config: Mapping[str, Any]) -> list[str]:
    """What building the model would run besides layers: ultralytics evaluates activations, and calls whatever a row names."""
    activation = config.get("activation")
    found = [] if activation is None or re.fullmatch(r"(torch\.)?nn\.\w+\([\w=., -]*\)", activation) else [activation]
    for _, _, name, _ in config["backbone"] + config["head"]:
        if name.startswith(("nn.", "torchvision.ops.")):
            layer = getattr(nn if name.startswith("nn.") else torchvision.ops, name.rpartition(".")[2], None)
        else:
            layer = vars(tasks).get(name)
        if not (isinstance(layer, type) and issubclass(layer, nn.Module)):
            found.append(name)
    return found


def _with_rows(config: dict[str, Any], plan: Plan) -> tuple[tuple[int, ...], list[str]]:
    """Replace rows in `config` by those of `plan`; their indices, and what cannot be one."""
    if plan.options.upsampler != "dysample" or plan.options.config.get("cascade"):
        raise OptionError("a row of a YAML can be a dysample, and no cascade; upswap.patch(model) takes all upsamplers")
    backbone, head = config["backbone"], config["head"]
    done, notes = [], []
    for site in plan.swapped:
        match = re.fullmatch(r"model\.(\d+)", site.owner) if site.op == "module" else None
        if match is None:
            notes.append(f"{site.name} is inside a row, and stays as it is; upswap.patch(model) swaps it")
            continue
        index = int(match[1])
        rows, at = (backbone, index) if index < len(backbone) else (head, index - len(backbone))
        rows[at] = [rows[at][0], rows[at][1], "DySample", _arguments(rows[at], site)]
        done.append(index)
    if not done:
        raise NothingToSwapError("no row of this YAML is an nn.Upsample to be swapped", *notes)
    return tuple(done), notes


def _arguments(row: list[Any], site: Site) -> list[Any]:
    # parse_model puts the channels of the row before in the place of its variable's name, at any scale of the model.
    channels = "c2" if row[0] == -1 else site.channels
    height, width = (int(side) if float(side).is_integer() else side for side in site.scale)
    arguments: list[Any] = [channels, height if height == width else [height, width], site.mode]
    defaults = dataclasses.asdict(DySampleConfig())
    options = {name: value for name, value in site.config.items() if value != defaults[name]}
    if site.align_corners:
        options["align_corners"] = True
    return [*arguments, options] if options else arguments


def _text(source: str, config: Mapping[str, Any]) -> str:
    lines = [
        f"# {Path(source).name} with learned upsampling, by `upswap yaml`. In Python, before it is built:",
        "#   import upswap.integrations.ultralytics as u; u.register()",
        "",
    ]
    for key, value in config.items():
        if key not in ("backbone", "head"):
            lines.append(f"{key}: {_flow(value)}")
    index = 0
    for part in ("backbone", "head"):
        lines += ["", f"{part}:"]
        for row in config[part]:
            lines.append(f"  - {_flow(row)} # {index}")
            index += 1
    return "\n".join(lines) + "\n"


def _flow(value: Any) -> str:
    text = yaml.safe_dump(value, default_flow_style=True, width=float("inf"), sort_keys=False)
    return str(text).removesuffix("...\n").strip()
