"""`upswap convert`: patch a model, verify that it computes what it did, save it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .options import model_options, patch_options
from .output import note, progress, say, say_json, stdout

if TYPE_CHECKING:
    from torch import nn

    from ...plan.plan import Plan


@click.command(short_help="Swap a model's feature upsampling, verify, and save it.")
@model_options
@click.option(
    "-o", "--output", metavar="OUT", help="What to write: .pt, .safetensors, or a folder.  [default: SOURCE.upswap.pt]"
)
@click.option("--force", is_flag=True, help="Replace OUT if it exists.")
@click.option("--dry-run", is_flag=True, help="Do everything but save.")
def convert(output: str | None, force: bool, dry_run: bool, **options: Any) -> None:
    """Swap the feature upsampling of SOURCE, verify that it still computes the same, and save it.

    SOURCE is a file (.pt, .safetensors) or a spec: smp:unet?encoder_name=resnet34&classes=3, timm:NAME,
    torchvision:NAME, hf:FOLDER (a model folder of transformers or SMP), python:package.module:factory.
    """
    from ... import api

    done = api.convert(
        options["source"],
        output,
        input_size=options["input_size"],
        trust=options["trust"],
        weights=options["weights"],
        key=options["key"],
        force=force,
        dry_run=dry_run,
        progress=progress,
        **patch_options(options, given_only=True),
    )
    plan, report = done.plan, done.report
    result = {
        "source": options["source"],
        "model": plan.model_class,
        "taken": done.taken,
        "saved": None if done.path is None else str(done.path),
        "parameters": _count(done.model) - done.parameters_added,
        "parameters_added": done.parameters_added,
        "max_abs_diff": report.max_abs_diff,
        "max_rel_diff": report.max_rel_diff,
        "verified_at": list(dict.fromkeys(row.inputs for row in report.rows)),
        "load": None if done.path is None else _load_line(done.path, options["trust"], plan),
        "plan": plan.to_dict(),
    }
    if options["as_json"]:
        say_json(result)
    else:
        _print(result, plan)


def _print(result: Mapping[str, Any], plan: Plan) -> None:
    from rich.filesize import decimal

    from ...console import words
    from ...nn.registry import is_exact
    from ...plan.table import sites_table

    console = stdout()
    console.print(words((plan.model_class.rpartition(".")[2], "bold"), f": {plan.summary}"))
    console.print()
    console.print(sites_table(plan.sites, console.width))
    added, before = result["parameters_added"], result["parameters"]
    share = f" ({added / before:+.2%} of {before:,})" if before else ""
    console.print()
    if result["taken"] is not None:
        console.print(f"taken              {result['taken']}", soft_wrap=True)
    console.print(f"parameters added   {added:,}{share}")
    difference = f"{result['max_rel_diff']:.1e} of the largest output, at inputs {'; '.join(result['verified_at'])}"
    why = "" if is_exact(plan) else f" ({plan.options.upsampler} with these options is not exact at step 0)"
    console.print(f"step-0 difference  {difference}{why}")
    if result["saved"] is None:
        console.print("saved              nothing (dry run)")
        return
    size = _bytes(Path(result["saved"]))
    console.print(f"saved              {result['saved']} ({decimal(size)})\n")
    console.print("In Python:\n")
    # As it is to be typed: no wrapping, no markup.
    say(f"    import upswap\n    {result['load']}")
    for hint in plan.hints:
        note(hint)


def _bytes(path: Path) -> int:
    return sum(file.stat().st_size for file in (path.iterdir() if path.is_dir() else [path]))


def _load_line(path: Path, trust: tuple[str, ...], plan: Plan) -> str:
    from ...architectures.spec import package_of, parse_stored
    from ...files.checkpoint import says_how_it_is_built, spec_in

    spec = parse_stored(spec_in(path) or "")
    if spec is not None and spec.scheme == "python":
        trust = (*trust, package_of(spec).partition(".")[0])
    # To be pasted: texts are written as JSON, which Python reads alike, and a class is only named where it is a name.
    arguments = [json.dumps(str(path), ensure_ascii=False)]
    if not says_how_it_is_built(path, trust):
        name = plan.model_class.rpartition(".")[2]
        arguments.append(f"{name if name.isidentifier() else 'Original'}(...)")
    if trust:
        arguments.append(f"trust={json.dumps(list(dict.fromkeys(trust)))}")
    return f"model = upswap.load({', '.join(arguments)})"


def _count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
